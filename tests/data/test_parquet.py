import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
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
        assert plain(data) == expected
        ids = np.random.default_rng(0).permutation(len(expected))
        assert plain(data.__getitems__(ids)) == [expected[n] for n in ids]


def plain(samples):
    return [
        {name: v.tolist() if isinstance(v, torch.Tensor) else v for name, v in sample.items()}
        for sample in samples
    ]


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


def compressed_arrow(path, compression="lz4"):
    """Ten blocks of 38 kB in which each row says what it is, behind an empty one."""
    table = pa.table(
        {
            "n": np.arange(5000),
            "t": [f"{n:060}" for n in range(5000)],
            "d": pa.array([f"k{n % 7}" for n in range(5000)]).dictionary_encode(),
        }
    )
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(str(path), table.schema, options=options) as writer:
        writer.write_batch(table.to_batches()[0].slice(0, 0))
        writer.write_table(table, max_chunksize=500)
    return [{"n": n, "t": f"{n:060}", "d": f"k{n % 7}"} for n in range(5000)]


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_blocks_of_compressed_arrow_files_are_decoded_once_per_node(tmp_path, compression):
    expected = compressed_arrow(tmp_path / "a.arrow", compression)
    plain = ShardedDataset(tmp_path / "a.arrow")
    assert list(plain) == expected
    assert plain._decoded_bytes > 10 * 35_000
    cache = tmp_path / "cache"
    for turn in range(2):
        data = ShardedDataset(tmp_path / "a.arrow", cache_dir=cache)
        before = {path: path.stat().st_ino for path in cache.glob("*.part")}
        assert len(before) == 10 * turn
        assert data.__getitems__(range(0, 5000, 3)) == expected[::3]
        assert data._decoded_bytes == 0
        after = {path: path.stat().st_ino for path in cache.glob("*.part")}
        assert len(after) == 10
        assert before.items() <= after.items()  # not written again
    loader = StreamLoader(pickle.loads(pickle.dumps(data)), 100, num_workers=1)
    assert sorted(n for b in loader for n in b["n"].tolist()) == list(range(5000))


def test_arrow_files_that_are_not_compressed_need_no_cache(tmp_path):
    expected = compressed_arrow(tmp_path / "a.arrow", None)
    data = ShardedDataset(tmp_path / "a.arrow", cache_dir=tmp_path / "cache")
    assert list(data) == expected
    assert data._decoded_bytes == 0
    assert not list((tmp_path / "cache").glob("*.part"))


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


def two_columns(path, rows=4000, group=500):
    """Numbers beside texts that take a hundred times as much."""
    table = pa.table({"n": np.arange(rows), "a.b": [f"{n:0800}" for n in range(rows)]})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=group)
    else:
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.ipc.new_file(str(path), table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=group)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_only_the_chosen_columns_are_decoded_and_kept(tmp_path, name):
    path = two_columns(tmp_path / name)
    data = ShardedDataset(path, columns=["n"])
    assert data.__getitems__(range(0, 4000, 7)) == [{"n": n} for n in range(0, 4000, 7)]
    assert data._decoded_bytes <= 4000 * 9
    cache = tmp_path / "cache"
    for columns in (["n"], ["a.b"], ["a.b", "n"], None):
        kept = ShardedDataset(path, columns=columns, cache_dir=cache)
        expected = {"n": 3999, "a.b": f"{3999:0800}"}
        assert kept[3999] == {c: expected[c] for c in columns or ["n", "a.b"]}
    sizes = sorted(piece.stat().st_size for piece in cache.glob("*.part"))
    assert len(sizes) == 3  # both columns are one piece, in whichever order
    assert sizes[0] < 10_000 < 400_000 < sizes[1]
    if name == "a.parquet":
        assert data.nbytes < 4000 * 20 < ShardedDataset(path).nbytes


def test_row_groups_are_prepared_before_they_are_read(tmp_path):
    path = two_columns(tmp_path / "a.parquet")
    cache = tmp_path / "cache"
    data = ShardedDataset(path, columns=["n"], cache_dir=cache)
    data._prepare(2)
    (piece,) = cache.glob("*.part")
    before = piece.stat().st_ino
    assert data[1000] == {"n": 1000}
    assert [p.stat().st_ino for p in cache.glob("*.part")] == [before]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_the_default_window_is_what_a_process_keeps_decoded(tmp_path, name, monkeypatch):
    from torsh_data import _dataset as module

    path = two_columns(tmp_path / name, 20_000, 100)
    monkeypatch.setattr(module, "_DECODED_BYTES", 4_000_000)  # a quarter
    data = ShardedDataset(path)
    loader = StreamLoader(data, 50)
    window = loader.state_dict()["window"]
    assert 1800 < window < 2600
    sizes = []
    for _ in loader:
        sizes.append(len(data._open_blocks))
    opened = count_opened(data, loader)
    assert opened < 2 * 200
    with pytest.warns(UserWarning, match=rf"again and again; .* cache_dir=.* window={window}"):
        StreamLoader(data, 50, window=8000)
    cached = ShardedDataset(path, cache_dir=tmp_path / "cache")
    assert StreamLoader(cached, 50).state_dict()["window"] == 20_000


