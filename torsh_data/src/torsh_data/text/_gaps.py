"""What stands between two words when the word between them goes."""

from functools import lru_cache

_RANKS = {"-": 1, "\u2013": 1, "\u2014": 1, ",": 2, "\u060c": 2, "\u3001": 2, ";": 3, "\u061b": 3}
_RANKS |= {":": 4} | dict.fromkeys(".!?\u2026\u3002\u061f\u0964", 5)
_STOP = 5  # ends a sentence
_DASHES = "-\u2013\u2014"
_MARKS = "".join(_RANKS)
_OPENING = "([{\u2018\u201c\u00ab\u00bf\u00a1"
_CLOSING = ")]}\u2019\u201d\u00bb"
_SMILING = (":", ";")
_QUOTES = "\"'"  # either


@lru_cache(maxsize=4096)
def merged_gap(left: str, right: str, *, first: bool, final: bool) -> str | None:
    """Make one gap of the two around a word that goes.

    Of the marks on both sides the stronger one is left, and the left one of equals. At the start of
    a text, a line or a bracket no mark is left, at the end only one that ends a sentence.

    Args:
        left: The gap before the word.
        right: The gap behind it.
        first: No word is before it.
        final: No word is behind it.

    Returns:
        None if the word has to stay, because it is a part of something, "a/b", or the only word in
        a bracket or of its first line.

    Example:
        >>> merged_gap(", ", ", ", first=False, final=False)
        ', '
        >>> merged_gap(", ", ".", first=False, final=True)
        '.'
    """
    body, rest = left.rstrip(), right.lstrip()
    space, lead = left[len(body) :], right[: len(right) - len(rest)]
    opened = _is_one(body[-1:], _OPENING if space else _OPENING + _QUOTES)
    closed = _is_one(rest[:1], _CLOSING if lead else _CLOSING + _QUOTES)
    alone = opened and (closed or "\n" in right)
    if alone or (_is_one(rest[:1], _QUOTES) and body[-1:] == rest[:1]):
        return None
    inner = body if opened else body.rstrip(_CLOSING + _QUOTES)
    head = inner.rstrip(_MARKS) if space and not opened else inner
    mark = inner[len(head) :]
    begins = head[-1:] == "\n" or (first and not head)
    if begins and inner == body and mark and not mark.strip(_DASHES):
        if "\n" in lead or (final and not rest):  # the only word of an item
            above = head.rstrip()
            return rest if first and not above else above + right
        head, mark, space = inner, "", "\n" + space
    behind, tail = ("", rest) if "\n" in lead else _leading_mark(rest, final=final)
    loose_left = space or opened or (first and not left)
    loose_right = lead or closed or behind or (final and not right)
    if not (loose_left and loose_right) or not (space or lead or tail[:1].isspace()):
        return None
    starts = first or opened or ("\n" in space and not mark)
    strength = max((_RANKS[one] for one in mark), default=0)
    if behind and (starts or max(_RANKS[one] for one in behind) <= strength):
        return _joined(left, lead + tail, final=final)
    if 0 < strength < _STOP and (behind or closed or (final and not rest) or "\n" in lead):
        left = head.rstrip() + body[len(inner) :] + space
    return _joined(left, right, final=final)


def _is_one(letter: str, of: str) -> bool:
    return bool(letter) and letter in of


def _leading_mark(rest: str, *, final: bool) -> tuple[str, str]:
    """The mark that a gap begins with, and the rest of it."""
    tail = rest.lstrip(_MARKS)
    mark, end = rest[: len(rest) - len(tail)], tail[:1]
    ends = end.isspace() or _is_one(end, _CLOSING + _QUOTES) or (final and not tail)
    if not ends or (mark[-1:] in _SMILING and end and end in ")]"):
        return "", rest  # of what follows: "-5", ".net", ":)"
    return mark, tail


def _joined(left: str, right: str, *, final: bool) -> str:
    """Two gaps with the spaces of one."""
    rest = right.lstrip()
    lead = right[: len(right) - len(rest)]
    ends = final and not rest
    if left[-1:].isspace() and (ends or "\n" in lead or (rest and not lead)):
        return left.rstrip() + right
    return left + rest
