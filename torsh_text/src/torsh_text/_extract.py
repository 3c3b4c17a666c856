"""Choosing sentences by their vectors: centrality, diversity, coverage."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Picks(NamedTuple):
    """Rows in the order they were chosen: ``ids, gains = mmr(...)``.

    ``ids`` are int64 ``(k,)``; ``gains`` ``(k,)`` are what each row added when it was chosen.
    """

    ids: Tensor
    gains: Tensor


def lexrank(
    similarity: Tensor, *, threshold: float | None = None, damping: float = 0.85, tol: float = 1e-6
) -> Tensor:
    """Rank rows by how much a random walk along their similarities visits them.

    With probability ``damping`` the walk goes on to a row in proportion to its similarity,
    otherwise to any row. Negative similarities count as none; a row similar to none goes anywhere.
    The number of steps is fixed beforehand from ``tol``, so nothing waits for the device, and
    gradients flow.

    Args:
        similarity: Symmetric ``(rows, rows)``, such as cosines with ones on the diagonal.
        threshold: Count every similarity above it as 1 and every other as 0, as in the paper; None
            walks along the similarities themselves (the paper's continuous LexRank).
        damping: Between 0 and 1. The paper's ``d`` is ``1 - damping``.
        tol: Largest total error of the result.

    Returns:
        Scores ``(rows,)`` that sum to 1.

    Example:
        A row that two others resemble is visited most:

        >>> s = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.5], [0.0, 0.5, 1.0]])
        >>> [round(score, 4) for score in lexrank(s, damping=0.5).tolist()]
        [0.3182, 0.3636, 0.3182]

    Reference:
        Erkan and Radev, "LexRank: Graph-based Lexical Centrality as Salience in Text
        Summarization", 2004, arXiv:1109.2128, with vectors of sentences instead of tf-idf.
    """
    rows = _square(similarity)
    if not 0 <= damping < 1:
        raise ValueError(f"damping={damping} is not in [0, 1)")
    if not tol > 0:
        raise ValueError(f"tol={tol} is not positive")
    if rows == 0:
        return similarity.new_zeros(0)
    weights = _floating(similarity)
    weights = weights.clamp_min(0) if threshold is None else (weights > threshold).to(weights.dtype)
    totals = weights.sum(1, keepdim=True)
    steps = torch.where(totals > 0, weights / totals.clamp_min(1e-30), 1 / rows)
    scores = weights.new_full((rows,), 1 / rows)
    # each step shrinks the distance to the answer, at most 2 at first, by the damping
    count = math.ceil(math.log(min(tol, 1) / 2) / math.log(damping)) if damping else 1
    for _ in range(count):
        scores = (1 - damping) / rows + damping * (scores @ steps)
    return scores


def mmr(relevance: Tensor, similarity: Tensor, k: int, *, diversity: float = 0.3) -> Picks:
    """Choose rows that are relevant and unlike those chosen before (maximal marginal relevance).

    Each choice is the row with the largest ``(1 - diversity) * relevance - diversity * (largest
    similarity to a chosen row)``; among equals the lowest row.

    Args:
        relevance: ``(rows,)``, best on the scale of the similarities.
        similarity: ``(rows, rows)``.
        k: How many; at most ``rows``.
        diversity: Between 0 (relevance alone) and 1.

    Example:
        Row 1 is nearly row 0, so row 2 goes first although it is less relevant:

        >>> s = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.1], [0.1, 0.1, 1.0]])
        >>> mmr(torch.tensor([0.9, 0.8, 0.5]), s, k=3, diversity=0.5).ids.tolist()
        [0, 2, 1]

    Reference:
        Carbonell and Goldstein, "The Use of MMR, Diversity-Based Reranking for Reordering
        Documents and Producing Summaries", 1998; their lambda is ``1 - diversity``.
    """
    rows = _square(similarity)
    if relevance.shape != (rows,):
        raise ValueError(
            f"relevance has shape {tuple(relevance.shape)}; similarity asks for ({rows},)"
        )
    check_diversity(diversity)
    _check_k(k, rows)
    relevance, similarity = _floating(relevance), _floating(similarity)
    closest = torch.zeros_like(relevance)
    free = torch.ones_like(relevance, dtype=torch.bool)
    ids: list[Tensor] = []
    gains: list[Tensor] = []
    for step in range(k):
        gain = (1 - diversity) * relevance - diversity * closest
        best = gain.where(free, -torch.inf).argmax()
        ids.append(best)
        gains.append(gain[best])
        free = free.scatter(0, best, False)
        closest = similarity[best] if step == 0 else torch.maximum(closest, similarity[best])
    return _picks(ids, gains, relevance)


def facility_location(similarity: Tensor, k: int) -> Picks:
    """Choose rows so that every row has a chosen one like it.

    Greedily enlarges the sum over all rows of the largest similarity to a chosen row (negative
    ones count as 0), which reaches at least ``1 - 1/e``, 63 %, of the best possible sum. Near
    copies gain nothing, so the choice is diverse by itself.

    Args:
        similarity: ``(rows, rows)``.
        k: How many; at most ``rows``.

    Returns:
        The rows, and how much each enlarged the sum: never more than the row before.

    Example:
        >>> s = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.2], [0.0, 0.2, 1.0]])
        >>> ids, gains = facility_location(s, k=2)
        >>> ids.tolist(), [round(gain, 4) for gain in gains.tolist()]  # 0.9 + 1 + 0.2, 1 - 0.2
        ([1, 2], [2.1, 0.8])

    Reference:
        Nemhauser, Wolsey and Fisher, "An analysis of approximations for maximizing submodular set
        functions", 1978; Lin and Bilmes, "A Class of Submodular Functions for Document
        Summarization", 2011.
    """
    rows = _square(similarity)
    _check_k(k, rows)
    weights = _floating(similarity).clamp_min(0)
    covered = weights.new_zeros(rows)
    free = torch.ones_like(covered, dtype=torch.bool)
    ids: list[Tensor] = []
    gains: list[Tensor] = []
    for _ in range(k):
        gain = (weights - covered.unsqueeze(1)).clamp_min(0).sum(0)
        best = gain.where(free, -torch.inf).argmax()
        ids.append(best)
        gains.append(gain[best])
        free = free.scatter(0, best, False)
        covered = torch.maximum(covered, weights[:, best])
    return _picks(ids, gains, covered)


def check_diversity(diversity: float) -> None:
    """Refuse what is not between 0 and 1."""
    if not 0 <= diversity <= 1:
        raise ValueError(f"diversity={diversity} is not in [0, 1]")


def _picks(ids: list[Tensor], gains: list[Tensor], like: Tensor) -> Picks:
    if not ids:
        return Picks(torch.empty(0, dtype=torch.int64, device=like.device), like.new_zeros(0))
    return Picks(torch.stack(ids), torch.stack(gains))


def _floating(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _square(similarity: Tensor) -> int:
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"similarity has shape {tuple(similarity.shape)}; expected (rows, rows)")
    return similarity.shape[0]


def _check_k(k: int, rows: int) -> None:
    if not 0 <= k <= rows:
        raise ValueError(f"k={k} is not between 0 and the {rows} rows")
