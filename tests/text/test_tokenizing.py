import threading
from itertools import pairwise

import numpy as np
import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from tests.text.architectures import make_tokenizer, random_texts
from torsh_text._tokenizing import RowTokenizer, checked_texts


def _rows(found):
    return [row.tolist() for row in np.split(found.ids, np.cumsum(found.lengths)[:-1])]


def test_own_rules_replace_those_in_the_file(minilm_path):
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    # what is in tokenizer.json, and would pad to 128 and cut at 128
    assert tokenizer.backend_tokenizer.padding["length"] == 128
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 128
    found = RowTokenizer(tokenizer, max_length=256).rows(["a cat", "word " * 300, "word " * 200])
    assert found.lengths.tolist() == [4, 256, 202]
    assert found.too_long == [1]
    assert tokenizer.backend_tokenizer.padding["length"] == 128  # the given one is untouched


def test_same_ids_as_transformers(minilm_path, stsb):
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    texts = [*stsb[0][:100], "", "  ", "naïve 日本語 🤗"]
    found = RowTokenizer(tokenizer, max_length=256).rows(texts)
    assert _rows(found) == tokenizer(texts, padding=False, truncation=False)["input_ids"]


def test_batch_gathers_rows_in_any_order():
    found = RowTokenizer(make_tokenizer(), max_length=50).rows(random_texts([3, 0, 7, 1]))
    batch = found.batch(np.array([2, 0, 3]))
    rows = _rows(found)
    assert batch.input_ids.tolist() == [rows[2] + rows[0] + rows[3]]
    assert batch.lengths == (9, 5, 3)


def test_mean_keeps_every_token():
    tokenizer = RowTokenizer(make_tokenizer(), max_length=6)
    texts = random_texts([10, 2, 4])
    found = tokenizer.rows(texts, long="mean")
    assert found.pieces.tolist() == [3, 1, 1]
    assert found.lengths.tolist() == [6, 6, 4, 4, 6]
    inside = [i for row in _rows(found) for i in row[1:-1]]
    assert inside == [int(word[1:]) for text in texts for word in text.split()]
    assert found.too_long == [0]


@pytest.mark.parametrize("long", ["truncate", "mean"])
def test_tokenizers_written_in_python(long):
    tokenizer = ByT5Tokenizer()
    found = RowTokenizer(tokenizer, max_length=4).rows(["abcdefg", "", "ab"], long=long)
    first = tokenizer("abc")["input_ids"]
    assert _rows(found)[0] == first
    assert found.too_long == [0]
    assert found.pieces.tolist() == ([3, 1, 1] if long == "mean" else [1, 1, 1])


def test_text_without_tokens_becomes_one_token():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.eos_token = "[SEP]"
    assert _rows(RowTokenizer(tokenizer, max_length=6).rows(["", "w5", " "])) == [[2], [5], [2]]


def test_lower_case():
    tokenizer = RowTokenizer(make_tokenizer(), max_length=6, lower_case=True)
    assert _rows(tokenizer.rows(["W7"])) == [[0, 7, 2]]


def test_lone_surrogates_are_named():
    tokenizer = RowTokenizer(make_tokenizer(), max_length=6)
    with pytest.raises(ValueError, match=r"texts\[1\] holds a lone surrogate at character 2"):
        tokenizer.rows(["fine", "w\u00e9\ud800"])


def test_refuses_a_length_without_room():
    with pytest.raises(ValueError, match=r"max_length=2 leaves no room .* at least 3"):
        RowTokenizer(make_tokenizer(), max_length=2)


@pytest.mark.parametrize("bad", [None, float("nan"), b"bytes", 3])
def test_refuses_what_is_no_string(bad):
    with pytest.raises(TypeError, match=r"texts\[1\] is .* not a string"):
        checked_texts(["fine", bad])


@pytest.mark.parametrize("bad", ["one", b"one"])
def test_refuses_a_bare_string(bad):
    with pytest.raises(TypeError, match="single string"):
        checked_texts(bad)


def test_refuses_what_has_no_order_of_texts():
    with pytest.raises(TypeError, match=r"texts is a dict.*list\(texts.values\(\)\)"):
        checked_texts({"a": "b"})
    with pytest.raises(TypeError, match="texts is a set, which has no order"):
        checked_texts({"a", "b"})


PAIRS = [("a man eats", "food"), ("", "x"), ("one two three four five six seven", "eight nine")]


@pytest.mark.parametrize("fast", [True, False])
def test_pairs_are_those_of_transformers(minilm_path, fast):
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    rows = RowTokenizer(tokenizer, max_length=9)
    if not fast:
        rows._fast = None
    found = rows.rows(PAIRS)
    expected = tokenizer(
        [a for a, _ in PAIRS], [b for _, b in PAIRS], truncation="only_first", max_length=9
    )
    assert _rows(found) == expected["input_ids"]
    assert found.types is not None
    assert found.types.tolist() == [i for row in expected["token_type_ids"] for i in row]
    assert found.too_long == [2]
    batch = found.batch(np.array([2, 0]))
    assert batch.token_type_ids is not None
    types = expected["token_type_ids"]
    assert batch.token_type_ids.tolist() == [types[2] + types[0]]
    padded = batch.padded()
    assert padded["token_type_ids"][1].tolist() == types[0] + [0] * (9 - len(types[0]))
    assert batch.cu_seqlens.tolist() == [0, 9, 9 + len(types[0])]


