import collections
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Subset

from torsh_data import Mixture, ShardedDataset, StreamLoader, write_shards
from torsh_data._mixture import MixedOrder, _counts
from torsh_data._order import Order

ODD = {"seed": 3, "rank": 0, "world_size": 1, "drop_last": False}


def numbers(count, name):
    return [{"name": name, "n": n} for n in range(count)]


def seen(loader):
    return [
        place for batch in loader for place in zip(batch["name"], batch["n"].tolist(), strict=True)
    ]


@pytest.fixture
def mixture():
    parts = {"a": (numbers(100, "a"), 6), "b": (numbers(37, "b"), 3), "c": (numbers(5, "c"), 1)}
    return Mixture(parts, epoch_size=200)


def test_shares_hold_in_every_epoch_and_parts_are_walked_to_their_end(mixture):
    loader = StreamLoader(mixture, 16, **ODD)
    epochs = [seen(loader) for _ in range(6)]
    for epoch in epochs:
        assert collections.Counter(name for name, _ in epoch) == {"a": 120, "b": 60, "c": 20}
    everything = list(itertools.chain(*epochs))
    for name, rows in (("a", 100), ("b", 37), ("c", 5)):
        mine = [n for which, n in everything if which == name]
        whole = len(mine) // rows * rows
        for start in range(0, whole, rows):  # pass after pass, across epochs
            assert sorted(mine[start : start + rows]) == list(range(rows))
        first, second = mine[:rows], mine[rows : 2 * rows]
        assert first != second


def test_ids_locate_what_was_read(mixture):
    loader = StreamLoader(mixture, 16, **ODD)
    for _ in range(2):
        for batch in loader:
            expected = list(zip(batch["name"], batch["n"].tolist(), strict=True))
            assert mixture.locate(batch["index"]) == expected
            keys = batch["key"].tolist()
            assert len(set(keys)) == len(keys)


def test_a_sample_that_comes_again_in_an_epoch_has_another_key(mixture):
    batch = next(iter(StreamLoader(mixture, 200, **ODD)))
    fives = [k for k, name in zip(batch["key"].tolist(), batch["name"], strict=True) if name == "c"]
    assert len(fives) == len(set(fives)) == 20


@pytest.mark.parametrize("stop", [0, 1, 7, 12, 25])
def test_resumes_exactly_with_another_batch_size_and_workers(mixture, stop):
    loader = StreamLoader(mixture, 8, **ODD)
    expected = seen(loader) + seen(loader)
    loader = StreamLoader(mixture, 8, **ODD)
    begun = seen(itertools.islice(iter(loader), stop))
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = StreamLoader(mixture, 5, num_workers=2, **ODD)
    resumed.load_state_dict(state)
    assert (begun + seen(resumed) + seen(resumed))[: len(expected)] == expected


def test_ranks_share_a_mixture(mixture):
    whole = seen(StreamLoader(mixture, 20, **ODD))
    ranks = [StreamLoader(mixture, 10, **{**ODD, "rank": r, "world_size": 2}) for r in range(2)]
    parts = [seen(rank) for rank in ranks]
    together = [
        place for step in range(10) for part in parts for place in part[step * 10 : step * 10 + 10]
    ]
    assert together == whole


def test_without_shuffle_each_part_comes_in_its_own_order(mixture):
    epoch = seen(StreamLoader(mixture, 16, shuffle=False, **ODD))
    assert [n for name, n in epoch if name == "a"] == [*range(100), *range(20)]
    assert {name for name, _ in epoch[:20]} == {"a", "b", "c"} or len(set(epoch[:20])) == 20


