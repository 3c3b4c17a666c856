"""Inflected forms of English words: from WordNet's exception lists, else by the regular rules.

A form that is not sure is None: a synonym without the needed form is not proposed for it.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

_VOWELS = set("aeiou")
_SIBILANTS = ("s", "x", "z", "ch", "sh")
_PAST_OR_BASE_PARTICIPLE = ("came", "ran")  # "has became" is wrong: past, but no participle

Exceptions = Mapping[str, list[str]]


def read_exceptions(path: Path) -> dict[str, list[str]]:
    """Irregular forms of each base form: WordNet's `.exc` lists, turned round."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in path.read_text().splitlines():
        form, *bases = line.split()
        for base in bases:
            if form != base:
                found[base].append(form)
    return dict(found)


def noun_forms(noun: str, irregular: Exceptions) -> dict[str, str | None]:
    """The plural."""
    special = irregular.get(noun, [])
    if len(special) == 1:
        return {"plural": special[0]}
    if special or (noun.endswith("s") and not noun.endswith("ss")) or noun.endswith("men"):
        return {"plural": None}
    if noun.endswith("man"):
        return {"plural": noun[:-2] + "en"}
    return {"plural": _with_s(noun)}


def verb_forms(verb: str, irregular: Exceptions) -> dict[str, str | None]:
    """Third person, past (which has to serve as participle too) and -ing form."""
    special = irregular.get(verb, [])
    ings = [form for form in special if form.endswith("ing")]
    pasts = [form for form in special if not form.endswith(("ing", "s"))]
    double = _doubles(verb) and not special
    stem = verb + verb[-1] if double else verb
    ing = ings[0] if len(ings) == 1 else None if ings else _ing(stem)
    past: str | None
    if not pasts:
        past = _past(stem)
    elif len(pasts) == 1 and not pasts[0].endswith(("n", *_PAST_OR_BASE_PARTICIPLE)):
        past = pasts[0]
    else:
        past = None
    return {"third": _with_s(verb), "past": past, "ing": ing}


def adjective_forms(adjective: str, irregular: Exceptions) -> dict[str, str | None]:
    """Comparative and superlative, where they are one word."""
    special = irregular.get(adjective, [])
    forms: dict[str, str | None] = {}
    for name, end in (("comparative", "er"), ("superlative", "est")):
        fitting = [form for form in special if form.endswith(end)]
        if special:
            forms[name] = fitting[0] if len(fitting) == 1 else None
        elif _syllables(adjective) == 1 and not adjective.endswith(("ed", "s")):
            stem = adjective + adjective[-1] if _doubles(adjective) else adjective
            forms[name] = stem.removesuffix("e") + end
        else:
            forms[name] = None
    return forms


def recognised(base: str, pos: str, irregular: Exceptions) -> dict[str, set[str]]:
    """All forms of a base form that a reader may meet, by name."""
    make = {"n": noun_forms, "v": verb_forms}.get(pos, adjective_forms)
    forms = {name: {form} if form else set() for name, form in make(base, irregular).items()}
    for form in irregular.get(base, []):
        if pos == "n":
            forms["plural"].add(form)
        elif pos == "v":
            forms["ing" if form.endswith("ing") else "past"].add(form)
    return forms


def _with_s(word: str) -> str:
    if word.endswith("y") and len(word) > 1 and word[-2] not in _VOWELS:
        return word[:-1] + "ies"
    if word.endswith(_SIBILANTS) or word in ("go", "do", "forgo", "undergo"):
        return word + "es"
    return word + "s"


def _past(stem: str) -> str:
    if stem.endswith("e"):
        return stem + "d"
    if stem.endswith("y") and stem[-2] not in _VOWELS:
        return stem[:-1] + "ied"
    return stem + "ed"


def _ing(stem: str) -> str:
    if stem.endswith("ie"):
        return stem[:-2] + "ying"
    if stem.endswith("e") and not stem.endswith(("ee", "oe", "ye")):
        return stem[:-1] + "ing"
    return stem + "ing"


def _doubles(word: str) -> bool:
    """Whether a word of one syllable ends in one vowel and one consonant that is doubled."""
    if len(word) < 3 or _syllables(word) != 1 or word[-1] in "wxyaeiou":
        return False
    vowel_before = word[-2] in _VOWELS and word[-3] not in _VOWELS
    return vowel_before or (word[-3:-1] in ("ui",) and word[-4:-3] == "q")


def _syllables(word: str) -> int:
    """Groups of vowels, without a silent e at the end."""
    groups, inside = 0, False
    for letter in word.removesuffix("e"):
        vowel = letter in "aeiouy"
        groups += vowel and not inside
        inside = vowel
    return max(1, groups)
