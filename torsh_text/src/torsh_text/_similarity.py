"""Similarity of vectors, and exact search with bounded memory."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Metric = Literal["cosine", "dot"]
_BLOCK_BYTES = 64 * 2**20


class SearchResult(NamedTuple):
    """Best matches of each query, best first: ``scores, ids = search(...)``.

    ``scores`` are float32, ``ids`` are rows of the corpus (int64); both are ``(queries, k)``, or
    ``(k,)`` for one query.
    """

    scores: Tensor
    ids: Tensor


def _vectors(x: Tensor, name: str) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; pass a tensor of vectors (rows, dim)")
    if x.ndim not in (1, 2):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected (rows, dim) or (dim,)")
    return x.unsqueeze(0) if x.ndim == 1 else x


def _prepared(x: Tensor, metric: str) -> Tensor:
    if metric not in ("cosine", "dot"):
        raise ValueError(f"metric={metric!r} is neither 'cosine' nor 'dot'")
    x = x if x.dtype == torch.float64 else x.float()
    return F.normalize(x, dim=-1) if metric == "cosine" else x


def similarity(a: Tensor, b: Tensor, metric: Metric = "cosine") -> Tensor:
    """Compare every vector of ``a`` with every vector of ``b``; gradients flow.

    Computed in float32 (float64 if the input is), whatever the input's precision.

    Args:
        a: ``(rows, dim)`` or ``(dim,)``.
        b: ``(other, dim)`` or ``(dim,)``.
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
    queries: Tensor,
    corpus: Tensor,
    k: int,
    *,
    metric: Metric = "cosine",
    block: int | None = None,
) -> SearchResult:
    """Find the ``k`` best rows of a corpus for each query, exactly.

    The corpus is scored block by block and each block is merged into the best so far, so memory
    does not grow with the corpus; it may stay on the CPU (or in a memory-mapped tensor, or in
    half precision) while the queries are on a GPU. Scores are computed in float32. Among equal
    scores that are returned, the lower row comes first.

    Args:
        queries: ``(queries, dim)`` or ``(dim,)``.
        corpus: ``(rows, dim)``.
        k: How many; 1 to ``rows``.
        metric: ``"cosine"`` or ``"dot"``.
        block: Rows scored at a time; None for as many as keep a block's scores and vectors under
            64 MiB each.

    Returns:
        Scores and rows, on the device of the queries.

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
    left = _prepared(left, metric)
    scores = left.new_empty(len(left), 0)
    ids = torch.empty(len(left), 0, dtype=torch.int64, device=left.device)
    for start in range(0, len(right), block):
        part = _prepared(right[start : start + block].to(left.device), metric).to(left.dtype)
        best, where = (left @ part.T).topk(min(k, len(part)), dim=1)
        scores = torch.cat([scores, best], dim=1)
        ids = torch.cat([ids, where + start], dim=1)
        # by row first, then stably by score: equal scores keep the lower row in front
        ids, order = ids.sort(dim=1)
        scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
        scores, ids = scores[:, :k], ids.gather(1, order)[:, :k]
    if queries.ndim == 1:
        return SearchResult(scores[0], ids[0])
    return SearchResult(scores, ids)
