import pytest

from torsh_data.text._abbreviations import is_abbreviation, is_initial, is_title


@pytest.mark.parametrize(
    ("word", "before", "after"),
    [
        ("Mr", "", "Baker"),
        ("Mr", "", "Will"),  # a name, though a function word too
        ("MR", "My", "BIG"),
        ("mr", "saw", "deeds"),
        ("dr", "saw", "Baker"),
        ("rev", "the", "Field"),
        ("Rev", "the", ""),
        ("Dec", "On", "5"),
        ("no", "see", "7th"),
        ("p", "see", "12"),
        ("etc", "cats", ""),
        ("etc", "cats", "The"),
        ("Inc", "Big", "The"),
        ("al", "et", ""),
        ("AL", "ET", "2019"),
        ("J", "saw", "R"),
        ("R", "J", "Baker"),
    ],
)
def test_full_stops_that_are_a_part_of_their_word(word, before, after):
    assert is_abbreviation(word, before, after)


@pytest.mark.parametrize(
    ("word", "before", "after"),
    [
        ("Dec", "in", "The"),
        ("Dec", "in", "Baker"),
        ("Dec", "in", ""),
        ("fig", "a", "Then"),
        ("no", "said", ""),
        ("rev", "a", "Then"),
        ("st", "the", "They"),
        ("al", "with", ""),
        ("al", "", "The"),
        ("B", "plan", "The"),
        ("B", "plan", ""),
        ("B", "plan", "then"),
        ("I", "did", "Baker"),
        ("b", "a", "Baker"),
        ("car", "the", "Baker"),
        ("", "", ""),
    ],
)
def test_full_stops_that_end_a_sentence(word, before, after):
    assert not is_abbreviation(word, before, after)


def test_titles_and_initials():
    assert is_title("Mr")
    assert is_title("PROF")
    assert not is_title("etc")
    assert not is_title("Dec")
    assert is_initial("J")
    assert is_initial("É")
    assert not any(map(is_initial, ("I", "j", "JR", "", "7")))
