import itertools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from tests.text.architectures import make_model, make_tokenizer, random_texts
from tests.text.test_heads import make_classifier
from torsh_text import Collator, Encoder, PackedBatch, TokenBudgetSampler


def _encoder() -> Encoder:
    return Encoder(make_model("bert"), make_tokenizer(), max_length=40)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=120),
    max_tokens=st.integers(1, 120),
    max_rows=st.integers(1, 9),
    world_size=st.integers(1, 4),
    padded=st.booleans(),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_every_row_once_within_the_budget(
    lengths, max_tokens, max_rows, world_size, padded, shuffle, epoch
):
    samplers = [
        TokenBudgetSampler(
            lengths, max_tokens, shuffle=shuffle, seed=3, rank=rank, world_size=world_size,
            max_rows=max_rows, padded=padded,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    for sampler in samplers:
        sampler.set_epoch(epoch)
    given_out = [list(sampler) for sampler in samplers]
    assert {len(batches) for batches in given_out} == {len(samplers[0])}
    # in the order of all processes; what is beyond one round of all batches is repeated
    merged = [batch for step in zip(*given_out, strict=True) for batch in step]
    rows = list(itertools.chain.from_iterable(merged))
    assert set(rows) == set(range(len(lengths)))
    ends = list(itertools.accumulate(map(len, merged)))
    count = ends.index(len(lengths)) + 1
    assert sorted(rows[: len(lengths)]) == list(range(len(lengths)))
    assert merged[count:] == merged[: len(merged) - count]
    assert len(merged) - count < world_size
    for batch in merged:
        sizes = [lengths[i] for i in batch]
        cost = len(sizes) * max(sizes) if padded else sum(sizes)
        assert len(batch) == 1 or (cost <= max_tokens and len(batch) <= max_rows)


def test_epochs_and_seeds_differ_and_repeat():
    def order(seed, epoch):
        sampler = TokenBudgetSampler([3] * 200, 30, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


def test_little_padding_and_well_mixed():
    generator = np.random.default_rng(0)
    lengths = generator.integers(4, 200, 20_000)
    sampler = TokenBudgetSampler(lengths, 4096, padded=True)
    batches = list(sampler)
    cost = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert cost <= 1.05 * lengths.sum()
    means = np.array([lengths[batch].mean() for batch in batches])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2  # short and long batches alternate


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resumed_size", [1, 2])
def test_goes_on_in_the_middle_of_an_epoch(workers, resumed_size):
    lengths = [(7 * i) % 23 + 1 for i in range(97)]

    def loader(sampler):
        return DataLoader(range(97), batch_sampler=sampler, collate_fn=list, num_workers=workers)

    samplers = [TokenBudgetSampler(lengths, 40, seed=5, rank=r, world_size=2) for r in range(2)]
    for sampler in samplers:
        sampler.set_epoch(2)
    whole = [list(loader(sampler)) for sampler in samplers]
    done = 3
    taken = loader(samplers[0])
    for _ in itertools.islice(taken, done):
        pass
    state = samplers[0].state_dict(done if workers else None)
    rest = []
    for rank in range(resumed_size):
        sampler = TokenBudgetSampler(lengths, 40, rank=rank, world_size=resumed_size)
        sampler.load_state_dict(state)
        assert sampler.epoch == 2
        rest.append(list(loader(sampler)))
        assert list(sampler) != rest[-1]  # the next time from the beginning
    merged = [batch for step in zip(*whole, strict=True) for batch in step][2 * done :]
    again = [batch for step in zip(*rest, strict=True) for batch in step]
    assert again[: len(merged)] == merged[: len(again)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "no state of a TokenBudgetSampler"),
        ({"version": 1}, "of version 2: format='torsh-text-sampler', version=1"),
        ({"rows": 5}, "rows=5, here it is 4"),
        ({"max_tokens": 9}, "max_tokens=9, here it is 10"),
        ({"done": 3}, "3 batches are done, which world_size=2 does not divide"),
    ],
)
def test_refuses_a_foreign_state(change, message):
    sampler = TokenBudgetSampler([1, 2, 3, 4], 10, world_size=2)
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict({**sampler.state_dict(), **change})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 8), "lengths has to be"),
        (([1, 0], 8), "lengths has to be"),
        (([1], 0), "max_tokens=0"),
        (([1], 8, {"rank": 2, "world_size": 2}), "rank=2 is not between 0 and world_size=2"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    options = arguments[2] if len(arguments) == 3 else {}
    with pytest.raises(ValueError, match=message):
        TokenBudgetSampler(*arguments[:2], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle": False}, "shuffle=True, here it is False"),
        ({"padded": True}, "padded=False, here it is True"),
        ({"max_rows": 7}, "max_rows=8192, here it is 7"),
        ({"lengths": [1, 2, 4, 3]}, "other lengths, here it is [0-9a-f]{32}"),
    ],
)
def test_refuses_the_state_of_another_plan(options, message):
    state = TokenBudgetSampler([1, 2, 3, 4], 10).state_dict()
    TokenBudgetSampler(np.array([1, 2, 3, 4], np.int32), 10, seed=4).load_state_dict(state)
    other = TokenBudgetSampler(**{"lengths": [1, 2, 3, 4], "max_tokens": 10} | options)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)


