"""Words of texts that were read in overlapping windows, and the scores of each."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np

from ._tokenizing import Window

Aggregation = Literal["first", "max", "mean", "token"]
AGGREGATIONS: tuple[Aggregation, ...] = ("first", "max", "mean", "token")
# scripts written without spaces: each token stands on its own
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS"


def _body(window: Window) -> range:
    """Tokens of a window without the special ones around them."""
    start, end = 0, len(window.ids)
    while start < end and window.words[start] < 0:
        start += 1
    while end > start and window.words[end - 1] < 0:
        end -= 1
    return range(start, end)


def best_context(windows: Sequence[Window], *, stride: int) -> list[tuple[int, int]]:
    """For each token of one text the window, and the place in it, with most context.

    A token's context in a window is the number of tokens to the nearer border; where the text
    itself begins or ends there is no border. Of equals the earlier window decides.

    Args:
        windows: Windows of one text, in order, each starting ``stride`` tokens before the end of
            the one before.
        stride: Tokens that neighbours share.

    Returns:
        ``(window, place)`` pairs, special tokens left out.
    """
    bodies = [_body(window) for window in windows]
    if len(windows) == 1:
        return [(0, place) for place in bodies[0]]
    starts = [0]
    for body in bodies[:-1]:
        starts.append(starts[-1] + len(body) - stride)
    total = starts[-1] + len(bodies[-1])
    best = np.full(total, -1)
    chosen = np.zeros((total, 2), dtype=np.int64)
    for index, (body, start) in enumerate(zip(bodies, starts, strict=True)):
        inner = np.arange(len(body))
        left = inner if index else np.full(len(body), total)
        right = inner[::-1] if index < len(windows) - 1 else np.full(len(body), total)
        context = np.minimum(left, right)
        better = context > best[start : start + len(body)]
        best[start : start + len(body)][better] = context[better]
        here = chosen[start : start + len(body)]
        here[better] = np.stack([np.full(len(body), index), np.asarray(body)], 1)[better]
    return [(int(window), int(place)) for window, place in chosen]


@dataclass(frozen=True)
class Words:
    """Words of a text and the tokens that speak for them.

    Attributes:
        spans: First character of each word and the one behind its last.
        tokens: For each word its tokens as ``(window, place)``.
    """

    spans: list[tuple[int, int]]
    tokens: list[list[tuple[int, int]]]


def find_words(text: str, windows: Sequence[Window], *, stride: int, whole: bool = True) -> Words:
    """Group the tokens of one text into words.

    Words are the tokenizer's, split further at punctuation and symbols and, in scripts without
    spaces, at every token. White space belongs to no word. A character that several tokens share
    (bytes of an emoji) is never divided, and an accent stays with its letter.

    Args:
        text: The text.
        windows: Its windows, as :meth:`RowTokenizer.windows` gives them.
        stride: Tokens that neighbouring windows share.
        whole: Whether tokens are grouped; else each is a word.
    """
    spans: list[tuple[int, int]] = []
    tokens: list[list[tuple[int, int]]] = []
    last_word, after_mark = -1, False
    for index, place in best_context(windows, stride=stride):
        window = windows[index]
        start, end = window.offsets[place]
        piece = text[start:end]
        start += len(piece) - len(piece.lstrip())
        piece = piece.strip()
        if not piece:
            continue
        end = start + len(piece)
        mark = all(map(_is_mark, piece))
        word = window.words[place]
        behind = spans[-1][1] if spans else 0
        shared = start < behind or (start == behind > 0 and unicodedata.combining(text[start]) > 0)
        joined = whole and word == last_word and not (mark or after_mark)
        if shared or (joined and not _UNSPACED.match(piece)):
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
            tokens[-1].append((index, place))
        else:
            spans.append((start, end))
            tokens.append([(index, place)])
        last_word, after_mark = word, mark
    return Words([(start, _past_accents(text, end)) for start, end in spans], tokens)


def _past_accents(text: str, end: int) -> int:
    """Move behind combining marks, which some tokenizers drop."""
    while end < len(text) and unicodedata.combining(text[end]):
        end += 1
    return end


def aggregate(scores: np.ndarray, counts: np.ndarray, how: Aggregation) -> np.ndarray:
    """Make the scores of words from those of their tokens.

    Args:
        scores: Log-probabilities of the tokens, word after word ``(tokens, tags)``.
        counts: Tokens of each word, all at least 1 ``(words,)``.
        how: ``"first"`` token, the token with the highest probability (``"max"``), or the
            ``"mean"`` of probabilities.

    Returns:
        Log-probabilities ``(words, tags)``.

    Example:
        >>> scores = np.log([[0.6, 0.4], [0.2, 0.8], [0.5, 0.5]])
        >>> [np.exp(aggregate(scores, np.array([2, 1]), how))[0].round(2).tolist()
        ...  for how in ("first", "max", "mean")]
        [[0.6, 0.4], [0.2, 0.8], [0.4, 0.6]]
    """
    starts = np.cumsum(counts) - counts
    if how in ("first", "token") or not len(counts):
        return scores[starts]
    if how == "mean":
        sums = np.add.reduceat(np.exp(scores), starts, axis=0)
        tiny = np.finfo(scores.dtype).tiny
        return np.log(np.maximum(sums / counts[:, None], tiny))
    surest = scores.max(axis=1)
    highest = np.repeat(np.maximum.reduceat(surest, starts), counts)
    candidates = np.flatnonzero(surest == highest)
    words = np.repeat(np.arange(len(counts)), counts)
    _, firsts = np.unique(words[candidates], return_index=True)
    return scores[candidates[firsts]]


def by_text(windows: Sequence[Window], *, from_end: bool) -> list[list[Window]]:
    """Group windows by their text, in reading order.

    Args:
        windows: Windows of texts in order.
        from_end: Whether the tokenizer cuts from the end, so that a text's last window is first.
    """
    groups = [list(group) for _, group in groupby(windows, key=lambda window: window.text)]
    return [group[::-1] for group in groups] if from_end else groups
