import pytest
import torch
from scipy.cluster.hierarchy import linkage

from tests.text.topic_documents import METHODS, fitted, topics_of
from torsh_text import TopicModel
from torsh_text._topic_merging import merge_topics


def test_merges_are_those_of_ward():
    """Parts of one document each: SciPy's linkage says which merge, in order."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    groups, merges = merge_topics([(i,) for i in range(12)], x, [1] * 12, 1)
    assert groups == [tuple(range(12))]
    members = {i: {i} for i in range(12)}
    for step, (a, b, *_) in enumerate(linkage(x.numpy(), "ward")):
        members[12 + step] = members[int(a)] | members[int(b)]
        assert {frozenset(merges[step].first), frozenset(merges[step].second)} == {
            frozenset(members[int(a)]),
            frozenset(members[int(b)]),
        }


def test_weights_and_similarity_by_hand():
    totals = torch.tensor([[10.0, 0.0], [0.0, 1.0], [3.0, 4.0]], dtype=torch.float64)
    # adding costs: 10/11 * 2 = 1.8; 50/15 * 0.8 = 2.7; 5/6 * (0.36 + 0.04) = 0.3
    groups, (merge,) = merge_topics([(0,), (1,), (2,)], totals, [10, 1, 5], 2)
    assert groups == [(0,), (1, 2)]
    assert (merge.first, merge.second) == ((2,), (1,))  # the larger first
    assert merge.similarity == pytest.approx(0.8)


def test_merging_goes_on_from_merged_topics():
    totals = torch.randn(6, 3, dtype=torch.float64)
    sizes = [5, 4, 3, 2, 2, 1]
    whole = merge_topics([(i,) for i in range(6)], totals, sizes, 2)
    half = merge_topics([(i,) for i in range(6)], totals, sizes, 4)
    rest = merge_topics(half[0], totals, sizes, 2)
    assert rest[0] == whole[0]
    steps = half[1] + rest[1]
    assert [(m.first, m.second) for m in steps] == [(m.first, m.second) for m in whole[1]]
    assert merge_topics([(0,), (1,)], totals, sizes, 2) == ([(0,), (1,)], [])


@pytest.mark.parametrize("method", METHODS)
def test_reduce_merges_and_remembers(method):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(300, 6, generator=generator)
    vocabulary = [f"w{i}" for i in range(30)]
    picks = torch.randint(30, (300, 12), generator=generator).tolist()
    texts = [" ".join(vocabulary[i] for i in row) for row in picks]
    if method == "hdbscan":
        x = torch.eye(6).repeat(50, 1) + 0.05 * x
    model = fitted(method, texts, x, k=8)
    before, told = model.topics, topics_of(model, texts, x)
    parts = len(before)
    assert parts >= 4
    assert model.reduce(3) is model
    assert len(model.topics) == 3
    assert len(model.merges) == parts - 3
    assert sorted(part for topic in model.topics for part in topic.parts) == list(range(parts))
    for topic in model.topics:
        assert topic.size == sum(before[part].size for part in topic.parts)
    # the merges, read in order, give the groups
    groups = {(part,) for part in range(parts)}
    for merge in model.merges:
        groups -= {merge.first, merge.second}
        groups.add(tuple(sorted(merge.first + merge.second)))
    assert groups == {topic.parts for topic in model.topics}
    number = {part: topic.id for topic in model.topics for part in topic.parts}
    after = topics_of(model, texts, x)
    for topic in model.topics:
        own = told.affinities[:, list(topic.parts)]
        whole = own.sum(1) if method == "nmf" else own.amax(1)
        torch.testing.assert_close(after.affinities[:, topic.id], whole)
    if method == "nmf":
        assert torch.equal(after.labels, after.affinities.argmax(1))
    else:
        assert [number.get(part, -1) for part in told.labels.tolist()] == after.labels.tolist()
    again = model.topics
    assert model.reduce(3).topics == again
    model.update(texts[:20], vectors=None if method == "nmf" else x[:20])
    assert len(model.topics) == 3
    assert model.reduce(1).topics[0].parts == tuple(range(parts))


def test_reducing_in_two_steps_is_reducing_at_once():
    x, texts = torch.randn(200, 5), [f"w{i % 13}" for i in range(200)]
    once = TopicModel(k=10).fit(texts, vectors=x).reduce(2)
    twice = TopicModel(k=10).fit(texts, vectors=x).reduce(6).reduce(2)
    assert once.topics == twice.topics
    assert {m.similarity for m in once.merges} == {m.similarity for m in twice.merges}
