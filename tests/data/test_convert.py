import io
import json
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision
from PIL import Image

from torsh_data import ShardedDataset, convert
from torsh_data._index import read_index


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("dog", "cat", "owl"):
        for k in range(4):
            path = tmp_path / "tree" / name / ("deep" if k == 3 else ".") / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).save(path)
        (tmp_path / "tree" / name / "notes.txt").write_text("not a picture")
    return tmp_path / "tree"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_folders_of_pictures_become_what_torchvision_reads(pictures, tmp_path, num_workers):
    convert(pictures, tmp_path / "out", num_workers=num_workers)
    folder = torchvision.datasets.ImageFolder(str(pictures))
    data = ShardedDataset(tmp_path / "out")
    assert len(data) == len(folder) == 12
    for sample, (image, label) in zip(data, folder, strict=True):
        assert sample["label"] == label
        found = Image.open(io.BytesIO(sample["image"])).convert("RGB")
        assert np.array_equal(np.asarray(found), np.asarray(image))
    assert read_index(tmp_path / "out" / "index.json").metadata == {"classes": folder.classes}


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_tables_keep_types_and_empty_cells(tmp_path, suffix, delimiter):
    rows = ["name,age,weight", "ann,3,1.5", '"b\nob",,2.5', "eve,5,"]
    path = tmp_path / f"people{suffix}"
    path.write_text("\n".join(rows).replace(",", delimiter) + "\n")
    convert(path, tmp_path / "out")
    assert list(ShardedDataset(tmp_path / "out")) == [
        {"name": "ann", "age": 3, "weight": 1.5},
        {"name": "b\nob", "age": None, "weight": 2.5},
        {"name": "eve", "age": 5, "weight": None},
    ]
    convert(path, tmp_path / "two", columns=["weight", "name"])
    assert ShardedDataset(tmp_path / "two")[0] == {"weight": 1.5, "name": "ann"}


def test_a_stopped_conversion_goes_on_and_another_source_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "n.csv"
    path.write_text("n\n" + "\n".join(map(str, range(2000))) + "\n")
    options = {"shard_bytes": "4kB", "block_bytes": "500B"}
    convert(path, tmp_path / "whole", **options)
    from torsh_data import _writer

    append, calls = _writer._OpenShard.append, []

    def failing(shard, block):
        calls.append(block.num_rows)
        if len(calls) == 20:
            raise OSError("disk full")
        append(shard, block)

    monkeypatch.setattr(_writer._OpenShard, "append", failing)
    with pytest.raises(OSError, match="disk full"):
        convert(path, tmp_path / "out", **options)
    other = tmp_path / "other.csv"
    other.write_text(path.read_text())
    with pytest.raises(ValueError, match=r"source='other.csv:\d+', but the unfinished shards"):
        convert(other, tmp_path / "out", **options)
    convert(path, tmp_path / "out", **options)
    written = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert written == {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}


def test_parquet_keeps_nulls_and_nested_values(tmp_path):
    rows = [{"id": 1, "tags": ["a", "b"], "x": None}, {"id": 2, "tags": [], "x": 0.5}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    convert(tmp_path / "a.parquet", tmp_path / "out", shuffle_seed=1)
    assert sorted(ShardedDataset(tmp_path / "out"), key=lambda s: s["id"]) == rows


def test_shards_are_converted_to_the_same_samples(tmp_path):
    rows = [{"n": n, "text": f"line {n}"} for n in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert(str(tmp_path / "a.jsonl"), tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "two", compression="zstd")
    assert list(ShardedDataset(tmp_path / "one")) == rows == list(ShardedDataset(tmp_path / "two"))


def test_members_of_a_tar_stay_bytes(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (
            ("0.jpg", b"jpeg"),
            ("0.cls", b"7"),
            ("1.jpg", b"JPEG"),
            ("1.cls", b"8"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    convert(tmp_path / "a.tar", tmp_path / "out")
    samples = list(ShardedDataset(tmp_path / "out"))
    assert [(s["jpg"], s["cls"]) for s in samples] == [(b"jpeg", b"7"), (b"JPEG", b"8")]


def test_hugging_face_data_sets_in_memory_and_saved(tmp_path):
    data = datasets.Dataset.from_dict({"n": list(range(10)), "t": [str(n) for n in range(10)]})
    convert(data, tmp_path / "one")
    data.save_to_disk(str(tmp_path / "saved"))
    convert(tmp_path / "saved", tmp_path / "two")
    assert list(ShardedDataset(tmp_path / "one")) == data.to_list()
    assert list(ShardedDataset(tmp_path / "two")) == data.to_list()


def test_what_cannot_be_converted_is_refused(tmp_path, pictures):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"columns: no column 'c'; there are \['a', 'b'\]"):
        convert(path, tmp_path / "out", columns=["c"])
    with pytest.raises(TypeError, match=r"shuffle_seed=1 needs random access"):
        convert(path, tmp_path / "out", shuffle_seed=1)
    with pytest.raises(TypeError, match="num_workers=2 needs samples with a length"):
        convert(path, tmp_path / "out", num_workers=2)
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ValueError, match="pictures have 'image' and 'label'"):
        convert(pictures, tmp_path / "out", columns=["jpg"])
    (pictures / "empty").mkdir()
    with pytest.raises(ValueError, match="the folder 'empty' has no pictures"):
        convert(pictures, tmp_path / "out")
    assert not (tmp_path / "out").exists()
