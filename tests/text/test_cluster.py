import pytest
import torch
import torch.nn.functional as F
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
    x[3, 1] = float("nan")
    with pytest.raises(ValueError, match=r"x\[3\] is not finite"):
        cluster(x)


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
