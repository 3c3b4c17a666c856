import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torsh_data.text._gaps import _CLOSING, _MARKS, _OPENING, _QUOTES, merged_gap


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (", ", ", ", ", "),
        (" , ", " , ", " , "),
        (" ", ", ", ", "),
        (", ", " ", ", "),
        (", ", ". ", ". "),
        ("; ", ", ", "; "),
        (", ", ": ", ": "),
        (" - ", " - ", " - "),
        (". ", ", ", ". "),  # "He left. However, we stayed."
        ("? ", "! ", "? "),  # "Really? Yes! He left."
        ("? ", '!" ', '?" '),
        (", ", ",\u201d ", ",\u201d "),
        ('." ', ", ", '." '),
        (" (", ", ", " ("),
        (", ", ") ", ") "),
        ("\n", ", ", "\n"),
        ("\n- ", ", ", "\n- "),
        (", ", "\n- ", "\n- "),
        (" ", " $", " $"),
        (", ", " -5", ", -5"),
        (". ", " :) ", ". :) "),
        ("\n\u2014) ", " ", "\n\u2014) "),  # no item
        (" (", "\n", None),
        (" \u201c", ".\n- ", None),  # the line would end with the bracket
        (" ", " - ", " - "),
        ("\n\n", ". ", "\n\n"),
        (".\n", ", ", ".\n"),
        (", ", "\n", "\n"),
        ("! ", "\n", "!\n"),
        ("\n- ", "\n- ", "\n- "),
        (" ", " (", " ("),
        (") ", ", ", "), "),
        ("\u3001 ", "\u3002 ", "\u3002 "),
        ("\u060c ", "\u061f ", "\u061f "),
        (" ", " .net", " .net"),
        ("(", ") ", None),
        (" ( ", " ) ", None),
        (' " ', ' " ', None),
        ("/", " ", None),
        (" ", "-", None),
    ],
)
def test_gaps_around_a_deleted_word(left, right, expected):
    assert merged_gap(left, right, first=False, final=False) == expected


@pytest.mark.parametrize(
    ("left", "right", "at_start", "at_end"),
    [
        ("", ", ", "", None),
        ("\u2014 ", " ", "\u2014 ", None),
        ('"', ", ", '"', None),
        ("... ", ", ", "... ", None),
        ("- ", "\n- ", "- ", None),
        (":)\n- ", "\n- ", ":)\n- ", None),
        ("\n- ", "", None, ""),
        (", ", ".", None, "."),
        (" , ", " .", None, " ."),
        (", ", "", None, ""),
        (". ", "", None, "."),
        (". ", ".", None, "."),
        (", ", " \n", None, " \n"),
        (" ", "...", None, "..."),
    ],
)
def test_gaps_at_the_ends_of_a_text(left, right, at_start, at_end):
    if at_start is not None:
        assert merged_gap(left, right, first=True, final=False) == at_start
    if at_end is not None:
        assert merged_gap(left, right, first=False, final=True) == at_end


GAPS = st.text(alphabet=[*" \n,;:.!?-\u2014()\u201c\u201d\"'$/", " ", " "], min_size=1, max_size=6)


@settings(max_examples=2000, deadline=None)
@given(GAPS | st.just(""), GAPS | st.just(""), st.booleans(), st.booleans())
def test_only_marks_and_spaces_of_the_two_gaps_go(left, right, first, final):
    found = merged_gap(left, right, first=first, final=final)
    if found is None:
        return
    it = iter(left + right)
    assert all(letter in it for letter in found)  # nothing is added or moved
    kept = [one for one in left + right if not one.isspace() and one not in _MARKS]
    assert [one for one in found if not one.isspace() and one not in _MARKS] == kept
    assert set(found) & {*_OPENING, *_CLOSING, *_QUOTES} <= set(kept)
    if not first and not final:  # or two words would be one
        assert found
