import os
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torsh_data.text import EDA
from torsh_data.text._gaps import _MARKS as MARKS
from torsh_data.text._transform import Sentence
from torsh_data.text._words import split_pieces

TABLE = {"cat": ["feline"], "big": ["large", "huge"], "saw": ["spotted"]}
TEXT = "The big cat saw my dog, and it ran home."


def only(**strengths):
    off = {"alpha_sr": 0, "alpha_ri": 0, "alpha_rs": 0, "p_rd": 0}
    return EDA(**off | strengths, num_aug=1, lexicon=TABLE)


def words(text):
    return split_pieces(text)[1::2]


def gaps(text):
    return split_pieces(text)[::2]


def results(eda, text, count=60):
    return {eda(text, keys=[key])[0] for key in range(count)}


def test_replacement_changes_a_share_of_the_words():
    found = results(only(alpha_sr=0.1), TEXT)  # 10 words: one of them
    assert found == {
        TEXT.replace("big", "large"),
        TEXT.replace("big", "huge"),
        TEXT.replace("cat", "feline"),
        TEXT.replace("saw", "spotted"),
    }
    assert results(only(alpha_sr=0.3), TEXT) == {
        TEXT.replace("big", one).replace("cat", "feline").replace("saw", "spotted")
        for one in ("large", "huge")
    }


def test_insertion_adds_synonyms():
    added = Counter({"feline": 0})
    for result in results(only(alpha_ri=0.2), TEXT):
        extra = Counter(words(result)) - Counter(words(TEXT))
        assert not Counter(words(TEXT)) - Counter(words(result))
        assert sum(extra.values()) == 2
        added += extra
    assert set(added) == {"feline", "large", "huge", "spotted"}


def test_swaps_keep_words_and_gaps():
    seen = set()
    for result in results(only(alpha_rs=0.1), TEXT):
        assert Counter(result.lower()) == Counter(TEXT.lower())
        assert gaps(result) == gaps(TEXT)
        assert result[0].isupper()
        moved = [a.lower() != b.lower() for a, b in zip(words(TEXT), words(result), strict=True)]
        assert sum(moved) == 2
        seen.add(tuple(moved))
    assert len(seen) > 20  # of 45 pairs


def test_deletion_is_a_share_and_leaves_clean_spacing():
    found = results(only(p_rd=0.2), TEXT, 300)
    lengths = []
    for result in found:
        it = iter([w.lower() for w in words(TEXT)])
        assert all(word.lower() in it for word in words(result))  # a subsequence
        assert "  " not in result
        assert " ," not in result
        assert not result.endswith(" .")
        assert result[0].isupper()
        lengths.append(len(words(result)))
    assert min(lengths) < 7
    eda = only(p_rd=0.2)
    long = "cat " * 20_000
    gone = 20_000 - len(eda(long, keys=[1])[0].split())
    assert abs(gone - 4000) < 4 * (20_000 * 0.2 * 0.8) ** 0.5  # four standard deviations


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("Well, he ran", {"Well, ran", "Well, he", "Well", "He ran", "He", "Ran"}),
        ("one\n\ntwo", {"one", "two"}),
        ("a/b", set()),
        ("(one) two", {"(one)"}),
        ('"one two"', {'"two"', '"one"'}),
        ("one two", {"one", "two"}),
        ("He can", {"He", "Can"}),
    ],
)
def test_spaces_around_a_deleted_word(text, allowed):
    found = results(only(p_rd=0.5), text, 200) - {text}
    assert found == allowed


@pytest.mark.parametrize(
    "text",
    [
        "Yes, sir, we stopped, quickly, at the big, old house.",
        "Yes , sir , we stopped - quickly - at the big , old house .",
        "He left, etc. near the house, in the U.S. We stayed, he said.",
        '"Yes," he said; "no, never," she (my dog, that is) replied: well, perhaps.',
        "- one, two\n- three, four\n\nfive, six.",
    ],
)
def test_deletion_leaves_no_debris(text):
    for result in results(only(p_rd=0.5), text, 400):
        assert not re.search(r"[,;:-]\s*[,;:.]|\.\.|[,;:-]\s*$|^\s*[,;:.]|  |\s$", result)
        assert " , " in text or not re.search(r"\s[,;:.)]", result)
        first = next(iter(words(result)))
        assert text[0] == "-" or first == "etc" or first[0].isupper()


