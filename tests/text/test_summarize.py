import json
import random
import re
import textwrap
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.writers import (
    load_smollm,
    make_writer,
    train_to_keep_first_word,
    words,
    writer_tokenizer,
)
from torsh_text import EmbeddingCache, Generator, KeySentence, Summarizer, Summary, split_sentences
from torsh_text._splitting import split_to_fit
from torsh_text._summarize import _choose

NEWS = (
    "The council voted on Tuesday to close the old bridge. Work on the bridge starts in May. "
    "My cat likes fish! The bridge will be closed for six months. Dr. Lee said drivers have to "
    "use the tunnel while the bridge is closed."
)


@pytest.fixture(scope="module")
def first_word():
    return Generator(train_to_keep_first_word(), writer_tokenizer())


@pytest.mark.parametrize(
    ("method", "diversity"), [("lexrank", 0.0), ("mmr", 0.0), ("facility", None)]
)
def test_extracts_sentences_word_for_word_in_order(minilm, method, diversity):
    summary = Summarizer(encoder=minilm).extract(
        NEWS, sentences=2, method=method, diversity=diversity
    )
    assert len(summary.sentences) == 2
    assert summary.text == " ".join(one.text for one in summary.sentences)
    assert [one.start for one in summary.sentences] == sorted(s.start for s in summary.sentences)
    for one in summary.sentences:
        assert NEWS[one.start : one.end] == one.text
        assert "bridge" in one.text or method == "facility"  # which also covers the cat
        assert 0 < one.score <= 1 + 1e-6
    assert (summary.pieces, summary.truncated, summary.finished) == (1, False, True)


def test_scores_and_numbers_of_sentences(minilm):
    summarizer = Summarizer(encoder=minilm)
    for method in ("lexrank", "mmr"):
        scores = summarizer.extract(NEWS, sentences=5, method=method).sentences
        assert min(scores, key=lambda one: one.score).text == "My cat likes fish!"
    assert max(s.score for s in summarizer.extract(NEWS).sentences) == pytest.approx(1)
    covered = summarizer.extract(NEWS, sentences=5, method="facility").sentences
    assert sum(one.score for one in covered) == pytest.approx(1, abs=1e-5)
    assert len(summarizer.extract(NEWS).sentences) == 3
    assert len(summarizer.extract(NEWS, ratio=0.5).sentences) == 3
    assert len(summarizer.extract(NEWS, ratio=0.01).sentences) == 1
    assert summarizer.extract(NEWS, sentences=99).text == NEWS


def test_diversity_leaves_out_copies(minilm):
    text = "Rain fell on the city all day. It rained on the city all day. The mayor resigned."
    for method, options in (
        ("lexrank", {"diversity": 0.5}),
        ("mmr", {"diversity": 0.5}),
        ("facility", {}),
    ):
        summary = Summarizer(encoder=minilm).extract(text, sentences=2, method=method, **options)
        assert "mayor" in summary.text
    plain = Summarizer(encoder=minilm).extract(text, sentences=2, diversity=0.0)
    assert "mayor" not in plain.text


def test_odd_texts(minilm):
    summarizer = Summarizer(encoder=minilm)
    empty, one, chinese = summarizer.extract(["", "One sentence", "今天很冷。我们在家。"])
    assert empty == Summary("")
    assert one.sentences == (KeySentence("One sentence", 0, 12, pytest.approx(1)),)
    assert chinese.text == "今天很冷。我们在家。"
    assert summarizer.extract([]) == []
    # far beyond the 256 tokens of the model: averaged, not cut
    with pytest.warns(UserWarning, match="1 of 1 texts hold a sentence of more than 400") as told:
        assert len(summarizer.extract("word " * 600 + ". The end.").sentences) == 2
    assert len(told) == 1


def test_texts_without_marks_between_sentences(minilm):
    summarizer = Summarizer(encoder=minilm)
    plain = [s.text.rstrip(".!").lower() for s in split_sentences(NEWS)] * 5
    lines = summarizer.extract("\n".join(plain) + "\n", sentences=2)
    assert [one.text in plain for one in lines.sentences] == [True, True]
    endless = " ".join(plain)
    texts = [endless, "Hello. " + endless + " ", plain[0]]
    with pytest.warns(UserWarning, match="2 of 3 texts hold a sentence of more than 400") as told:
        whole, _, short = summarizer.extract(texts, sentences=1)
    assert told[0].filename == __file__
    assert len(told) == 1
    assert whole.text == endless
    assert short.text == plain[0]


def test_vectors_of_sentences_are_kept_in_a_cache(minilm, tmp_path):
    cache = EmbeddingCache(tmp_path)
    summarizer = Summarizer(encoder=minilm)
    first = summarizer.extract(NEWS, cache=cache)
    assert (cache.stats().stored, cache.stats().hits) == (5, 0)
    assert summarizer.extract([NEWS], cache=cache) == [first]
    assert (cache.stats().stored, cache.stats().hits) == (5, 5)
    assert first == summarizer.extract(NEWS)


