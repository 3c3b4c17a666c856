"""Topics as non-negative factors of term counts."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_NEEDS = "method='nmf' needs scikit-learn: pip install 'torsh-text[topics]'"


@dataclass(frozen=True)
class TermFactors:
    """Topics as mixtures of words, and what turns documents into rows of numbers.

    Attributes:
        vocabulary: Column of each word.
        rarity: Weight of each word, ``(words,)``: the inverse document frequency.
        parts: Topics as rows of words, float64 ``(topics, words)``, not negative.
    """

    vocabulary: dict[str, int]
    rarity: Tensor
    parts: Tensor


def _rows(documents: Sequence[Counter[str]], vocabulary: dict[str, int], rarity: Tensor) -> Any:
    """Weighted counts of known words, each document of length one."""
    try:
        from scipy.sparse import csr_array
    except ImportError:
        raise ImportError(_NEEDS) from None
    weights = rarity.tolist()
    data: list[float] = []
    columns: list[int] = []
    ends = [0]
    for count in documents:
        known = sorted((vocabulary[word], n) for word, n in count.items() if word in vocabulary)
        values = [n * weights[column] for column, n in known]
        length = math.hypot(*values)
        data += [value / length for value in values]
        columns += [column for column, _ in known]
        ends.append(len(columns))
    return csr_array((data, columns, ends), shape=(len(documents), len(vocabulary)))


def _solve(x: Any, parts: Tensor | None, k: int, seed: int) -> tuple[Tensor, Tensor]:
    try:
        from sklearn.decomposition import non_negative_factorization
    except ImportError:
        raise ImportError(_NEEDS) from None
    options: dict[str, Any] = {"n_components": k, "random_state": seed, "max_iter": 1000}
    if parts is not None:
        options |= {"H": parts.numpy(), "update_H": False}
    weights, found, _ = non_negative_factorization(x, **options)
    return torch.from_numpy(weights), torch.from_numpy(found)


def factor_terms(documents: Sequence[Counter[str]], k: int, *, seed: int) -> TermFactors:
    """Find ``k`` topics, or fewer where documents or words are fewer; the largest comes first.

    Topics in which no document has its largest share are left out.

    Args:
        documents: Counts of words.
        k: Number of topics.
        seed: Seed of the start.

    Reference:
        Lee and Seung, "Learning the parts of objects by non-negative matrix factorization", 1999.
    """
    holders: Counter[str] = Counter()
    for count in documents:
        holders.update(count.keys())
    vocabulary = {word: column for column, word in enumerate(sorted(holders))}
    rarity = torch.tensor(
        [math.log((1 + len(documents)) / (1 + holders[word])) + 1 for word in vocabulary],
        dtype=torch.float64,
    )
    if not vocabulary:
        return TermFactors(vocabulary, rarity, torch.empty(0, 0, dtype=torch.float64))
    x = _rows(documents, vocabulary, rarity)
    k = min(k, *x.shape)
    _, parts = _solve(x, None, k, seed)
    while True:
        factors = TermFactors(vocabulary, rarity, parts)
        shares = term_shares(factors, documents)
        labels = shares.argmax(1)[shares.sum(1) > 0]
        sizes = torch.bincount(labels, minlength=len(parts))
        order = sizes.argsort(descending=True, stable=True)
        if bool((sizes > 0).all()):
            return TermFactors(vocabulary, rarity, parts[order].contiguous())
        parts = parts[sizes > 0].contiguous()


def term_shares(factors: TermFactors, documents: Sequence[Counter[str]]) -> Tensor:
    """Return each topic's share of each document ``(documents, topics)``; rows sum to 1.

    A document without a word of any topic has zeros.
    """
    topics = len(factors.parts)
    if not topics or not documents:
        return torch.zeros(len(documents), topics)
    x = _rows(documents, factors.vocabulary, factors.rarity)
    weights, _ = _solve(x, factors.parts, topics, 0)
    # parts of any scale: weigh by how much of the document each one explains
    weights = weights * factors.parts.sum(1)
    return F.normalize(weights, p=1, dim=1).float()
