import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.writers import load_smollm, make_writer, writer_tokenizer
from torsh_text import Generation, Generator, Paraphraser, word_overlap

TEXT = "The company will hire two hundred engineers this year."


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("the cat sat", "The cat, sat!", 1.0),
        ("the cat sat on a mat", "yes, the cat sat on a mat", 1.0),
        ("the cat sat on a mat", "the cat sat", 1.0),
        ("the cat sat", "sat cat the", 0.0),
        ("a b c d", "a b x c d", 2 / 3),
        ("a b a b", "a b", 1.0),
        ("a b", "a b a b", 1.0),
        ("word", "word", 1.0),
        ("word", "a word here", 1.0),
        ("word", "other", 0.0),
        ("今天很冷", "今天很热", 2 / 3),
        ("", "", 1.0),
        ("", "a", 0.0),
        ("...", "!", 1.0),
    ],
)
def test_word_overlap_by_hand(a, b, expected):
    assert word_overlap(a, b) == pytest.approx(expected)
    assert word_overlap(b, a) == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=8), st.lists(st.sampled_from("abcd"), max_size=8))
def test_word_overlap_is_a_symmetric_share(a, b):
    a, b = " ".join(a), " ".join(b)
    assert 0 <= word_overlap(a, b) <= 1
    assert word_overlap(a, b) == word_overlap(b, a)
    assert word_overlap(a, a) == 1
    if a:
        assert word_overlap(a, f"{b} {a}") == 1


class Script(Generator):
    """A generator whose answers are given: the filters are tested, not a model."""

    def __init__(self, answers):
        super().__init__(make_writer("t5"), writer_tokenizer())
        self.answers = answers
        self.asked = []

    def candidates(self, texts, n, **options):
        self.asked.append((list(texts), n, options))
        made = [Generation(a, 9, True, False) if isinstance(a, str) else a for a in self.answers]
        return [made for _ in texts]


GOOD = [
    "This year the firm is going to employ 200 new engineers.",
    "Two hundred engineers will be taken on by the company in the current year.",
]


def test_keeps_the_same_meaning_in_other_words(minilm):
    answers = [
        *GOOD,
        TEXT,
        TEXT.upper(),
        '"' + TEXT + '"',
        "Sure, here is a paraphrase: the firm will take on 200 engineers in this year",
        "Sure! The firm will take on two hundred engineers in the current year.",
        "Here's the rewritten text: this year, 200 engineers get hired by the company.",
        "Paraphrased version: this year, 200 engineers get hired by the company.",
        "I'm sorry, but the company will not hire 200 engineers.",
        "",
        " ... ",
        "The company will hire two hundred engineers this year, it said.",
        "The company will hire two hundred engineers",
        "My cat likes fish.",
        GOOD[0],
        f"“{GOOD[0]}”",
        "1. The firm hires engineers.\n2. Engineers are hired by the firm.",
        Generation("This year the firm is going to employ 200", 9, False, False),
    ]
    found = Paraphraser(Script(answers), minilm).generate(TEXT, min_similarity=0.7)
    assert sorted(one.text for one in found) == sorted(GOOD)
    assert found[0].similarity >= found[1].similarity >= 0.7
    for one in found:
        expected = float(minilm.encode([TEXT])[0] @ minilm.encode([one.text])[0])
        assert one.similarity == pytest.approx(expected, abs=1e-5)
        assert one.overlap == word_overlap(TEXT, one.text) <= 0.7


def test_limits_do_what_they_say(minilm):
    near = "The company will hire two hundred engineers next month."
    model = Paraphraser(Script([*GOOD, near, "My cat likes fish."]), minilm)
    assert model.generate(TEXT, min_similarity=0.99) == []
    loose = model.generate(TEXT, min_similarity=-1, max_overlap=1)
    assert len(loose) == 4
    assert loose[-1].text == "My cat likes fish."
    assert near in {one.text for one in loose}
    assert near not in {one.text for one in model.generate(TEXT, min_similarity=-1)}
    assert len(model.generate(TEXT, n=1, min_similarity=0.5)) == 1
    assert model.generate(TEXT, n=1, min_similarity=-1, max_overlap=1)[0] == loose[0]


def test_results_are_in_order_and_equal_texts_are_asked_once(minilm):
    script = Script(GOOD)
    results = Paraphraser(script, minilm).generate(
        [TEXT, "", "My cat likes fish.", TEXT], n=2, min_similarity=0.7, seed=4
    )
    assert [len(found) for found in results] == [2, 0, 0, 2]
    assert results[0] == results[3]
    assert results[0] is not results[3]
    ((asked, n, options),) = script.asked
    assert asked == [TEXT, "My cat likes fish."]
    assert n == 6
    assert options["seed"] == 4
    assert options["long"] == "error"
    assert Paraphraser(script, minilm).generate([]) == []