def test_second_text_of_a_pair_is_never_cut(minilm_path):
    rows = RowTokenizer(AutoTokenizer.from_pretrained(minilm_path), max_length=8)
    with pytest.raises(ValueError, match=r"second text of a pair, 'one two three.*max_length=8"):
        rows.rows([("a", "one two three four five six")])


def test_windows_cover_the_text(minilm_path):
    text = " ".join(f"word{i}" for i in range(40))
    rows = RowTokenizer(AutoTokenizer.from_pretrained(minilm_path), max_length=20)
    windows = rows.windows([text, "short"], stride=6)
    assert [window.text for window in windows] == [0] * (len(windows) - 1) + [1]
    assert all(len(window.ids) <= 20 for window in windows)
    seen = set()
    for window in windows[:-1]:
        for (start, end), word in zip(window.offsets, window.words, strict=True):
            assert (word == -1) == (start == end)
            seen.update(range(start, end))
    assert seen == {i for i, char in enumerate(text) if char != " "}
    for before, after in pairwise(windows[:-1]):
        assert before.offsets[-7:-1] == after.offsets[1:7]
    with pytest.raises(ValueError, match="stride=18 is not between 0 and 17"):
        rows.windows([text], stride=18)


def test_threads_with_other_strides_get_their_windows():
    rows = RowTokenizer(make_tokenizer(), max_length=20)
    texts = random_texts([100, 60, 90] * 20)
    strides = (0, 3, 9)
    expected = {
        n: RowTokenizer(make_tokenizer(), max_length=20).windows(texts, stride=n) for n in strides
    }
    wrong = []

    def work(stride):
        for _ in range(15):
            if rows.windows(texts, stride=stride) != expected[stride]:
                wrong.append(stride)

    threads = [threading.Thread(target=work, args=(stride,)) for stride in strides * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_pairs_and_windows_do_not_share_rules():
    rows = RowTokenizer(make_tokenizer(), max_length=10)
    texts = random_texts([30, 3])
    windows = rows.windows(texts, stride=2)
    pairs = rows.rows([(texts[0], texts[1]), ("w5", "w6")])
    assert rows.windows(texts, stride=2) == windows
    assert rows.rows(texts).lengths.tolist() == [10, 5]
    again = rows.rows([(texts[0], texts[1]), ("w5", "w6")])
    assert np.array_equal(again.ids, pairs.ids)
    assert pairs.too_long == [0]


@pytest.mark.parametrize("make", [make_tokenizer, ByT5Tokenizer])
def test_the_beginning_is_cut_off_from_the_left(make):
    tokenizer = make()
    tokenizer.truncation_side = "left"
    rows = RowTokenizer(tokenizer, max_length=6)
    text = "w5 w6 w7 w8 w9 w10" if make is make_tokenizer else "abcdefg"
    whole = tokenizer(text)["input_ids"]
    found = rows.rows([text], long="mean")
    first, second = _rows(found)
    assert found.too_long == [0]
    if make is make_tokenizer:
        assert first == [0, 7, 8, 9, 10, 2]
        assert second == [0, 5, 6, 2]
    else:
        assert first == whole[2:]
        assert second == [*whole[:2], tokenizer.eos_token_id]


def test_described_knows_more_than_the_words():
    class Other(ByT5Tokenizer):
        pass

    def described(tokenizer, max_length=9):
        return RowTokenizer(tokenizer, max_length=max_length).described()

    same = described(ByT5Tokenizer())
    assert described(ByT5Tokenizer(name_or_path="elsewhere")) == same
    others = [
        described(ByT5Tokenizer(truncation_side="left")),
        described(ByT5Tokenizer(eos_token="<unk>")),
        described(ByT5Tokenizer(clean_up_tokenization_spaces=True)),
        described(Other()),
    ]
    assert len({same, *others}) == 5
    fast, left = make_tokenizer(), make_tokenizer()
    left.truncation_side = "left"
    assert described(fast) == described(make_tokenizer()) != described(left)
    fast("w5", truncation=True, max_length=3)  # sets rules in the tokenizer that are not ours
    assert described(fast) == described(make_tokenizer())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("stride", [0, 1, 3])
@pytest.mark.parametrize("words", [1, 4, 5, 8, 9, 13])
def test_windows_by_hand(side, stride, words):
    tokenizer = make_tokenizer()
    tokenizer.truncation_side = side
    text = random_texts([words])[0]
    ids = [int(word[1:]) for word in text.split()]
    found = RowTokenizer(tokenizer, max_length=6).windows([text], stride=stride)
    step = 4 - stride
    pieces = []
    if side == "right":
        start = 0
        while not pieces or start + stride < words:
            pieces.append(ids[start : start + 4])
            start += step
    else:
        end = words
        while not pieces or end > stride:
            pieces.append(ids[max(0, end - 4) : end])
            end -= step
    assert [window.ids for window in found] == [[0, *piece, 2] for piece in pieces]
    for window in found:
        assert [f"w{i}" for i in window.ids[1:-1]] == [text[a:b] for a, b in window.offsets[1:-1]]
