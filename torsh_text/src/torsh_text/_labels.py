"""Labels with scores: what classifiers give back."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Label:
    """A label that was given to a text.

    Attributes:
        name: The label.
        score: Its probability, or the value of a regression model.
        index: Its place among the labels.
    """

    name: str
    score: float
    index: int


def check_top_k(top_k: object, count: int, kind: str = "labels") -> None:
    """Refuse what is neither None nor a number of labels that there are."""
    if top_k is None:
        return
    if not isinstance(top_k, int) or isinstance(top_k, bool):
        raise TypeError(f"top_k={top_k!r} is neither None nor an integer")
    if not 1 <= top_k <= count:
        raise ValueError(f"top_k={top_k} is not between 1 and the {count} {kind}")


def check_ranking(*, top_k: object, threshold: object, count: int) -> None:
    """Refuse options of ``predict`` that do not fit ``count`` labels."""
    check_top_k(top_k, count)
    if not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold!r} is not a number between 0 and 1")


def checked_names(labels: Iterable[str], *, least: int = 1) -> list[str]:
    """Return label names as a list, refusing what cannot tell classes apart."""
    if isinstance(labels, (str, bytes)):
        raise TypeError(f"labels={labels!r} is a single string; pass a list of label names")
    names = list(labels)
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"labels[{index}] is {name!r} of type {type(name).__name__}, no string")
        if not name.strip():
            raise ValueError(f"labels[{index}] is blank; give every label a name")
    if len(names) < least:
        raise ValueError(f"labels={names} has {len(names)} names; give at least {least}")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"labels holds {twice} more than once; every label needs its own name")
    return names


def ranked(
    scores: Tensor,
    names: Sequence[str],
    *,
    top_k: int | None,
    several: bool,
    threshold: float,
) -> list[Label] | list[list[Label]]:
    """Turn scores into labels, best first; of equal scores the lower index comes first.

    Args:
        scores: ``(texts, labels)``.
        names: Name of each label.
        top_k: Labels for each text; None for the best one, or with ``several`` for all that reach
            the threshold.
        several: Whether a text may have several labels.
        threshold: Least score of one of several labels.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[0.25, 0.75]])
        >>> ranked(scores, ["ham", "spam"], top_k=None, several=False, threshold=0.5)
        [Label(name='spam', score=0.75, index=1)]
        >>> [[label.name for label in labels] for labels in ranked(
        ...     scores, ["ham", "spam"], top_k=2, several=False, threshold=0.5)]
        [['spam', 'ham']]
    """
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    every = [
        [Label(names[i], score, i) for score, i in zip(row, indices, strict=True)]
        for row, indices in zip(ordered.tolist(), order.tolist(), strict=True)
    ]
    if top_k is not None:
        return [labels[:top_k] for labels in every]
    if several:
        return [[label for label in labels if label.score >= threshold] for labels in every]
    return [labels[0] for labels in every]
