import pytest
import torch
from scipy.cluster.hierarchy import linkage

from torsh_text._topic_merging import merge_topics


def test_merges_are_those_of_ward():
    """Parts of one document each: SciPy's linkage says which merge, in order."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    groups, merges = merge_topics([(i,) for i in range(12)], x, [1] * 12, 1)
    assert groups == [tuple(range(12))]
    members = {i: {i} for i in range(12)}
    for step, (a, b, *_) in enumerate(linkage(x.numpy(), "ward")):
        members[12 + step] = members[int(a)] | members[int(b)]
        assert {frozenset(merges[step].first), frozenset(merges[step].second)} == {
            frozenset(members[int(a)]),
            frozenset(members[int(b)]),
        }


def test_weights_and_similarity_by_hand():
    totals = torch.tensor([[10.0, 0.0], [0.0, 1.0], [3.0, 4.0]], dtype=torch.float64)
    # adding costs: 10/11 * 2 = 1.8; 50/15 * 0.8 = 2.7; 5/6 * (0.36 + 0.04) = 0.3
    groups, (merge,) = merge_topics([(0,), (1,), (2,)], totals, [10, 1, 5], 2)
    assert groups == [(0,), (1, 2)]
    assert (merge.first, merge.second) == ((2,), (1,))  # the larger first
    assert merge.similarity == pytest.approx(0.8)


def test_merging_goes_on_from_merged_topics():
    totals = torch.randn(6, 3, dtype=torch.float64)
    sizes = [5, 4, 3, 2, 2, 1]
    whole = merge_topics([(i,) for i in range(6)], totals, sizes, 2)
    half = merge_topics([(i,) for i in range(6)], totals, sizes, 4)
    rest = merge_topics(half[0], totals, sizes, 2)
    assert rest[0] == whole[0]
    steps = half[1] + rest[1]
    assert [(m.first, m.second) for m in steps] == [(m.first, m.second) for m in whole[1]]
    assert merge_topics([(0,), (1,)], totals, sizes, 2) == ([(0,), (1,)], [])