BRACKETS = {"(": ")", "\u201c": "\u201d", '"': '"'}
DEBRIS = re.compile(
    r"[,;:]\s*[,;:.!?]|[.!?]\s*[,;:]|\s[,;:.!?)\u201d]|^\s*[,;:.!?]|[,;:]\s*$|[,;:]\s*\n|[ \t]{2}"
    r"|[(\u201c]\s*[,;:.!?]|\n[ \t]*[,;:.!?]|\(\s*\)|\u201c\s*\u201d|[ \t]\n|\n [^-]"
)


@st.composite
def sentences(draw):
    """Texts with marks where they may stand: between words, around brackets, at line ends."""
    word = st.sampled_from(["one", "big", "cats", "saw", "He", "ran", "it's", "x-ray", "7", "@me"])
    gap = st.sampled_from(
        [*[" "] * 6, *[", "] * 3, "; ", ": ", " - ", " \u2014 ", "\u2014", ". ", "? ", "... ", "\n",
         ".\n\n", "\n- ", ".\n- "]
    )  # fmt: skip
    text = draw(word)
    for _ in range(draw(st.integers(1, 6))):
        text += draw(gap)
        opening = draw(st.sampled_from(["", "", "", *BRACKETS]))
        inner = " ".join(draw(st.lists(word, min_size=1, max_size=3)))
        mark = draw(st.sampled_from(["", ",", "."])) if opening else ""
        text += opening + inner + mark + BRACKETS.get(opening, "")
    return text + draw(st.sampled_from(["", ".", "!", "...", ".\n"]))


@settings(max_examples=400, deadline=None)
@given(sentences(), st.integers(0, 2**62), st.sampled_from([0.2, 0.5, 0.9]))
def test_no_deletion_leaves_debris(text, key, p):
    assume(not DEBRIS.search(text))
    (result,) = only(p_rd=p)(text, keys=[key])
    assert not DEBRIS.search(result)
    assert result.count("(") == text.count("(")
    assert result.count(")") == text.count(")")
    assert result.count('"') == text.count('"')
    it = iter(word.lower() for word in words(text))
    assert words(result)
    assert all(word.lower() in it for word in words(result))  # a subsequence
    for kept in ("7", "@me"):
        assert words(result).count(kept.strip("@")) == words(text).count(kept.strip("@"))


ABBREVIATED = (
    "Mr. Rose and Dr. Baker met Mrs. Field in St. Paul, etc. near the big house.",
    ("Mr. Rose", "Dr. Baker", "Mrs. Field", "St. Paul", "etc."),
)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ABBREVIATED,
        ("We saw big houses, cf. page nine, vs. ours", ("cf.", "vs.")),
        ("Gen. Stone saw the Rev. Field, but on the mt. Then", ("Gen. Stone", "Rev. Field")),
        ("See Fig. 3 and no. 7 of Prof. Stone et al. now.", ("Fig. 3", "no. 7", "Prof. Stone")),
        ("We saw J. R. Big and John F. House today.", ("J. R. Big", "F. House")),
        ("They left the cat at A. B. Inc. for C++ or C# and R&D.", ("Inc.", "C++", "C#", "R&D")),
        ("My MR. BIG saw it", ("MR. BIG",)),
        ("my big cat saw mr. deeds", ("mr.",)),
        ("It is in the U.S. and e.g. ours", ("U.S.", "e.g.")),
    ],
)
def test_abbreviations_stay(text, kept):
    eda = EDA(0.5, 0.5, 0.5, 0.3, num_aug=8)
    for key in range(100):
        for result in eda(text, keys=[key]):
            assert all(one in result for one in kept), result
            assert not re.search(r"\.\.", result)


