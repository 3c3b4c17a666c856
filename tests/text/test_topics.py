import dataclasses
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import v_measure_score

from tests.text.architectures import make_model, make_tokenizer, random_texts
from tests.text.topic_documents import METHODS, ON_VECTORS, WORDS, documents, fitted, topics_of
from torsh_text import EmbeddingCache, Encoder, TopicModel, topic_terms


@pytest.mark.parametrize("method", METHODS)
def test_topics_are_found_named_and_described(method):
    texts, x, gold = documents()
    model = fitted(method, texts, x)
    found = topics_of(model, texts, x)
    assert v_measure_score(gold, found.labels) >= (0.9 if method == "hdbscan" else 0.999)
    assert len(model.topics) == 3
    for number, topic in enumerate(model.topics):
        assert topic.id == number
        assert topic.parts == (number,)
        mine = [doc for doc, label in zip(texts, found.labels, strict=True) if label == number]
        assert set(topic.words) in [set(words) for words in WORDS]
        assert list(topic.scores) == sorted(topic.scores, reverse=True)
        assert len(set(topic.documents)) == 3
        assert set(topic.documents) <= set(mine)
        assert topic.name == ", ".join(topic.words)
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.topics[0].size = 1


@pytest.mark.parametrize("method", METHODS)
def test_words_are_those_of_topic_terms(method):
    texts, x, _ = documents()
    model = fitted(method, texts, x, words=2)
    labels = topics_of(model, texts, x).labels
    sizes = [topic.size for topic in model.topics]
    assert sizes == sorted(sizes, reverse=True)
    if method == "hdbscan":
        return  # a document between two topics may count in one and be nearest to the other
    expected = topic_terms(texts, labels, 2)
    assert [(t.words, t.size) for t in model.topics] == [(t.words, t.size) for t in expected]
    for mine, theirs in zip(model.topics, expected, strict=True):
        assert mine.scores == pytest.approx(theirs.scores)


@pytest.mark.parametrize("method", METHODS)
def test_affinities_mean_what_is_said(method):
    texts, x, _ = documents()
    model = fitted(method, texts, x)
    found = topics_of(model, texts, x)
    assert found.affinities.shape == (60, 3)
    kept = found.labels >= 0
    own = found.affinities[torch.arange(60), found.labels.clamp_min(0)]
    torch.testing.assert_close(found.scores[kept], own[kept])
    if method == "nmf":
        torch.testing.assert_close(found.affinities.sum(1), torch.ones(60))
        assert torch.equal(found.labels, found.affinities.argmax(1))
    elif method != "hdbscan":
        unit = F.normalize(x, dim=1)
        means = torch.stack([unit[found.labels == topic].mean(0) for topic in range(3)])
        expected = unit @ F.normalize(means, dim=1).T
        torch.testing.assert_close(found.affinities, expected, atol=1e-5, rtol=0)
        assert torch.equal(found.labels, torch.cdist(unit, means).argmin(1))


@pytest.mark.parametrize("method", METHODS)
def test_one_document_may_be_a_string(method):
    texts, x, _ = documents()
    model = fitted(method, texts, x)
    all_of_them, one = topics_of(model, texts, x), topics_of(model, texts[4], x[4])
    assert one.labels.ndim == one.scores.ndim == 0
    assert one.labels == all_of_them.labels[4]
    torch.testing.assert_close(one.affinities, all_of_them.affinities[4])
    empty = topics_of(model, [], x[:0])
    assert empty.labels.shape == empty.scores.shape == (0,)
    assert empty.affinities.shape == (0, 3)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits(method):
    texts, _, _ = documents()
    x = torch.randn(60, 8)
    first, again = fitted(method, texts, x, seed=4), fitted(method, texts, x, seed=4)
    assert first.topics == again.topics
    a, b = topics_of(first, texts, x), topics_of(again, texts, x)
    assert torch.equal(a.affinities, b.affinities)
    assert torch.equal(a.labels, b.labels)
    if method in ("kmeans", "spherical"):
        other = fitted(method, texts, x, k=8, seed=1), fitted(method, texts, x, k=8, seed=2)
        assert other[0].topics != other[1].topics


