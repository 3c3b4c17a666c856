import pytest
import torch
from transformers import AutoConfig, BertForTokenClassification

from tests.text.architectures import PACKED, make_model, make_tokenizer
from tests.text.taggers import LABELS, make_tagger
from tests.text.test_heads import make_classifier
from torsh_text import PackedBatch, Tagger


class Forgetful(BertForTokenClassification):
    """A head that does not hand its keywords on to the backbone."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return super().forward(input_ids, attention_mask=attention_mask)


def test_a_head_that_forgets_the_rows_is_found_out():
    config = AutoConfig.for_model("bert", **PACKED["bert"], id2label=dict(enumerate(LABELS)))
    with pytest.warns(UserWarning, match="runs padded, which is slower: its head"):
        tagger = Tagger(Forgetful(config).eval(), make_tokenizer(), max_length=40).eval()
    assert tagger.attention.name == "padded"
    assert "its head does not hand the rows on" in tagger.explain()
    batch = PackedBatch.pack([[0, 5, 6, 7, 2], [0, 9, 2]])
    inputs = batch.padded(tagger.pad_id)
    assert torch.equal(tagger(batch), tagger(inputs)[inputs["attention_mask"].bool()])
    with pytest.raises(RuntimeError, match="cannot run packed: its head"):
        Tagger(tagger.model, make_tokenizer(), max_length=40, attn="packed")
    Tagger(tagger.model, make_tokenizer(), max_length=40, attn="padded")


class Strict(BertForTokenClassification):
    """A head that takes no keywords it does not know."""

    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids, attention_mask=attention_mask)


def test_a_head_that_raises_runs_padded():
    config = AutoConfig.for_model("bert", **PACKED["bert"], id2label=dict(enumerate(LABELS)))
    why = r"its head does not take packed rows \(TypeError: .*position_ids"
    with pytest.warns(UserWarning, match=why):
        tagger = Tagger(Strict(config).eval(), make_tokenizer(), max_length=40).eval()
    assert tagger.attention.name == "padded"
    assert isinstance(tagger.predict("w5 w6"), list)
    with pytest.raises(RuntimeError, match="cannot run packed: its head does not take"):
        Tagger(tagger.model, make_tokenizer(), max_length=40, attn="packed")


def test_the_head_of_a_classifier_is_no_tagger(tmp_path):
    classifier = make_classifier(id2label=dict(enumerate("ab")))
    classifier.save_pretrained(tmp_path)
    why = "holds a BertForSequenceClassification, which labels whole texts. Load it with Classifier"
    with pytest.raises(ValueError, match=why):
        Tagger.from_pretrained(tmp_path, device="cpu")
    new = Tagger.from_pretrained(tmp_path, labels=["a", "b"], device="cpu")
    assert not torch.equal(new.model.classifier.weight, classifier.model.classifier.weight)
    for labels in (2, "OB"):
        with pytest.raises(TypeError, match=f"labels={labels!r} is no list; pass names of tags"):
            Tagger.from_pretrained(tmp_path, labels=labels, device="cpu")


def test_heads_that_are_missing_or_other(tmp_path):
    plain = tmp_path / "plain"
    make_model("bert").save_pretrained(plain)
    make_tokenizer().save_pretrained(plain)
    with pytest.raises(ValueError, match=r"lack 2 .*would be random. Pass labels="):
        Tagger.from_pretrained(plain, device="cpu")
    kept = torch.get_rng_state()
    one, two, other = (
        Tagger.from_pretrained(plain, labels=LABELS, seed=seed, device="cpu") for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), kept)
    assert torch.equal(one.model.classifier.weight, two.model.classifier.weight)
    assert not torch.equal(one.model.classifier.weight, other.model.classifier.weight)
    assert one.labels == tuple(LABELS)
    tagger = make_tagger()
    tagger.save_pretrained(tmp_path)
    same = Tagger.from_pretrained(tmp_path, labels=LABELS, device="cpu")
    assert torch.equal(same.model.classifier.weight, tagger.model.classifier.weight)
    with pytest.warns(UserWarning, match=r"for labels=\['O', 'B-z', 'I-z'\] it got a new one"):
        fresh = Tagger.from_pretrained(tmp_path, labels=["O", "B-z", "I-z"], device="cpu", crf=True)
    assert fresh.model.classifier.weight.shape == (3, 64)
    assert fresh.crf.num_tags == 3
    assert torch.equal(
        fresh.backbone.embeddings.word_embeddings.weight,
        tagger.backbone.embeddings.word_embeddings.weight,
    )
