from datetime import date

import pytest
import torch
import torch.nn.functional as F

from tests.text.topic_documents import METHODS, documents, fitted, topics_of
from torsh_text import TopicModel, topic_terms


@pytest.mark.parametrize("method", ["kmeans", "spherical"])
def test_update_is_the_running_mean_of_all_documents(method):
    texts, x, _ = documents(200)
    model = fitted(method, texts[:50], x[:50])
    labels = [topics_of(model, texts[:50], x[:50]).labels]
    for start in range(50, 200, 30):
        part = slice(start, start + 30)
        before = topics_of(model, texts[part], x[part])
        told = model.update(texts[part], vectors=x[part])
        assert torch.equal(told.labels, before.labels)
        torch.testing.assert_close(told.affinities, before.affinities)
        labels.append(told.labels)
    together = torch.cat(labels)
    unit = F.normalize(x.double(), dim=1)
    means = torch.stack([unit[together == topic].mean(0) for topic in range(3)])
    found = topics_of(model, texts, x)
    expected = unit @ F.normalize(means, dim=1).T
    torch.testing.assert_close(found.affinities.double(), expected, atol=1e-6, rtol=0)
    assert [t.size for t in model.topics] == torch.bincount(together).tolist()
    terms = topic_terms(texts, together, 10)
    assert [t.words for t in model.topics] == [t.words for t in terms]


@pytest.mark.parametrize("method", METHODS)
def test_update_keeps_numbers_and_refreshes_words_and_documents(method):
    texts, x, _ = documents()
    model = fitted(method, texts, x)
    before = model.topics
    last = before[2]
    row = texts.index(last.documents[0])
    new = [texts[row] + " melon"] * 40
    told = model.update(new, vectors=None if method == "nmf" else x[row].expand(40, -1))
    assert told.labels.tolist() == [2] * 40
    after = model.topics
    assert [t.size for t in after] == [before[0].size, before[1].size, last.size + 40]
    assert "melon" in after[2].words
    assert after[:2] == before[:2] or method == "nmf" or after[0].words == before[0].words
    assert last.size == before[2].size  # what was handed out does not change
    assert "melon" not in last.words
    assert model.update([], vectors=None if method == "nmf" else x[:0]).labels.shape == (0,)


def test_a_new_topic_opens_by_the_rule_only():
    texts, x, _ = documents()
    strange = torch.zeros(7, 8)
    strange[:6, 6] = 1
    strange[:6] += 0.05 * torch.randn(6, 8)
    strange[6, 7] = 1  # far from all, but alone
    new = ["moon star"] * 6 + ["lonely"]
    batch, rows = texts[:5] + new, torch.cat([x[:5], strange])

    closed = TopicModel(k=3).fit(texts, vectors=x)
    assert closed.update(batch, vectors=rows).affinities.shape == (12, 3)
    assert len(closed.topics) == 3
    few = TopicModel(k=3).fit(texts, vectors=x)
    few.update(batch, vectors=rows, new_below=0.4, new_size=7)
    assert len(few.topics) == 3

    model = TopicModel(k=3).fit(texts, vectors=x)
    expected = model.transform(texts[:5], vectors=x[:5]).labels.tolist()
    told = model.update(batch, vectors=rows, new_below=0.4)
    assert told.labels[:11].tolist() == expected + [3] * 6
    assert told.labels[11] in (0, 1, 2, 3)
    assert told.affinities.shape == (12, 4)
    assert (told.scores[5:11] > 0.9).all()
    topic = model.topics[3]
    assert topic.size in (6, 7)
    assert topic.words[:2] == ("moon", "star")
    assert topic.parts == (3,)
    assert model.transform(new[:6], vectors=strange[:6]).labels.tolist() == [3] * 6
    mine = F.normalize(rows, dim=1)[told.labels == 3]
    assert topic.size == len(mine)
    torch.testing.assert_close(model._parts.sums[3].float(), mine.sum(0), atol=1e-5, rtol=0)
    assert sum(t.size for t in model.topics) == 60 + 12


def test_a_new_topic_has_the_documents_that_opened_it():
    """One of them is nearer to the mean of opposite documents, which is zero."""
    axes = torch.eye(4)
    model = TopicModel(k=1).fit(["left", "right"], vectors=torch.stack([axes[3], -axes[3]]))
    aside = F.normalize(axes[0] * 0.2 + axes[1], dim=0)
    x = torch.cat([axes[:1].expand(10, -1), aside.unsqueeze(0)])
    told = model.update([f"w{i}" for i in range(11)], vectors=x, new_below=0.15, new_size=11)
    assert told.labels.tolist() == [1] * 11
    assert model.transform("w10", vectors=aside).labels == 0


def test_over_time():
    texts = ["apple pie", "apple tart", "fast car", "old car", "apple juice", "red car"]
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 1.0], [1.0, 0.1], [0.0, 0.9]])
    times = [date(2024, 1, 1)] * 3 + [date(2023, 1, 1)] * 3
    model = TopicModel(k=2).fit(texts, vectors=x)
    apple = next(topic.id for topic in model.topics if "apple" in topic.words)
    found = model.over_time(texts, times, vectors=x)
    assert [(p.time.year, p.topic) for p in found] == [(2023, 0), (2023, 1), (2024, 0), (2024, 1)]
    size = {(p.time.year, p.topic): (p.size, p.share) for p in found}
    assert size[2024, apple] == (2, pytest.approx(2 / 3))
    assert size[2023, apple] == (1, pytest.approx(1 / 3))
    then = next(p for p in found if (p.time.year, p.topic) == (2023, apple))
    assert then.words == ("juice", "apple")  # apple is said at both times
    with pytest.raises(ValueError, match="6 texts came with 2 times"):
        model.over_time(texts, times[:2], vectors=x)
