import pytest
import torch

from tests.text.architectures import make_model, make_tokenizer, random_texts
from tests.text.test_heads import make_classifier_model
from torsh_text import Classifier, Sentiment
from torsh_text._sentiment import valences_of


def make_sentiment(*names, **options):
    model = make_classifier_model("bert", num_labels=len(names), id2label=dict(enumerate(names)))
    return Sentiment(Classifier(model, make_tokenizer(), max_length=40).eval(), **options)


@pytest.mark.parametrize(
    ("names", "valences"),
    [
        (["NEGATIVE", "POSITIVE"], [-1, 1]),
        (["POS", "NEU", "NEG"], [1, 0, -1]),
        (["Bad", "GOOD"], [-1, 1]),
        (["LABEL_0", "LABEL_1"], [-1, 1]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], [-1, 0, 1]),
        (["1 star", "2 stars", "3 stars", "4 stars", "5 stars"], [-1, -0.5, 0, 0.5, 1]),
        (["5 stars", "1 star", "3 stars", "2 stars", "4 stars"], [1, -1, 0, -0.5, 0.5]),
        (
            ["Very Negative", "Negative", "Neutral", "Positive", "Very Positive"],
            [-1, -0.5, 0, 0.5, 1],
        ),
        (["very_positive", "positive", "negative"], [1, 0.5, -0.5]),
    ],
)
def test_names_say_how_they_are_meant(names, valences):
    assert valences_of(names) == valences


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["joy", "anger"], "do not say which is negative"),
        (["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"], "do not say which is negative"),
        (["LABEL_2", "LABEL_3"], "do not say which is negative"),
        (["1 star", "3 stars"], "do not say which is negative"),
        (["positive", "joy"], "do not say which is negative"),
        (["positive", "neutral"], "lack a negative or a positive one"),
    ],
)
def test_names_that_do_not_say_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        valences_of(names)


def test_probabilities_are_grouped_and_the_signed_score_is_their_mean():
    model = make_sentiment(*(f"{n} stars" for n in range(1, 6)))
    texts = random_texts([5, 9, 1])
    scores = model.classifier.scores(texts)
    for text, row, found in zip(texts, scores, model.predict(texts), strict=True):
        parts = [row[:2].sum(), row[2], row[3:].sum()]
        best = int(torch.stack(parts).argmax())
        assert (found.name, found.index) == (("negative", "neutral", "positive")[best], best)
        assert found.score == pytest.approx(float(parts[best]), abs=1e-6)
        expected = float(-row[0] - row[1] / 2 + row[3] / 2 + row[4])
        assert found.signed == pytest.approx(expected, abs=1e-6)
        assert model.predict(text).signed == pytest.approx(found.signed, abs=2e-6)


def test_two_labels_are_never_neutral():
    model = make_sentiment("POS", "NEG")
    assert model.labels == ["negative", "positive"]
    found = model.predict(random_texts([3, 4]))
    assert all(label.name != "neutral" for label in found)
    assert all(
        label.signed == pytest.approx((2 * label.score - 1) * (label.index - 1), abs=1e-6)
        for label in found
    )


def test_valences_may_be_given():
    model = make_sentiment("joy", "anger", "news", valences={"joy": 1, "anger": -0.5, "news": 0})
    row = model.classifier.scores("w5")
    assert model.predict("w5").signed == pytest.approx(float(row[0] - row[1] / 2), abs=1e-6)
    with pytest.raises(ValueError, match=r"valences has .*, the model's labels are"):
        make_sentiment("joy", "anger", valences={"joy": 1})
    with pytest.raises(ValueError, match="not all between -1 and 1"):
        make_sentiment("joy", "anger", valences={"joy": 1, "anger": -2})


def test_is_a_layer_and_loads_from_a_folder(tmp_path):
    model = make_sentiment("NEG", "POS")
    batch = model.classifier.pack(["w5 w6"])
    assert torch.equal(model(batch), model.classifier(batch))
    model.classifier.save_pretrained(tmp_path)
    again = Sentiment.from_pretrained(tmp_path, device="cpu")
    assert again.predict("w5 w6") == model.predict("w5 w6")
    assert Sentiment(tmp_path).labels == again.labels
    with pytest.raises(RuntimeError, match="training mode"):
        model.train().predict("w5")


def test_long_texts_are_marked(tmp_path):
    model = make_sentiment("NEG", "POS")
    texts = ["w5", *random_texts([60])]
    with pytest.warns(UserWarning, match="1 of 2 different texts") as caught:
        found = model.predict(texts)
    assert caught[0].filename == __file__
    assert [label.truncated for label in found] == [False, True]
    assert not model.predict(texts[1], long="mean").truncated


def test_what_has_no_trained_head_is_refused(tmp_path):
    make_model("bert").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    match = r"lack 2 .*Use a model trained for sentiment, .* or train one with Classifier"
    for load in (Sentiment, Sentiment.from_pretrained):
        with pytest.raises(ValueError, match=match) as caught:
            load(tmp_path)
        assert "Pass labels" not in str(caught.value)
    with pytest.raises(TypeError, match="classifier is a int; pass a Classifier, or the hub id"):
        Sentiment(3)
