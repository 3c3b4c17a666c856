import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from tests.text.architectures import make_model, make_tokenizer, random_texts
from tests.text.taggers import make_tagger
from tests.text.test_heads import make_classifier, make_classifier_model, padded_logits
from torsh_text import Classifier, Label, PackedBatch


@pytest.fixture
def tiny():
    return make_classifier(id2label={0: "red", 1: "green", 2: "blue"})


@pytest.fixture(scope="session")
def sst2(text_data):
    def read(split):
        lines = (text_data / "sst2" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
        rows = [line.rsplit("\t", 1) for line in lines]
        return [text for text, _ in rows], [("negative", "positive")[int(y)] for _, y in rows]

    return read("train"), read("dev")


def alone(model, text):
    """Logits of one text, unpadded, from transformers."""
    return model(input_ids=torch.tensor([make_tokenizer()(text)["input_ids"]])).logits[0].detach()


def test_labels_in_input_order(tiny):
    texts = random_texts([5, 30, 1, 17, 0, 30, 8])
    texts += [texts[2], texts[0]]
    found = tiny.predict(texts)
    for text, label in zip(texts, found, strict=True):
        expected = alone(tiny.model, text).softmax(-1)
        assert label.index == int(expected.argmax())
        assert label.name == ("red", "green", "blue")[label.index]
        assert label.score == pytest.approx(float(expected.max()), abs=2e-6)
    assert found[7] == found[2]


def test_what_predict_gives_back(tiny):
    one = tiny.predict("w5 w6")
    assert isinstance(one, Label)
    assert tiny.predict(["w5 w6"]) == [one]
    (two,) = tiny.predict(["w5 w6"], top_k=2)
    assert two[0] == one
    assert two[0].score >= two[1].score
    (every,) = tiny.predict(["w5 w6"], top_k=3)
    assert sum(label.score for label in every) == pytest.approx(1, abs=1e-6)
    assert tiny.predict("w5 w6", top_k=2) == two
    assert tiny.predict([]) == []
    assert tiny.scores([]).shape == (0, 3)
    assert tiny.scores("w5").shape == (3,)


def test_several_labels(tiny):
    logits = alone(tiny.model, "w5 w6")
    (found,) = tiny.predict(["w5 w6"], multi_label=True, min_score=0)
    expected = logits.sigmoid().sort(descending=True).values
    assert [label.score for label in found] == pytest.approx(expected.tolist(), abs=2e-6)
    middle = float(expected[:2].mean())
    (some,) = tiny.predict(["w5 w6"], multi_label=True, min_score=middle)
    assert some == found[:1]
    tiny.model.config.problem_type = "multi_label_classification"
    assert tiny.predict(["w5 w6"], min_score=0) == [found]
    assert isinstance(tiny.predict("w5 w6", multi_label=False), Label)


def test_min_score_leaves_labels_out_of_every_list(tiny):
    (every,) = tiny.predict(["w5 w6"], top_k=3)
    limit = every[1].score
    assert tiny.predict(["w5 w6"], top_k=3, min_score=limit) == [every[:2]]
    assert tiny.predict(["w5 w6"], top_k=1, min_score=limit) == [every[:1]]
    assert tiny.predict("w5 w6", top_k=1, min_score=1.0) == []
    (several,) = tiny.predict(["w5 w6"], multi_label=True, min_score=0)
    assert tiny.predict("w5 w6", multi_label=True) == [x for x in several if x.score >= 0.5]
    assert tiny.predict("w5 w6", multi_label=True, top_k=3) == several
    limit = several[0].score
    assert tiny.predict("w5 w6", multi_label=True, top_k=3, min_score=limit) == several[:1]


def test_regression_gives_the_value():
    model = make_classifier(num_labels=1)
    value = float(alone(model.model, "w5 w6"))
    assert model.predict("w5 w6").score == pytest.approx(value, abs=2e-6)
    assert model.predict("w5 w6", top_k=1) == [model.predict("w5 w6")]  # whatever its sign
    squashed = model.scores("w5 w6", multi_label=True)
    assert float(squashed) == pytest.approx(float(torch.tensor(value).sigmoid()), abs=2e-6)
    with pytest.raises(ValueError, match="multi_label=False needs two labels"):
        model.predict("w5", multi_label=False)


def test_long_texts(tiny):
    texts = ["w5", *random_texts([60])]
    with pytest.warns(UserWarning, match="1 of 2 different texts have more than max_le") as caught:
        cut = tiny.predict(texts)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert [label.truncated for label in cut] == [False, True]
    assert [x.truncated for x in tiny.predict(texts, long="mean")] == [False, False]
    with pytest.warns(UserWarning, match="1 of 3") as caught:
        rows = tiny.predict([texts[1], *texts, "w6", texts[1]], top_k=2)
    assert [[x.truncated for x in row] for row in rows] == [
        [cut] * 2 for cut in (True, False, True, False, True)
    ]
    with pytest.warns(UserWarning, match="1 of 2") as caught:
        tiny.scores(texts)
    assert caught[0].filename == __file__
    words = texts[1].split()
    alone_label = tiny.predict(" ".join(words[:38]))
    assert cut[1].index == alone_label.index
    assert cut[1].score == pytest.approx(alone_label.score, abs=1e-6)  # another batch, other sums
    first, second = (alone(tiny.model, " ".join(part)) for part in (words[:38], words[38:]))
    expected = (first.softmax(-1) * 40 + second.softmax(-1) * 24) / 64
    assert (tiny.scores(texts, long="mean")[1] - expected).abs().max() <= 2e-6
    with pytest.raises(ValueError, match=r"texts\[1\] has more than max_length=40"):
        tiny.predict(texts, long="error")
    with pytest.warns(UserWarning, match="1 of 2 texts have more"):
        tiny.pack(texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k=0 is not between 1 and the 3 labels"),
        ({"top_k": 4}, "top_k=4 is not between 1 and the 3 labels"),
        ({"min_score": 2}, "min_score=2 is not a number between 0 and 1"),
        ({"min_score": 0.5}, "min_score=0.5 leaves labels out .* pass top_k=1"),
        ({"min_score": 0.5, "multi_label": False}, "min_score=0.5 leaves labels out"),
        ({"long": "cut"}, "long='cut' is none of"),
        ({"max_tokens": 2}, "max_tokens=2 is less than the 3 tokens"),
    ],
)
def test_refuses_wrong_options(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.predict(["w5"], **options)


def test_refuses_wrong_input(tiny):
    with pytest.raises(TypeError, match=r"texts\[1\] is None"):
        tiny.predict(["w5", None])
    with pytest.raises(TypeError, match="top_k='2' is neither"):
        tiny.predict(["w5"], top_k="2")
    with pytest.raises(RuntimeError, match="the classifier is in training mode"):
        tiny.train().predict(["w5"])


def test_refuses_scores_that_are_not_finite(tiny):
    with torch.no_grad():
        tiny.backbone.embeddings.word_embeddings.weight[9] = torch.inf
    with pytest.raises(RuntimeError, match=r"a score of texts\[1\] is not finite"):
        tiny.predict(["w5", "w9"])


def test_out_of_memory_halves_the_budget_and_goes_on(tiny):
    def limited(module, args, kwargs):
        if kwargs["input_ids"].shape[1] > 60:
            raise torch.OutOfMemoryError("no more than 60 tokens fit")

    texts = random_texts([n % 9 + 3 for n in range(60)])
    expected = tiny.scores(texts)
    tiny.backbone.register_forward_pre_hook(limited, with_kwargs=True)
    assert torch.allclose(tiny.scores(texts), expected, atol=2e-6)


def test_the_state_is_that_of_transformers(tiny):
    plain = make_classifier_model("bert")
    state = {key.removeprefix("model."): value for key, value in tiny.state_dict().items()}
    plain.load_state_dict(state)
    assert all(key.startswith("model.") for key in tiny.state_dict())


def test_padded_batches_run_as_transformers_runs_them(tiny):
    batch = tiny.pack(random_texts([5, 9]))
    padded = batch.padded(0)
    assert torch.equal(tiny(padded), tiny.model(**padded).logits)
    with pytest.raises(ValueError, match="counts positions from 2"):
        tiny(PackedBatch.pack([[5, 6]], first_position=2))


def test_explains_itself(tiny):
    assert "3 (red, green, blue), single label classification" in tiny.explain()


def test_saves_what_both_libraries_load(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "model")
    texts = random_texts([5, 30, 1])
    again = Classifier.from_pretrained(tmp_path / "model", device="cpu")
    assert again.max_length == 40
    assert again.labels == ["red", "green", "blue"]
    assert torch.equal(again.scores(texts), tiny.scores(texts))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    batch = tiny.pack(texts)
    assert (padded_logits(plain, batch) - tiny(batch)).abs().max() <= 5e-6
    tiny.model.save_pretrained(tmp_path / "plain")
    tiny.tokenizer.save_pretrained(tmp_path / "plain")
    assert Classifier.from_pretrained(tmp_path / "plain", device="cpu").labels == tiny.labels
    assert not list(tmp_path.glob(".*"))


def test_a_missing_head_is_refused_or_made_from_a_seed(tmp_path):
    make_model("bert").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lack 2 .*would be random. Pass labels="):
        Classifier.from_pretrained(tmp_path, device="cpu")
    first, same, other = (
        Classifier.from_pretrained(tmp_path, ["a", "b"], seed=seed, device="cpu")
        for seed in (1, 1, 2)
    )
    assert first.labels == ["a", "b"]
    assert torch.equal(first.model.classifier.weight, same.model.classifier.weight)
    assert not torch.equal(first.model.classifier.weight, other.model.classifier.weight)
    several = Classifier.from_pretrained(tmp_path, ["a", "b"], multi_label=True, device="cpu")
    assert several.model.config.problem_type == "multi_label_classification"


def test_new_labels_keep_a_head_only_if_it_is_theirs(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    old = tiny.model.classifier.weight

    def weight(labels):
        return Classifier.from_pretrained(tmp_path, labels, device="cpu").model.classifier.weight

    assert torch.equal(weight(["red", "green", "blue"]), old)
    with pytest.warns(UserWarning, match=r"a head for \['red', .*labels=\['cat', .*got a new one"):
        assert not torch.equal(weight(["cat", "dog", "cow"]), old)
    with pytest.warns(UserWarning, match="got a new one") as caught:
        assert weight(["cat", "dog"]).shape == (2, 64)
    assert caught[0].filename == __file__
    tiny.model.config.id2label = {i: f"LABEL_{i}" for i in range(3)}
    tiny.save_pretrained(tmp_path)
    assert torch.equal(weight(["cat", "dog", "cow"]), old)
    tiny.model.config.problem_type = "multi_label_classification"
    tiny.save_pretrained(tmp_path)
    for labels, several, problem in (
        (["cat", "dog", "cow"], False, "multi_label_classification"),
        (["cat", "dog"], False, "single_label_classification"),
        (["cat", "dog"], True, "multi_label_classification"),
    ):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*got a new one")
            found = Classifier.from_pretrained(tmp_path, labels, multi_label=several, device="cpu")
        assert found.model.config.problem_type == problem
    for labels, message in (
        (["a", "a"], "more than once"),
        ([], "has 0 names"),
        (["a", " "], r"labels\[1\] is blank"),
    ):
        with pytest.raises(ValueError, match=message):
            weight(labels)
    with pytest.raises(TypeError, match="single string"):
        weight("cat")
    with pytest.raises(TypeError, match=r"labels\[0\] is 3"):
        weight([3])
    with pytest.raises(TypeError, match=r"labels=2 is no list; pass names, such as \['ham"):
        weight(2)


def test_loading_and_saving_say_nothing_that_is_expected(tiny, tmp_path, capfd):
    tiny.save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match="got a new one"):
        Classifier.from_pretrained(tmp_path / "model", ["cat", "dog"], device="cpu")
    make_model("bert").save_pretrained(tmp_path / "plain")
    make_tokenizer().save_pretrained(tmp_path / "plain")
    capfd.readouterr()
    new = Classifier.from_pretrained(tmp_path / "plain", ["cat", "dog"], device="cpu")
    new.save_pretrained(tmp_path / "new")
    assert capfd.readouterr() == ("", "")


def test_the_head_of_a_tagger_is_no_classifier(tmp_path):
    """Even with as many labels and no pooler that is missing, as in DistilBERT."""
    tagger = make_tagger("distilbert", labels=["O", "B-x"])
    tagger.save_pretrained(tmp_path)
    why = "holds a DistilBertForTokenClassification, which labels each token. Load it with Tagger"
    with pytest.raises(ValueError, match=why):
        Classifier.from_pretrained(tmp_path, device="cpu")
    new = Classifier.from_pretrained(tmp_path, ["O", "B-x"], device="cpu")
    assert not torch.equal(new.model.classifier.weight, tagger.model.classifier.weight)
    assert torch.equal(
        new.backbone.embeddings.word_embeddings.weight,
        tagger.backbone.embeddings.word_embeddings.weight,
    )


def test_a_plain_loop_learns_words(tiny):
    """The class is whether a text holds w7: a linear head alone could not always tell."""
    texts = random_texts([6] * 64)
    texts = [f"w7 {t}" if i % 2 else t.replace("w7 ", "w8 ") for i, t in enumerate(texts)]
    targets = torch.tensor([i % 2 for i in range(64)])
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=3e-3)
    batch = tiny.train().pack(texts)
    for _ in range(25):
        loss = F.cross_entropy(tiny(batch), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (tiny.eval()(batch).argmax(1) == targets).float().mean() > 0.95


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and what it calls in torch
def test_lightning_trains_it(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.classifier = make_classifier(num_labels=2).train()
            self.losses = []

        def training_step(self, batch, _):
            rows, targets = batch
            loss = F.cross_entropy(self.classifier(rows), targets)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=3e-3)

    task = Task()
    data = [
        (f"{word} {text}", y)
        for text in random_texts([5] * 32)
        for y, word in enumerate(("w7", "w9"))
    ]

    def collate(rows):
        return task.classifier.pack([text for text, _ in rows]), torch.tensor([y for _, y in rows])

    trainer = lightning.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
    )
    loader = DataLoader(data, batch_size=16, collate_fn=collate, shuffle=True)
    trainer.fit(task, loader)
    assert sum(task.losses[-4:]) < 0.5 * sum(task.losses[:4])
    found = task.classifier.eval().predict(["w7 w100 w101", "w9 w100 w101"])
    assert [label.index for label in found] == [0, 1]


@pytest.mark.slow
def test_fine_tuned_on_real_reviews(minilm_path, sst2):
    """640 reviews, one epoch through a plain loop; always the larger class would reach 0.51."""
    (texts, labels), (dev, gold) = sst2
    model = Classifier.from_pretrained(minilm_path, ["negative", "positive"], device="cpu")
    order = random.Random(0).sample(range(len(texts)), 640)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    model.train()
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        targets = torch.tensor([model.labels.index(labels[i]) for i in rows])
        loss = F.cross_entropy(model(model.pack([texts[i] for i in rows])), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    found = model.eval().predict(dev[:400])
    accuracy = sum(a.name == b for a, b in zip(found, gold, strict=False)) / 400
    assert accuracy > 0.72


@pytest.mark.gpu
def test_cuda_gives_the_same_labels(tiny):
    texts = random_texts([5, 30, 1, 17, 30, 8])
    expected = tiny.scores(texts)
    found = tiny.to("cuda").scores(texts)
    assert (found.cpu() - expected).abs().max() <= 1e-3  # TensorFloat-32 may be on
    half = tiny.to("cuda", torch.bfloat16).scores(texts)
    assert (half.cpu() - expected).abs().max() <= 0.1
