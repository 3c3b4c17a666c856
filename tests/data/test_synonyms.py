import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torsh_data import ShardedDataset, StreamLoader, write_shards
from torsh_data._rng import generator, uniform
from torsh_data.text import Lexicon, SynonymReplacer
from torsh_data.text._draws import content_keys, draws
from torsh_data.text._words import join_spans, protected_spans, split_around, split_pieces

TABLE = {"cat": ["feline"], "big": ["large"], "Haus": ["Gebäude"]}
every = SynonymReplacer(p=1.0, lexicon=TABLE)


@settings(max_examples=400, deadline=None)
@given(st.text())
def test_pieces_join_to_the_text(text):
    pieces = split_pieces(text)
    assert "".join(pieces) == text
    assert len(pieces) % 2 == 1
    assert all(pieces[1::2])
    assert not any(c.isalpha() for gap in pieces[::2] for c in gap)


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="ab .'-\u0301😀"), st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)))
)
def test_pieces_around_spans_join_to_the_text_and_have_each_span(text, raw):
    spans = join_spans((a, min(a + n, len(text))) for a, n in raw if a < len(text))
    pieces, stays = split_around(text, spans)
    assert "".join(pieces) == text
    assert len(pieces) % 2 == 1
    starts = np.cumsum([0, *map(len, pieces)])
    for start, end in spans:
        i = [k for k in stays if starts[2 * k + 1] == start and pieces[2 * k + 1]]
        assert pieces[2 * i[0] + 1] == text[start:end]
    for k in range(len(pieces) // 2):  # what has no gap at its side stays
        left = not pieces[2 * k] and k
        right = not pieces[2 * k + 2] and 2 * k + 3 < len(pieces)
        assert k in stays or not (left or right)


def words(text):
    return split_pieces(text)[1::2]


def test_words_of_many_scripts():
    assert words("It's a well-known café, isn\u2019t it?") == [
        "It's",
        "a",
        "well-known",
        "café",
        "isn\u2019t",
        "it",
    ]
    assert words("हिन्दी में लिखा।") == ["हिन्दी", "में", "लिखा"]  # vowel signs belong to words
    assert words("می‌خواهم بروم؟") == ["می‌خواهم", "بروم"]
    assert words("Привет, мир… “да”") == ["Привет", "мир", "да"]
    assert words("cafe\u0301 👩‍👩‍👧 ❤️ ok") == ["cafe\u0301", "ok"]
    assert words("「猫」、犬。") == ["猫", "犬"]
    assert words("'quoted' -- end- (x)") == ["quoted", "end", "x"]


@pytest.mark.parametrize(
    "kept",
    [
        "https://cat.example/big?cat=big", "big.cat@example.org", "@cat", "#cat", "<cat big='x'>",
        "www.cat.example/big", "cat.big", "/home/cat/big", "&cat;", "C:\\cat\\big", "cat4",
        "big_cat",
    ],
)  # fmt: skip
def test_addresses_and_the_like_stay(kept):
    assert every(f"big {kept} cat, ({kept}).") == f"large {kept} feline, ({kept})."


def test_case_is_that_of_the_word():
    assert every("Cat. CAT! Big cats, big cat. Haus haus HAUS") == (
        "Feline. FELINE! Large cats, large feline. Gebäude haus HAUS"
    )
    assert every("BIG CAT ON A ROOF") == "LARGE FELINE ON A ROOF"
    assert every("Big Cat Eats Big Haus") == "Large Feline Eats Large Gebäude"  # a headline
    assert every("we saw Big Cat there") == "we saw Big Cat there"  # a name
    assert every("cAt bIG") == "cAt bIG"


def test_gaps_stay():
    text = '\tbig   (cat)…\n\n"big"—cat;\u00a0big/cat\r\n'
    assert every(text) == text.replace("big", "large").replace("cat", "feline")


def test_what_a_user_keeps():
    text = "big cat, big dog"
    assert SynonymReplacer(1.0, TABLE, keep=r"big (?=dog)")(text) == "large feline, big dog"
    assert SynonymReplacer(1.0, TABLE, keep=["CAT"])(text) == "large cat, large dog"
    assert SynonymReplacer(1.0, TABLE, keep=["Big cat"])(text) == "big cat, large dog"
    assert every(text, keep=[(1, 2)]) == "big feline, large dog"
    assert every([text, text], keep=[[], [(0, 16)]]) == ["large feline, large dog", text]
    assert SynonymReplacer(1.0, TABLE, stop_words=["big"])(text) == "big feline, big dog"


def test_spans_are_found_again():
    text = "The big cat met Anna Big of Cat Ltd. near a big cat."
    spans = [(16, 24), (28, 35), (21, 24)]
    ((result, moved),) = every.with_spans(text, spans, keys=[5])
    assert result == "The large feline met Anna Big of Cat Ltd. near a large feline."
    assert [result[a:b] for a, b in moved] == ["Anna Big", "Cat Ltd", "Big"]


def test_wordnet_agrees_with_the_article():
    # "car" has automobile, auto, motorcar; "an auto" needs another article than "a car"
    replace = SynonymReplacer(p=1.0)
    found = {replace("we saw a car", keys=[k]) for k in range(40)}
    assert found == {"we saw a motorcar"}
    assert len({replace("we saw the car", keys=[k]) for k in range(40)}) == 3


def test_p_is_the_share_of_words():
    replace = SynonymReplacer(p=0.3, lexicon=TABLE)
    count = replace("cat " * 10_000, keys=[1]).count("feline")
    assert abs(count - 3000) < 4 * np.sqrt(10_000 * 0.3 * 0.7)  # four standard deviations
    assert SynonymReplacer(p=0.0, lexicon=TABLE)("cat") == "cat"


def test_nothing_to_do_is_no_change():
    for text in ("", " ", "12:30", "😀", "the and of", "...", "\ud800"):
        assert SynonymReplacer(p=1.0)(text) == text
        assert SynonymReplacer(p=1.0, lexicon=TABLE)([text]) == [text]
    assert every([]) == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(alphabet="cat big.\n"), max_size=6), st.integers(0, 2**62))
