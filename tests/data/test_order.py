import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from torsh_data._order import Order, effective_batch


def is_permutation(ids, rows):
    return len(ids) == rows and (np.bincount(ids, minlength=rows) == 1).all()


def test_every_size_to_3000_is_a_permutation():
    for rows in range(1, 3001):
        assert is_permutation(Order(rows, rows, rows)(0, np.arange(rows)), rows), rows


def test_every_third_size_to_3000_is_a_permutation_in_windows():
    random = np.random.default_rng(0)
    for rows in range(1, 3001, 3):
        window, block = int(random.integers(1, rows + 1)), int(random.integers(1, 70))
        ids = Order(rows, rows, window, block)(1, np.arange(rows))
        assert is_permutation(ids, rows), (rows, window, block)


@settings(max_examples=5, deadline=None)
@given(
    rows=st.integers(3001, 10_000_000),
    block=st.integers(1, 5000),
    share=st.floats(0.001, 1.2),
    epoch=st.integers(0, 1000),
)
def test_large_sizes_are_permutations(rows, block, share, epoch):
    order = Order(rows, 7, max(1, int(share * rows)), block)
    assert is_permutation(order(epoch, np.arange(rows)), rows)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**12), st.data())
def test_a_place_does_not_depend_on_what_is_asked_with_it(rows, data):
    order = Order(rows, 3, data.draw(st.integers(1, rows)), data.draw(st.integers(1, 10_000)))
    places = np.array(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=20)))
    alone = [int(order(2, place[None])[0]) for place in places]
    assert order(2, places).tolist() == alone
    assert 0 <= min(alone) <= max(alone) < rows


def test_no_window_is_no_shuffle():
    assert Order(10)(5, np.arange(10)).tolist() == list(range(10))


def test_epochs_and_seeds_have_their_own_orders():
    orders = [Order(1000, s, 300, 10)(e, np.arange(1000)) for s in (0, 1) for e in (0, 1)]
    for i in range(4):
        for j in range(i):
            assert (orders[i] == orders[j]).mean() < 0.02


def test_the_order_of_a_seed_is_for_ever():
    # saved positions mean nothing if a new version orders differently
    assert Order(20, 0, 20)(0, np.arange(20)).tolist() == GOLDEN_UNIFORM
    assert Order(20, 0, 8, 2)(0, np.arange(20)).tolist() == GOLDEN_WINDOWS


GOLDEN_UNIFORM = [6, 12, 14, 8, 10, 5, 16, 15, 3, 19, 13, 17, 7, 1, 11, 9, 18, 0, 4, 2]
GOLDEN_WINDOWS = [6, 16, 11, 2, 3, 0, 10, 17, 13, 18, 5, 7, 19, 1, 14, 12, 8, 4, 15, 9]


@pytest.mark.parametrize("rows", [2, 3, 5, 12, 64])
def test_each_sample_is_equally_likely_at_each_place(rows):
    seeds = 3000
    counts = np.zeros((rows, rows))
    for seed in range(seeds):
        counts[np.arange(rows), Order(rows, seed, rows)(0, np.arange(rows))] += 1
    expected = seeds / rows
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert stats.chi2((rows - 1) ** 2).sf(chi2) > 1e-3


def test_successive_places_of_a_shuffle_are_unrelated():
    ids = Order(100_000, 4, 100_000)(0, np.arange(100_000))
    steps = np.diff(ids) % 100_000
    counts = np.histogram(steps, bins=100, range=(0, 100_000))[0]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_a_window_bounds_what_is_in_use_at_once():
    order = Order(65_536, 0, 4096, 64)
    ids = order(0, np.arange(65_536))
    for start in range(0, 65_536 - 2048, 2048):
        blocks = np.unique(ids[start : start + 2048] // 64)
        assert len(blocks) <= 2 * 4096 // 64


def test_neighbouring_windows_mix():
    order = Order(65_536, 0, 4096, 64)
    ids = order(0, np.arange(65_536))
    in_use = [set((ids[s : s + 4096] // 64).tolist()) for s in range(0, 65_536, 4096)]
    for a, b in pairwise(in_use):
        assert len(a & b) > 32  # half a window in common would be all 64 blocks


def worth(order, values, epochs=12):
    """What a batch of 256 is worth as a sample of `values`, whose mean is 0."""
    means = [
        values[order(epoch, np.arange(order.rows))].reshape(-1, 256).mean(1)
        for epoch in range(epochs)
    ]
    return np.mean(values**2) / np.mean(np.square(means))


def test_a_batch_from_an_eighth_of_the_data_is_worth_as_much_as_one_from_all_of_it():
    # Each window has its share of every 64th of the data, so what is left of the variance is that
    # of a batch from one window: 256 (1 - 1/16), and 1/64^2 for the place within a 64th. 12 epochs
    # measure the mean to about 10 percent.
    order = Order(65_536, 0, 4096, 64)
    measured = 1 / np.mean([1 / effective_batch(order, 256, 256, epoch) for epoch in range(12)])
    assert 200 < measured < 320
    assert effective_batch(Order(65_536), 256) < 1.1


def test_what_is_stored_in_short_runs_is_mixed_as_well_as_its_blocks_allow():
    # Runs of one block: 256 rows from 128 random blocks of 1024 are worth
    # 1 / ((1 - 1/8) / 128 + (1 - 1/32) / 256) = 94.
    order = Order(65_536, 0, 4096, 64)
    noise = np.random.default_rng(0).standard_normal(1024)
    assert 65 < worth(order, np.repeat(noise - noise.mean(), 64)) < 125
    tenth = np.arange(65_536) * 10 // 65_536 == 3
    assert worth(order, tenth - tenth.mean()) > 170


@pytest.mark.parametrize("strata", [2, 7, 40])
def test_a_window_has_one_block_of_each_part_of_the_data(strata):
    windows = 9
    order = Order(strata * windows * 8, 0, strata * 8, 8)
    for epoch in range(20):
        ids = order(epoch, np.arange(strata * 4))  # the first half window is of one window alone
        blocks = np.unique(ids // 8)
        assert len(blocks) > strata / 2
        assert len(np.unique(blocks // windows)) == len(blocks)


def test_the_billionth_sample_is_found_at_once_in_little_memory():
    order = Order(10**9, 0, 2_000_000, 4000)
    tracemalloc.start()
    order(3, np.arange(8192) + 987_654_321)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6  # a materialised order takes 8 GB
