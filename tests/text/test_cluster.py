from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import make_blobs
from sklearn.metrics import silhouette_score, v_measure_score

from torsh_text import cluster
from torsh_text._cluster import _silhouette

METHODS = ["kmeans", "spherical", "agglomerative", "hdbscan"]


def _blobs(k=5, spread=0.5):
    points, gold = make_blobs(
        300, n_features=8, centers=k, cluster_std=spread, center_box=(-9, 9), random_state=2
    )
    return torch.from_numpy(points).float(), gold


@pytest.mark.parametrize("method", METHODS)
def test_finds_clear_groups_and_their_number(method):
    x, gold = _blobs()
    found = cluster(x, method=method)
    assert v_measure_score(gold, found.labels.numpy()) >= 0.99
    assert found.centers.shape == (5, 8)


@pytest.mark.parametrize("method", METHODS)
def test_result_is_described_truthfully(method):
    x, _ = _blobs(spread=2.0)
    found = cluster(x, method=method)
    kept = found.labels >= 0
    sizes = torch.bincount(found.labels[kept])
    assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)
    rows = F.normalize(x, dim=1) if method == "spherical" else x
    for label, center in enumerate(found.centers):
        mean = rows[found.labels == label].mean(0)
        mean = F.normalize(mean, dim=0) if method == "spherical" else mean
        torch.testing.assert_close(center, mean, atol=1e-4, rtol=1e-4)
    cosine = F.cosine_similarity(rows[kept], found.centers[found.labels[kept]])
    torch.testing.assert_close(found.scores[kept], cosine)
    assert not found.scores[~kept].any()
    again = cluster(x, method=method)
    assert torch.equal(found.labels, again.labels)


def test_spherical_ignores_length():
    x, _ = _blobs()
    scaled = x * torch.rand(len(x), 1).add(0.1)
    a, b = cluster(x, k=5, method="spherical"), cluster(scaled, k=5, method="spherical")
    assert v_measure_score(a.labels, b.labels) == pytest.approx(1.0)


def test_silhouette_equals_sklearns():
    x, gold = _blobs(spread=3.0)
    labels = torch.from_numpy(gold).long()
    assert _silhouette(x, labels, 5) == pytest.approx(silhouette_score(x, gold), abs=1e-5)
    labels[0] = 5  # alone in its cluster
    expected = silhouette_score(x, labels.numpy())
    assert _silhouette(x, labels, 6) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_few_rows(method, rows):
    found = cluster(torch.randn(rows, 4), method=method)
    assert found.labels.shape == found.scores.shape == (rows,)
    assert len(found.centers) == int(found.labels.max()) + 1 if rows else len(found.centers) == 0
    assert found.scores.isfinite().all()


@pytest.mark.parametrize("method", ["kmeans", "spherical", "agglomerative"])
@pytest.mark.parametrize("k", [1, 3, "auto"])
def test_identical_rows_are_one_cluster(method, k):
    found = cluster(torch.ones(12, 4), k=k, method=method)
    assert found.labels.tolist() == [0] * 12
    torch.testing.assert_close(found.scores, torch.ones(12))


def test_more_clusters_than_rows_give_one_each():
    x = torch.randn(10, 4)
    found = cluster(x, k=20)
    assert found.labels.tolist() == list(range(10))
    torch.testing.assert_close(found.centers, x, atol=1e-6, rtol=0)


def test_arrays_are_taken_as_tensors_are():
    x = torch.randn(30, 4)
    expected = cluster(x, k=3)
    for rows in (x.numpy(), x.double().numpy(), x.flip(0).numpy()[::-1]):
        found = cluster(rows, k=3)
        assert torch.equal(found.labels, expected.labels)
        assert torch.equal(found.centers, expected.centers)
    for empty in (x[:0], x[:0].numpy()):
        assert cluster(empty).labels.shape == (0,)
    for wrong in (x.numpy()[0], x[:, :0].numpy(), torch.empty(0)):
        with pytest.raises(ValueError, match=r"x has shape .*; expected \(rows, dim\)"):
            cluster(wrong)
    with pytest.raises(ValueError, match=r"x\[1\] is not finite"):
        cluster(np.array([[1.0], [np.nan]]))
    with pytest.raises(TypeError, match="x holds <U1; pass an array of floats"):
        cluster(np.array([["a"]]))


