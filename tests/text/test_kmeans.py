import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, make_blobs

from torsh_text._kmeans import k_means, lloyd, nearest, seed_centers


@pytest.mark.parametrize("data", ["blobs", "digits"])
def test_lloyd_reaches_sklearns_inertia_from_the_same_start(data):
    if data == "blobs":
        points, _ = make_blobs(400, n_features=6, centers=7, cluster_std=2.5, random_state=3)
    else:
        points = load_digits().data
    x = torch.from_numpy(points).float()
    start = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:7]]
    labels, centers, inertia = lloyd(x, start)
    peer = KMeans(7, init=start.numpy(), n_init=1, tol=0, algorithm="lloyd").fit(x.numpy())
    assert inertia == pytest.approx(peer.inertia_, rel=1e-5)  # float32 sums
    assert (torch.from_numpy(peer.labels_).long() != labels).float().mean() <= 0.001
    by_hand = sum(((x[labels == c] - centers[c]).double() ** 2).sum() for c in range(7))
    assert inertia == pytest.approx(float(by_hand), rel=1e-5)


def test_is_as_good_as_sklearn_with_its_own_starts():
    x = torch.from_numpy(load_digits().data).float()
    labels, centers = k_means(x, 10, seed=0)
    inertia = float((x - centers[labels]).square().sum())
    peer = KMeans(10, n_init=4, random_state=0).fit(x.numpy())
    assert inertia <= 1.02 * peer.inertia_


def test_nearest_equals_cdist_in_float64():
    x, centers = torch.randn(300, 9), torch.randn(11, 9)
    distances, labels = nearest(x, centers)
    full = torch.cdist(x.double(), centers.double()).square()
    assert torch.equal(labels, full.argmin(1))
    torch.testing.assert_close(distances.double(), full.amin(1), atol=1e-5, rtol=1e-5)


def test_a_center_without_rows_takes_the_farthest():
    x = torch.tensor([[0.0], [1.0], [10.0], [11.0], [30.0]])
    labels, centers, inertia = lloyd(x, torch.tensor([[0.0], [100.0], [200.0]]))
    assert sorted(centers.flatten().tolist()) == [0.5, 10.5, 30.0]
    assert labels.unique().numel() == 3
    assert inertia == pytest.approx(1.0)


def test_seeds_are_different_rows():
    x = torch.tensor([[0.0], [0.0], [0.0], [0.0], [1.0], [2.0]])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        assert seed_centers(x, 3, generator).flatten().sort().values.tolist() == [0.0, 1.0, 2.0]


def test_repeatable_and_seeded():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(200, 5))).float()
    first, again = k_means(x, 8, seed=5), k_means(x, 8, seed=5)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], k_means(x, 8, seed=6)[0])


@pytest.mark.gpu
def test_a_gpu_gives_the_same_clusters_twice():
    x = torch.randn(5000, 32, device="cuda")
    first, again = k_means(x, 20, seed=1), k_means(x, 20, seed=1)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
