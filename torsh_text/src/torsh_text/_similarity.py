"""Similarity of vectors, and exact search and mining with bounded memory."""

import math
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ._arrays import as_tensor, rows_at_a_time
from ._quantized import QuantizedVectors, sign_products, values_and_factors

Metric = Literal["cosine", "dot"]
Vectors = Tensor | np.ndarray | QuantizedVectors
_SCORE_BYTES = 32 * 2**20
_PAIR_BLOCK = 2048
_FEW_QUERIES = 16  # beyond, unpacking bits once and multiplying is faster than counting them
_OVERSAMPLE = 4


class SearchResult(NamedTuple):
    """Best matches of each query, best first: ``scores, ids = search(...)``.

    ``scores`` are float32, ``ids`` are rows of the corpus (int64); both are ``(queries, k)``, or
    ``(k,)`` for one query, with as many columns as the corpus has rows if these are fewer.
    """

    scores: Tensor
    ids: Tensor


def _vectors(x: Vectors, name: str) -> Tensor | QuantizedVectors:
    if not isinstance(x, QuantizedVectors):
        x = as_tensor(x, name)
    if x.ndim not in (1, 2):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected (rows, dim) or (dim,)")
    if x.ndim == 2:
        return x
    if isinstance(x, Tensor):
        return x.unsqueeze(0)
    scales = None if x.scales is None else x.scales.unsqueeze(0)
    return QuantizedVectors(x.codes.unsqueeze(0), x.dim, scales)


def _check_metric(metric: str) -> None:
    if metric not in ("cosine", "dot"):
        raise ValueError(f"metric={metric!r} is neither 'cosine' nor 'dot'")


def _check_count(value: object, name: str) -> None:
    """Refuse what is neither None nor a positive integer."""
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is no integer")
    if value < 1:
        raise ValueError(f"{name}={value} is not positive")


def _prepared(x: Tensor, metric: str) -> Tensor:
    _check_metric(metric)
    x = x if x.dtype == torch.float64 else x.float()
    return F.normalize(x, dim=-1) if metric == "cosine" else x


class _Rows(NamedTuple):
    """Rows to multiply, and what their products are multiplied by afterwards."""

    matrix: Tensor
    factors: Tensor | None


def _rows(x: Tensor | QuantizedVectors, metric: str) -> _Rows:
    if isinstance(x, Tensor):
        return _Rows(_prepared(x, metric), None)
    _check_metric(metric)
    return _Rows(*values_and_factors(x, metric))


def _products(left: _Rows, right: _Rows) -> Tensor:
    products = left.matrix @ right.matrix.to(left.matrix.dtype).T
    return _scaled(products, left.factors, right.factors)


