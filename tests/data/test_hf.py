import pickle

import numpy as np
import pytest
import torch

from torsh_data import ShardedDataset, StreamLoader, convert

datasets = pytest.importorskip("datasets")

ROWS = 2500


def columns():
    return {
        "n": list(range(ROWS)),
        "t": [f"größe {n}" if n % 7 else None for n in range(ROWS)],
        "v": [[n / 2, -n] for n in range(ROWS)],
        "l": [[n] * (n % 3) for n in range(ROWS)],
        "s": [{"a": n, "b": [str(n)]} for n in range(ROWS)],
    }


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    features = datasets.Features(
        {
            "n": datasets.Value("int32"),
            "t": datasets.Value("string"),
            "v": datasets.Sequence(datasets.Value("float32"), length=2),
            "l": datasets.Sequence(datasets.Value("int64")),
            "s": {"a": datasets.Value("int64"), "b": datasets.Sequence(datasets.Value("string"))},
        }
    )
    folder = tmp_path_factory.mktemp("hub")
    datasets.Dataset.from_dict(columns(), features=features).save_to_disk(folder, num_shards=3)
    return datasets.load_from_disk(folder)


def plain(sample):
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in sample.items()}


CHOICES = {
    "all": lambda d: d,
    "shuffle": lambda d: d.shuffle(seed=3),
    "select": lambda d: d.select([5, 5, 2499, 0]),
    "range": lambda d: d.select(range(100, 2200)),
    "filter": lambda d: d.filter(lambda n: n % 5 == 0, input_columns="n", keep_in_memory=True),
    "shard": lambda d: d.shard(4, 1),
    "joined": lambda d: datasets.concatenate_datasets([d.select(range(10)), d.shuffle(seed=1)]),
    "memory": lambda d: datasets.Dataset.from_dict(d[:50]),
    "fewer columns": lambda d: d.select_columns(["t", "n"]),
    "column format": lambda d: d.with_format(None, columns=["n"]),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_samples_are_those_of_the_data_set(on_disk, choice):
    theirs = CHOICES[choice](on_disk)
    ours = ShardedDataset(theirs)
    assert len(ours) == len(theirs)
    ids = np.random.default_rng(0).integers(len(theirs), size=60).tolist()
    for got, n in zip(ours.__getitems__(ids), ids, strict=True):
        assert plain(got) == theirs[n]
    batch = ours.read_batch(ids)
    assert batch["n"].tolist() == [theirs[n]["n"] for n in ids]
    copy = pickle.loads(pickle.dumps(ours))
    assert plain(copy[ids[0]]) == theirs[ids[0]]
    assert copy.fingerprint == ours.fingerprint


def test_columns_and_batches(on_disk):
    data = ShardedDataset(on_disk.with_format("torch"), columns=["v", "n"])
    assert data.columns == ["v", "n"]
    batch = data.read_batch([3, 9])
    assert torch.equal(batch["v"], torch.tensor([[1.5, -3.0], [4.5, -9.0]]))
    assert batch["n"].tolist() == [3, 9]


def test_the_fingerprint_tells_choices_apart(on_disk):
    prints = {ShardedDataset(CHOICES[name](on_disk)).fingerprint for name in ("all", "shuffle")}
    assert len(prints) == 2
    assert ShardedDataset(on_disk).fingerprint in prints


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("wrap", [ShardedDataset, lambda d: d.with_format("torch")])
def test_an_epoch_is_exact_and_resumes(on_disk, workers, wrap):
    data = wrap(on_disk.select_columns(["n", "v"]))
    loader = StreamLoader(data, 100, num_workers=workers, seed=4)
    seen = []
    for number, batch in enumerate(loader):
        seen += batch["n"].tolist()
        if number == 9:
            state = loader.state_dict()
            break
    resumed = StreamLoader(wrap(on_disk.select_columns(["n", "v"])), 50, seed=4)
    resumed.load_state_dict(state)
    rest = [n for batch in resumed for n in batch["n"].tolist()]
    assert sorted(seen + rest) == list(range(ROWS))


def test_what_has_no_rows_at_random_is_refused(on_disk):
    with pytest.raises(TypeError, match=r"DatasetDict with \['train', 'test'\]; .*source\['train'"):
        ShardedDataset(datasets.DatasetDict({"train": on_disk, "test": on_disk}))
    with pytest.raises(TypeError, match="IterableDataset, which has no random access"):
        ShardedDataset(on_disk.to_iterable_dataset())
    with pytest.raises(ValueError, match="source has the format 'numpy'"):
        ShardedDataset(on_disk.with_format("numpy"))
    with pytest.raises(ValueError, match="source has the format 'custom'"):
        ShardedDataset(on_disk.with_transform(lambda batch: batch))
    with pytest.raises(ValueError, match="but no rows"):
        ShardedDataset(on_disk.select([]))


@pytest.fixture
def pictures(tmp_path):
    from PIL import Image

    paths = []
    for n in range(4):
        paths.append(tmp_path / f"{n}.png")
        Image.new("RGB", (4, 4), (n, n, n)).save(paths[-1])
    contents = [path.read_bytes() for path in paths]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])}
    )
    columns = {
        "image": [
            {"bytes": contents[0], "path": None},
            {"bytes": None, "path": str(paths[1])},
            {"bytes": contents[2], "path": "elsewhere.png"},
            None,
        ],
        "label": [0, 1, 0, 1],
    }
    return datasets.Dataset.from_dict(columns, features=features), [*contents[:3], None]


