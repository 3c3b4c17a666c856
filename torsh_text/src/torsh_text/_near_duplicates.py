"""Vectors or texts that are almost the same."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ._arrays import as_tensor
from ._quantized import QuantizedVectors
from ._similarity import check_finite, mine_pairs
from ._terms import words_of
from ._tokenizing import checked_texts

_CHECKED_ROWS = 65_536


@dataclass(frozen=True)
class Duplicates:
    """Which rows nearly repeat others.

    Attributes:
        pairs: Rows that are alike, the lower first, int64 ``(pairs, 2)``; most similar first.
            Of rows that are exactly equal only the first takes part in other pairs; each of the
            others is paired with it.
        scores: Similarity of each pair ``(pairs,)``; 1 for equal rows.
        first: The first row of each row's group, int64 ``(rows,)``; a row that is alone is its
            own. Rows are in one group if pairs lead from one to the other.
    """

    pairs: Tensor
    scores: Tensor
    first: Tensor

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """Rows of each group of two or more, ascending; groups by their first row."""
        found: dict[int, list[int]] = {}
        for row, first in enumerate(self.first.tolist()):
            found.setdefault(first, []).append(row)
        return [tuple(rows) for rows in found.values() if len(rows) > 1]

    @property
    def kept(self) -> Tensor:
        """One row of each group, the first, and all rows that are alone; int64 ``(kept,)``."""
        rows = torch.arange(len(self.first), device=self.first.device)
        return rows[self.first == rows]


def _components(count: int, pairs: Iterable[Sequence[int]]) -> list[int]:
    """Return the lowest row that each row is connected with."""
    parent = list(range(count))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return [root(row) for row in range(count)]


def _first_of_equals(x: Tensor) -> Tensor:
    """Row of the first vector that equals each one."""
    _, group = torch.unique(x, dim=0, return_inverse=True)
    rows = torch.arange(len(x), device=x.device)
    first = torch.full_like(rows, len(x)).scatter_reduce(0, group, rows, "amin")
    return first[group]


def _as_bytes(x: QuantizedVectors) -> Tensor:
    """Codes and scales side by side, ``(rows, bytes)``."""
    if x.scales is None:
        return x.codes
    return torch.cat([x.codes, x.scales.unsqueeze(1).view(torch.int8)], 1)


def _grams(text: str, n: int) -> frozenset[str]:
    if len(text) <= n:
        return frozenset([text])
    return frozenset(text[i : i + n] for i in range(len(text) - n + 1))


def _similar_sets(sets: list[frozenset[str]], threshold: float) -> list[tuple[float, int, int]]:
    """Return all pairs of sets with at least this Jaccard similarity.

    Sets that are so alike share an element among the rarest few of each: only those are looked
    up, and what they find is counted in full.
    """
    frequency: dict[str, int] = {}
    for members in sets:
        for gram in members:
            frequency[gram] = frequency.get(gram, 0) + 1
    rank = {gram: i for i, gram in enumerate(sorted(frequency, key=lambda g: (frequency[g], g)))}
    rows = [np.sort(np.fromiter((rank[g] for g in members), np.int64)) for members in sets]
    holders: dict[int, list[int]] = {}
    found: list[tuple[float, int, int]] = []
    # shortest first: a row then looks among rows that are no longer than itself
    for row in sorted(range(len(rows)), key=lambda i: (len(rows[i]), i)):
        mine = rows[row]
        # 1e-9: a product that rounding put above a whole number must not shorten the prefix
        least = math.ceil(threshold * len(mine) - 1e-9)
        prefix = mine[: len(mine) - least + 1].tolist()
        others = {other for gram in prefix for other in holders.get(gram, ())}
        for other in others:
            if len(rows[other]) < least:
                continue
            both = len(np.intersect1d(mine, rows[other], assume_unique=True))
            score = both / (len(mine) + len(rows[other]) - both)
            if score >= threshold:
                found.append((score, min(row, other), max(row, other)))
        for gram in prefix:
            holders.setdefault(gram, []).append(row)
    return found


def _similar_texts(texts: list[str], threshold: float, n: int) -> tuple[Tensor, Tensor, list[int]]:
    plain = [" ".join(words_of(text)) or text.strip() for text in texts]
    unique: dict[str, int] = {}
    where = [unique.setdefault(text, row) for row, text in enumerate(plain)]
    rows = list(unique.values())
    similar = _similar_sets([_grams(text, n) for text in unique], threshold)
    found = [(score, rows[a], rows[b]) for score, a, b in similar]
    found.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    pairs = torch.tensor([pair[1:] for pair in found], dtype=torch.int64).reshape(-1, 2)
    return pairs, torch.tensor([pair[0] for pair in found]), where


def near_duplicates(
    x: Tensor | np.ndarray | QuantizedVectors | Iterable[str],
    threshold: float | None = None,
    *,
    ngram: int | None = None,
    block: int | None = None,
) -> Duplicates:
    """Find rows that are almost the same, exactly: every pair above the threshold is found.

    Vectors (:meth:`Encoder.encode`) find texts that say the same; similarity is the cosine, all
    pairs are scored block by block, as in :func:`mine_pairs`. Texts themselves find copies with
    small changes, without a model; similarity is Jaccard's, of the sets of character n-grams of
    their lower-case words, and a prefix filter leaves out pairs that cannot reach the threshold.

    Args:
        x: Vectors ``(rows, dim)``, as a tensor, a numpy array or :class:`QuantizedVectors`; or
            texts.
        threshold: Least similarity, above 0 and at most 1; None for 0.95 with vectors and 0.8
            with texts.
        ngram: Characters of an n-gram, for texts; None for 5. A shorter text is one n-gram.
        block: As for :func:`mine_pairs`, for vectors.

    Raises:
        TypeError: If ``x`` is neither vectors nor texts.
        ValueError: If an option does not fit, or a vector is not finite.

    Example:
        >>> texts = ["Shares fell on Monday.", "Rain is expected.", "shares fell on monday"]
        >>> found = near_duplicates(texts)
        >>> found.groups, found.kept.tolist()
        ([(0, 2)], [0, 1])
        >>> near_duplicates(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])).groups
        [(0, 1)]

    Reference:
        Bayardo, Ma and Srikant, "Scaling Up All Pairs Similarity Search", 2007 (prefixes by
        rarity); Broder, "On the resemblance and containment of documents", 1997 (shingles).
    """
    if isinstance(x, np.ndarray) and x.dtype.kind not in "OUT":
        x = as_tensor(x, "x")
    vectors = isinstance(x, Tensor | QuantizedVectors)
    if threshold is None:
        threshold = 0.95 if vectors else 0.8
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} is not above 0 and at most 1")
    if isinstance(x, Tensor | QuantizedVectors):
        if ngram is not None:
            raise ValueError(f"ngram={ngram} is for texts, x holds vectors")
        if x.ndim != 2 or not x.shape[1]:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected (rows, dim)")
        check_finite(x, "x", _CHECKED_ROWS)
        first = _first_of_equals(x if isinstance(x, Tensor) else _as_bytes(x))
        rows = torch.arange(len(x), device=x.device)
        unique = rows[first == rows]
        found = mine_pairs(x[unique], threshold=threshold, block=block)
        pairs, scores, where = unique[found.pairs], found.scores, first.tolist()
    else:
        if block is not None:
            raise ValueError(f"block={block} is for vectors, x holds texts")
        if ngram is not None and ngram < 1:
            raise ValueError(f"ngram={ngram} is not positive")
        pairs, scores, where = _similar_texts(checked_texts(x), threshold, ngram or 5)
    equal = [(first, row) for row, first in enumerate(where) if first != row]
    stars = torch.tensor(equal, dtype=torch.int64, device=pairs.device).reshape(-1, 2)
    pairs = torch.cat([stars, pairs])
    scores = torch.cat([scores.new_ones(len(equal)), scores])
    roots = _components(len(where), pairs.tolist())
    return Duplicates(pairs, scores, torch.tensor(roots, dtype=torch.int64, device=pairs.device))
