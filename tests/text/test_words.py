import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.text.architectures import make_tokenizer, random_texts
from tests.text.taggers import make_tagger
from torsh_text._words import aggregate, best_context, find_words


@pytest.mark.parametrize("side", ["right", "left"])
def test_context_decides_between_windows(side):
    """Each token from the window whose nearer border is farthest; the text's ends are none."""
    tokenizer = make_tokenizer()
    tokenizer.truncation_side = side
    tagger = make_tagger(tokenizer=tokenizer)
    tagger.max_length = 12  # 10 words and 2 special tokens
    text = random_texts([22])[0]
    windows = tagger.row_tokenizer.windows([text], stride=6)
    windows = windows[::-1] if side == "left" else windows
    offsets = [pair for window in windows for pair in window.offsets]
    begins = [0, 4, 8, 12] if side == "right" else [0, 2, 6, 10, 12]
    chosen = best_context(windows, stride=6)
    assert len(chosen) == 22
    assert len(offsets) > 22
    found = [text[slice(*windows[w].offsets[p])] for w, p in chosen]
    assert found == text.split()
    if side == "right":
        windows_of = [w for w, _ in chosen]
        expected = []
        for token in range(22):
            contexts = []
            for w, begin in enumerate(begins):
                if begin <= token < begin + 10:
                    left = 99 if w == 0 else token - begin
                    right = 99 if w == len(begins) - 1 else begin + 9 - token
                    contexts.append((-min(left, right), w))
            expected.append(min(contexts)[1])
        assert windows_of == expected


TEXT = "Zürich, São  Paulo! (Müller's 😀)\n\nJose\u0301 co-operate 北京市 U.S. 👩‍👩‍👧 e-mail."


def _trained(kind):
    """Tokenizers of the kinds in use, trained on a few lines."""
    lines = [TEXT, "Zürich naïve São Paulo Müller co-operate 北京"] * 20
    special = ["<pad>", "<s>", "</s>"]
    if kind == "byte-level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    else:
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=special, unk_token="<pad>", show_progress=False
        )
    backend.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["byte-level", "unigram", "wordpiece"])
def test_words_of_real_tokenizers(kind, minilm):
    tokenizer = minilm.tokenizer if kind == "wordpiece" else _trained(kind)
    size = len(tokenizer)
    tagger = make_tagger("bert", tokenizer=tokenizer, vocab_size=size)
    for max_length, stride in ((100, 0), (14, 4)):
        tagger.max_length = max_length
        windows = tagger.row_tokenizer.windows([TEXT], stride=stride)
        words = find_words(TEXT, windows, stride=stride)
        pieces = [TEXT[start:end] for start, end in words.spans]
        assert all(a[1] <= b[0] for a, b in zip(words.spans, words.spans[1:], strict=False))
        assert {"Zürich", "São", "Paulo", "co", "operate", "e", "mail"} <= set(pieces)
        assert {"U", "S", "(", "!", ",", "Jose\u0301"} <= set(pieces)
        assert all(piece == piece.strip() != "" for piece in pieces)
        for aggregation in ("first", "token"):
            for entity in tagger.predict(TEXT, stride=stride, aggregation=aggregation):
                assert TEXT[entity.start : entity.end] == entity.text


def test_aggregation_by_hand():
    chances = np.array([[0.6, 0.4], [0.1, 0.9], [0.5, 0.5], [0.3, 0.7], [0.2, 0.8], [0.8, 0.2]])
    counts = np.array([2, 1, 3])
    expected = {
        "first": [[0.6, 0.4], [0.5, 0.5], [0.3, 0.7]],
        "max": [[0.1, 0.9], [0.5, 0.5], [0.2, 0.8]],
        "mean": [[0.35, 0.65], [0.5, 0.5], [1.3 / 3, 1.7 / 3]],
    }
    for how, rows in expected.items():
        found = np.exp(aggregate(np.log(chances), counts, how))
        np.testing.assert_allclose(found, rows, atol=1e-12)
