import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from torsh_data import ShardedDataset, convert, write_shards


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".jpg", ".png"):
            Image.new("RGB", (4, 4)).save(path)
        else:
            path.write_text("{}")


@pytest.mark.parametrize(
    ("names", "source", "text"),
    [
        ([], "missing", "missing' does not exist"),
        ([], "a-*.tar", r"a-\*.tar': no file has such a name"),
        ([], ".", "is empty and no .arrow"),
        (["a/0.jpg", "b/0.png"], ".", "holds folders of pictures; write them as shards first: con"),
        (["0.jpg", "1.jpg", "x.txt"], ".", r"holds 2 .jpg files and no .*; convert\(\) reads pict"),
        (["0.csv", "1.csv"], ".", r"holds 2 .csv files and no .*: convert\(source, out\)"),
        (["a/b/c.txt"], ".", r"holds the folders \['a'\] and no .*whose writer did not finish"),
    ],
)
def test_what_is_there_instead_is_said(tmp_path, names, source, text):
    make(tmp_path, *names)
    with pytest.raises(FileNotFoundError, match=text):
        ShardedDataset(tmp_path / source)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", r"; write it as shards first: convert\(source, out\)"),
        ("a.json", "; one object a line is JSON Lines: name such a file .jsonl"),
        ("a.tar.gz", ": unpack it first"),
        ("a.tgz", ": unpack it first"),
    ],
)
def test_files_of_other_formats_are_refused_with_a_remedy(tmp_path, name, text):
    make(tmp_path, name)
    with pytest.raises(ValueError, match=f"reads .arrow, .*{text}"):
        ShardedDataset(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (pd.DataFrame({"a": [1]}), r"write_shards\(source.to_dict\('records'\), out\)"),
        (pa.table({"a": [1]}), r"write_shards\(source.to_pylist\(\), out\)"),
        (
            TensorDataset(torch.ones(2), torch.ones(2)),
            r"its samples, as mappings: write_shards\(\[",
        ),
        (5, "source is a builtins.int, and not files"),
    ],
)
def test_samples_in_place_of_files_are_refused(tmp_path, source, text):
    for call in (ShardedDataset, lambda source: convert(source, tmp_path / "out")):
        with pytest.raises(TypeError, match=text):
            call(source)


def test_the_remedies_work(tmp_path):
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    write_shards(frame.to_dict("records"), tmp_path / "a")
    assert list(ShardedDataset(tmp_path / "a")) == frame.to_dict("records")
    write_shards(pa.table({"a": [1, 2]}).to_pylist(), tmp_path / "b")
    assert ShardedDataset(tmp_path / "b")[1] == {"a": 2}


def test_arguments_in_the_wrong_order_are_noticed(tmp_path):
    with pytest.raises(
        TypeError, match=r"samples is a PosixPath and out a list; call write_shards"
    ):
        write_shards(tmp_path / "a", [{"a": 1}])
    with pytest.raises(TypeError, match=r"samples is a str and out a PosixPath; .*or convert\(sou"):
        write_shards("a.jsonl", tmp_path / "a")


@pytest.mark.parametrize("index", [slice(0, 3), "label"])
def test_only_numbers_are_an_index(tmp_path, index):
    write_shards([{"label": 1}], tmp_path / "a")
    with pytest.raises(TypeError, match=r"a sample has a number; data.__getitems__"):
        ShardedDataset(tmp_path / "a")[index]
