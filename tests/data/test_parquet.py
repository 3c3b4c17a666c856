import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torsh_data import ShardedDataset, StreamLoader

columns = {
    "i": (pa.int16(), st.integers(-(2**15), 2**15 - 1)),
    "f": (pa.float64(), st.floats(allow_nan=False)),
    "b": (pa.bool_(), st.booleans()),
    "größe": (pa.string(), st.text(max_size=10)),
    "x": (pa.binary(), st.binary(max_size=10)),
    "l": (pa.list_(pa.int64()), st.lists(st.integers(-9, 9), max_size=3)),
    "d": (pa.dictionary(pa.int8(), pa.string()), st.sampled_from(["u", "v"])),
}


@st.composite
def tables(draw):
    rows = draw(st.integers(0, 40))
    made = {}
    for name, (kind, values) in columns.items():
        made[name] = pa.array(
            draw(st.lists(st.none() | values, min_size=rows, max_size=rows)), kind
        )
    return pa.table(made)


@settings(deadline=None, max_examples=20)
@given(tables(), tables(), st.integers(1, 20), st.sampled_from([None, "lz4", "zstd"]))
def test_rows_are_those_of_pyarrow(tmp_path_factory, first, second, rows, compression):
    if not len(first) + len(second):
        return
    folder = tmp_path_factory.mktemp("tables")
    expected = first.to_pylist() + second.to_pylist()
    for name, table in (("a", first), ("b", second)):
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=rows)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(str(folder / "c.arrow"), first.schema, options=options) as writer:
        both = pa.concat_tables([first, second]).unify_dictionaries()
        writer.write_table(both, max_chunksize=rows)
    parquet = [folder / "a.parquet", folder / "b.parquet"]
    for data in (
        ShardedDataset(parquet),
        ShardedDataset(parquet, cache_dir=folder / "cache"),
        ShardedDataset(parquet, cache_dir=folder / "cache"),
        ShardedDataset(folder / "c.arrow"),
    ):
        assert list(data) == expected
        ids = np.random.default_rng(0).permutation(len(expected))
        assert data.__getitems__(ids) == [expected[n] for n in ids]


def test_row_groups_are_decoded_once_per_node_and_lie_in_files(tmp_path, monkeypatch):
    table = pa.table({"n": np.arange(5000), "t": [f"{n}" for n in range(5000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    decoded = []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, number, **k: (decoded.append(number), real(self, number, **k))[1],
    )
    cache = tmp_path / "cache"
    for _ in range(2):
        data = ShardedDataset(tmp_path / "a.parquet", cache_dir=cache)
        for n in np.random.default_rng(0).integers(5000, size=300).tolist():
            assert data[n] == {"n": n, "t": str(n)}
        assert data._decoded_bytes == 0
    assert sorted(decoded) == list(range(10))
    loader = StreamLoader(pickle.loads(pickle.dumps(data)), 100, num_workers=1)
    assert sorted(n for b in loader for n in b["n"].tolist()) == list(range(5000))


def test_a_file_that_changed_is_decoded_anew(tmp_path):
    for value in (1, 2):
        pq.write_table(pa.table({"n": [value]}), tmp_path / "a.parquet")
        assert ShardedDataset(tmp_path / "a.parquet", cache_dir=tmp_path / "c")[0] == {"n": value}


def test_the_limit_of_the_cache_is_kept(tmp_path):
    table = pa.table({"n": np.arange(20_000)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    cache = tmp_path / "cache"
    data = ShardedDataset(tmp_path / "a.parquet", cache_dir=cache, cache_bytes="40kB")
    for n in range(0, 20_000, 100):
        assert data[n] == {"n": n}
        assert sum(p.stat().st_size for p in cache.glob("*.part")) <= 40_000


@pytest.mark.parametrize("cached", [False, True])
def test_damage_names_the_file(tmp_path, cached):
    table = pa.table({"t": [f"{n}" * 20 for n in range(2000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=500, compression="zstd")
    content = (tmp_path / "a.parquet").read_bytes()
    options = {"cache_dir": tmp_path / "cache"} if cached else {}
    (tmp_path / "a.parquet").write_bytes(content[:-10])
    with pytest.raises(RuntimeError, match=r"a.parquet is not a readable Parquet file"):
        ShardedDataset(tmp_path / "a.parquet", **options)
    changed = bytearray(content)
    changed[40:200] = bytes(160)
    (tmp_path / "a.parquet").write_bytes(changed)
    data = ShardedDataset(tmp_path / "a.parquet", **options)
    with pytest.raises(RuntimeError, match=r"a.parquet: row group 0 is damaged"):
        data[0]
    assert data[1999] == {"t": "1999" * 20}


def test_threads_share_a_data_set(tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from torsh_data import _dataset as module

    monkeypatch.setattr(module, "_DECODED_BYTES", 5000)
    table = pa.table({"n": np.arange(5000)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    data = ShardedDataset(tmp_path / "a.parquet")
    orders = [np.random.default_rng(k).permutation(5000)[:500] for k in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ids: [data[int(n)]["n"] for n in ids], orders))
    assert found == [order.tolist() for order in orders]
    assert data._decoded_bytes == sum(b.in_memory for b in data._open_blocks.values()) <= 5000
