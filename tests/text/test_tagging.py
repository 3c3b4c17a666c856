import copy
import random
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from tests.text.architectures import PACKED, random_texts
from tests.text.taggers import local_tagger, make_tagger
from torsh_text import CRF, Entity, PackedBatch, Tagger


@pytest.fixture
def tiny():
    return make_tagger()


def conll(path):
    """Sentences of a CoNLL file as (words, tags)."""
    found, words, tags = [], [], []
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        if line.strip():
            word, tag = line.split("\t")
            words.append(word)
            tags.append(tag)
        elif words:
            found.append((words, tags))
            words, tags = [], []
    return found


FAMILIES = [f for f in PACKED if f != "gemma3_text"]  # which transformers has no tagger for


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded(family):
    tagger = make_tagger(family)
    assert tagger.attention.name == "grouped"
    rows = [[0, *range(9, 9 + n), 2] for n in (30, 2, 17, 30, 1)]
    batch = PackedBatch.pack(rows, first_position=tagger.first_position)
    inputs = batch.padded(tagger.pad_id)
    mask = inputs["attention_mask"].bool()
    packed, padded = tagger(batch), tagger(inputs)[mask]
    plain = copy.deepcopy(tagger.model)
    plain.set_attn_implementation("sdpa")
    expected = plain(**inputs).logits[mask]
    assert packed.shape == (batch.num_tokens, 5)
    # float32 rounding, relative to the largest logit
    assert ((packed - expected).abs().max() / expected.abs().max()).item() <= 2e-6
    assert torch.equal(padded, expected)
    weights = torch.randn(packed.shape)
    (packed * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, mine), theirs in zip(
        tagger.model.named_parameters(), plain.parameters(), strict=True
    ):
        if theirs.grad is not None and theirs.grad.abs().max() > 1e-4:
            error = (mine.grad - theirs.grad).abs().max() / theirs.grad.abs().max()
            assert error.item() <= 1e-5, name


@pytest.mark.parametrize("family", ["mobilebert", "layoutlm"])
def test_families_that_cannot_pack_run_padded(family):
    with pytest.warns(UserWarning, match="tiny runs padded, which is slower") as caught:
        tagger = make_tagger(family)
    assert len(caught) == 1
    assert tagger.attention.name == "padded"
    texts = random_texts([5, 30, 5])
    alone = [tagger.predict(text, stride=8) for text in texts]
    together = tagger.predict(texts, stride=8)
    assert [[(e.label, e.start, e.end) for e in row] for row in together] == [
        [(e.label, e.start, e.end) for e in row] for row in alone
    ]


def test_padding_may_be_on_either_side(tiny):
    batch = PackedBatch.pack([[0, 5, 6, 7, 2], [0, 9, 2]])
    right = batch.padded(tiny.pad_id)
    left = {key: torch.stack([rows[0], rows[1].roll(2)]) for key, rows in right.items()}
    found, expected = tiny(left), tiny(right)
    torch.testing.assert_close(found[1, 2:], expected[1, :3], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("max_length", "stride"), [(3, 0), (40, 19), (64, 31), (400, 64)])
def test_default_stride_fits_every_window(max_length, stride):
    tagger = make_tagger()
    tagger.max_length = max_length
    assert tagger.predict("w5") == tagger.predict("w5", stride=0)
    texts = random_texts([500])
    assert tagger.predict(texts) == tagger.predict(texts, stride=stride)


def test_surrogates_are_named_by_the_place_the_caller_knows(tiny):
    with pytest.raises(ValueError, match=r"texts\[5\] holds a lone surrogate"):
        tiny.predict([*["w5"] * 5, "\ud800"])


@pytest.mark.parametrize("crf", [False, True])
@pytest.mark.parametrize("stride", [0, 1, 9, 30])
def test_a_long_text_reads_as_one_window(crf, stride):
    tagger = local_tagger(crf=crf)
    text = random_texts([300])[0]
    tagger.max_length = 302
    whole = tagger.predict(text, stride=0)
    assert len(whole) > 20
    tagger.max_length = 40
    found = tagger.predict(text, stride=stride)
    assert [e.text for e in found] == [e.text for e in whole]
    for mine, theirs in zip(found, whole, strict=True):
        assert (mine.label, mine.start, mine.end) == (theirs.label, theirs.start, theirs.end)
        assert mine.score == pytest.approx(theirs.score, abs=1e-4)  # float32 forward-backward


def test_order_duplicates_and_empty_texts(tiny):
    texts = [*random_texts([5, 0, 100, 30]), "", "  ", "w5"]
    texts += [texts[2], texts[0]]
    alone = [tiny.predict(text, stride=8) for text in texts]
    rows = []
    tiny.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["packed"])), with_kwargs=True
    )
    found = tiny.predict(iter(texts), stride=8, max_tokens=100)
    for mine, theirs in zip(found, alone, strict=True):
        assert [(e.label, e.start, e.end) for e in mine] == [
            (e.label, e.start, e.end) for e in theirs
        ]
    assert found[7] == found[2]
    assert found[7] is not found[2]
    assert found[1] == found[4] == found[5] == []
    assert sum(rows) == 1 + 4 + 1 + 1 + 1 + 1  # windows of the different texts
    assert tiny.predict([]) == []


def test_more_texts_than_are_read_at_a_time(tiny, monkeypatch):
    texts = random_texts([n % 7 for n in range(30)])
    expected = tiny.predict(texts, stride=8)
    monkeypatch.setattr("torsh_text._tagging.WINDOW", 8)
    found = tiny.predict(texts, stride=8)
    assert [[e.text for e in row] for row in found] == [[e.text for e in row] for row in expected]