def test_an_encoder_is_used_once_and_any_encoder_will_do():
    class Counting:
        calls = 0

        def encode(self, texts):
            self.calls += 1
            letters = [[text.count(c) for c in "abcdefgh"] for text in texts]
            return torch.tensor(letters).numpy()  # integers, as a numpy array

    encoder = Counting()
    texts = ["aab", "aba", "hgh", "hhg"]
    model = TopicModel(encoder, k=2).fit(texts)
    assert encoder.calls == 1
    assert model.transform(texts).labels.tolist() == [0, 0, 1, 1]
    assert model.transform("abba").labels == 0
    tiny = Encoder(make_model("bert"), make_tokenizer(), max_length=20).eval()
    texts = random_texts([5] * 6)
    fitted = TopicModel(tiny, k=2).fit(texts)
    given = TopicModel(k=2).fit(texts, vectors=tiny.encode(texts))
    assert fitted.topics == given.topics
    with pytest.warns(UserWarning, match="were cut"):
        fitted.transform(random_texts([50]))


def test_an_encoder_may_be_a_path(minilm, minilm_path, tmp_path):
    texts = ["red apple", "green apple", "fast car", "old car"]
    model = TopicModel(minilm_path, k=2).fit(texts)
    assert model.topics == TopicModel(minilm, k=2).fit(texts).topics
    model.save(tmp_path / "m")
    same = TopicModel.load(tmp_path / "m", minilm_path)
    assert torch.equal(same.transform(texts).labels, model.labels)


def test_vectors_are_kept_in_a_cache(tmp_path):
    encoder = Encoder(make_model("bert"), make_tokenizer(), max_length=20).eval()
    cache = EmbeddingCache(tmp_path)
    texts = random_texts([5] * 6)
    model = TopicModel(encoder, k=2).fit(texts, cache=cache)
    assert cache.stats().stored == len(set(texts))
    model.transform(texts, cache=cache)
    model.transform(texts[0], cache=cache)
    model.update(texts, cache=cache)
    model.over_time(texts, [1] * 6, cache=cache)
    assert cache.stats().stored == len(set(texts))
    assert cache.stats().hits == 3 * len(set(texts)) + 1
    assert model.labels.tolist() == TopicModel(encoder, k=2).fit(texts).labels.tolist()
    with pytest.raises(ValueError, match="vectors were given, so cache has nothing to keep"):
        model.transform(texts, vectors=encoder.encode(texts), cache=cache)
    with pytest.raises(ValueError, match="cache was given, but method='nmf' looks at words"):
        TopicModel(k=2, method="nmf").fit(["a b", "c d"], cache=cache)

    class Other:
        def encode(self, texts):
            return torch.ones(len(texts), 2)

    with pytest.raises(TypeError, match="cache is for an Encoder; this encoder is a Other"):
        TopicModel(Other(), k=1).fit(texts, cache=cache)


@pytest.mark.parametrize("method", METHODS)
def test_labels_are_those_of_the_fitted_documents(method, tmp_path):
    texts, x, _ = documents()
    model = fitted(method, texts, x)
    counts = torch.bincount(model.labels[model.labels >= 0], minlength=3)
    assert counts.tolist() == [topic.size for topic in model.topics]
    told = topics_of(model, texts, x).labels
    assert (told == model.labels).float().mean() >= (0.8 if method == "hdbscan" else 1)
    before = model.labels
    model.update(texts[:9], vectors=None if method == "nmf" else x[:9])
    assert torch.equal(model.labels, before)
    model.reduce(2)
    number = {part: topic.id for topic in model.topics for part in topic.parts}
    assert model.labels.tolist() == [number.get(part, -1) for part in before.tolist()]
    model.save(tmp_path / "m")
    with pytest.raises(RuntimeError, match=r"a loaded .* ask transform\(texts\)\.labels"):
        _ = TopicModel.load(tmp_path / "m").labels


def test_vectors_may_be_an_array():
    texts, x, _ = documents()
    rows = x.numpy()
    rows.flags.writeable = False
    model = TopicModel(k=3).fit(texts, vectors=rows)
    assert model.topics == TopicModel(k=3).fit(texts, vectors=x).topics
    assert torch.equal(model.transform(texts, vectors=rows[:, :]).labels, model.labels)
    assert model.transform(texts[2], vectors=rows[2]).labels == model.labels[2]
    with pytest.raises(TypeError, match="vectors is a list; pass a tensor or array"):
        model.transform(texts, vectors=rows.tolist())
    with pytest.raises(ValueError, match=r"vectors have shape \(480,\); expected \(60, dim\)"):
        model.transform(texts, vectors=rows.ravel())


