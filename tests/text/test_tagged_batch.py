import numpy as np
import pytest
import torch

from tests.text.architectures import random_texts
from tests.text.taggers import LABELS, make_tagger
from torsh_text import CRF, TaggedBatch


@pytest.fixture
def tiny():
    return make_tagger()


@pytest.mark.parametrize("crf", [False, True])
def test_loss_by_hand(crf):
    tagger = make_tagger(crf=crf)
    examples = [
        (["w5", "w6", "w7"], ["B-x", "I-x", "O"]),
        (random_texts([90])[0].split(), ["O"] * 38 + ["B-x", "I-x", "I-x"] + ["O"] * 49),
        (["w9"], ["B-y"]),
    ]
    batch = tagger.collate(examples)
    assert isinstance(batch, TaggedBatch)
    assert batch.lengths == (3, 90, 1)
    assert list(batch.tokens.lengths) == sorted(batch.tokens.lengths, reverse=True)
    ids = batch.tokens.input_ids[0, batch.places]
    assert ids.tolist() == [int(w[1:]) for words, _ in examples for w in words]
    assert [LABELS[i] for i in batch.tags] == [t for _, tags in examples for t in tags]
    logits = tagger(batch.tokens)[batch.places]
    if crf:
        rows = zip(logits.split(batch.lengths), batch.tags.split(batch.lengths), strict=True)
        expected = -sum(tagger.crf(x[None], t[None]).sum() for x, t in rows) / 94
    else:
        expected = torch.nn.functional.nll_loss(logits.log_softmax(1), batch.tags)
    torch.testing.assert_close(tagger.loss(batch), expected)
    tagger.loss(batch.to("cpu")).backward()
    assert all(p.grad is not None for p in tagger.parameters())


def test_first_tokens_of_words(minilm):
    tagger = make_tagger("bert", tokenizer=minilm.tokenizer, vocab_size=30522)
    words = ["Antidisestablishmentarianism", "U.S.", "\u200d", "Łódź", ":)"]
    batch = tagger.collate([(words, ["B-x", "O", "O", "B-y", "O"])])
    tokens = minilm.tokenizer.convert_ids_to_tokens(batch.tokens.input_ids[0, batch.places])
    assert tokens[0] == "anti"
    assert tokens[1] == "u"
    assert tokens[-1] == ":"
    assert len(tokens) == batch.lengths[0] == 4  # the tokenizer drops the joiner
    assert batch.tags.tolist() == [1, 0, 3, 0]
    with pytest.raises(ValueError, match="of example 0 has a tag and no token; remove it"):
        tagger.collate([(["\u200d"], ["B-x"])])


def test_what_collate_refuses(tiny):
    for words, tags, message in (
        (["w5"], ["O", "O"], "example 1 has 1 words and 2 tags"),
        (["w5"], ["B-z"], "example 1 has the label 'B-z'; known: 'O', 'B-x'"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.collate([(["w5"], ["O"]), (words, tags)])
    for words, tags in (("w5 w6", "O O"), (["w5"], "O"), ("w5", ["O", "O"])):
        with pytest.raises(TypeError, match=r"example 0 has '.*', a single string, for its words"):
            tiny.collate([(words, tags)])
    with pytest.raises(ValueError, match="examples holds no words"):
        tiny.collate([([], [])])
    tiny.collate([(["w5", "w6"], ["O", "I-x"])])
    tiny.crf = CRF(5, tiny.scheme.transitions())
    with pytest.raises(ValueError, match=r"example 0 break the rules of BIO.*: O I-x"):
        tiny.collate([(["w5", "w6"], ["O", "I-x"])])


def test_tags_may_be_numbers_as_in_data_sets(tiny):
    named = tiny.collate([(["w5", "w6"], ["B-x", "O"])])
    numbers = [LABELS.index("B-x"), np.int64(LABELS.index("O"))]
    assert tiny.collate([(["w5", "w6"], numbers)]).tags.tolist() == named.tags.tolist()


@pytest.mark.parametrize(
    ("example", "error", "message"),
    [
        (
            (["w5"], [99]),
            ValueError,
            "example 0 has the tag 99; the 5 tags have the numbers 0 to 4",
        ),
        ((["w5"], [-1]), ValueError, "example 0 has the tag -1"),
        ((["w5"], [True]), TypeError, "example 0 has the tag True"),
        ((["w5"], [1.0]), TypeError, "example 0 has the tag 1.0"),
        (([5], ["O"]), TypeError, "example 0 has the word 5, which is no string"),
        (["w5"], TypeError, r"example 0 is \['w5'\]; pass \(words, tags\)"),
    ],
)
def test_says_what_examples_are(tiny, example, error, message):
    with pytest.raises(error, match=message):
        tiny.collate([example])