def rouge1(text, golds):
    """ROUGE-1 (Lin, 2004): mean over references of F1 of common words, counted."""
    found = Counter(re.findall(r"\w+", text.lower()))
    total = 0.0
    for gold in golds:
        reference = Counter(re.findall(r"\w+", gold.lower()))
        total += 2 * (found & reference).total() / (found.total() + reference.total())
    return total / len(golds)


def test_rouge1_by_hand():
    # 2 common of 4 and 2 words: F = 2 * 2 / 6; none in common: 0
    assert rouge1("a b b c", ["B a", "x"]) == pytest.approx((4 / 6 + 0) / 2)


def test_beats_first_and_random_sentences_on_reviews(minilm, text_data):
    topics = json.loads((text_data / "opinosis" / "topics.json").read_text(encoding="utf-8"))
    texts = ["\n\n".join(topic["sentences"][:40]) for topic in topics.values()]
    golds = [topic["gold"] for topic in topics.values()]
    assert len(texts) == 26
    split = [[one.text for one in split_sentences(text)] for text in texts]
    vectors = minilm.encode([one for found in split for one in found])

    def score(pick):
        chosen = [pick(i, len(found)) for i, found in enumerate(split)]
        summaries = [" ".join(split[i][j] for j in ids) for i, ids in enumerate(chosen)]
        return sum(map(rouge1, summaries, golds)) / len(golds)

    first = score(lambda i, n: range(2))
    dice = random.Random(0)
    chance = sum(score(lambda i, n: dice.sample(range(n), 2)) for _ in range(5)) / 5
    parts = vectors.split([len(found) for found in split])
    for method in ("lexrank", "mmr", "facility"):
        reached = score(lambda i, n, by=method: _choose(parts[i], 2, 0.3, by)[0])
        # measured: 1.17 to 1.19 times
        assert reached > 1.1 * max(first, chance), (method, reached, first, chance)


def test_short_texts_are_written_in_one_piece(first_word):
    texts = words([5, 9], seed=3)
    one = Summarizer(first_word).generate(texts[0], max_new_tokens=4)
    assert one == Summary(texts[0].split()[0])
    both = Summarizer(first_word).generate([*texts, "", " \n"], max_new_tokens=4)
    assert [s.text for s in both] == [texts[0].split()[0], texts[1].split()[0], "", ""]
    cut = Summarizer(first_word).generate(texts[0], max_new_tokens=1)
    assert not cut.finished


def test_map_reduce_reads_everything(first_word):
    model = Generator(first_word.model, first_word.tokenizer, max_length=20).eval()
    text = ". ".join(words([4] * 30, seed=5)) + "."
    rounds = []
    plain = model.generate

    def recorded(texts, **options):
        rounds.append(list(texts))
        return plain(texts, **options)

    model.generate = recorded
    short = "a7 a8."
    long_summary, short_summary = Summarizer(model).generate([text, short], max_new_tokens=4)
    # sentences of 5 tokens, 6 with the space that may cost one: 3 of them in the 19 tokens
    pieces = split_to_fit(text, model, 19)
    assert long_summary.pieces == len(pieces) == 10
    assert rounds[0] == [*pieces, short]
    firsts = [piece.split()[0] for piece in pieces]
    assert rounds[1] == ["\n".join(firsts)]
    assert long_summary == Summary(firsts[0], pieces=10)
    assert short_summary == Summary("a7")


def test_a_piece_that_was_cut_off_is_told_by_the_whole(first_word):
    """Pieces end too early, by a limit of their own; the last round's answer ends by itself."""
    model = Generator(first_word.model, first_word.tokenizer, max_length=20).eval()
    text = ". ".join(words([4] * 30, seed=5)) + "."
    plain, limits = model.generate, iter([1, 4])
    model.generate = lambda texts, **options: plain(
        texts, **{**options, "max_new_tokens": next(limits)}
    )
    long_summary, short_summary = Summarizer(model).generate([text, ""], max_new_tokens=4)
    assert long_summary.text
    assert not long_summary.finished
    assert short_summary == Summary("")


def test_it_is_a_module_of_its_parts(minilm, first_word):
    found = Summarizer(first_word, minilm)
    assert not found.training
    assert set(found.children()) == {first_word, minilm}
    assert list(Summarizer(encoder=minilm).children()) == [minilm]


def test_map_reduce_repeats_until_one_piece_is_left(first_word):
    model = Generator(first_word.model, first_word.tokenizer, max_length=9).eval()
    text = ". ".join(words([4] * 60, seed=5)) + "."
    summary = Summarizer(model).generate(text, max_new_tokens=4)
    assert summary == Summary(text.split()[0], pieces=60)
    with pytest.raises(ValueError, match=r"max_new_tokens=5 is more than half of the 8 tokens"):
        Summarizer(model).generate(text, max_new_tokens=5)


def test_truncating_and_refusing(first_word):
    model = Generator(first_word.model, first_word.tokenizer, max_length=9).eval()
    text = ". ".join(words([4] * 6, seed=5)) + "."
    with pytest.warns(UserWarning, match=r"1 of 1 different texts did not fit"):
        cut = Summarizer(model).generate(text, max_new_tokens=4, long="truncate")
    assert cut == Summary(text.split()[0], truncated=True)
    with pytest.raises(ValueError, match=r"texts\[0\] does not fit the model"):
        Summarizer(model).generate(text, max_new_tokens=4, long="error")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(3, 25))
