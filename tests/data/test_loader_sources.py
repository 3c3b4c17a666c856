import numpy as np
import pytest
import torch

from torsh_data import ShardedDataset, StreamLoader, write_shards
from torsh_data._order import Order
from torsh_data._requests import Requests

ODD = {"seed": 3, "rank": 0, "world_size": 1, "drop_last": False}


def fails_on_sevens(sample):
    if sample["n"] % 7 == 0:
        raise ValueError(f"{sample['n']} is a multiple of seven")
    return sample


@pytest.fixture
def folder(tmp_path):
    write_shards(({"n": n} for n in range(64)), tmp_path / "x", block_bytes="64B")
    return tmp_path / "x"


@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}])
def test_what_workers_replace_is_known_here(folder, workers):
    data = ShardedDataset(folder, transform=fails_on_sevens, on_error="substitute", max_errors=10)
    batches = list(StreamLoader(data, 8, **workers, **ODD))
    assert [len(batch["n"]) for batch in batches] == [8] * 8
    assert all((batch["n"] % 7 != 0).all() for batch in batches)
    assert sorted(data.errors) == list(range(0, 64, 7))
    assert "21 is a multiple of seven" in data.errors[21]


def test_more_than_max_errors_in_all_workers_together_is_an_error(folder):
    data = ShardedDataset(folder, transform=fails_on_sevens, on_error="substitute", max_errors=9)
    with pytest.raises(RuntimeError, match="10 bad samples, more than max_errors=9"):
        list(StreamLoader(data, 8, num_workers=2, **ODD))


def test_metadata_comes_with_the_data(tmp_path):
    write_shards([{"n": 1}], tmp_path / "y", metadata={"classes": ["a", "b"]})
    assert ShardedDataset(tmp_path / "y").metadata == {"classes": ["a", "b"]}


def test_a_cache_that_is_too_small_is_refused_with_what_it_takes(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    write_shards(
        ({"x": torch.zeros(1000)} for _ in range(1000)), tmp_path / "big", block_bytes="40kB"
    )
    fsspec.filesystem("memory").put(str(tmp_path / "big"), "/bucket/too_small", recursive=True)
    remote = ShardedDataset(
        "memory://bucket/too_small", cache_dir=tmp_path / "cache", cache_bytes="500kB"
    )
    with pytest.raises(ValueError, match="cache_bytes=500 kB does not hold the two windows"):
        StreamLoader(remote, 8, window=400, **ODD)
    roomy = ShardedDataset(
        "memory://bucket/too_small", cache_dir=tmp_path / "two", cache_bytes="6MB"
    )
    assert len(list(StreamLoader(roomy, 8, window=20, **ODD))) == 125


@pytest.mark.parametrize("rows", [100, 8192 * 3 + 5])
def test_requests_announce_what_comes_before_it_comes(rows):
    announced = []
    order = Order(rows, 1, rows)
    requests = Requests(order, 0, 16, 16, 0, 1, True, announced.append)
    plain = Requests(order, 0, 16, 16, 0, 1, True)
    seen = []
    for mine, other in zip(requests, plain, strict=True):
        assert np.array_equal(mine.ids, other.ids)
        latest = announced[-1]
        assert np.isin(mine.ids, latest).all()
        seen.append(mine.ids)
    assert len(announced) == max(1, -(-(rows // 16 - 1) // 512))
    if rows > 8192:  # the chunk after the next is announced while this one is read
        assert len(announced[0]) == 2 * 8192
    assert len(np.concatenate(seen)) == (rows // 16 - 1) * 16