def test_a_result_does_not_depend_on_the_batch(texts, key):
    replace = SynonymReplacer(p=0.5, lexicon={"cat": ["feline", "tom"], "big": ["large", "huge"]})
    keys = [key + n for n in range(len(texts))]
    together = replace(texts, keys=keys)
    assert together == [replace(t, keys=[k]) for t, k in zip(texts, keys, strict=True)]
    assert together[::-1] == replace(texts[::-1], keys=keys[::-1])
    assert replace(texts) == [replace(t) for t in texts]


def test_seeds():
    text = "cat " * 50
    replace = SynonymReplacer(p=0.5, lexicon=TABLE, seed=1)
    assert replace(text) == replace(text)
    assert replace(text) != SynonymReplacer(p=0.5, lexicon=TABLE, seed=2)(text)
    assert replace(text, generator(7)) == replace(text, generator(7))
    assert replace(text, generator(7)) != replace(text, generator(8))


def test_few_and_many_draw_the_same_numbers():
    keys = np.random.default_rng(0).integers(-(2**63), 2**63, 100)
    for key, draw in zip(keys, draws(keys, 24), strict=True):
        (alone,) = draws(np.array([key]), 24)
        expected = [uniform(np.array([key]), n)[0] for n in range(40)]
        assert [draw() for _ in range(40)] == expected == [alone() for _ in range(40)]
    texts = [f"text {n}" for n in range(50)]
    assert content_keys(3, texts).tolist() == [content_keys(3, [t])[0] for t in texts]


def test_long_texts_have_draws_enough():
    replace = SynonymReplacer(p=0.5, lexicon=TABLE)
    found = replace("cat " * 300, keys=[3]).split()
    halves = ["".join(w[0] for w in found[a : a + 100]) for a in (0, 100, 200)]
    assert len(set(halves)) == 3