def test_collates_what_the_model_packs():
    prompts = {"prompts": {"p": "w5 w6 "}, "default_prompt": "p"}
    encoder = Encoder(make_model("bert"), make_tokenizer(), max_length=12, **prompts)
    texts = random_texts([3, 20])
    collate = pickle.loads(pickle.dumps(Collator(encoder)))
    with pytest.warns(UserWarning, match="1 of 2 texts have more than max_length=12") as said:
        batch = collate(texts)
    assert said[0].filename == __file__
    with pytest.warns(UserWarning, match="1 of 2 texts") as said:
        assert batch.buffer.equal(encoder.pack(texts).buffer)
    assert said[0].filename == __file__
    assert batch.lengths == (7, 12)
    assert batch.input_ids[0, 1:3].tolist() == [5, 6]
    assert len(pickle.dumps(collate)) < 100_000  # not the model, which has 400,000 bytes


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ([], ValueError, "texts is empty; a batch needs at least one text"),
        ([None], TypeError, r"items\[0\] is None, neither a string nor a \(text, label\) pair"),
        ([b"x"], TypeError, r"items\[0\] is b'x', neither"),
        ([("w5", 1), ("w6",)], TypeError, r"items\[1\] is \('w6',\), neither"),
        (["w5", ("w6", 1)], TypeError, r"texts\[1\] is \('w6', 1\) of type tuple"),
        ([(5, 1)], TypeError, r"texts\[0\] is 5 of type int"),
    ],
)
def test_collator_refuses(items, error, message):
    with pytest.raises(error, match=message):
        Collator(_encoder())(items)


def test_collates_texts_and_labels():
    encoder = _encoder()
    texts = random_texts([3, 9, 5])
    collate = Collator(encoder)
    batch = collate(texts)
    assert isinstance(batch, PackedBatch)
    assert batch.buffer.equal(encoder.pack(texts).buffer)
    batch, labels = collate(list(zip(texts, [2, 0, 1], strict=True)))
    assert batch.buffer.equal(encoder.pack(texts).buffer)
    assert labels.tolist() == [2, 0, 1]
    padded, labels = Collator(encoder, packed=False)(
        [(text, torch.tensor([1.0, 0.0])) for text in texts]
    )
    assert padded["input_ids"].equal(encoder.pack(texts).padded(encoder.pad_id)["input_ids"])
    assert labels.shape == (3, 2)


def test_labels_may_be_names_or_numbers():
    classifier = make_classifier(id2label={0: "ham", 1: "spam", 2: "eggs"})
    collate = pickle.loads(pickle.dumps(Collator(classifier)))
    texts = random_texts([3, 7, 1])
    for labels in (["spam", "ham", "spam"], [1, 0, 1], ["spam", 0, torch.tensor(1)]):
        batch, found = collate(list(zip(texts, labels, strict=True)))
        assert batch.buffer.equal(classifier.pack(texts).buffer)
        assert found.dtype == torch.int64
        assert found.tolist() == [1, 0, 1]
    message = r"items\[1\] has the label 'spma'; known: 'ham', .*Did you mean 'spam'"
    with pytest.raises(ValueError, match=message):
        collate([("w5", "ham"), ("w6", "spma")])
    with pytest.raises(TypeError, match=r"items\[0\] has the label 'ham'; names are for classif"):
        Collator(_encoder())([("w5", "ham")])
    for label in (["ham", "spam"], None):
        with pytest.raises(TypeError, match=r"make no tensor .*; pass a name or number for each"):
            collate([("w5", label)])


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and loggers
@pytest.mark.parametrize("packed", [True, False])
def test_trains_in_a_lightning_loop(packed, tmp_path):
    """Texts whose label is their first word: learnt from packed and padded batches alike."""
    lightning = pytest.importorskip("lightning")
    texts = random_texts([6, 3, 9, 5] * 20)
    texts = [f"w{4 + i % 2} {text}" for i, text in enumerate(texts)]
    data = [(text, i % 2) for i, text in enumerate(texts)]

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder = _encoder()
            self.head = nn.Linear(self.encoder.dim, 2)
            self.losses: list[float] = []

        def training_step(self, batch, _):
            loss = F.cross_entropy(self.head(self.encoder(batch[0])), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=2e-3)

    net = Net()
    sampler = TokenBudgetSampler([len(t.split()) + 2 for t in texts], 64, padded=not packed)
    loader = DataLoader(
        data, batch_sampler=sampler, collate_fn=Collator(net.encoder, packed=packed)
    )
    trainer = lightning.Trainer(
        max_epochs=6, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(net, loader)
    assert sum(net.losses[-10:]) < 0.3 * sum(net.losses[:10])


@pytest.mark.parametrize("label", [3, -1, 1.0, True, torch.tensor(True), torch.tensor(1.0)])
def test_numbers_that_are_no_label_are_refused(label):
    collate = Collator(make_classifier(id2label={0: "ham", 1: "eggs", 2: "spam"}))
    for first in (0, torch.zeros_like(torch.as_tensor(label))):
        with pytest.raises(
            (TypeError, ValueError), match=r"items\[[01]\] has the label .*3 labels"
        ):
            collate([("w5", first), ("w6", label)])


def test_says_what_it_wants_instead():
    with pytest.raises(TypeError, match="model is a str; pass an Encoder"):
        Collator("path")
    with pytest.raises(TypeError, match="lengths has to be a list of the numbers of tokens"):
        TokenBudgetSampler(["a text", "another"], 100)