@pytest.mark.parametrize("choice", ["all", "shuffled"])
def test_pictures_are_bytes_and_class_labels_have_names(pictures, tmp_path, choice):
    hub, contents = pictures
    order = [2, 0, 3, 1] if choice == "shuffled" else [0, 1, 2, 3]
    data = ShardedDataset(hub.select(order))
    assert data.read_batch([0, 3])["image"] == [contents[order[0]], contents[order[3]]]
    assert [s["image"] for s in data] == [contents[n] for n in order]
    assert data.metadata == {"classes": ["even", "odd"]}
    assert ShardedDataset(hub, columns=["image"]).metadata == {}
    convert(hub.select(order), tmp_path / "out")
    converted = ShardedDataset(tmp_path / "out")
    assert list(converted) == list(data)
    assert converted.metadata == {"classes": ["even", "odd"]}
    convert(converted.files, tmp_path / "again")
    assert ShardedDataset(tmp_path / "again").metadata == {"classes": ["even", "odd"]}


def test_parquet_from_the_hub_is_read_alike_but_opens_no_path(pictures, tmp_path):
    hub, contents = pictures
    hub.to_parquet(tmp_path / "a.parquet")
    for options in ({}, {"cache_dir": tmp_path / "cache"}):
        data = ShardedDataset(tmp_path / "a.parquet", **options)
        held = [s["image"] for s in data]
        assert (held[0], held[2], held[3]) == (contents[0], contents[2], None)
        assert data.metadata == {"classes": ["even", "odd"]}


def test_no_path_in_a_file_is_followed(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "secret").write_text("secret")
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = pa.array([{"bytes": None, "path": str(tmp_path / "secret")}], kind)
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet")
    assert ShardedDataset(tmp_path / "a.parquet")[0] == {"image": None}


def test_several_class_labels_have_their_names_by_column(tmp_path):
    label = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"coarse": label, "fine": datasets.ClassLabel(names=["c", "d"])})
    hub = datasets.Dataset.from_dict({"coarse": [0], "fine": [1]}, features=features)
    expected = {"classes": {"coarse": ["a", "b"], "fine": ["c", "d"]}}
    assert ShardedDataset(hub).metadata == expected
    assert ShardedDataset(hub, columns=["fine"]).metadata == {"classes": ["c", "d"]}


def test_folders_of_save_to_disk_are_read(on_disk, tmp_path):
    small = on_disk.select(range(20))
    small.save_to_disk(tmp_path / "one")
    assert [s["n"] for s in ShardedDataset(tmp_path / "one")] == list(range(20))
    datasets.DatasetDict({"train": small, "test": small}).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match=r"DatasetDict with \['train', 'test'\]; .*both/train'"):
        ShardedDataset(tmp_path / "both")


def test_large_record_batches_are_shuffled_in_small_pieces():
    labels = np.repeat(np.arange(100), 500)
    hub = datasets.Dataset.from_dict({"label": labels.tolist(), "n": list(range(50_000))})
    data = ShardedDataset(hub)
    assert data.block_rows <= 1024
    loader = StreamLoader(data, 256, window=25_000)
    batch = next(iter(loader))
    # half a window of 25 pieces with 2 or 3 labels each, of which 256 draws see most
    assert len(set(batch["label"].tolist())) > 35
    assert (batch["label"] == batch["n"] // 500).all()
    assert [s["n"] for s in data] == list(range(50_000))