def test_a_text_may_begin_like_a_preamble(minilm):
    text = "Sure, here is the report that you asked for."
    answer = "Of course: the report you wanted is attached."
    found = Paraphraser(Script([answer]), minilm).generate(text, min_similarity=0.3)
    assert [one.text for one in found] == [answer]


def test_the_whole_way_with_a_small_model(minilm):
    model = Generator(make_writer("t5", initializer_factor=1.0), writer_tokenizer())
    paraphraser = Paraphraser(model, minilm)
    options = {"n": 3, "min_similarity": -1.0, "max_overlap": 1.0, "max_new_tokens": 40}
    once = paraphraser.generate(["a1 a2 a3", "a4"], **options)
    assert once == paraphraser.generate(["a1 a2 a3", "a4"], **options)
    assert once != paraphraser.generate(["a1 a2 a3", "a4"], seed=1, **options)
    beams = paraphraser.generate("a1 a2", method="beam", **options)
    assert len({one.text for one in beams}) == len(beams)


class Limits(Script):
    """Keeps the limit of each text."""

    def candidates(self, texts, n, **options):
        self.limits = getattr(self, "limits", {}) | dict.fromkeys(texts, options["max_new_tokens"])
        return super().candidates(texts, n, **options)


def test_a_text_has_the_same_limit_beside_any_other(minilm):
    script = Limits(GOOD)
    model = Paraphraser(script, minilm)
    short, long = "a1 a2", " ".join(["a1"] * 60)
    model.generate(short)
    assert script.limits == {short: 64}
    model.generate([long, short])
    assert script.limits == {short: 64, long: 192}  # 16 + 2 * 60 = 136, in steps of 64


def test_a_text_beyond_a_third_of_the_context_is_written_anew(minilm):
    """And what does not fit is named by its place."""
    model = Generator(
        make_writer("llama"), writer_tokenizer(ends=False), max_length=100, name="tiny"
    )
    text = " ".join(["a1"] * 60)
    options = {"n": 1, "min_similarity": -1.0, "max_overlap": 1.0}
    seen = []
    plain = model.candidates

    def recorded(texts, n, **more):
        seen.append(more["max_new_tokens"])
        return plain(texts, n, **more)

    model.candidates = recorded
    Paraphraser(model, minilm).generate(text, **options)
    assert seen == model.rooms([text]) == [40]
    with pytest.raises(ValueError, match=r"texts\[2\] does not fit the model beside its prompt"):
        Paraphraser(model, minilm).generate(["a1", "a1", f"{text} {text}"], **options)


def test_it_is_a_module_of_its_parts(minilm):
    script = Script(GOOD)
    assert set(Paraphraser(script, minilm).children()) == {script, minilm}


def test_bad_arguments(minilm):
    model = Paraphraser(Script(GOOD), minilm)
    for options, message in (
        ({"n": 0}, r"n=0 is no positive integer"),
        ({"candidates": 2}, r"candidates=2 is less than n=5"),
        ({"min_similarity": 2}, r"min_similarity=2 is not in \[-1, 1\]"),
        ({"max_overlap": -1}, r"max_overlap=-1 is not in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(TEXT, **options)
    with pytest.raises(TypeError, match=r"texts\[0\] is None"):
        model.generate([None])
    short = Generator(make_writer("llama"), writer_tokenizer(ends=False), max_length=12)
    with pytest.raises(ValueError, match=r"texts\[0\] does not fit the model"):
        Paraphraser(short, minilm).generate("a1 a2 a3 a4 a5 a6 a7 a8 a9 a1", max_new_tokens=8)


@pytest.mark.slow
def test_a_real_model_that_copies_gets_nothing_through(minilm):
    text = "The company said on Monday that it would hire two hundred new engineers this year."
    model = load_smollm()
    instruction = "Rewrite the following text in other words.\n\n"
    options = {"method": "beam", "max_new_tokens": 32, "instruction": instruction}
    written = model.candidates(text, 3, **options)
    assert any(word_overlap(text, one.text) > 0.9 for one in written)  # it copies
    found = Paraphraser(model, minilm).generate(text, n=3, candidates=3, **options)
    for one in found:
        assert one.overlap <= 0.7
        assert one.similarity >= 0.8


def test_no_limit_lets_copies_and_cut_answers_through(minilm):
    cut = Generation("The firm is going to employ engineers and", 9, False, False)
    script = Script([TEXT, TEXT.upper(), f'"{TEXT}"', cut, "", GOOD[0]])
    found = Paraphraser(script, minilm).generate(TEXT, min_similarity=-1, max_overlap=1)
    assert [one.text for one in found] == [GOOD[0]]
