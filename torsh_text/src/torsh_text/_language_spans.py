"""Cutting a text into units and choosing a language for each, neighbours considered."""

import re

import numpy as np

_CJK = (
    r"\u2e80-\u2fff\u3005-\u3007\u3021-\u30ff\u3100-\u9fff\uac00-\ud7af\uf900-\ufaff"
    r"\U00020000-\U0003ffff"
)
# a run without spaces, or a few characters of a script that is written without them
_UNIT = re.compile(rf"[{_CJK}]{{1,6}}|[^\s{_CJK}]+")


def units(text: str) -> list[tuple[int, int]]:
    """Return start and end of each word, or piece of Chinese, Japanese or Korean.

    Example:
        >>> units("ask 田中さん now")
        [(0, 3), (4, 8), (9, 12)]
    """
    return [found.span() for found in _UNIT.finditer(text)]


def best_path(scores: np.ndarray, penalties: np.ndarray) -> np.ndarray:
    """Return the label of each step with the largest sum of scores less penalties.

    Viterbi's algorithm where a step costs the same for every change of label, so it looks at the
    best label only: time is steps times labels.

    Args:
        scores: ``(steps, labels)``, at least one step.
        penalties: What a change of label at each step costs, in the unit of ``scores``
            ``(steps,)``; the first is not read.

    Example:
        >>> best_path(np.log([[0.9, 0.1], [0.4, 0.6], [0.9, 0.1]]), np.full(3, 1.0))
        array([0, 0, 0])
        >>> best_path(np.log([[0.9, 0.1], [0.4, 0.6], [0.9, 0.1]]), np.full(3, 0.1))
        array([0, 1, 0])
    """
    steps, labels = scores.shape
    stay = np.arange(labels)
    origin = np.empty((steps, labels), dtype=np.int32)
    total = scores[0]
    for step in range(1, steps):
        best = int(total.argmax())
        jump = total[best] - penalties[step]
        kept = total >= jump
        origin[step] = np.where(kept, stay, best)
        total = np.where(kept, total, jump) + scores[step]
    path = np.empty(steps, dtype=np.int64)
    path[-1] = total.argmax()
    for step in range(steps - 1, 0, -1):
        path[step - 1] = origin[step, path[step]]
    return path
