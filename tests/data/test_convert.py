import datetime
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

from torsh_data import ShardedDataset, _csv, convert
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
    with pytest.raises(ValueError, match=r"source='other.csv:\d+:\d+', but the unfinished shards"):
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


def test_pictures_in_a_tar_stay_bytes_and_numbers_are_numbers(tmp_path):
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
    assert [(s["jpg"], s["cls"]) for s in samples] == [(b"jpeg", 7), (b"JPEG", 8)]


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


def converted(tmp_path, text, suffix=".csv", **options):
    (tmp_path / f"a{suffix}").write_text(text)
    convert(tmp_path / f"a{suffix}", tmp_path / "out", **options)
    return ShardedDataset(tmp_path / "out")


def test_cells_that_are_no_plain_numbers_stay_text_and_only_empty_ones_are_null(tmp_path):
    data = converted(tmp_path, "zip,name,day,none\n00501,NA,2020-01-01,\n01234,,2020-01-02,\n")
    assert list(data) == [
        {"zip": "00501", "name": "NA", "day": "2020-01-01", "none": None},
        {"zip": "01234", "name": None, "day": "2020-01-02", "none": None},
    ]
    assert data.schema.field("none").type == pa.string()


def test_a_column_is_what_all_of_its_cells_look_like(tmp_path, monkeypatch):
    monkeypatch.setattr(_csv, "_BLOCK_BYTES", 1 << 12)  # the last row lies in another block
    early = "1,,1,true,1,12345678901234567\n" * 400
    data = converted(tmp_path, "a,b,c,d,e,f\n" + early + f"-2,x,0.5,False,{2**63},0.5\n")
    kinds = [pa.int64(), pa.string(), pa.float64(), pa.bool_(), pa.string(), pa.string()]
    assert data.schema.types == kinds
    assert data[0]["b"] is None
    last = {"a": -2, "b": "x", "c": 0.5, "d": False, "e": str(2**63), "f": "0.5"}
    assert data[400] == last


def test_a_schema_says_otherwise(tmp_path):
    schema = pa.schema([("zip", pa.int32()), ("day", pa.date32())])
    data = converted(tmp_path, "zip,n,day\n00501,7,2020-01-01\n", schema=schema)
    assert data[0] == {"zip": 501, "n": 7, "day": datetime.date(2020, 1, 1)}
    with pytest.raises(
        ValueError, match=r"a.csv: .*int32: invalid value 'x'; is the type that sch"
    ):
        convert(write(tmp_path / "a.csv", "zip,day\nx,\n"), tmp_path / "two", schema=schema)
    with pytest.raises(ValueError, match=r"schema: no column 'zip'; there are \['n'\]"):
        convert(write(tmp_path / "b.csv", "n\n1\n"), tmp_path / "two", schema=schema)
    for text in ("a,a\n1,2\n", "", "a,b\n1\n"):
        with pytest.raises(ValueError, match=r"c.csv: (two columns|Empty|CSV parse)"):
            convert(write(tmp_path / "c.csv", text), tmp_path / "two")


def write(path, text):
    path.write_text(text)
    return path


def test_lines_with_lists_objects_and_late_fractions_are_converted(tmp_path):
    rows = [{"ids": [n, 2], "o": {"a": [n]}, "x": n, "l": n} for n in range(1200)]
    rows[1100] |= {"x": 0.5, "l": "late"}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with pytest.raises(TypeError, match=r"sample 1100: column 'l' holds str.* or a schema"):
        converted(tmp_path, text, ".jsonl")
    data = converted(tmp_path, text, ".jsonl", schema=pa.schema([("l", pa.json_())]))
    assert [{**row, "ids": row["ids"].tolist()} for row in data] == rows


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_source_that_changed_is_not_gone_on_with(tmp_path, suffix, monkeypatch):
    def text(last):
        line = "%d\n" if suffix == ".csv" else '{"n": %d}\n'
        return "n\n" * (suffix == ".csv") + "".join(line % n for n in [*range(2000, 3999), last])

    from torsh_data import _writer

    path = write(tmp_path / f"n{suffix}", text(4000))
    options = {"shard_bytes": "4kB", "block_bytes": "500B"}
    finish = _writer._OpenShard.finish

    def failing(shard):
        if shard.path.name == "shard-00002.arrow":
            raise OSError("disk full")
        return finish(shard)

    with monkeypatch.context() as patch:
        patch.setattr(_writer._OpenShard, "finish", failing)
        with pytest.raises(OSError, match="disk full"):
            convert(path, tmp_path / "out", **options)
    write(path, text(5000))
    with pytest.raises(ValueError, match=r"source='.*', but the unfinished shards"):
        convert(path, tmp_path / "out", **options)
