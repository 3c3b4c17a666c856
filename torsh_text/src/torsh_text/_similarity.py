"""Similarity of vectors, and exact search and mining with bounded memory."""

import math
import warnings
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Metric = Literal["cosine", "dot"]
_BLOCK_BYTES = 64 * 2**20
_PAIR_BLOCK = 2048


class SearchResult(NamedTuple):
    """Best matches of each query, best first: ``scores, ids = search(...)``.

    ``scores`` are float32, ``ids`` are rows of the corpus (int64); both are ``(queries, k)``, or
    ``(k,)`` for one query.
    """

    scores: Tensor
    ids: Tensor


def _tensor(x: Tensor | np.ndarray, name: str) -> Tensor:
    """The same memory as a tensor."""
    if isinstance(x, Tensor):
        return x
    if not isinstance(x, np.ndarray):
        raise TypeError(
            f"{name} is a {type(x).__name__}; pass a tensor or array of vectors (rows, dim)"
        )
    if x.dtype.kind not in "fiu" or not x.dtype.isnative:
        raise TypeError(f"{name} holds {x.dtype}; pass an array of floats, such as float32")
    if min(x.strides, default=0) < 0:  # torch has no such views
        x = x.copy()
    with warnings.catch_warnings():  # a read-only array, such as a map of a file, is only read
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(x)


def _vectors(x: Tensor | np.ndarray, name: str) -> Tensor:
    x = _tensor(x, name)
    if x.ndim not in (1, 2):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected (rows, dim) or (dim,)")
    return x.unsqueeze(0) if x.ndim == 1 else x


def _prepared(x: Tensor, metric: str) -> Tensor:
    if metric not in ("cosine", "dot"):
        raise ValueError(f"metric={metric!r} is neither 'cosine' nor 'dot'")
    x = x if x.dtype == torch.float64 else x.float()
    return F.normalize(x, dim=-1) if metric == "cosine" else x


def _check_finite(x: Tensor, name: str, block: int) -> None:
    """Refuse a row that is not finite, block by block."""
    for start in range(0, len(x), block):
        finite = x[start : start + block].isfinite().all(1)
        if not bool(finite.all()):
            raise ValueError(f"{name}[{start + int((~finite).nonzero()[0])}] is not finite")


def similarity(a: Tensor | np.ndarray, b: Tensor | np.ndarray, metric: Metric = "cosine") -> Tensor:
    """Compare every vector of ``a`` with every vector of ``b``; gradients flow.

    Computed in float32 (float64 if the input is), whatever the input's precision.

    Args:
        a: ``(rows, dim)`` or ``(dim,)``, a tensor or a numpy array.
        b: ``(other, dim)`` or ``(dim,)``, likewise.
        metric: ``"cosine"`` (0 for a zero vector) or ``"dot"``.

    Returns:
        ``(rows, other)``; an axis is missing where one vector was given.

    Example:
        >>> similarity(torch.tensor([3.0, 4.0]), torch.tensor([[4.0, 3.0], [0.0, 1.0]])).tolist()
        [0.96..., 0.80...]
    """
    left, right = _vectors(a, "a"), _vectors(b, "b")
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"a has {left.shape[1]} entries a vector, b has {right.shape[1]}")
    scores = _prepared(left, metric) @ _prepared(right, metric).T
    scores = scores.squeeze(1) if b.ndim == 1 else scores
    return scores.squeeze(0) if a.ndim == 1 else scores