def test_in_a_stream_results_follow_seed_and_epoch_and_not_workers(tmp_path):
    texts = [f"big cat {'cat ' * 20}{n}" for n in range(24)]
    write_shards([{"text": text} for text in texts], tmp_path / "d")
    replace = SynonymReplacer(p=0.5, lexicon=TABLE)

    def read(workers, batch, transform, epoch=0, seed=0):
        data = ShardedDataset(tmp_path / "d", transform=transform)
        loader = StreamLoader(data, batch, num_workers=workers, seed=seed, epoch=epoch)
        return sorted(t for b in loader for t in b["text"])

    for transform in (replace, lambda sample, rng: replace(sample, rng)):
        first = read(0, 4, transform)
        assert first != sorted(texts)
        assert first == read(2, 6, transform)
        assert first != read(0, 4, transform, epoch=1)
        assert first != read(0, 4, transform, seed=1)


def test_pickles_do_not_depend_on_what_was_seen():
    replace = SynonymReplacer(p=1.0)
    before = pickle.dumps(replace)
    assert len(before) < 10_000
    replace("the big car")
    assert pickle.dumps(replace) == before
    assert pickle.loads(before)("the big cars", keys=[1]) == replace("the big cars", keys=[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 1.5}, r"p=1.5 must be in \[0, 1\]"),
        ({"min_share": -1}, "min_share=-1 must be"),
        ({"keep": "("}, "is no regular expression"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SynonymReplacer(**{"lexicon": TABLE} | arguments)


def test_wrong_calls():
    with pytest.raises(TypeError, match="must hold words; pass spans with each call"):
        SynonymReplacer(lexicon=TABLE, keep=[(0, 3)])
    with pytest.raises(TypeError, match="stop_words='the' is one string"):
        SynonymReplacer(lexicon=TABLE, stop_words="the")
    with pytest.raises(TypeError, match="texts holds a int, expected strings"):
        every(["a", 1])
    with pytest.raises(ValueError, match=r"keep: \(0, 9\) is no span of a text of 3 letters"):
        every("cat", keep=[(0, 9)])
    with pytest.raises(ValueError, match="keep has spans for 1 texts, but there are 2"):
        every(["cat", "cat"], keep=[[(0, 1)]])
    with pytest.raises(ValueError, match="keys has 1 values of int64 for 2 texts"):
        every(["cat", "cat"], keys=[1])
    with pytest.raises(ValueError, match="keys has 2 values of float64 for 2 texts"):
        every(["cat", "cat"], keys=[1.0, 2.0])
    with pytest.raises(ValueError, match="give rng or keys, not both"):
        every("cat", generator(1), keys=[1])
    with pytest.raises(ValueError, match=r"column='text'; there are \['body'\]"):
        every({"body": "cat"})


def test_a_lexicon_object_can_be_shared():
    lexicon = Lexicon(TABLE)
    assert SynonymReplacer(1.0, lexicon)("cat") == "feline"


def test_long_runs_take_linear_time():
    """What grows with the square of the length does not end before the timeout of the tests."""
    for text, spans in (
        ("a" * 200_000 + "@#./", []),
        ("a." * 100_000 + " @", [(0, 200_000)]),
        ("/a" * 100_000, [(0, 200_000)]),
        ("-" * 200_000 + "@x", [(0, 200_002)]),
    ):
        assert protected_spans(text, []) == spans


def test_a_tagger_restricts_the_senses():
    def tags(words):  # after "to" or "they" stands a verb, after "the" a noun
        kinds = {"to": "v", "they": "v", "the": "n"}
        return [kinds.get(before, "") for before in ["", *words[:-1]]]

    text = "they start to plant at the plant, the Answer to START"
    plain = SynonymReplacer(1.0, stop_words=["to", "the", "they", "at"])
    tagged = SynonymReplacer(1.0, stop_words=["to", "the", "they", "at"], pos_tagger=tags)
    assert "works at the works" in plain(text)
    found = {tagged(text, keys=[key]) for key in range(20)}
    assert found == {
        f"they {one} to plant at the works, the Answer to {other}"
        for one in ("begin", "commence")
        for other in ("BEGIN", "COMMENCE")
    }
    own = SynonymReplacer(1.0, TABLE, pos_tagger=lambda words: ["n"] * len(words))
    assert own("big cat") == "large feline"  # a table without parts of speech serves all
    for wrong in (["n"], ["n", "NN"]):
        with pytest.raises(ValueError, match=r"pos_tagger gave . tags \['n'.*\] for 2 words"):
            SynonymReplacer(1.0, TABLE, pos_tagger=lambda words, wrong=wrong: wrong)("big cat")