def test_refuses_what_does_not_fit():
    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match="method='dbscan' is none of 'kmeans'"):
        cluster(x, method="dbscan")
    with pytest.raises(ValueError, match="k=0; it has to be 'auto' or at least 1"):
        cluster(x, k=0)
    with pytest.raises(ValueError, match="k=3; it has to be 'auto' with method='hdbscan'"):
        cluster(x, k=3, method="hdbscan")
    with pytest.raises(ValueError, match=r"expected \(rows, dim\)"):
        cluster(x[0])
    with pytest.raises(TypeError, match="x is a list; pass a tensor or array"):
        cluster([[1.0, 2.0]])
    for k, kind in ((2.0, "float"), ("2", "str"), (True, "bool"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"is of type {kind}; expected an integer or 'auto'"):
            cluster(x, k=k)
    with pytest.raises(ValueError, match=r"x\[0\] is not finite in float32"):
        cluster(x.double() + 1e300)
    x[3, 1] = float("nan")
    with pytest.raises(ValueError, match=r"x\[3\] is not finite"):
        cluster(x)


def _check_no_cluster_is_empty(found):
    kept = found.labels[found.labels >= 0]
    assert kept.unique().tolist() == list(range(len(found.centers)))
    assert found.centers.isfinite().all()
    assert found.scores.isfinite().all()


def _near_duplicates():
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(50, 384, generator=generator), dim=1)
    return torch.cat([x, x + 1e-6 * torch.randn(50, 384, generator=generator)])


@pytest.mark.parametrize("method", METHODS)
def test_near_duplicates_leave_no_cluster_empty(method):
    k = "auto" if method == "hdbscan" else 90
    found = cluster(_near_duplicates(), k=k, method=method)
    _check_no_cluster_is_empty(found)
    assert method == "hdbscan" or len(found.centers) >= 50


@settings(max_examples=25, deadline=None)
@given(
    points=st.lists(st.tuples(*[st.integers(-3, 3)] * 2), min_size=1, max_size=12),
    k=st.integers(1, 12) | st.just("auto"),
    method=st.sampled_from(METHODS),
    power=st.sampled_from([-30, 0, 30]),
)
def test_no_cluster_is_empty_and_magnitude_does_not_count(points, k, method, power):
    x = torch.tensor(points, dtype=torch.float32)
    k = "auto" if method == "hdbscan" else k
    found = cluster(x, k=k, method=method)
    _check_no_cluster_is_empty(found)
    assert len(found.centers) == found.labels.max() + 1
    scaled = cluster(x * 10.0**power, k=k, method=method)
    _check_no_cluster_is_empty(scaled)


def test_opposite_ends_of_float32():
    x, _ = _blobs()
    for factor, method in product((2.0**120, 2.0**-110), METHODS):
        found, usual = cluster(x * factor, method=method), cluster(x, method=method)
        assert torch.equal(found.labels, usual.labels)
        centers = usual.centers * (1 if method == "spherical" else factor)
        torch.testing.assert_close(found.centers, centers, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_news_topics_come_out(minilm_path, text_data):
    """Five BBC desks: k-means on MiniLM reached V 0.75 here; a broken encoder stays under 0.3."""
    from torsh_text import Encoder, topic_terms

    lines = (text_data / "bbc_news" / "corpus.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines[:: len(lines) // 500]]
    encoder = Encoder.from_pretrained(minilm_path, device="cpu", max_length=64)
    with pytest.warns(UserWarning, match="were cut"):
        x = encoder.encode([row[0] for row in rows])
    gold = [row[2] for row in rows]
    for method in ("kmeans", "spherical"):
        found = cluster(x, k=5, method=method)
        assert v_measure_score(gold, found.labels.tolist()) >= 0.65
    words = {w for t in topic_terms([r[0] for r in rows], found.labels) for w in t.words}
    assert len(words & {"film", "game", "government", "company", "election", "market"}) >= 3