def test_sentences_end_behind_abbreviations_and_words_like_them():
    def starts(text):
        sentence = Sentence(text, EDA(lexicon=TABLE)._words, ())
        return [sentence.pieces[2 * i + 1] for i in sentence.starts]

    assert starts("He saw Mr. Will Big. The cat ran etc. She left. No. We saw it.") == [
        "He", "The", "She", "No", "We",
    ]  # fmt: skip
    assert starts("He ate a fig. Then plan B. The end. So did I. You saw No. 5 Big") == [
        "He", "Then", "The", "So", "You",
    ]  # fmt: skip
    assert starts("We saw it etc... Then") == ["We", "Then"]
    assert starts("It happened in Dec. The car was his, of Big Co. She saw Sen. Will Big") == [
        "It", "The", "She",
    ]  # fmt: skip
    assert starts("He is a rev. Then we saw her on the st. They ran.") == ["He", "Then", "They"]


def test_words_stay_ends_of_sentences_where_a_full_stop_is_no_part_of_them():
    for text in ("It happened in Dec. The cat ran", "He is a rev. Then cats ran"):
        for result in results(only(alpha_rs=0.4), text):
            assert gaps(result) == gaps(text)
            assert len(re.findall(r"(?:^|\. )[A-Z]", result)) == 2
        last = text.partition(".")[0].split()[-1]
        assert any(last not in result for result in results(only(p_rd=0.5), text))


def test_one_word_always_stays():
    eda = only(p_rd=0.999)
    for key in range(50):
        assert len(words(eda("one two three four", keys=[key])[0])) == 1


def test_four_results_come_from_four_operations():
    eda = EDA(num_aug=4, lexicon=TABLE, p_rd=0.9)
    text = "my big cat saw ten dogs on our roof"
    for key in range(30):
        kinds = set()
        for result in eda(text, keys=[key]):
            before, after = Counter(words(text)), Counter(words(result))
            assert result != text
            lost, won = bool(before - after), bool(after - before)
            kinds.add("swap" if not lost and not won else (lost, won))
        assert kinds == {"swap", (True, True), (False, True), (True, False)}
    assert len(eda(text, keys=[1])) == 4
    assert len(EDA(num_aug=7, lexicon=TABLE)(text)) == 7


def test_what_cannot_be_done_is_left():
    eda = EDA(num_aug=3)
    for text in ("", "  ", "12:30", "http://a.example/b", "...", "😀😀"):
        assert eda(text) == [text] * 3
    assert EDA(num_aug=1, lexicon=TABLE, p_rd=0)("dog") == ["dog"]  # no pair, no synonym


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_kept_spans_survive(data):
    alphabet = st.sampled_from(
        ["big", "cat", "The", "saw", "x1", "@me", " ", " ", ", ", ".", "\n", "é", "“"]
    )
    text = "".join(data.draw(st.lists(alphabet, max_size=16)))
    marks = st.tuples(st.integers(0, max(0, len(text) - 1)), st.integers(1, 6))
    raw = data.draw(st.lists(marks, max_size=3)) if text else []
    spans = [(a, min(a + n, len(text))) for a, n in raw]
    key = data.draw(st.integers(-(2**63), 2**63 - 1))
    eda = EDA(0.4, 0.4, 0.4, 0.4, num_aug=5, lexicon=TABLE)
    found = eda.with_spans(text, spans, keys=[key])
    assert [result for result, _ in found] == eda(text, keys=[key], keep=spans)
    for result, moved in found:
        assert [result[a:b] for a, b in moved] == [text[a:b] for a, b in spans]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=5), st.integers(0, 2**40))
