"""Labels with scores: what classifiers give back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from torch import Tensor

from ._tokenizing import check_unicode


@dataclass(frozen=True)
class Label:
    """A label that was given to a text.

    Attributes:
        name: The label.
        score: Its probability, or the value of a regression model.
        index: Its place among the labels.
        truncated: Whether the text was too long and its end was not read.
    """

    name: str
    score: float
    index: int
    truncated: bool = field(default=False, kw_only=True)


def check_top_k(top_k: object, count: int, kind: str = "labels") -> None:
    """Refuse what is neither None nor a number of labels that there are."""
    if top_k is None:
        return
    if not isinstance(top_k, int) or isinstance(top_k, bool):
        raise TypeError(f"top_k={top_k!r} is neither None nor an integer")
    if not 1 <= top_k <= count:
        raise ValueError(f"top_k={top_k} is not between 1 and the {count} {kind}")


def check_ranking(*, top_k: object, min_score: object, several: bool, count: int) -> None:
    """Refuse options of ``predict`` that do not fit ``count`` labels."""
    check_top_k(top_k, count)
    if min_score is None:
        return
    if not isinstance(min_score, (int, float)) or not 0 <= min_score <= 1:
        raise ValueError(f"min_score={min_score!r} is not a number between 0 and 1")
    if top_k is None and not several:
        raise ValueError(
            f"min_score={min_score} leaves labels out of a list, and each text gets its best label"
            " alone; pass top_k=1 for a list that may be empty, or multi_label=True"
        )


def checked_names(labels: Iterable[str], *, least: int = 1) -> list[str]:
    """Return label names as a list, refusing what cannot tell classes apart."""
    if isinstance(labels, (str, bytes)):
        raise TypeError(f"labels={labels!r} is a single string; pass a list of label names")
    if not isinstance(labels, Iterable):
        raise TypeError(f"labels={labels!r} is no list; pass names, such as ['ham', 'spam']")
    names = list(labels)
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"labels[{index}] is {name!r} of type {type(name).__name__}, no string")
        if not name.strip():
            raise ValueError(f"labels[{index}] is blank; give every label a name")
        check_unicode(name, index, "labels")
    if len(names) < least:
        raise ValueError(f"labels={names} has {len(names)} names; give at least {least}")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"labels holds {twice} more than once; every label needs its own name")
    return names


def number_of(name: str, places: Mapping[str, int], whose: str) -> int:
    """Return the number of a label, refusing a name that is none of ``places``.

    Example:
        >>> number_of("positve", {"negative": 0, "positive": 1}, "items[7] has")
        Traceback (most recent call last):
        ValueError: items[7] has the label 'positve'; known: 'negative', 'positive'. Did you mean
        'positive'?
    """
    if name in places:
        return places[name]
    close = get_close_matches(name, places, 1)
    raise ValueError(
        f"{whose} the label {name!r}; known: {', '.join(map(repr, places))}"
        + (f". Did you mean {close[0]!r}?" if close else "")
    )


def ranked(
    scores: Tensor,
    names: Sequence[str],
    *,
    top_k: int | None,
    several: bool,
    min_score: float | None = None,
    truncated: Iterable[bool],
) -> list[Label] | list[list[Label]]:
    """Turn scores into labels, best first; of equal scores the lower index comes first.

    Args:
        scores: ``(texts, labels)``.
        names: Name of each label.
        top_k: Most labels for each text; None for the best one, or with ``several`` for all that
            reach ``min_score``.
        several: Whether a text may have several labels.
        min_score: Labels below it are left out of lists; None for 0.5 with ``several`` and without
            ``top_k``, else for no limit.
        truncated: Whether each text was cut.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[0.25, 0.75]])
        >>> ranked(scores, ["ham", "spam"], top_k=None, several=False, truncated=[False])
        [Label(name='spam', score=0.75, index=1, truncated=False)]
        >>> [[label.name for label in labels] for labels in ranked(
        ...     scores, ["ham", "spam"], top_k=2, several=False, truncated=[False])]
        [['spam', 'ham']]
    """
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    every = [
        [Label(names[i], score, i, truncated=cut) for score, i in zip(row, indices, strict=True)]
        for row, indices, cut in zip(ordered.tolist(), order.tolist(), truncated, strict=True)
    ]
    if top_k is None and not several:
        return [labels[0] for labels in every]
    if min_score is None and top_k is None:
        min_score = 0.5
    return [
        [label for label in labels[:top_k] if min_score is None or label.score >= min_score]
        for labels in every
    ]
