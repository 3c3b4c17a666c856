import json
from pathlib import Path

import pytest

from torsh_data import ShardedDataset
from torsh_data._index import Index, ShardEntry, hash_bytes, read_index, replace_file, write_index

ENTRY = ShardEntry("shard-00000.arrow", 3, 100, [2, 1], [0, 60, 90], ["ab", "cd"], "ef")
INDEX = Index(3, 100, {"x": "int64"}, None, [ENTRY], {"classes": ["cat", "dog"]})


def test_an_index_comes_back_as_it_was_written(tmp_path):
    write_index(tmp_path, INDEX)
    assert read_index(tmp_path / "index.json") == INDEX
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]


def test_an_index_of_version_1_is_read():
    folder = Path(__file__).parent / "fixtures" / "index_v1"
    index = read_index(folder / "index.json")
    assert (index.rows, index.metadata) == (5, {})
    data = ShardedDataset(folder)
    assert [sample["text"] for sample in data] == [f"no {n}" for n in range(5)]
    assert data[3]["image"].tolist() == [[3, 3, 3], [3, 3, 3]]


def test_the_checksum_is_xxh3_of_64_bits():
    assert hash_bytes(b"") == "2d06800538d394c2"  # published test vector, seed 0


def test_every_flipped_byte_is_noticed(tmp_path):
    write_index(tmp_path, INDEX)
    path = tmp_path / "index.json"
    original = path.read_bytes()
    for place in range(len(original) - 1):  # the last byte is a line feed
        changed = bytearray(original)
        changed[place] ^= 1
        path.write_bytes(changed)
        try:
            read = read_index(path)
        except RuntimeError:
            continue
        assert read == INDEX, place  # such as one kind of white space for another


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("format", "other", "has format 'other'"), ("version", 3, "reads up to 2; update it")],
)
def test_foreign_and_newer_indexes_are_refused(tmp_path, name, value, message):
    write_index(tmp_path, INDEX)
    path = tmp_path / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(RuntimeError, match=message):
        read_index(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\xfe"])
def test_what_is_not_an_index_is_refused(tmp_path, content):
    path = tmp_path / "index.json"
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match="not an index of shards, or is damaged"):
        read_index(path)


def test_replacing_a_file_leaves_no_other(tmp_path):
    replace_file(tmp_path / "a", b"one")
    replace_file(tmp_path / "a", b"two")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"two")]
