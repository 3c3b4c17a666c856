"""Texts as words and gaps that join to the text again.

A word is a run of letters, marks, digits and underscores; apostrophes, hyphens and joiners between
two such runs belong to it. Everything else is a gap: spaces, punctuation, symbols, emoji. Scripts
that do not set words apart have long runs: separate their words first.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TypeAlias

Span: TypeAlias = tuple[int, int]

# What is no part of a word: a list of separators, because `\w` leaves out the vowel signs of
# Indic scripts and other marks.
_GAPS = (
    r"\s\x00-\x2f:-@\[-^`{-\xa9\xab-\xb4\xb6-\xb9\xbb-\xbf\xd7\xf7"
    r"\u037e\u0387\u055a-\u055f\u0589\u05be\u05f3\u05f4\u060c\u061b\u061f\u066a-\u066d\u06d4"
    r"\u0964\u0965\u2000-\u206f\u20a0-\u20cf\u2100-\u2101\u2190-\u2bff\u2e00-\u2e7f"
    r"\u3000-\u3004\u3008-\u3020\u3030\ufe00-\ufe0f\ufe10-\ufe6b\ufeff\uff01-\uff0f\uff1a-\uff20"
    r"\uff3b-\uff40\uff5b-\uff65\ufff0-\ufffd\U0001f000-\U0001fbff\U000e0000-\U000e01ef"
)
_RUN = f"[^{_GAPS}]+"
_JOINERS = r"['\u2019\u2010\u2011\u200c\u200d-]"
split_pieces = re.compile(f"({_RUN}(?:{_JOINERS}{_RUN})*+)").split

# Addresses, mentions, tags and abbreviations; only looked for where one of their signs is.
has_signs = re.compile(r"[@#./\\<&+](?:(?=[^\s.])|(?<=[A-Za-z]#))").search
# A letter's full stop: of a sentence, or of an abbreviation.
has_full_stop = re.compile(r"\.(?<=[^\W\d_]\.)").search
# Each branch refuses to begin inside a run and never gives back what it took: linear time.
_PROTECTED = re.compile(
    r"(?<![\w+.-])[A-Za-z][A-Za-z0-9+.-]*+://\S*[^\s.,;:!?)\]}'\"]"
    r"|(?<![\w.+-])[\w.+-]++@[\w-]+(?:\.[\w-]+)*"
    r"|[@#][\w-]+"
    r"|</?\w[^<>]{0,200}+>"
    r"|&#?\w++;"
    r"|(?<!\w)\w++(?:(?:&\w++)++|\+\+|#)(?!\w)"
    r"|(?<![\w.])(?:\w++\.)+\w++\.?(?:/[^\s.,;:!?)\]}'\"]*)*"
    r"|(?<![\w.~-])[\w.~-]*+(?:[/\\][\w.~-]++){2,}"
)

# Parts that tokenisers cut off ("it 's", "do n't"): they stay behind the word they belong to.
CLITICS = frozenset(
    ("s", "t", "re", "ve", "ll", "d", "m", "n't", "'s", "'t", "'re", "'ve", "'ll", "'d", "'m")
)


def protected_spans(text: str, extra: Sequence[re.Pattern[str]]) -> list[Span]:
    """Where a text has addresses and the like, or what the user wants kept."""
    patterns = [*extra, _PROTECTED] if has_signs(text) else extra
    return [match.span() for one in patterns for match in one.finditer(text) if match.group()]


def join_spans(spans: Iterable[Span]) -> list[Span]:
    """Overlapping spans made one, in order."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def split_around(text: str, spans: Sequence[Span]) -> tuple[list[str], set[int]]:
    """Pieces with each span as one of them.

    Args:
        text: Any text.
        spans: Disjoint, in order.

    Returns:
        Gap, word, gap, ..., word, gap, which join to the text; and which of the words stay: the
        spans, and words that touch one.
    """
    pieces: list[str] = [""]
    stays: set[int] = set()
    position = 0
    for start, end in [*spans, (len(text), len(text))]:
        first, *rest = split_pieces(text[position:start])
        pieces[-1] += first
        if rest and position and not pieces[-1]:
            stays.add(len(pieces) // 2)
        pieces += rest
        if start < end:
            if rest and not pieces[-1]:
                stays.add(len(pieces) // 2 - 1)
            stays.add(len(pieces) // 2)
            pieces += [text[start:end], ""]
        position = end
    return pieces, stays