def test_any_text_any_batch(texts, key):
    eda = EDA(0.3, 0.3, 0.3, 0.3, num_aug=4, lexicon=TABLE)
    keys = [key + n for n in range(len(texts))]
    together = eda(texts, keys=keys)
    assert together == [eda(t, keys=[k]) for t, k in zip(texts, keys, strict=True)]
    assert together == eda(texts, keys=torch.tensor(keys, dtype=torch.int64))
    for text, made in zip(texts, together, strict=True):
        for result in made:  # only words move, and marks beside a word that was deleted go
            other = Counter(c for gap in gaps(result) for c in gap if not c.isspace())
            gone = Counter(c for gap in gaps(text) for c in gap if not c.isspace()) - other
            assert not set(gone).difference(MARKS)
            if len(words(result)) >= len(words(text)):
                assert not gone


def test_negations_and_clitics():
    eda = EDA(0, 0, 0.5, 0.5, num_aug=8, lexicon=TABLE, keep=["not", "never"])
    text = "it 's not the big cat , i do n't think"
    for key in range(40):
        for result in eda(text, keys=[key]):
            assert " not " in f" {result} "
            assert "'s" in result
            assert "n't" in result


def test_every_call_form():
    eda = EDA(num_aug=2, lexicon=TABLE, seed=3)
    single = eda(TEXT)
    assert isinstance(single, list)
    assert eda([TEXT, "dog"]) == [single, eda("dog")]
    assert eda({"text": [TEXT, "dog"], "label": [0, 1]}) == {
        "text": [*single, *eda("dog")],
        "label": [0, 0, 1, 1],
    }
    one = EDA(num_aug=1, lexicon=TABLE, column="body")
    assert one({"body": TEXT, "label": 5}) == {"body": one(TEXT)[0], "label": 5}
    with pytest.raises(ValueError, match="there are 2 results for one sample"):
        eda({"text": TEXT})


def test_hugging_face_map(tmp_path):
    texts = [f"my big cat saw {n} dogs" for n in range(10)]
    data = datasets.Dataset.from_dict({"text": texts, "label": list(range(10))})
    eda = EDA(num_aug=4, seed=1)
    made = data.map(eda, batched=True)
    assert made["label"][:] == [n for n in range(10) for _ in range(4)]
    assert made["text"][:] == [one for text in texts for one in eda(text)]
    assert data.map(eda, batched=True, batch_size=3)["text"][:] == made["text"][:]
    by_number = data.map(eda, batched=True, with_indices=True, batch_size=3)
    assert by_number["text"][:] == [one for m in eda(texts, list(range(10))) for one in m]
    assert datasets.fingerprint.Hasher.hash(eda) == datasets.fingerprint.Hasher.hash(
        EDA(num_aug=4, seed=1)
    )
    assert datasets.fingerprint.Hasher.hash(eda) != datasets.fingerprint.Hasher.hash(
        EDA(num_aug=4, seed=2)
    )


def test_in_a_new_process_the_results_are_the_same():
    eda = EDA(num_aug=3, keep=["not", "big cat", "n't"], seed=5)
    given = [TEXT, "Mr. Baker did not stop the quick car, etc. near a big cat.", "dog"]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(eda, given).result() == eda(given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha_sr": 2}, r"alpha_sr=2 must be in \[0, 1\]"),
        ({"p_rd": 1.0}, r"p_rd=1.0 must be in \[0, 1\)"),
        ({"num_aug": 0}, "num_aug=0 must be at least 1"),
        ({"alpha_sr": 0, "alpha_ri": 0, "alpha_rs": 0, "p_rd": 0}, "are all 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EDA(**arguments, lexicon=TABLE)


def test_real_sentences_with_wordnet():
    path = Path(os.environ["TORSH_TEST_DATA"]) / "text/sst2/dev.tsv"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    texts = [line.split("\t")[0] for line in path.read_text().splitlines()]
    made = EDA(num_aug=4)(texts)
    changed = sum(one != text for text, four in zip(texts, made, strict=True) for one in four)
    assert changed > 0.99 * 4 * len(texts)
    for text, four in zip(texts, made, strict=True):
        for one in four:
            assert abs(len(one.split()) - len(text.split())) <= 3 + 0.5 * len(text.split())
