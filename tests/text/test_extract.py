import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torsh_text import facility_location, lexrank, mmr


def cosines(rows, dim=6, seed=0, dtype=torch.float32):
    x = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    x = torch.nn.functional.normalize(x, dim=1)
    return x @ x.T


def dense_lexrank(similarity, damping, threshold=None):
    """The stationary distribution as the solution of a linear system in float64."""
    weights = similarity.double()
    weights = weights.clamp_min(0) if threshold is None else (weights > threshold).double()
    n = len(weights)
    totals = weights.sum(1, keepdim=True)
    steps = torch.where(totals > 0, weights / totals.clamp_min(1e-300), 1 / n)
    right = torch.full((n,), (1 - damping) / n, dtype=torch.float64)
    return torch.linalg.solve(torch.eye(n, dtype=torch.float64) - damping * steps.T, right)


@pytest.mark.parametrize("rows", [1, 2, 7, 60])
@pytest.mark.parametrize("threshold", [None, 0.1, 0.9])
@pytest.mark.parametrize("damping", [0.0, 0.5, 0.85, 0.99])
def test_lexrank_is_the_stationary_distribution(rows, threshold, damping):
    similarity = cosines(rows)
    scores = lexrank(similarity, threshold=threshold, damping=damping)
    expected = dense_lexrank(similarity, damping, threshold)
    # tol=1e-6 in total, and float32 rounding of up to 1,400 steps
    assert (scores - expected).abs().sum() < 1e-5
    assert scores.sum().item() == pytest.approx(1, abs=1e-5)
    double = lexrank(similarity.double(), threshold=threshold, damping=damping, tol=1e-13)
    assert (double - expected).abs().sum() < 1e-12


def test_lexrank_by_hand():
    # rows 0 and 2 go to themselves with 2/3 and to row 1 with 1/3; p1 = 1/6 + (p1/2 + 2 p0/3) / 2
    s = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.5], [0.0, 0.5, 1.0]])
    assert lexrank(s, damping=0.5).tolist() == pytest.approx([7 / 22, 8 / 22, 7 / 22], abs=1e-6)


def test_lexrank_of_odd_input():
    assert lexrank(torch.empty(0, 0)).shape == (0,)
    zeros = lexrank(torch.zeros(4, 4))
    assert zeros.tolist() == pytest.approx([0.25] * 4)
    assert lexrank(cosines(5).half()).dtype == torch.float32
    similarity = cosines(5).requires_grad_()
    lexrank(similarity)[0].backward()
    assert similarity.grad.abs().sum() > 0


def greedy_mmr(relevance, similarity, k, diversity):
    chosen = []
    for _ in range(k):
        best = max(
            (i for i in range(len(relevance)) if i not in chosen),
            key=lambda i: (
                (1 - diversity) * relevance[i]
                - diversity * max((similarity[i][j] for j in chosen), default=0.0),
                -i,
            ),
        )
        chosen.append(best)
    return chosen


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.data())
def test_mmr_is_the_greedy_definition(rows, data):
    k = data.draw(st.integers(0, rows))
    diversity = data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    similarity = cosines(rows, seed=data.draw(st.integers(0, 99)), dtype=torch.float64)
    relevance = similarity.mean(1)
    ids, gains = mmr(relevance, similarity, k, diversity=diversity)
    assert ids.tolist() == greedy_mmr(relevance.tolist(), similarity.tolist(), k, diversity)
    assert gains.shape == (k,)
    if diversity == 0:
        assert gains.tolist() == pytest.approx(sorted(relevance.tolist(), reverse=True)[:k])


def coverage(similarity, chosen):
    return similarity.clamp_min(0)[:, list(chosen)].amax(1).sum().item() if chosen else 0.0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.data())
def test_facility_location_keeps_its_bound(rows, data):
    k = data.draw(st.integers(1, rows))
    similarity = cosines(rows, dim=3, seed=data.draw(st.integers(0, 999)), dtype=torch.float64)
    ids, gains = facility_location(similarity, k)
    assert len(set(ids.tolist())) == k
    reached = coverage(similarity, ids.tolist())
    best = max(coverage(similarity, c) for c in itertools.combinations(range(rows), k))
    assert best * (1 - 1 / math.e) <= reached <= best + 1e-12
    assert gains.sum().item() == pytest.approx(reached)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(gains.tolist()))
    if k == 1:
        assert reached == pytest.approx(best)


def test_near_copies_are_not_chosen_twice():
    x = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.0], [1.0, 0.01], [1.0, 0.02], [0.0, 1.0]]), dim=1
    )
    similarity = x @ x.T
    assert 3 in facility_location(similarity, 2).ids.tolist()
    assert 3 in mmr(torch.tensor([1.0, 1.0, 1.0, 0.4]), similarity, 2, diversity=0.5).ids.tolist()
    assert 3 not in mmr(torch.tensor([1.0, 1.0, 1.0, 0.4]), similarity, 2, diversity=0.1).ids


def test_bad_arguments():
    square = torch.eye(3)
    with pytest.raises(ValueError, match=r"similarity has shape \(3, 2\); expected \(rows, rows\)"):
        lexrank(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"damping=1.0 is not in \[0, 1\)"):
        lexrank(square, damping=1.0)
    with pytest.raises(ValueError, match=r"tol=0 is not positive"):
        lexrank(square, tol=0)
    with pytest.raises(ValueError, match=r"relevance has shape \(2,\); similarity asks for \(3,\)"):
        mmr(torch.zeros(2), square, 1)
    with pytest.raises(ValueError, match=r"diversity=1.5 is not in \[0, 1\]"):
        mmr(torch.zeros(3), square, 1, diversity=1.5)
    with pytest.raises(ValueError, match=r"k=4 is not between 0 and the 3 rows"):
        facility_location(square, 4)