def _scaled(products: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    products = products if right is None else products * right
    return products if left is None else products * left.unsqueeze(1)


def check_finite(x: Tensor | QuantizedVectors, name: str, block: int) -> None:
    """Refuse a row that is not finite, block by block."""
    if isinstance(x, QuantizedVectors):
        if x.scales is None:
            return
        x = x.scales.unsqueeze(1)
    for start in range(0, len(x), block):
        finite = x[start : start + block].isfinite().all(1)
        if not bool(finite.all()):
            raise ValueError(f"{name}[{start + int((~finite).nonzero()[0])}] is not finite")


def similarity(a: Vectors, b: Vectors, metric: Metric = "cosine") -> Tensor:
    """Compare every vector of ``a`` with every vector of ``b``; gradients flow.

    Computed in float32 (float64 if the input is), whatever the input's precision. Quantized
    vectors are decoded as a whole; :func:`search` and :func:`mine_pairs` decode block by block.

    Args:
        a: ``(rows, dim)`` or ``(dim,)``, a tensor, a numpy array or :class:`QuantizedVectors`.
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
    scores = _products(_rows(left, metric), _rows(right, metric))
    scores = scores.squeeze(1) if b.ndim == 1 else scores
    return scores.squeeze(0) if a.ndim == 1 else scores


def _in_order(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Order by row first, then stably by score: equal scores keep the lower row in front."""
    ids, order = ids.sort(dim=1)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores[:, :k], ids.gather(1, order)[:, :k]


def _rescored(left: _Rows, ids: Tensor, finer: Tensor | QuantizedVectors, metric: str) -> Tensor:
    """Scores of each query with its own rows of ``finer``."""
    queries, count = ids.shape
    dim = left.matrix.shape[1]
    scores = left.matrix.new_empty(queries, count)
    block = max(1, rows_at_a_time(dim, left.matrix.device) // count)
    for start in range(0, queries, block):
        here = slice(start, start + block)
        part = finer[ids[here].flatten().to(finer.device)].to(left.matrix.device)
        matrix, factors = _rows(part, metric)
        matrix = matrix.to(left.matrix.dtype).view(-1, count, dim)
        products = (matrix @ left.matrix[here].unsqueeze(2)).squeeze(2)
        scores[here] = _scaled(
            products,
            None if left.factors is None else left.factors[here],
            None if factors is None else factors.view(-1, count),
        )
        if not bool(scores[here].sum().isfinite()):  # or a sum that overflowed
            for row in ids[here].flatten().tolist():
                check_finite(finer[row : row + 1], f"rescore[{row}:]", 1)
    return scores


@torch.no_grad()
def search(
    queries: Vectors,
    corpus: Vectors,
    k: int = 10,
    *,
    metric: Metric = "cosine",
    block: int | None = None,
    rescore: Vectors | None = None,
    candidates: int | None = None,
) -> SearchResult:
    """Find the ``k`` best rows of a corpus for each query, exactly.

    The corpus is scored block by block and each block is merged into the best so far, so memory
    does not grow with the corpus; it may stay on the CPU (or in a memory-mapped array, in half
    precision, or quantized) while the queries are on a GPU. Scores are computed in float32. Among
    equal scores that are returned, the lower row comes first.

    A quantized corpus is decoded block by block and gives the scores of its ``dequantize()``.
    Queries are best left as they are: whole queries against signs find more than signs against
    signs. If both are binary, scores are those of Hamming distances, ``dim - 2 * distance``.

    Args:
        queries: ``(queries, dim)`` or ``(dim,)``, a tensor, a numpy array or
            :class:`QuantizedVectors`.
        corpus: ``(rows, dim)``, likewise.
        k: How many; of a smaller corpus all its rows come back, ``min(k, rows)``.
        metric: ``"cosine"`` or ``"dot"``.
        block: Rows whose scores are held at a time; None for as many as keep them under 32 MiB.
        rescore: Finer vectors of the same rows, in float or int8, such as a memory-mapped array:
            the best ``candidates`` of the corpus are ranked again by their scores with these, and
            only those rows are read. Exact among the candidates.
        candidates: How many; None for ``4 * k``, at least ``k``.

    Returns:
        Scores and rows, tensors on the device of the queries.

    Raises:
        TypeError: If vectors are neither a tensor nor an array of numbers nor quantized, or ``k``
            is no integer.
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
    _check_count(k, "k")
    k = min(k, len(right))
    finer = None if rescore is None else _vectors(rescore, "rescore")
    if finer is None and candidates is not None:
        raise ValueError(f"candidates={candidates} is given without rescore; pass finer vectors")
    if finer is not None and tuple(finer.shape) != tuple(right.shape):
        raise ValueError(
            f"rescore has shape {tuple(finer.shape)}, the corpus has {tuple(right.shape)}"
        )
    if candidates is not None and candidates < k:
        raise ValueError(f"candidates={candidates} is less than k={k}")
    _check_count(block, "block")
    decoded = rows_at_a_time(right.shape[1], left.device)
    block = block or max(1, _SCORE_BYTES // (4 * max(len(left), 1)))
    check_finite(left, "queries", decoded)
    rows = _rows(left, metric)
    wanted = k if finer is None else min(candidates or _OVERSAMPLE * k, len(right))
    suspect = torch.zeros((), dtype=torch.bool, device=left.device)
    scores = rows.matrix.new_empty(len(left), 0)
    ids = torch.empty(len(left), 0, dtype=torch.int64, device=left.device)
    for start in range(0, len(right), block):
        end = min(start + block, len(right))
        cuts = [*range(start, end, decoded), end]
        parts = (right[a:b].to(left.device) for a, b in pairwise(cuts))
        tile = torch.cat([_tile(left, rows, part, metric) for part in parts], 1)
        suspect |= ~tile.sum().isfinite()  # less to read than the corpus; looked at in the end
        best, where = tile.topk(min(wanted, end - start), dim=1)
        scores, ids = torch.cat([scores, best], 1), torch.cat([ids, where + start], 1)
        scores, ids = _in_order(scores, ids, wanted)
    if bool(suspect):  # or a sum that overflowed
        check_finite(right, "corpus", decoded)
    if finer is not None and len(right):
        scores, ids = _in_order(_rescored(rows, ids, finer, metric), ids, k)
    if queries.ndim == 1:
        return SearchResult(scores[0], ids[0])
    return SearchResult(scores, ids)


def _tile(
    queries: Tensor | QuantizedVectors,
    rows: _Rows,
    part: Tensor | QuantizedVectors,
    metric: str,
) -> Tensor:
    """Scores of the queries, whose rows are prepared, with a part of the corpus."""
    if not (
        isinstance(queries, QuantizedVectors)
        and isinstance(part, QuantizedVectors)
        and queries.kind == part.kind == "binary"
        and queries.device.type == "cpu"
        and len(queries) <= _FEW_QUERIES
    ):
        return _products(rows, _rows(part, metric))
    products = sign_products(queries, part)
    return _scaled(products, rows.factors, None if rows.factors is None else rows.factors[:1])


class MinedPairs(NamedTuple):
    """Pairs of rows, most similar first: ``scores, pairs = mine_pairs(...)``.

    ``scores`` are float32 ``(pairs,)``; ``pairs`` are rows, int64 ``(pairs, 2)``, the lower first.
    Equal scores are ordered by the rows.
    """

    scores: Tensor
    pairs: Tensor


def _best_pairs(scores: Tensor, ids: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    """Order pairs by score, then by rows, and keep the first ``k``."""
    for column in (1, 0):
        order = ids[:, column].argsort(stable=True)
        scores, ids = scores[order], ids[order]
    scores, order = scores.sort(descending=True, stable=True)
    return scores[:k], ids[order[:k]]


@torch.no_grad()
def mine_pairs(
    x: Vectors,
    *,
    threshold: float | None = None,
    k: int | None = None,
    metric: Metric = "cosine",
    block: int | None = None,
) -> MinedPairs:
    """Find the most similar pairs among all rows, exactly; each pair comes once.

    All ``rows * (rows - 1) / 2`` pairs are scored, a square block at a time, so beyond the result
    memory is that of two blocks (with ``threshold`` alone, the result may be large). ``x`` may be
    a memory-mapped array, in half precision or quantized; scores are computed in float32 (float64
    if ``x`` is).

    Args:
        x: ``(rows, dim)``, a tensor, a numpy array or :class:`QuantizedVectors`.
        threshold: Least score of a pair.
        k: Most pairs; at least one of ``threshold`` and ``k`` has to be given.
        metric: ``"cosine"`` (0 for a zero vector) or ``"dot"``.
        block: Rows and columns scored at a time; None for 2,048.

    Returns:
        Scores and pairs of rows, tensors on the device of ``x``.

    Raises:
        TypeError: If ``x`` is neither a tensor nor an array of numbers nor quantized.
        ValueError: If an option does not fit, or a vector is not finite.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [0.1, 3.0]])
        >>> mine_pairs(x, threshold=0.9).pairs.tolist()
        [[1, 3], [0, 2]]
        >>> mine_pairs(x, k=3).pairs[2].tolist()
        [2, 3]
    """
    x = x if isinstance(x, QuantizedVectors) else as_tensor(x, "x")
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (rows, dim)")
    if threshold is None and k is None:
        raise ValueError("neither threshold nor k is given: all pairs would be kept; give one")
    if threshold is not None and math.isnan(threshold):
        raise ValueError("threshold is not a number")
    _check_count(k, "k")
    _check_count(block, "block")
    block = block or _PAIR_BLOCK
    check_finite(x, "x", block)
    scores = _rows(x[:0], metric).matrix.flatten()
    ids = torch.empty(0, 2, dtype=torch.int64, device=x.device)
    kept: list[tuple[Tensor, Tensor]] = []
    floor = -math.inf if threshold is None else threshold
    for top in range(0, len(x), block):
        left = _rows(x[top : top + block], metric)
        for start in range(top, len(x), block):
            tile = _products(
                left, left if start == top else _rows(x[start : start + block], metric)
            )
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
