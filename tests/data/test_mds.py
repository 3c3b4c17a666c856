"""Folders of MosaicML Streaming 0.13.0, which wrote the fixtures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from torsh_data import ShardedDataset, convert
from torsh_data._mds import MdsFolder, is_mds

FOLDERS = Path(__file__).parent / "fixtures" / "mds"
ROWS = 5


def expected(n):
    return {
        "count": -n * 10**10,
        "digits": n * 7,
        "free": torch.tensor([[n, n / 2]], dtype=torch.float64),
        "grid": torch.arange(6, dtype=torch.int16).reshape(2, 3) * n,
        "meta": json.dumps({"n": [n, None]}),
        "ratio": float(np.float32(n / 3)),
        "raw": bytes([n]) * n,
        "small": 200 + n,
        "text": "é" * n,
    }


@pytest.fixture
def copied(tmp_path):
    def copy(name):
        return Path(shutil.copytree(FOLDERS / name, tmp_path / name))

    return copy


def change(folder, **values):
    index = json.loads((folder / "index.json").read_text())
    for entry in index["shards"]:
        entry.update(values)
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["plain", "zstd"])
def test_all_samples_come_over_in_order(name, tmp_path):
    convert(FOLDERS / name, tmp_path / "shards", num_workers=2 if name == "plain" else 0)
    data = ShardedDataset(tmp_path / "shards")
    assert len(data) == ROWS
    for n, sample in enumerate(data):
        for name, value in expected(n).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(sample[name], value, rtol=0, atol=0)
            else:
                assert sample[name] == value, name


def test_columns_are_chosen_and_samples_shuffled(tmp_path):
    convert(FOLDERS / "plain", tmp_path / "some", columns=["text", "small"], shuffle_seed=3)
    found = list(ShardedDataset(tmp_path / "some"))
    assert [list(sample) for sample in found] == [["text", "small"]] * ROWS
    assert sorted(sample["small"] - 200 for sample in found) == list(range(ROWS))
    assert [sample["small"] for sample in found] != [200 + n for n in range(ROWS)]
    with pytest.raises(ValueError, match="no column 'texts'; there are"):
        convert(FOLDERS / "plain", tmp_path / "none", columns=["texts"])
    with pytest.raises(TypeError, match="compressed; convert it as it is"):
        convert(FOLDERS / "zstd", tmp_path / "none", shuffle_seed=3)


def test_a_pickle_is_refused_by_name_and_can_be_left_out(tmp_path):
    with pytest.raises(ValueError, match=r"column 'any', encoded as 'pkl', is a pickle.*columns="):
        convert(FOLDERS / "pickle", tmp_path / "shards")
    convert(FOLDERS / "pickle", tmp_path / "shards", columns=["n"])
    assert list(ShardedDataset(tmp_path / "shards")) == [{"n": 0}, {"n": 1}]


@pytest.mark.parametrize("name", ["plain", "zstd"])
def test_a_flipped_byte_names_the_shard(name, copied):
    folder = copied(name)
    shard = sorted(folder.glob("shard.00001*"))[0]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    data = MdsFolder(folder, None)
    with pytest.raises(RuntimeError, match=r"shard.00001.mds.*is damaged: its (sha1|xxh3_64) is"):
        data[ROWS - 1]


def test_short_missing_and_lying_files_are_named(copied):
    folder = copied("plain")
    shard = folder / "shard.00000.mds"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(RuntimeError, match=r"shard.00000.mds has 648 bytes, index.json says 649"):
        MdsFolder(folder, None)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard.00000.mds is missing"):
        MdsFolder(folder, None)
    shard.write_bytes(content)
    change(folder, column_sizes=[8] * 9)
    with pytest.raises(RuntimeError, match="sample 0 is damaged: its columns end at byte"):
        MdsFolder(folder, None)
    change(folder, samples=2)
    with pytest.raises(RuntimeError, match="does not hold the 2 samples of its index"):
        MdsFolder(folder, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "csv"}, "a shard is csv of version 2, not mds 2"),
        ({"version": 3}, "a shard is mds of version 3"),
        ({"raw_data": {"basename": "../../x", "bytes": 1, "hashes": {}}}, "not a file in the"),
        ({"column_names": ["one"]}, "index.json cannot be read"),
    ],
)
def test_an_index_of_something_else_is_refused(copied, values, message):
    folder = copied("plain")
    change(folder, **values)
    with pytest.raises(RuntimeError, match=message):
        MdsFolder(folder, None)


def test_only_their_folders_are_taken_for_theirs(tmp_path):
    assert is_mds(FOLDERS / "plain")
    convert(FOLDERS / "pickle", tmp_path / "ours", columns=["n"])
    assert not is_mds(tmp_path / "ours")
    assert not is_mds(tmp_path)