@torch.no_grad()
def search(
    queries: Tensor | np.ndarray,
    corpus: Tensor | np.ndarray,
    k: int,
    *,
    metric: Metric = "cosine",
    block: int | None = None,
) -> SearchResult:
    """Find the ``k`` best rows of a corpus for each query, exactly.

    The corpus is scored block by block and each block is merged into the best so far, so memory
    does not grow with the corpus; it may stay on the CPU (or in a memory-mapped array, or in
    half precision) while the queries are on a GPU. Scores are computed in float32. Among equal
    scores that are returned, the lower row comes first.

    Args:
        queries: ``(queries, dim)`` or ``(dim,)``, a tensor or a numpy array.
        corpus: ``(rows, dim)``, likewise.
        k: How many; 1 to ``rows``.
        metric: ``"cosine"`` or ``"dot"``.
        block: Rows scored at a time; None for as many as keep a block's scores and vectors under
            64 MiB each.

    Returns:
        Scores and rows, tensors on the device of the queries.

    Raises:
        TypeError: If ``queries`` or ``corpus`` is neither a tensor nor an array of numbers.
        ValueError: If an option does not fit, or a vector is not finite.

    Example:
        >>> corpus = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        >>> search(torch.tensor([1.0, 0.1]), corpus, k=2).ids.tolist()
        [1, 2]
    """
    left, right = _vectors(queries, "queries"), _vectors(corpus, "corpus")
    if left.shape[1] != right.shape[1]:
        raise ValueError(
            f"queries have {left.shape[1]} entries a vector, the corpus has {right.shape[1]}"
        )
    if not 1 <= k <= len(right):
        raise ValueError(f"k={k} is not between 1 and the {len(right)} rows of the corpus")
    if block is None:
        widest = max(len(left), right.shape[1], 1)
        block = max(1, _BLOCK_BYTES // (4 * widest))
    elif block < 1:
        raise ValueError(f"block={block} is not positive")
    _check_finite(left, "queries", block)
    left = _prepared(left, metric)
    suspect = torch.zeros((), dtype=torch.bool, device=left.device)
    scores = left.new_empty(len(left), 0)
    ids = torch.empty(len(left), 0, dtype=torch.int64, device=left.device)
    for start in range(0, len(right), block):
        part = _prepared(right[start : start + block].to(left.device), metric).to(left.dtype)
        tile = left @ part.T
        suspect |= ~tile.sum().isfinite()  # less to read than the corpus; looked at in the end
        best, where = tile.topk(min(k, len(part)), dim=1)
        scores = torch.cat([scores, best], dim=1)
        ids = torch.cat([ids, where + start], dim=1)
        # by row first, then stably by score: equal scores keep the lower row in front
        ids, order = ids.sort(dim=1)
        scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
        scores, ids = scores[:, :k], ids.gather(1, order)[:, :k]
    if bool(suspect):  # or a sum that overflowed
        _check_finite(right, "corpus", block)
    if queries.ndim == 1:
        return SearchResult(scores[0], ids[0])
    return SearchResult(scores, ids)


class MinedPairs(NamedTuple):
    """Pairs of rows, most similar first: ``scores, ids = mine_pairs(...)``.

    ``scores`` are float32 ``(pairs,)``; ``ids`` are rows, int64 ``(pairs, 2)``, the lower first.
    Equal scores are ordered by the rows.
    """

    scores: Tensor
    ids: Tensor


def _best_pairs(scores: Tensor, ids: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    """Order pairs by score, then by rows, and keep the first ``k``."""
    for column in (1, 0):
        order = ids[:, column].argsort(stable=True)
        scores, ids = scores[order], ids[order]
    scores, order = scores.sort(descending=True, stable=True)
    return scores[:k], ids[order[:k]]


@torch.no_grad()
def mine_pairs(
    x: Tensor | np.ndarray,
    *,
    threshold: float | None = None,
    k: int | None = None,
    metric: Metric = "cosine",
    block: int | None = None,
) -> MinedPairs:
    """Find the most similar pairs among all rows, exactly; each pair comes once.

    All ``rows * (rows - 1) / 2`` pairs are scored, a square block at a time, so beyond the result
    memory is that of two blocks (with ``threshold`` alone, the result may be large). ``x`` may be
    a memory-mapped array or in half precision; scores are computed in float32 (float64 if ``x``
    is).

    Args:
        x: ``(rows, dim)``, a tensor or a numpy array.
        threshold: Least score of a pair.
        k: Most pairs; at least one of ``threshold`` and ``k`` has to be given.
        metric: ``"cosine"`` (0 for a zero vector) or ``"dot"``.
        block: Rows and columns scored at a time; None for 2,048.

    Returns:
        Scores and pairs of rows, tensors on the device of ``x``.

    Raises:
        TypeError: If ``x`` is neither a tensor nor an array of numbers.
        ValueError: If an option does not fit, or a vector is not finite.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [0.1, 3.0]])
        >>> mine_pairs(x, threshold=0.9).ids.tolist()
        [[1, 3], [0, 2]]
        >>> mine_pairs(x, k=3).ids[2].tolist()
        [2, 3]
    """
    x = _tensor(x, "x")
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (rows, dim)")
    if threshold is None and k is None:
        raise ValueError("neither threshold nor k is given: all pairs would be kept; give one")
    if threshold is not None and math.isnan(threshold):
        raise ValueError("threshold is not a number")
    if k is not None and k < 1:
        raise ValueError(f"k={k} is not positive")
    if block is not None and block < 1:
        raise ValueError(f"block={block} is not positive")
    block = block or _PAIR_BLOCK
    _check_finite(x, "x", block)
    scores = _prepared(x[:0], metric).flatten()
    ids = torch.empty(0, 2, dtype=torch.int64, device=x.device)
    kept: list[tuple[Tensor, Tensor]] = []
    floor = -math.inf if threshold is None else threshold
    for top in range(0, len(x), block):
        left = _prepared(x[top : top + block], metric)
        for start in range(top, len(x), block):
            part = left if start == top else _prepared(x[start : start + block], metric)
            tile = left @ part.T
            wanted = tile >= floor
            if start == top:
                wanted = wanted.triu(1)
            where = wanted.nonzero()
            if not len(where):
                continue
            found = tile[wanted]
            kept.append((found, where + where.new_tensor([top, start])))
            if k is not None and sum(len(part) for part, _ in kept) >= k:
                scores = torch.cat([scores, *(part for part, _ in kept)])
                ids = torch.cat([ids, *(part for _, part in kept)])
                scores, ids = _best_pairs(scores, ids, k)
                kept.clear()
                if len(scores) == k:
                    floor = max(floor, float(scores[-1]))
    scores = torch.cat([scores, *(part for part, _ in kept)])
    ids = torch.cat([ids, *(part for _, part in kept)])
    return MinedPairs(*_best_pairs(scores, ids, k))