def test_parts_with_blocks_keep_their_windows(tmp_path):
    write_shards(({"n": n} for n in range(4096)), tmp_path / "x", block_bytes="128B")
    sharded = ShardedDataset(tmp_path / "x")
    mixed = Mixture({"x": (sharded, 1), "y": ([{"n": -1}] * 100, 1)}, epoch_size=2000)
    loader = StreamLoader(mixed, 50, window=256, **ODD)
    rows = [n for batch in loader for n in batch["n"].tolist() if n >= 0]
    assert len(set(rows)) == 1000
    blocks = {n // sharded.block_rows for n in rows[:100]}
    assert len(blocks) * sharded.block_rows <= 4 * 256  # two windows, and what the order cuts


def test_transforms_of_repeated_samples_draw_anew(tmp_path):
    write_shards(({"n": n} for n in range(4)), tmp_path / "x")
    data = ShardedDataset(tmp_path / "x", transform=lambda s, rng: {**s, "draw": rng.random()})
    mixed = Mixture({"x": (data, 1)}, epoch_size=16)
    batch = next(iter(StreamLoader(mixed, 16, **ODD)))
    assert len(set(batch["draw"].tolist())) == 16
    alone = next(iter(StreamLoader(data, 4, **ODD)))
    first = dict(zip(alone["n"].tolist(), alone["draw"].tolist(), strict=True))
    drawn = collections.defaultdict(set)
    for n, draw in zip(batch["n"].tolist(), batch["draw"].tolist(), strict=True):
        drawn[n].add(draw)
    assert all(first[n] in drawn[n] for n in range(4))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=100),
    st.integers(1, 10**12),
    st.integers(0, 2**20),
)
def test_counts_grow_and_sum(weights, start, length):
    shares = tuple(w / sum(weights) for w in weights)
    length = max(length, 2**14)
    before, after = _counts(shares, start), _counts(shares, start + length)
    assert before.sum() == start
    assert after.sum() == start + length
    assert (after >= before).all()
    assert np.abs(before - np.array(shares) * start).max() <= len(weights) / 2 + 1e-3


def test_an_epoch_of_several_periods_is_exact():
    orders = (Order(50_000, 1, 50_000), Order(300, 1, 300))
    mixed = MixedOrder(40_000, 0, orders, (0.9, 0.1), 50_300)
    ids = mixed(2, np.arange(40_000))
    part = ids % 50_300 >= 50_000
    assert part.sum() == 4000
    assert abs(int(part[: 2**14].sum()) - 0.1 * 2**14) <= 1
    for places in (np.array([39_999, 5, 20_000]), np.arange(16_300, 16_500)):
        assert np.array_equal(mixed(2, places), ids[places])


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ({}, {}, "parts is empty"),
        ({"a": [1]}, {}, r"parts\['a'\] is a list; give a pair"),
        ([[1], [2]], {}, r"parts is a list; give .*: Mixture\({'code': \(code, 0.7\), "),
        ({"a": ("x", 1)}, {}, r"parts\['a'\]='x' is a path; give Mixture a ShardedDataset\('x'\)"),
        ({"a": ([1], "1")}, {}, r"parts\['a'\] has weight='1'; give a number above 0"),
        ({"a": (iter([1]), 1)}, {}, "is a list_iterator without a length"),
        ({"a": ([], 1)}, {}, "holds an empty data set"),
        ({"a": ([1], 0)}, {}, r"parts\['a'\] has weight=0; it must be above 0"),
        ({"a": ([1], float("nan"))}, {}, "weight=nan"),
        ({"a": ([1], 1)}, {"epoch_size": 0}, "epoch_size=0 must be a whole number"),
        ({str(n): ([1], 1) for n in range(101)}, {}, "parts has 101 data sets, 100 fit"),
    ],
)
def test_refuses(parts, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Mixture(parts, **options)


def test_its_repr_has_the_shares():
    mixture = Mixture({"a": ([1], 3), "b": ([2], 1)}, epoch_size=5000)
    assert repr(mixture) == "Mixture(0.75 a, 0.25 b; 5,000 samples an epoch)"


def test_state_of_another_mixture_is_refused(mixture):
    state = StreamLoader(mixture, 8, **ODD).state_dict()
    other = Mixture({"a": (numbers(100, "a"), 6), "b": (numbers(37, "b"), 3)}, epoch_size=200)
    with pytest.raises(ValueError, match="state_dict has fingerprint="):
        StreamLoader(other, 8, **ODD).load_state_dict(state)
    again = Mixture(
        {"a": (numbers(100, "a"), 12), "b": (numbers(37, "b"), 6), "c": (numbers(5, "c"), 2)},
        epoch_size=200,
    )
    StreamLoader(again, 8, **ODD).load_state_dict(state)  # only the ratio counts


def test_ids_beyond_are_refused(mixture):
    with pytest.raises(IndexError, match="sample -1 of a mixture"):
        mixture[-1]
    assert torch.equal(torch.tensor(mixture[105]["n"]), torch.tensor(5))
    assert len(Subset(mixture, [1, 2])) == 2