def test_min_score(tiny):
    text = random_texts([35])[0]
    every = tiny.predict(text, stride=8)
    limit = sorted(e.score for e in every)[len(every) // 2]
    assert tiny.predict(text, stride=8, min_score=limit) == [e for e in every if e.score >= limit]


def test_what_predict_refuses(tiny):
    with pytest.raises(ValueError, match="stride=64 is not between 0 and 37"):
        tiny.predict("w5", stride=64)
    with pytest.raises(ValueError, match="aggregation='average' is none of 'first'"):
        tiny.predict("w5", stride=2, aggregation="average")
    with pytest.raises(ValueError, match="min_score=2 is not between 0 and 1"):
        tiny.predict("w5", stride=2, min_score=2)
    with pytest.raises(TypeError, match=r"texts\[1\] is None"):
        tiny.predict(["w5", None], stride=2)
    with pytest.raises(ValueError, match=r"texts\[1\] holds a lone surrogate"):
        tiny.predict(["w5", "\ud800"], stride=2)
    with pytest.raises(ValueError, match="counts positions from 2, tiny from 0"):
        tiny(PackedBatch.pack([[5]], first_position=2))
    with pytest.raises(ValueError, match="crf has 3 tags, the model 5"):
        Tagger(tiny.model, tiny.tokenizer, crf=CRF(3), max_length=40)
    with torch.no_grad():
        tiny.backbone.embeddings.word_embeddings.weight[77] = float("nan")
    with pytest.raises(RuntimeError, match="the scores of 'w6 w77' are not finite"):
        tiny.predict(["w5", "w6 w77"], stride=2)
    with pytest.raises(RuntimeError, match=r"call \.eval\(\) first"):
        tiny.train().predict("w5", stride=2)


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers, and its own old calls
def test_lightning_trains_a_crf(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.tagger = make_tagger(crf=True)
            self.losses = []

        def training_step(self, batch, index):
            loss = self.tagger.loss(batch)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=3e-3)

    lit = Lit()
    before = copy.deepcopy(lit.tagger.crf.state_dict())
    examples = [
        (words, ["B-x" if int(w[1:]) % 2 else "O" for w in words])
        for words in (text.split() for text in random_texts([6] * 32))
    ]
    loader = DataLoader(examples, batch_size=8, collate_fn=lit.tagger.collate)
    trainer = lightning.Trainer(
        max_epochs=6,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(lit, loader)
    assert lit.losses[-1] < 0.5 * lit.losses[0]
    assert not torch.equal(lit.tagger.crf.transitions, before["transitions"])


@pytest.mark.gpu
def test_packed_on_cuda_equals_the_cpu():
    tagger = make_tagger(crf=True)
    texts = random_texts([5, 30, 100, 1])
    expected = tagger.predict(texts, stride=8)
    tagger.cuda()
    found = tagger.predict(texts, stride=8)
    for mine, theirs in zip(found, expected, strict=True):
        assert [(e.label, e.start, e.end) for e in mine] == [
            (e.label, e.start, e.end) for e in theirs
        ]
    batch = tagger.collate([(["w5", "w6"], ["B-x", "O"])])
    tagger.loss(batch.pin_memory().to("cuda", non_blocking=True)).backward()
    tagger.bfloat16()
    assert tagger.attention.name == "varlen"
    assert all(isinstance(e, Entity) for row in tagger.predict(texts, stride=8) for e in row)


def span_f1(tagger, examples, found):
    """Micro F1 of spans, as conlleval counts them."""
    hits = extra = missed = 0
    for (words, tags), entities in zip(examples, found, strict=True):
        starts = [sum(len(w) + 1 for w in words[:i]) for i in range(len(words))]
        gold = {
            (s.label, starts[s.start], starts[s.end - 1] + len(words[s.end - 1]))
            for s in tagger.scheme.spans(tags)
        }
        mine = {(e.label, e.start, e.end) for e in entities}
        hits += len(gold & mine)
        extra += len(mine - gold)
        missed += len(gold - mine)
    return 2 * hits / (2 * hits + extra + missed)


@pytest.mark.slow
def test_learns_real_entities(minilm_path: Path, text_data: Path):
    """WNUT-17: emerging entities in noisy posts; a plain loop over packed batches."""
    train = [
        (words, tags)
        for words, tags in conll(text_data / "wnut17" / "train.conll")
        if set(tags) != {"O"} and len(words) <= 20
    ]
    dev = conll(text_data / "wnut17" / "dev.conll")[:150]
    labels = ["O", *sorted({tag for _, tags in train for tag in tags} - {"O"})]
    tagger = Tagger.from_pretrained(minilm_path, labels=labels, device="cpu")
    random.Random(0).shuffle(train)
    groups = [
        {"params": tagger.backbone.parameters(), "lr": 5e-4},
        {"params": tagger.model.classifier.parameters(), "lr": 5e-3},
    ]
    optimizer = torch.optim.AdamW(groups)
    tagger.train()
    for start in range(0, len(train), 16):
        loss = tagger.loss(tagger.collate(train[start : start + 16]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tagger.eval()
    found = tagger.predict([" ".join(words) for words, _ in dev])
    # 0.43 was measured; other thread counts round otherwise. No training gives 0.0
    assert span_f1(tagger, dev, found) > 0.3
