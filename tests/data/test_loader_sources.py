import functools
import json
import re
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, StackDataset, Subset

from torsh_data import Mixture, SampleCache, ShardedDataset, StreamLoader, write_shards
from torsh_data._order import Order
from torsh_data._requests import Requests

ODD = {"seed": 3, "rank": 0, "world_size": 1, "drop_last": False}


def fails_on_sevens(sample):
    if sample["n"] % 7 == 0:
        raise ValueError(f"{sample['n']} is a multiple of seven")
    return sample


pytestmark = pytest.mark.filterwarnings("ignore:sample .* is replaced by another one:UserWarning")


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


@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}])
def test_this_process_warns_once_of_what_is_replaced(folder, workers, capfd, recwarn):
    warnings.simplefilter("always")
    loader = StreamLoader(tolerant(folder), 8, **workers, **ODD)
    for _ in range(2):
        list(loader)
    (warned,) = [one for one in recwarn if "is replaced" in str(one.message)]
    number = re.match(r"sample (\d+), in block .*, is replaced .*seven", str(warned.message))[1]
    assert int(number) % 7 == 0
    assert capfd.readouterr().err == ""  # nor do workers say so
    state = loader.state_dict()
    StreamLoader(tolerant(folder), 8, **ODD).load_state_dict(state)
    said = [one for one in recwarn if "is replaced" in str(one.message)]
    assert len(said) == 1  # it was said before


def test_more_than_max_errors_in_all_workers_together_is_an_error(folder):
    data = ShardedDataset(folder, transform=fails_on_sevens, on_error="substitute", max_errors=9)
    with pytest.raises(RuntimeError, match="10 bad samples, more than max_errors=9"):
        list(StreamLoader(data, 8, num_workers=2, **ODD))


def tolerant(folder, most=10):
    return ShardedDataset(folder, transform=fails_on_sevens, on_error="substitute", max_errors=most)


def wrapped_in(kind, folder):
    """A data set over two sharded ones, and these; the first half of both is read."""
    one, two = tolerant(folder), tolerant(folder)
    half = range(32)
    if kind == "mixture":
        parts = {"one": (Subset(one, half), 1), "two": (Subset(two, half), 1)}
        return Mixture(parts), [one, two]
    if kind == "stack":
        return StackDataset(a=Subset(one, half), b=SampleCache(Subset(two, half))), [one, two]
    again = ConcatDataset([Subset(one, half), Subset(Subset(two, half), half), Subset(one, half)])
    return again, [one, two]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["mixture", "concat", "stack"])
def test_what_workers_replace_inside_other_data_sets_is_known_here(folder, kind, workers):
    dataset, parts = wrapped_in(kind, folder)
    stream = StreamLoader(dataset, 8, num_workers=workers, **ODD)
    for _ in stream:
        pass
    sevens = [0, 7, 14, 21, 28]
    assert all(set(sevens) <= set(part.errors) for part in parts)
    assert all(n % 7 == 0 for part in parts for n in part.errors)
    state = json.loads(json.dumps(stream.state_dict()))
    dataset, fresh = wrapped_in(kind, folder)
    resumed = StreamLoader(dataset, 8, **ODD)
    resumed.load_state_dict(state)
    assert [sorted(part.errors) for part in fresh] == [sorted(part.errors) for part in parts]
    assert resumed.state_dict()["errors"] == state["errors"]


def test_errors_in_the_workers_of_a_wrapped_data_set_use_up_its_budget(folder):
    parts = ConcatDataset([tolerant(folder, 10), tolerant(folder, 9)])
    with pytest.raises(RuntimeError, match="10 bad samples, more than max_errors=9"):
        list(StreamLoader(parts, 8, num_workers=2, **ODD))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restart_does_not_start_the_budget_anew(folder, workers):
    """Each life of the run reads a few batches; the bad samples of all lives count together."""

    def live(state, workers=0):
        stream = StreamLoader(tolerant(folder, 6), 8, num_workers=workers, **ODD)
        if state is not None:
            stream.load_state_dict(state)
        next(iter(stream))
        return json.loads(json.dumps(stream.state_dict()))

    state = live(live(None, workers), workers)
    assert "," in state["errors"]
    with pytest.raises(RuntimeError, match="7 bad samples, more than max_errors=6"):
        functools.reduce(lambda state, _: live(state), range(10), state)


def test_replaced_samples_stay_replaced_by_the_same_after_a_restart(folder):
    def flaky(sample):
        if flaky.fails and sample["n"] % 7 == 0:
            raise ValueError("the disk was busy")
        return sample

    def epoch(state=None, batches=8):
        data = ShardedDataset(folder, transform=flaky, on_error="substitute", max_errors=10)
        stream = StreamLoader(data, 8, **ODD)
        if state is not None:
            stream.load_state_dict({**state, "epoch": 0, "position": 0})
        got = [batch["n"].tolist() for batch, _ in zip(stream, range(batches), strict=False)]
        return got, stream.state_dict()

    flaky.fails = True
    unbroken, state = epoch()
    flaky.fails = False
    assert epoch(state)[0] == unbroken
    mended, clean = epoch({**state, "errors": ""})
    assert sorted(n for batch in mended for n in batch) == list(range(64))
    assert clean["errors"] == ""
    old = dict(state)
    del old["errors"]  # of before errors were kept
    assert epoch(old)[0] == mended


def test_the_states_of_all_ranks_add_up(folder):
    states, known = [], []
    for rank in range(2):
        data = tolerant(folder)
        stream = StreamLoader(data, 8, **{**ODD, "rank": rank, "world_size": 2})
        for _ in stream:
            pass
        states.append(stream.state_dict())
        known.append(set(data.errors))
    assert known[0]
    assert known[1]
    assert {**states[0], "errors": ""} == {**states[1], "errors": ""}
    data = tolerant(folder)
    stream = StreamLoader(data, 8, **ODD)
    for state in states:
        stream.load_state_dict(state)
    assert set(data.errors) == known[0] | known[1] == set(range(0, 64, 7))


def test_errors_of_a_damaged_block_take_little_room(folder):
    data = tolerant(folder, 60)
    stream = StreamLoader(data, 8, **ODD)
    data.add_errors(dict.fromkeys([*range(8, 40), 63, *range(45, 50)], "block 3"))
    state = stream.state_dict()
    assert state["errors"] == "8-39,45-49,63"
    assert len(json.dumps(state)) < 500


@pytest.mark.parametrize(
    ("errors", "match"),
    [
        ("64", "errors='64', not sample ids of the 1 sharded"),
        ("3;4", "errors='3;4', not sample ids"),
        ("5-3", "errors='5-3'"),
        ("-3", "errors='-3'"),
        ("x", "errors='x'"),
        ([3], r"errors=\[3\]"),
        ("0-4", "makes 5 bad samples, more than max_errors=4; allow more, or mend the files"),
    ],
)
def test_errors_that_do_not_fit_are_refused_and_change_nothing(folder, errors, match):
    data = tolerant(folder, 4)
    stream = StreamLoader(data, 8, **ODD)
    before = stream.state_dict()
    with pytest.raises(ValueError, match=match):
        stream.load_state_dict({**before, "position": 8, "errors": errors})
    assert stream.state_dict() == before


def test_a_data_set_that_replaces_nothing_reads_what_another_replaced(folder):
    strict = StreamLoader(ShardedDataset(folder), 8, **ODD)
    strict.load_state_dict({**strict.state_dict(), "errors": "3-9"})
    assert strict.state_dict()["errors"] == ""
    assert sorted(n for batch in strict for n in batch["n"].tolist()) == list(range(64))


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
