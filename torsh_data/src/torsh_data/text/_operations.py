"""The four edits of EDA on a text in pieces.

An edit changes words where they are: the list of pieces keeps its length, so that every word and
every kept span is found again at its index.
"""

from collections.abc import Sequence
from math import log1p

from torsh_data.text._draws import Draw
from torsh_data.text._gaps import merged_gap
from torsh_data.text._transform import Sentence, Words

_VOWELS = frozenset("aeiouAEIOU")
_UNCERTAIN = frozenset("hHuUyY")  # an hour, a house; a unit, an uncle


def replace_words(
    pieces: list[str], sentence: Sentence, chosen: Sequence[int], words: Words, draw: Draw
) -> None:
    """Put a synonym in the place of each chosen word."""
    for i in chosen:
        found = sentence.entries[i] or ()
        if words.lexicon.english and i and pieces[2 * i - 1].lower() in ("a", "an"):
            found = _fitting(pieces[2 * i - 1], found)
        if found:
            pieces[2 * i + 1] = found[int(draw() * len(found))]


def insert_words(
    pieces: list[str], sentence: Sentence, count: int, words: Words, draw: Draw
) -> None:
    """Put synonyms of random words behind random words."""
    sources, places = sentence.replaceable, sentence.movable
    if not sources:
        return
    for _ in range(count):
        source = sources[int(draw() * len(sources))]
        found = sentence.entries[source] or ()
        if sentence.starts:
            found = _in_running_text(sentence.pieces[2 * source + 1], found, words)
        place = 2 * places[int(draw() * len(places))] + 1
        pieces[place] += " " + found[int(draw() * len(found))]


def swap_words(pieces: list[str], sentence: Sentence, count: int, draw: Draw) -> None:
    """Exchange random pairs of words."""
    places = sentence.movable
    if len(places) < 2:
        return
    for _ in range(count):
        a = int(draw() * len(places))
        b = int(draw() * (len(places) - 1))
        i, j = 2 * places[a] + 1, 2 * places[b + (b >= a)] + 1
        pieces[i], pieces[j] = pieces[j], pieces[i]


def delete_words(pieces: list[str], sentence: Sentence, p: float, draw: Draw) -> None:
    """Take each word out with probability p, and what would stand doubled then."""
    places = sentence.movable
    if p <= 0 or not places:
        return
    # the distances between words that go are geometric: draws only for those
    scale = log1p(-p)
    gone: list[int] = []
    k = int(log1p(-draw()) / scale) if p < 1 else 0
    while k < len(places):
        gone.append(k)
        k += 1 + (int(log1p(-draw()) / scale) if p < 1 else 0)
    if len(gone) == len(sentence.entries):  # one word stays
        del gone[int(draw() * len(gone))]
    before = 0  # words at the start that are gone
    for k in gone:
        first = places[k] == before
        before += _remove(pieces, places[k], first=first) and first


def restore_capitals(pieces: list[str], sentence: Sentence, words: Words) -> None:
    """Give sentences their capital back after words have moved."""
    starts = sentence.starts
    first_words = {sentence.pieces[2 * s + 1] for s in starts}
    heads: set[int] = set()
    for s, end in zip(starts, [*starts[1:], len(sentence.entries)], strict=True):
        original = sentence.pieces[2 * s + 1]
        head = next((i for i in range(s, end) if pieces[2 * i + 1]), None)
        if head is None:
            continue
        heads.add(head)
        if original[:1].isupper() and sentence.entries[head] is not None:
            word = pieces[2 * head + 1]
            pieces[2 * head + 1] = _capitalised(word)
    for i in sentence.movable:
        word = pieces[2 * i + 1]
        if i in heads or word not in first_words or word == "I":
            continue
        if word[1:] == word[1:].lower() and word.lower() in words.stop_words:
            pieces[2 * i + 1] = word.lower()


def expected_edits(alpha: float, count: int) -> int:
    """Edits of a text: a share of its words, and at least one."""
    return int(alpha * count) or 1


def pick(draw: Draw, count: int, places: Sequence[int]) -> list[int]:
    """Up to `count` different ones of `places`, in random order."""
    if count == 1 and places:
        return [places[int(draw() * len(places))]]
    pool = list(places)
    for k in range(min(count, len(pool))):
        other = k + int(draw() * (len(pool) - k))
        pool[k], pool[other] = pool[other], pool[k]
    return pool[:count]


def _capitalised(word: str) -> str:
    upper = word[:1].upper()
    return upper + word[1:] if len(upper) == 1 else word


def _in_running_text(source: str, found: tuple[str, ...], words: Words) -> tuple[str, ...]:
    """Synonyms of a word with a capital as they stand inside a sentence."""
    if source[:1].isupper() and source[1:] == source[1:].lower() and not words.raw(source):
        return words.raw(source.lower())
    return found


def _fitting(article: str, found: tuple[str, ...]) -> tuple[str, ...]:
    """Synonyms that can stand behind "a" or "an"."""
    vowel = len(article) == 2
    return tuple(one for one in found if one[0] not in _UNCERTAIN and (one[0] in _VOWELS) is vowel)


def _remove(pieces: list[str], i: int, *, first: bool) -> bool:
    left, right = pieces[2 * i], pieces[2 * i + 2]
    if left == right == " " and not first:
        pieces[2 * i] = pieces[2 * i + 1] = ""
        return True
    gap = merged_gap(left, right, first=first, final=2 * i + 3 == len(pieces))
    if gap is None:
        return False
    if gap[:1] == "." and gap[1:2] != "." and not first:
        k = 2 * i - 1
        while not pieces[k]:
            k -= 2
        if pieces[k][-1] == ".":  # "etc." has its own
            gap = gap[1:]
    pieces[2 * i], pieces[2 * i + 1], pieces[2 * i + 2] = "", "", gap
    return True
