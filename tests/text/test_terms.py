import math

import pytest
import torch

from torsh_text import topic_terms
from torsh_text._terms import words_of


def test_weights_by_hand():
    texts = ["red apple", "green apple", "fast red car"]
    first, second = topic_terms(texts, torch.tensor([0, 0, 1]), k=9)
    assert first.words == ("apple", "green", "red")
    # 7 words in 2 clusters: A = 3.5; apple is 2 of the 4 words of its cluster and occurs twice
    assert first.scores[0] == pytest.approx(2 / 4 * math.log(1 + 3.5 / 2))
    assert first.scores[2] == pytest.approx(1 / 4 * math.log(1 + 3.5 / 2))
    assert second.words == ("car", "fast", "red")  # equal weights by the alphabet
    assert second.scores[0] == pytest.approx(1 / 3 * math.log(1 + 3.5))
    assert (first.size, second.size, first.name) == (2, 1, "apple, green, red")


def test_noise_is_left_out_and_labels_may_have_gaps():
    topics = topic_terms(["apple", "junk", "car"], [4, -1, 2])
    assert [(t.label, t.words) for t in topics] == [(2, ("car",)), (4, ("apple",))]


def test_clusters_without_words_have_a_number_for_a_name():
    (topic,) = topic_terms(["the of and", "", "?!"], [0, 0, 0])
    assert (topic.words, topic.size, topic.name) == ((), 3, "cluster 0")
    assert topic_terms([], []) == []


def test_stop_words():
    texts, labels = ["the red car and x"], [0]
    assert topic_terms(texts, labels)[0].words == ("car", "red", "x")
    assert topic_terms(texts, labels, stop_words=None, k=9)[0].words == (
        "and",
        "car",
        "red",
        "the",
        "x",
    )
    assert topic_terms(texts, labels, stop_words={"red"}, k=2)[0].words == ("and", "car")


def test_own_tokenizer():
    (topic,) = topic_terms(["ab", "b"], [0, 0], tokenize=list, k=1)
    assert topic.words == ("b",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don\u2019t STOP", ["don't", "stop"]),
        ("state-of-the-art -x-", ["state-of-the-art", "x"]),
        ("a_b 3.14", ["a", "b", "3", "14"]),
        ("Größe naïve Жук", ["größe", "naïve", "жук"]),
        ("機械学習 GPU 猫", ["機械", "械学", "学習", "gpu", "猫"]),
        ("PyTorchで学習", ["pytorch", "で学", "学習"]),
        ("", []),
    ],
)
def test_words_of_many_scripts(text, words):
    assert words_of(text) == words


def test_refuses_what_does_not_fit():
    with pytest.raises(TypeError, match="single string"):
        topic_terms("text", [0])
    with pytest.raises(ValueError, match="2 texts came with 1 labels"):
        topic_terms(["a", "b"], [0])
    with pytest.raises(ValueError, match="k=0"):
        topic_terms(["a"], [0], k=0)
    with pytest.raises(ValueError, match="stop_words='german'"):
        topic_terms(["a"], [0], stop_words="german")
