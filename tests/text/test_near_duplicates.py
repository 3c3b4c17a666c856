import json
import random
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torsh_text import near_duplicates, quantize, similarity
from torsh_text._near_duplicates import _components, _similar_sets


def _jaccard(a, b):
    return len(a & b) / len(a | b)


def _grams(text, n=5):
    return {text[i : i + n] for i in range(max(1, len(text) - n + 1))}


def _plain(text):
    """The texts used here have no punctuation inside words."""
    kept = "".join(c if c.isalnum() else " " for c in text.lower())
    return " ".join(kept.split())


@settings(max_examples=150, deadline=None)
@given(
    sets=st.lists(st.frozensets(st.sampled_from("abcdefgh"), min_size=1), max_size=14),
    threshold=st.sampled_from([0.05, 0.2, 1 / 3, 0.5, 0.6, 2 / 3, 0.75, 0.8, 1.0]),
)
def test_the_prefix_filter_loses_no_pair(sets, threshold):
    expected = {
        (i, j): _jaccard(sets[i], sets[j])
        for i, j in combinations(range(len(sets)), 2)
        if _jaccard(sets[i], sets[j]) >= threshold
    }
    found = {(i, j): score for score, i, j in _similar_sets(sets, threshold)}
    assert found == expected
    assert len(_similar_sets(sets, threshold)) == len(found)


