import math
from itertools import combinations

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import mutual_info_score

from torsh_text._coherence import diversity, npmi


def test_npmi_equals_its_definition_on_news(text_data):
    lines = (text_data / "bbc_news" / "corpus.tsv").read_text(encoding="utf-8").splitlines()
    docs = [line.split("\t")[0] for line in lines[::10]]
    topics = [["film", "award", "actor"], ["election", "party", "film"], ["game", "zzz"]]
    words = sorted({w for t in topics for w in t})
    table = CountVectorizer(vocabulary=words, binary=True).fit_transform(docs).toarray()
    held = {word: table[:, i].astype(float) for i, word in enumerate(words)}
    for topic, found in zip(topics, npmi(topics, [d.split() for d in docs]), strict=True):
        scores = []
        for a, b in combinations(topic, 2):
            both = (held[a] * held[b]).mean()
            independent = held[a].mean() * held[b].mean()
            scores.append(math.log(both / independent) / -math.log(both) if both else -1.0)
        assert found == pytest.approx(sum(scores) / len(scores), abs=1e-12)
    good, mixed, never = npmi(topics, [d.split() for d in docs])
    assert good > mixed > never == -1


def test_npmi_of_independent_words_is_zero():
    docs = [["a", "b"], ["a"], ["b"], []]
    assert mutual_info_score([1, 1, 0, 0], [1, 0, 1, 0]) == pytest.approx(0)
    assert npmi([["a", "b"]], docs) == [0]


def test_npmi_at_the_ends():
    assert npmi([["a", "b"]], [["a", "b"], ["b", "a", "a"]]) == [1]  # in all documents
    assert npmi([["a", "b"]], [["a"], ["b"]]) == [-1]
    found = npmi([["a"], [], ["b", "b"]], [["a", "b"]])
    assert all(math.isnan(score) for score in found)


def test_diversity():
    assert diversity([["a", "b"], ["c", "b"], ["b"]]) == 3 / 5
    assert math.isnan(diversity([[], []]))