def count_opened(data, loader):
    opened = []
    for shard in data._shards:
        real = shard.open
        shard.open = lambda *a, real=real: (opened.append(a), real(*a))[1]
    data._let_go()
    for _ in loader:
        pass
    return len(opened)


def test_compressed_shards_have_a_window_that_fits_as_well(tmp_path, monkeypatch):
    from torsh_data import _dataset as module
    from torsh_data import write_shards

    rows = ({"n": n, "t": f"{n:0800}"} for n in range(20_000))
    write_shards(rows, tmp_path / "d", block_bytes="80kB", compression="lz4")
    data = ShardedDataset(tmp_path / "d")
    assert StreamLoader(data, 50).state_dict()["window"] == 20_000
    monkeypatch.setattr(module, "_DECODED_BYTES", 4_000_000)
    assert 1800 < StreamLoader(data, 50).state_dict()["window"] < 2600
    with pytest.warns(UserWarning, match="without compression="):
        StreamLoader(data, 50, window=8000)


def test_a_window_of_few_blocks_is_said_to_mix_badly(tmp_path):
    path = two_columns(tmp_path / "a.parquet", 20_000, 5000)
    data = ShardedDataset(path)
    with pytest.warns(
        UserWarning, match=r"1\.0 blocks of 5000 rows.*a batch of 256 is worth about"
    ):
        StreamLoader(data, 256, window=5000)
    with pytest.warns(UserWarning, match=r"worth about 4; .*torsh-data convert"):
        StreamLoader(data, 256, window=10_000)  # sorted data would be mixed well
    StreamLoader(data, 256)  # uniform: no warning


def test_mapped_record_batches_are_cut_and_read_right(tmp_path):
    table = pa.table({name: pa.array([None] * 0, kind) for name, (kind, _) in columns.items()})
    rows = {
        "i": [n if n % 5 else None for n in range(5001)],
        "f": [n / 2 for n in range(5001)],
        "b": [n % 3 == 0 for n in range(5001)],
        "größe": [f"ü{n}" for n in range(5001)],
        "x": [b"x" * (n % 4) if n % 7 else None for n in range(5001)],
        "l": [[n] * (n % 3) for n in range(5001)],
        "d": ["uv"[n % 2] for n in range(5001)],
    }
    table = pa.table(rows, schema=table.schema)
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=5001)
    data = ShardedDataset(tmp_path / "a.arrow")
    assert data._shards[0].block_rows == [1000, 1000, 1000, 1000, 1001]
    expected = table.to_pylist()
    assert plain(data) == expected
    ids = np.random.default_rng(0).permutation(5001)
    assert plain(data.__getitems__(ids)) == [expected[n] for n in ids.tolist()]
    assert data._decoded_bytes == 0


def contents(kind, first, compression=None):
    """A file of 1,000 numbers from `first` on; always of the same size."""
    import io
    import json
    import tarfile

    values = range(first, first + 1000)
    file = io.BytesIO()
    if kind == "parquet":
        pq.write_table(pa.table({"n": list(values)}), file, compression=None, use_dictionary=False)
    elif kind == "arrow":
        with pa.ipc.new_file(file, pa.schema([("n", pa.int64())])) as writer:
            writer.write_table(pa.table({"n": list(values)}))
    elif kind == "jsonl":
        file.write("".join(json.dumps({"n": n}) + "\n" for n in values).encode())
    else:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for k, n in enumerate(values):
                info = tarfile.TarInfo(f"{k:04}.cls")
                info.size = 4
                tar.addfile(info, io.BytesIO(f"{n:04}".encode()))
    return file.getvalue()


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl", "tar"])
def test_other_contents_of_the_same_size_have_another_fingerprint(tmp_path, kind):
    import fsspec

    memory = fsspec.filesystem("memory")
    prints = set()
    for first in (1000, 5000):
        content = contents(kind, first)
        (tmp_path / f"a.{kind}").write_bytes(content)
        memory.pipe(f"/{kind}{first}/a.{kind}", content)
        local = ShardedDataset(tmp_path / f"a.{kind}")
        cache = tmp_path / "cache"
        for _ in range(2):  # fetched, then from the plan in the cache
            url = f"memory://{kind}{first}/a.{kind}"
            remote = ShardedDataset(url, cache_dir=cache)
            assert remote.fingerprint == local.fingerprint
            assert remote.block_rows == local.block_rows
        prints.add(local.fingerprint)
        size = len(content)
    assert len(content) == size
    assert len(prints) == 2