def test_groups_are_connected_components():
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    generator = random.Random(0)
    for count in (1, 10, 200):
        pairs = [generator.sample(range(count), 2) for _ in range(count // 2) if count > 1]
        rows, columns = zip(*pairs, strict=True) if pairs else ((), ())
        graph = coo_array(([1] * len(rows), (rows, columns)), shape=(count, count))
        _, expected = connected_components(graph, directed=False)
        first = {}
        for row, label in enumerate(expected.tolist()):
            first.setdefault(label, row)
        assert _components(count, pairs) == [first[label] for label in expected.tolist()]


def test_near_copies_of_vectors():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=generator)
    noise = torch.randn(200, 32, generator=generator)
    copies = torch.cat([x, 3 * x + 0.3 * noise])  # cosine about 0.995
    found = near_duplicates(copies, 0.97, block=50)
    assert found.groups == [(i, i + 200) for i in range(200)]
    assert found.kept.tolist() == list(range(200))
    expected = similarity(copies, copies)[found.pairs[:, 0], found.pairs[:, 1]]
    torch.testing.assert_close(found.scores, expected, atol=1e-6, rtol=0)
    assert (found.scores.diff() <= 0).all()


def test_a_chain_is_one_group():
    angles = torch.tensor([0.0, 0.2, 0.4, 2.0])
    x = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = near_duplicates(x, 0.97)  # cos 0.2 is 0.980, cos 0.4 is 0.921
    assert sorted(found.pairs.tolist()) == [[0, 1], [1, 2]]
    assert found.groups == [(0, 1, 2)]
    assert found.first.tolist() == [0, 0, 0, 3]


def test_equal_rows_make_few_pairs_and_meet_any_threshold():
    x = torch.randn(3, 5).repeat(400, 1)
    found = near_duplicates(x, 1.0)
    assert [len(group) for group in found.groups] == [400] * 3
    assert len(found.pairs) == 3 * 399  # not 3 * 400 * 399 / 2
    assert found.scores.eq(1).all()
    texts = ["a", "b"] * 500
    assert near_duplicates(texts, 1.0).kept.tolist() == [0, 1]


@pytest.mark.parametrize("empty", [torch.empty(0, 4), []])
def test_nothing(empty):
    found = near_duplicates(empty)
    assert found.pairs.shape == (0, 2)
    assert found.first.shape == found.scores.shape == found.kept.shape == (0,)
    assert found.groups == []


def test_texts_by_hand():
    texts = ["abcdefg", "ABCDEF!", "", "  ", "?!", "?", "xyz"]
    # 3 and 2 n-grams of 5 characters, 2 in common
    found = near_duplicates(texts, 0.6)
    assert found.pairs.tolist() == [[2, 3], [0, 1]]
    assert found.scores.tolist() == pytest.approx([1, 2 / 3])
    assert near_duplicates(texts, 0.7).groups == [(2, 3)]
    assert near_duplicates(texts, 0.8, ngram=1).groups == [(0, 1), (2, 3)]  # 6 of 7 letters


def test_scripts_without_spaces():
    texts = ["今日は天気がとても良いです", "今日は天気がとても良いです。", "明日は雨が降るでしょう"]
    assert near_duplicates(texts).groups == [(0, 1)]


def test_reviews_equal_brute_force(text_data):
    """Opinosis: reviews that people copied from one topic's page to another's."""
    topics = json.loads((text_data / "opinosis" / "topics.json").read_text(encoding="utf-8"))
    texts = [s for name in sorted(topics)[:12] for s in topics[name]["sentences"]][:700]
    texts = [text for text in texts if text.isascii() and not set(text) & set("'-_")]
    for threshold in (0.4, 0.8):
        found = near_duplicates(texts, threshold)
        sets = [_grams(_plain(text)) for text in texts]
        table = {
            (i, j)
            for i, j in combinations(range(len(sets)), 2)
            if _jaccard(sets[i], sets[j]) >= threshold
        }
        parts = {pair for group in found.groups for pair in combinations(group, 2)}
        assert table <= parts
        assert {tuple(pair) for pair in found.pairs.tolist()} <= table
        assert _components(len(sets), table) == found.first.tolist()
        assert len(table) >= 3


def test_vectors_of_reviews_say_the_same(minilm):
    texts = [
        "The battery lasts all day.",
        "Battery life is a whole day.",
        "The battery lasts the whole day.",
        "The screen is too dark outside.",
        "Parking costs extra at this hotel.",
    ]
    assert near_duplicates(minilm.encode(texts), 0.7).groups == [(0, 1, 2)]
    assert near_duplicates(texts).groups == []


def test_numpy_arrays_are_vectors():
    x = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    x[7] = x[3]
    for array in (x, x.astype(np.float64), np.asfortranarray(x), x[::-1][::-1]):
        assert near_duplicates(array).groups == near_duplicates(torch.tensor(x)).groups == [(3, 7)]
    x.setflags(write=False)
    assert near_duplicates(x).groups == [(3, 7)]
    for wrong in (x[0], x[:, :0], torch.empty(0)):
        with pytest.raises(ValueError, match=r"x has shape \(.*\); expected \(rows, dim\)"):
            near_duplicates(wrong)
    with pytest.raises(TypeError, match="x holds bool; pass an array of floats"):
        near_duplicates(x > 0)
    assert near_duplicates(x[:0]).groups == []
    assert near_duplicates(np.array(["a b c", "d", "A b c"])).groups == [(0, 2)]


@pytest.mark.gpu
def test_groups_on_a_gpu():
    x = torch.randn(500, 16).repeat(2, 1) + 0.01 * torch.randn(1000, 16)
    found, expected = near_duplicates(x.cuda()), near_duplicates(x)
    assert found.first.is_cuda
    assert torch.equal(found.first.cpu(), expected.first)


def test_refuses_what_does_not_fit():
    x = torch.randn(5, 4)
    for threshold in (0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="is not above 0 and at most 1"):
            near_duplicates(x, threshold)
    with pytest.raises(ValueError, match="ngram=3 is for texts, x holds vectors"):
        near_duplicates(x, ngram=3)
    with pytest.raises(ValueError, match="block=9 is for vectors, x holds texts"):
        near_duplicates(["a"], block=9)
    with pytest.raises(ValueError, match="ngram=0 is not positive"):
        near_duplicates(["a"], ngram=0)
    with pytest.raises(ValueError, match=r"expected \(rows, dim\)"):
        near_duplicates(x[0])
    with pytest.raises(TypeError, match="single string"):
        near_duplicates("text")
    with pytest.raises(TypeError, match=r"texts\[1\] is None"):
        near_duplicates(["a", None])
    x[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"x\[2\] is not finite"):
        near_duplicates(x)


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_quantized_vectors(kind):
    x = torch.randn(40, 24)
    x[7], x[31] = x[3], x[3] + 1e-3 * torch.randn(24)
    small = quantize(x, kind)
    found, plain = near_duplicates(small, 0.6), near_duplicates(small.dequantize(), 0.6)
    assert found.pairs.tolist() == plain.pairs.tolist()
    torch.testing.assert_close(found.scores, plain.scores)
    assert {3, 7, 31} <= set(found.groups[0])
    if kind == "int8":
        small.scales[5] = torch.nan
        with pytest.raises(ValueError, match=r"x\[5\] is not finite"):
            near_duplicates(small)
