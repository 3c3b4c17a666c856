import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from tests.text.architectures import PACKED, PADDED, make_tokenizer, random_texts
from torsh_text import Classifier
from torsh_text._heads import Head, check_head, find_head, head_logits
from torsh_text._packing import PackedBatch

LENGTHS = [5, 30, 1, 17, 0, 30, 8]
SEQ2SEQ = {
    "bart": {
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "vocab_size": 500,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "init_std": 0.2,
    },
    "t5": {
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 500,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
}


def make_classifier_model(family, **changes):
    torch.manual_seed(0)
    settings = (PACKED | PADDED | SEQ2SEQ)[family] | {"num_labels": 3} | changes
    config = AutoConfig.for_model(family, **settings)
    return AutoModelForSequenceClassification.from_config(config).eval()


def make_classifier(family="bert", **changes):
    model = make_classifier_model(family, **changes)
    return Classifier(model, make_tokenizer(), max_length=40, name=family).eval()


def padded_logits(model, batch):
    """Logits of a plain transformers run, then back to the attention it had."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    logits = model(**batch.padded(model.config.get_text_config().pad_token_id)).logits
    model.set_attn_implementation(before)
    return logits


@pytest.mark.parametrize("family", PACKED)
def test_packed_logits_and_gradients_are_those_of_transformers(family):
    classifier = make_classifier(family)
    assert classifier.attention.name == "grouped"
    batch = classifier.pack(random_texts(LENGTHS))
    weights = torch.randn(len(LENGTHS), 3)
    found = classifier(batch)
    (found * weights).sum().backward()
    mine = {
        name: p.grad.clone()
        for name, p in classifier.model.named_parameters()
        if p.grad is not None
    }
    classifier.zero_grad()
    expected = padded_logits(classifier.model, batch)
    (expected * weights).sum().backward()
    # rounding of float32 sums in another order
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max().clamp_min(1)
    theirs = {n: p.grad for n, p in classifier.model.named_parameters() if p.grad is not None}
    assert set(mine) == set(theirs)
    largest = max(grad.abs().max() for grad in theirs.values())
    assert max((mine[n] - theirs[n]).abs().max() for n in theirs) <= 1e-5 * largest


def test_modernbert_reads_the_mean_where_it_is_told_to():
    classifier = make_classifier("modernbert", classifier_pooling="mean")
    assert classifier._head.reads == "mean"
    batch = classifier.pack(random_texts(LENGTHS))
    expected = padded_logits(classifier.model, batch)
    assert (classifier(batch) - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_the_last_token_is_the_last_that_is_no_padding_token():
    """Transformers skips padding tokens that a text holds at its end; so do packed rows."""
    classifier = make_classifier("llama")
    pad = classifier.model.config.pad_token_id
    rows = [[5, 6, pad, pad], [7, 8, 9], [pad, pad], [4, pad, 5, pad, 6]]
    batch = PackedBatch.pack(rows)
    states = torch.arange(14.0).unsqueeze(1)
    found = head_logits(Head("last", nn.Identity()), states, batch, pad)
    assert found[:, 0].tolist() == [1.0, 6.0, 7.0, 13.0]
    assert head_logits(Head("last", nn.Identity()), states, batch, None)[:, 0].tolist() == [
        3.0, 6.0, 8.0, 13.0,
    ]  # fmt: skip
    for row, logits in zip(rows, classifier(batch), strict=True):
        alone = classifier.model(input_ids=torch.tensor([row])).logits[0]
        assert (logits - alone).abs().max() <= 2e-6 * alone.abs().max().clamp_min(1)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert", "gpt2"])
def test_a_head_that_computes_something_else_is_found_out(family):
    model = make_classifier_model(family)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 1
    head = find_head(model)
    options = {"pad_id": model.config.pad_token_id, "first_position": 0, "longest": 40}
    if family == "roberta":
        options["first_position"] = 2
    assert check_head(model, head, **options) is None
    wrong = Head("last" if head.reads == "first" else "first", head.logits)
    assert "are off by" in check_head(model, wrong, **options)
    assert "not one that reads packed rows" in check_head(model, None, **options)
    broken = Head(head.reads, lambda x: x.no_such_thing)
    assert "AttributeError" in check_head(model, broken, **options)
    narrow = Head(head.reads, lambda x: head.logits(x)[:, :2])
    assert "the head gives (4, 2), the model (4, 3)" in check_head(model, narrow, **options)
    assert not model.training


def test_a_family_with_an_unknown_head_runs_padded(recwarn):
    model = make_classifier_model("bert")
    model.old = model.classifier
    del model.classifier
    model.forward = lambda **inputs: type(model).forward(model, **inputs)
    model.__class__ = type(
        "OddForSequenceClassification",
        (type(model),),
        {"classifier": property(lambda self: self.old)},
    )
    with pytest.warns(UserWarning, match="OddFor.* runs padded, which is slower: the head of Odd"):
        classifier = Classifier(model, make_tokenizer(), max_length=40).eval()
    batch = classifier.pack(random_texts(LENGTHS))
    assert torch.equal(classifier(batch), padded_logits(model, batch))
    with pytest.raises(RuntimeError, match="cannot run packed: the head of Odd"):
        Classifier(model, make_tokenizer(), max_length=40, attn="packed")


@pytest.mark.parametrize("family", [*PADDED, *SEQ2SEQ])
def test_families_that_cannot_pack_run_as_transformers_runs_them(family):
    with pytest.warns(UserWarning, match=f"{family} runs padded, which is slower") as caught:
        classifier = make_classifier(family)
    assert len(caught) == 1
    assert classifier.attention.name == "padded"
    texts = random_texts(LENGTHS[:4])
    scores = classifier.scores(texts)
    for text, found in zip(texts, scores, strict=True):
        ids = torch.tensor([make_tokenizer()(text)["input_ids"]])
        expected = classifier.model(input_ids=ids).logits[0].softmax(-1)
        assert (found - expected).abs().max() <= 5e-6  # probabilities; a row alone, no padding


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_encoder_decoders_take_padding_on_either_side(family):
    classifier = Classifier(
        make_classifier_model(family), make_tokenizer(), max_length=40, attn="padded"
    ).eval()
    ids = torch.tensor([[1, 1, 0, 9, 2], [0, 5, 6, 7, 2]])
    found = classifier({"input_ids": ids, "attention_mask": (ids != 1).long()})
    expected = classifier({"input_ids": ids[:1, 2:]})[0]
    assert (found[0] - expected).abs().max() <= 5e-6 * expected.abs().max()


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_encoder_decoders_take_rows_with_several_ends(family):
    model = make_classifier_model(family)
    classifier = Classifier(model, make_tokenizer(), max_length=40, attn="padded").eval()
    rows = [[0, 9, 2], [0, 9, 2, 8, 2], [0, 5, 6, 7, 2]]
    found = classifier(PackedBatch.pack(rows))
    for row, logits in zip(rows, found, strict=True):
        expected = model(input_ids=torch.tensor([row])).logits[0]
        assert (logits - expected).abs().max() <= 5e-6 * expected.abs().max()
    found.sum().backward()
    assert model.classification_head.out_proj.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="row 1 has no end-of-text token"):
        classifier(PackedBatch.pack([[0, 9, 2], [0, 9]]))
    with pytest.raises(RuntimeError, match="cannot run packed: it is an encoder-decoder"):
        Classifier(model, make_tokenizer(), max_length=40, attn="packed")
