import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torsh_data import ShardedDataset
from torsh_data._files import LocalFile
from torsh_data._plan import Plan, sample_bytes
from torsh_data._store import Store

KB = 1 << 10


@pytest.mark.parametrize("size", [0, 1, 64 * KB, 192 * KB, 192 * KB + 1, 1000 * KB])
def test_a_changed_byte_at_the_start_the_middle_or_the_end_is_noticed(size):
    content = bytearray(size)
    before = sample_bytes(pa.py_buffer(bytes(content)))
    for place in {0, size // 2, size - 1} if size else set():
        content[place] = 1
        assert sample_bytes(pa.py_buffer(bytes(content))) != before
        content[place] = 0
    assert sample_bytes(pa.py_buffer(bytes(content))) == before


def test_files_up_to_three_samples_are_hashed_whole_and_larger_ones_are_not():
    content = bytearray(192 * KB)
    before = sample_bytes(pa.py_buffer(bytes(content)))
    content[80 * KB] = 1
    assert sample_bytes(pa.py_buffer(bytes(content))) != before
    larger = bytearray(1000 * KB)
    before = sample_bytes(pa.py_buffer(bytes(larger)))
    larger[200 * KB] = 1
    assert sample_bytes(pa.py_buffer(bytes(larger))) == before


def test_a_plan_comes_back_from_the_store_as_it_was(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"x")
    schema = pa.schema([pa.field("größe", pa.int8(), metadata={"a": "b"})], {"c": "d"})
    looks = []

    def look():
        looks.append(1)
        return Plan.make(schema, "digest", rows=[3, 4], keys=np.frombuffer(b"ab", np.uint8))

    for _ in range(3):
        file, store = LocalFile(tmp_path / "a.parquet"), Store(tmp_path / "cache", 10**6)
        plan = Plan.of(file, store, "kind", look)
        assert plan.schema.equals(schema, check_metadata=True)
        assert plan.digest == "digest"
        assert {name: (a.dtype, a.tolist()) for name, a in plan.arrays.items()} == {
            "rows": (np.int64, [3, 4]),
            "keys": (np.uint8, list(b"ab")),
        }
    assert len(looks) == 1
    Plan.of(file, store, "another kind", look)
    Plan.of(file, None, "kind", look)
    assert len(looks) == 3


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_file_is_looked_at_once_with_a_cache(tmp_path, kind, monkeypatch):
    from torsh_data import _sources

    table = pa.table({"n": np.arange(5000), "t": [f"{n}" for n in range(5000)]})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=500)
    else:  # to know what is in it takes decoding all of it
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(str(path), table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=500)
    reader = _sources._READERS[f".{kind}"]
    looks = []
    real = reader._look
    monkeypatch.setattr(reader, "_look", lambda self: (looks.append(1), real(self))[1])
    plain = ShardedDataset(path)
    first, second = (ShardedDataset(path, cache_dir=tmp_path / "cache") for _ in range(2))
    assert len(looks) == 2
    assert plain.fingerprint == first.fingerprint == second.fingerprint
    assert plain.block_rows == second.block_rows == 500
    assert list(second) == list(plain) == table.to_pylist()
