import gzip
import json
import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torsh_data import ShardedDataset, StreamLoader
from torsh_data import _jsonl_shards as module

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
rows = st.lists(st.dictionaries(st.sampled_from("abcü"), values, min_size=1), min_size=1)


@settings(deadline=None, max_examples=60)
@given(rows, st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"]), st.booleans())
def test_rows_are_those_of_json(tmp_path_factory, found, ascii_only, end, closed):
    folder = tmp_path_factory.mktemp("rows")
    text = end.join(json.dumps(row, ensure_ascii=ascii_only) for row in found)
    (folder / "a.jsonl").write_bytes((text + end * closed).encode())
    data = ShardedDataset(folder)
    names = list(dict.fromkeys(name for row in found for name in row))
    assert data.columns == names
    expected = [{name: row.get(name) for name in names} for row in found]
    assert list(data) == expected
    ids = np.random.default_rng(0).permutation(len(found))
    assert data.__getitems__(ids) == [expected[n] for n in ids]


def write(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_columns_become_tensors_or_lists_by_their_type(tmp_path):
    found = [{"i": n, "f": n / 2, "b": n > 1, "s": f"{n}", "l": [n] * n} for n in range(4)]
    batch = ShardedDataset(write(tmp_path / "a.jsonl", found)).read_batch([2, 0])
    assert batch["i"].dtype == torch.int64
    assert batch["i"].tolist() == [2, 0]
    assert batch["f"].dtype == torch.float64
    assert batch["b"].tolist() == [True, False]
    assert (batch["s"], batch["l"]) == (["2", "0"], [[2, 2], []])


def test_one_fraction_anywhere_makes_a_column_of_numbers_one_of_floats(tmp_path):
    data = ShardedDataset(write(tmp_path / "a.jsonl", [{"x": 1}, {"x": 0.5}]))
    assert data.read_batch([0, 1])["x"].tolist() == [1.0, 0.5]
    found = [{"x": n} for n in range(1500)] + [{"x": 0.5}]
    data = ShardedDataset(write(tmp_path / "a.jsonl", found))
    assert data[1500] == {"x": 0.5}
    assert data.read_batch([1, 2])["x"].dtype == torch.float64  # whichever lines they are
    assert data.read_batch([1, 1500])["x"].tolist() == [1.0, 0.5]
    inner = [{"x": n, "o": {"x": 0.5}, "t": '"x": 0.5'} for n in range(1500)]
    data = ShardedDataset(write(tmp_path / "a.jsonl", inner))
    assert data.read_batch([0, 1500 - 1])["x"].dtype == torch.int64


@pytest.mark.parametrize("name", ["a.b (c)", "größe", 'a"b', "*"])
@pytest.mark.parametrize("number", ["1e3", "-0.5", "NaN", "-Infinity"])
def test_a_late_fraction_is_found_under_any_name(tmp_path, name, number):
    line = json.dumps({name: 1}) + "\n"
    late = json.dumps({name: 1}, ensure_ascii=False).replace(" 1}", f"\t{number} }}") + "\n"
    (tmp_path / "a.jsonl").write_text(line * 1200 + late + line * 10)
    assert ShardedDataset(tmp_path).read_batch([0])[name].dtype == torch.float64


def test_shards_with_other_keys_are_one_data_set(tmp_path):
    write(tmp_path / "a.jsonl", [{"x": 1}])
    write(tmp_path / "b.ndjson", [{"x": 0.5, "y": "u"}])
    (tmp_path / "c.jsonl").write_text("\n")
    data = ShardedDataset(tmp_path)
    assert list(data) == [{"x": 1, "y": None}, {"x": 0.5, "y": "u"}]
    assert data.read_batch([0, 1])["x"].tolist() == [1.0, 0.5]


def test_keys_that_come_late_are_an_error_unless_columns_are_chosen(tmp_path):
    found = [{"x": n} for n in range(1200)] + [{"x": 0, "late": 1}]
    path = write(tmp_path / "a.jsonl", found)
    with pytest.raises(ValueError, match=r"a.jsonl, line 1201 has a key 'late' that none of the f"):
        ShardedDataset(path)[1200]
    assert ShardedDataset(path, columns=["x"])[1200] == {"x": 0}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"x": 1', "Expecting"),
        (b"[1]", "is a list; a line is an object"),
        (b'{"x": "\xff"}', "invalid start byte"),
        (b"[" * 100_000, "nested too deeply|recursion"),
    ],
)
def test_a_broken_line_names_file_and_line(tmp_path, line, text):
    path = tmp_path / "a.jsonl"
    good = [b'{"x": %d}' % n for n in range(1500)]
    good[1300] = b"\n\n" + line
    path.write_bytes(b"\n".join(good))
    data = ShardedDataset(path)
    assert data[1299] == {"x": 1299}
    assert data[1301] == {"x": 1301}
    with pytest.raises(ValueError, match=rf"a.jsonl, line 1303.*({text})"):
        data[1300]
    path.write_bytes(b"\n".join([*good[:3], b"", line]))
    with pytest.raises(ValueError, match=rf"a.jsonl, line 5.*({text})"):
        ShardedDataset(path)


def test_lines_are_found_across_blocks_chunks_and_after_a_mark(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 64)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 200)
    found = [{"n": n, "t": "ü" * (n % 300)} for n in range(400)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    data = ShardedDataset(tmp_path)
    assert len(data._starts) > 100
    assert list(data) == found
    assert list(pickle.loads(pickle.dumps(data))) == found
    (tmp_path / "a.jsonl").write_bytes(text.encode()[:-20] + b"\n")
    with pytest.raises(ValueError, match=r"a.jsonl, line 400: "):
        ShardedDataset(tmp_path)[399]


def test_through_the_loader_with_workers(tmp_path):
    write(tmp_path / "a.jsonl", [{"n": n, "s": str(n)} for n in range(100)])
    loader = StreamLoader(ShardedDataset(tmp_path), 10, num_workers=1)
    seen = [n for batch in loader for n in batch["n"].tolist()]
    assert sorted(seen) == list(range(100))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_lines_are_unpacked_into_the_cache(tmp_path, suffix):
    found = [{"n": n} for n in range(5000)]
    text = "".join(json.dumps(row) + "\n" for row in found).encode()
    content = gzip.compress(text) if suffix == "gz" else bytes(packed_bytes(text))
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is compressed and has no random access; give cache_dir"):
        ShardedDataset(path)
    data = ShardedDataset(path, cache_dir=tmp_path / "cache")
    assert data[4321] == {"n": 4321}
    assert list(pickle.loads(pickle.dumps(data)))[::999] == found[::999]
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(RuntimeError, match=rf"a.jsonl.{suffix} is damaged"):
        ShardedDataset(path, cache_dir=tmp_path / "cache")


def packed_bytes(text):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(text)
    return memoryview(sink.getvalue())


def test_compressed_tars_are_refused(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a.tar.gz: reads .* files only .*: unpack it first"):
        ShardedDataset(tmp_path / "a.tar.gz")
