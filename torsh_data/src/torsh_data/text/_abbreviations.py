"""Abbreviations of English whose full stop is a part of them and ends no sentence.

Those with several full stops ("e.g.", "U.S.") are told by their form, see `_words`.
"""

from torsh_data.text._stop_words import ENGLISH

_TITLES = """
adm capt cmdr col dr ft fr gen gov hon lt maj messrs mlle mme mr mrs ms mt pres prof rep rev sen
sgt st
"""
_NUMBERED = """
apr art aug ca ch dec est eq eqs feb fig figs jan jul jun mar no nos nov oct op p pp sec sep sept
tab vol
"""
_OTHERS = "approx ave blvd bros cf co corp dept etc ext inc incl jr ltd rd resp sr univ viz vs"

_KINDS = {
    word: kind
    for kind, words in (("title", _TITLES), ("number", _NUMBERED), ("other", _OTHERS))
    for word in words.split()
}


def is_abbreviation(word: str, before: str, after: str) -> bool:
    """Whether the full stop behind a word belongs to it.

    Args:
        word: The word.
        before: The word before it, or "".
        after: The word after it, if only spaces are behind the full stop, or "".
    """
    low = word.lower()
    kind = _KINDS.get(low)
    if kind == "number":
        return after[:1].isdigit()
    if kind == "title" and word == low and after[:1].isupper() and after.lower() in ENGLISH:
        return False  # "on the mt. Then", but "Dr. No"
    if kind is not None:
        return True
    if low == "al":
        return before.lower() == "et"
    if not (is_initial(word) and after[:1].isupper()):
        return False
    return len(after) == 1 or after.lower() not in ENGLISH  # "plan B. The", but "A. Baker"


def is_title(word: str) -> bool:
    """Whether a name follows an abbreviation and belongs to it."""
    return _KINDS.get(word.lower()) == "title"


def is_initial(word: str) -> bool:
    """Whether a word may be one letter of a name."""
    return len(word) == 1 and word.isupper() and word != "I"