def test_length_of_vectors_does_not_count():
    texts, x, _ = documents()
    for method in ON_VECTORS:
        usual = fitted(method, texts, x)
        scaled = fitted(method, texts, x * 2.0 ** torch.randint(-90, 90, (60, 1)))
        assert [t.documents for t in scaled.topics] == [t.documents for t in usual.topics]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "texts", [["cat"], ["cat", "dog"], ["cat"] * 9, ["the of", "and", "", "a"]]
)
@pytest.mark.filterwarnings("ignore:k=3 topics asked")
def test_few_equal_and_empty_documents(method, texts, tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = {doc: torch.randn(5, generator=generator) for doc in texts}
    x = torch.stack([rows[doc] for doc in texts])
    model = fitted(method, texts, x)
    found = topics_of(model, texts, x)
    assert len(model.topics) <= min(3, len(set(texts)))
    assert sum(topic.size for topic in model.topics) <= len(texts)
    assert all(topic.size for topic in model.topics)
    if method in ("kmeans", "spherical"):
        assert sum(topic.size for topic in model.topics) == len(texts)
        assert (found.labels >= 0).all()
        assert len(model.topics) == min(3, len(set(texts)))
    if "and" in texts:
        assert all(topic.words == () for topic in model.topics)
        assert all(topic.name == f"topic {topic.id}" for topic in model.topics)
        assert math.isnan(model.coherence(texts))
        assert math.isnan(model.coherence(texts, "diversity"))
        if method == "nmf":
            assert found.labels.tolist() == [-1] * 4
            assert model.topics == []
    for doc in set(texts):
        assert len({int(lb) for d, lb in zip(texts, found.labels, strict=True) if d == doc}) == 1
    assert found.affinities.isfinite().all()
    _ = model.update(texts, vectors=None if method == "nmf" else x)
    model.save(tmp_path / "m")
    assert TopicModel.load(tmp_path / "m").topics == model.topics
    if model.topics:
        assert len(model.reduce(1).topics) == 1


def test_zero_vectors_are_documents_too():
    model = TopicModel(k=2).fit(
        ["a", "b", "c"], vectors=torch.zeros(3, 4).index_fill(0, torch.tensor(2), 1)
    )
    assert [topic.size for topic in model.topics] == [2, 1]


def test_fewer_topics_than_asked_are_reported():
    with pytest.warns(UserWarning, match="k=20 topics asked, 10 found") as caught:
        TopicModel(k=20).fit([str(i) for i in range(10)], vectors=torch.randn(10, 4))
    assert caught[0].filename == __file__


@settings(max_examples=30, deadline=None)
@given(
    points=st.lists(st.tuples(*[st.integers(-2, 2)] * 3), min_size=1, max_size=20),
    k=st.integers(1, 6) | st.just("auto"),
    method=st.sampled_from(["kmeans", "spherical"]),
    seed=st.integers(0, 3),
)
def test_no_document_is_lost_whatever_the_vectors(points, k, method, seed):
    x = torch.tensor(points, dtype=torch.float32)
    texts = [f"w{i}" for i in range(len(x))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = TopicModel(k=k, method=method, seed=seed).fit(texts, vectors=x)
    count = len(model.topics)
    assert sum(topic.size for topic in model.topics) == len(x)
    told = model.update(texts, vectors=x, new_below=0.5, new_size=2)
    assert (told.labels >= 0).all()
    assert sum(topic.size for topic in model.topics) == 2 * len(x)
    assert all(topic.size for topic in model.topics)
    assert len(model.topics) >= count
    model.reduce(1)
    assert model.topics[0].size == 2 * len(x)


def test_refuses_what_does_not_fit():
    texts, x, _ = documents()
    with pytest.raises(ValueError, match="method='lda' is none of 'kmeans'"):
        TopicModel(method="lda")
    with pytest.raises(TypeError, match=r"k=2\.0 is of type float"):
        TopicModel(k=2.0)
    with pytest.raises(ValueError, match="k=0; it has to be at least 1"):
        TopicModel(k=0)
    with pytest.raises(ValueError, match="k=3; it has to be 'auto' with method='hdbscan'"):
        TopicModel(k=3, method="hdbscan")
    with pytest.raises(ValueError, match="k='auto' does not go with method='nmf'"):
        TopicModel(method="nmf")
    with pytest.raises(ValueError, match="words=0 is not positive"):
        TopicModel(words=0)
    with pytest.raises(ValueError, match="stop_words='german'"):
        TopicModel(stop_words="german")
    model = TopicModel(k=3)
    for call in (
        lambda: model.transform(texts),
        lambda: model.update(texts),
        lambda: model.reduce(1),
        lambda: model.topics,
        lambda: model.labels,
        lambda: model.save("x"),
    ):
        with pytest.raises(RuntimeError, match="no topics yet; call fit first"):
            call()
    with pytest.raises(ValueError, match="texts is empty"):
        model.fit([])
    with pytest.raises(TypeError, match="single string"):
        model.fit("a document")
    with pytest.raises(TypeError, match=r"texts\[1\] is None"):
        model.fit(["a", None])
    with pytest.raises(ValueError, match="has no encoder; pass vectors"):
        model.fit(texts)
    with pytest.raises(ValueError, match=r"vectors have shape \(59, 8\); expected \(60, dim\)"):
        model.fit(texts, vectors=x[:59])
    model.fit(texts, vectors=x)
    with pytest.raises(ValueError, match="vectors have 7 entries, those of the topics 8"):
        model.transform(texts, vectors=x[:, :7])
    bad = x.clone()
    bad[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"vectors\[3\] is not finite"):
        model.transform(texts, vectors=bad)
    with pytest.raises(ValueError, match="k=4 is not between 1 and the 3 topics"):
        model.reduce(4)
    with pytest.raises(ValueError, match=r"new_below=1\.5 is not between 0 and 1"):
        model.update(texts, vectors=x, new_below=1.5)
    with pytest.raises(ValueError, match="new_size=0 is not positive"):
        model.update(texts, vectors=x, new_size=0)
    with pytest.raises(ValueError, match="measure='umass' is neither"):
        model.coherence(texts, "umass")
    with pytest.raises(ValueError, match="texts is empty; npmi needs documents"):
        model.coherence([])
    factors = TopicModel(k=3, method="nmf").fit(texts)
    with pytest.raises(ValueError, match="method='nmf' looks at words alone"):
        factors.transform(texts, vectors=x)
    with pytest.raises(ValueError, match=r"new_below=0\.3 does not go with method='nmf'"):
        factors.update(texts, new_below=0.3)


def test_scikit_learn_is_asked_for_where_it_is_missing():
    code = (
        "import sys; sys.modules['sklearn'] = None; sys.modules['sklearn.decomposition'] = None\n"
        "from torsh_text import TopicModel\n"
        "TopicModel(k=2, method='nmf').fit(['a b', 'c d'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join([*sys.path, str(Path.cwd())])},
        check=False,
    )
    assert done.returncode == 1
    assert "pip install 'torsh-text[topics]'" in done.stderr


def test_long_documents_are_told_of_averaged_or_refused(tiny):
    texts = [*random_texts([5, 6, 7]), *random_texts([60], seed=4)]
    model = TopicModel(tiny, k=2, stop_words=None)
    for method, arguments in (
        (model.fit, (texts,)),
        (model.transform, (texts,)),
        (model.transform, (texts[3],)),
        (model.update, (texts,)),
        (model.over_time, (texts, [1, 1, 2, 2])),
    ):
        with pytest.warns(UserWarning, match="have more than max_length=40") as told:
            method(*arguments)
        assert [one.filename for one in told] == [__file__]
        with pytest.raises(ValueError, match=r"texts\[[03]\] has more than max_length=40"):
            method(*arguments, long="error")
        method(*arguments, long="mean")
    with pytest.warns(UserWarning, match="were cut"):
        assert model.transform(texts).truncated.tolist() == [False, False, False, True]
    assert not model.transform(texts[3], long="mean").truncated
    x = tiny.encode(texts, long="mean")
    with pytest.raises(ValueError, match="long='mean' has nothing to do"):
        model.transform(texts, vectors=x, long="mean")
    with pytest.raises(ValueError, match="method='nmf' looks at words alone"):
        TopicModel(k=2, method="nmf").fit(texts, long="mean")


def test_a_device_is_for_what_is_loaded(tiny, minilm_path):
    assert TopicModel(minilm_path, device="cpu").encoder.backbone.device.type == "cpu"
    with pytest.raises(ValueError, match="device='cpu' is for a path or hub id"):
        TopicModel(tiny, device="cpu")