def test_pieces_fit_and_hold_everything(lengths, room):
    model = Generator(make_writer("t5"), writer_tokenizer())
    text = ". ".join(words(lengths)) + "."
    pieces = split_to_fit(text, model, room)
    assert all(1 <= count <= room for count in model.count_tokens(pieces))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    total = model.count_tokens([text])[0]
    assert len(pieces) >= total / room


def test_pieces_are_of_about_equal_length():
    model = Generator(make_writer("t5"), writer_tokenizer())
    text = ". ".join(words([4] * 22)) + "."
    counts = model.count_tokens(split_to_fit(text, model, 60))
    assert counts == [40, 40, 30]  # not 50, 50, 10


def test_instructions():
    seen = []

    def first_ids(model):
        model.model.get_encoder().register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()),
            with_kwargs=True,
        )
        return model

    config = {"task_specific_params": {"summarization": {"prefix": "a9 "}}}
    own = first_ids(Generator(make_writer("t5", **config), writer_tokenizer()))
    Summarizer(own).generate("a1", max_new_tokens=1)
    Summarizer(own).generate("a1", max_new_tokens=1, instruction="a5 ")
    plain = first_ids(Generator(make_writer("t5"), writer_tokenizer()))
    Summarizer(plain).generate("a1", max_new_tokens=1)
    assert seen == [[15, 7, 1], [11, 7, 1], [7, 1]]


def test_bad_arguments(minilm, first_word):
    with pytest.raises(ValueError, match=r"pass an encoder, such as .* to extract, or a model"):
        Summarizer()
    with pytest.raises(RuntimeError, match=r"there is no encoder; make Summarizer\(encoder=...\)"):
        Summarizer(first_word).extract("a1")
    with pytest.raises(RuntimeError, match=r"there is no model; make Summarizer\(model=...\)"):
        Summarizer(encoder=minilm).generate("a1")
    with pytest.raises(ValueError, match=r"long='mean' is none of 'map-reduce'"):
        Summarizer(first_word).generate("a1", long="mean")
    extract = Summarizer(encoder=minilm).extract
    for options, kind, message in (
        ({"method": "first"}, ValueError, r"method='first' is none of 'lexrank'"),
        ({"sentences": 2, "ratio": 0.5}, ValueError, r"say the same; pass one of them"),
        ({"sentences": 0}, ValueError, r"sentences=0 is not positive"),
        ({"sentences": 1.5}, TypeError, r"sentences=1.5 is no integer"),
        ({"ratio": 1.5}, ValueError, r"ratio=1.5 is not in \(0, 1\]"),
        ({"diversity": 2}, ValueError, r"diversity=2 is not in \[0, 1\]"),
        ({"method": "facility", "diversity": 0.3}, ValueError, r"is diverse by itself"),
    ):
        with pytest.raises(kind, match=message):
            extract("a1", **options)
    with pytest.raises(TypeError, match=r"texts\[0\] is 3 of type int"):
        extract([3])


def test_models_by_name(minilm_path, tmp_path):
    model, tokenizer = make_writer("t5"), writer_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    summarizer = Summarizer(tmp_path, minilm_path)
    assert summarizer.extract("One.").text == "One."
    assert isinstance(summarizer.generate("a1", max_new_tokens=2), Summary)


@pytest.mark.slow
def test_a_real_model_says_what_the_text_is_about():
    summary = Summarizer(load_smollm()).generate(NEWS, max_new_tokens=40)
    assert "bridge" in summary.text
    assert summary.text not in NEWS
    assert torch.is_inference_mode_enabled() is False


def test_a_long_sentence_in_wrapped_lines_stays_whole(minilm):
    long = "It begins here and " + ", ".join(f"goes on with clause {n}" for n in range(40)) + "."
    wrapped = textwrap.fill(f"A short one comes first. {long} The end.", 80)
    with pytest.warns(UserWarning, match="1 of 1 texts hold a sentence"):
        found = Summarizer(encoder=minilm).extract(wrapped, sentences=9).sentences
    assert [one.text.replace("\n", " ") for one in found] == [
        "A short one comes first.",
        long,
        "The end.",
    ]


def test_lines_divide_scripts_without_spaces_and_marks(minilm):
    lines = ["\u0e01" * n for n in (90, 40, 120, 60, 100)] * 2
    text = "Thai follows.\n\n" + "\n".join(lines)
    found = Summarizer(encoder=minilm).extract(text, sentences=20).sentences
    assert [one.text for one in found] == ["Thai follows.", *lines]
    assert all(text[one.start : one.end] == one.text for one in found)


def test_a_device_is_for_what_is_loaded(minilm, minilm_path):
    assert Summarizer(encoder=minilm_path, device="cpu").encoder.backbone.device.type == "cpu"
    with pytest.raises(ValueError, match="device='cpu' is for a path or hub id"):
        Summarizer(encoder=minilm, device="cpu")
