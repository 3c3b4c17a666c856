"""Groups of similar vectors."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ._arrays import as_tensor
from ._kmeans import k_means

Method = Literal["kmeans", "spherical", "agglomerative", "hdbscan"]
_METHODS = ("kmeans", "spherical", "agglomerative", "hdbscan")
_CANDIDATES = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64)
_SAMPLE = 2048


@dataclass(frozen=True)
class Clusters:
    """Which vectors belong together.

    Attributes:
        labels: Cluster of each vector, int64 ``(rows,)``; 0 is the largest cluster, -1 is noise.
        centers: Mean of each cluster ``(clusters, dim)``, of length one for ``"spherical"``.
        scores: How typical each vector is: cosine to its center, 0 for noise; ``(rows,)``.
    """

    labels: Tensor
    centers: Tensor
    scores: Tensor


def finite_rows(x: Tensor | np.ndarray, name: str) -> Tensor:
    """Return vectors in float32, refusing all but finite rows ``(rows, dim)``."""
    x = as_tensor(x, name)
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected (rows, dim)")
    x = x.float()
    finite = x.isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(f"{name}[{int((~finite).nonzero()[0])}] is not finite in float32")
    return x


def _silhouette(x: Tensor, labels: Tensor, k: int) -> float:
    """Mean silhouette (Rousseeuw, 1987); rows alone in their cluster count 0."""
    members = F.one_hot(labels, k).to(x.dtype)
    sizes = members.sum(0)
    totals = torch.cdist(x, x) @ members
    own = labels.unsqueeze(1)
    own_size = sizes[labels]
    inner = totals.gather(1, own).squeeze(1) / (own_size - 1).clamp_min(1)
    others = (totals / sizes).scatter(1, own, torch.inf).amin(1)
    score = (others - inner) / torch.maximum(others, inner).clamp_min(1e-12)
    return score.where(own_size > 1, torch.zeros_like(score)).mean().item()


def _choose_k(x: Tensor, *, spherical: bool, seed: int) -> int:
    """Return the k-means cluster count with the best mean silhouette on a sample of the rows."""
    generator = torch.Generator().manual_seed(seed)
    sample = x
    if len(x) > _SAMPLE:
        rows = torch.randperm(len(x), generator=generator)[:_SAMPLE].sort().values
        sample = x[rows.to(x.device)]
    best, best_score = 1, 0.0
    distinct = len(torch.unique(sample, dim=0))
    for k in _CANDIDATES:
        if k >= distinct:
            break
        labels, centers = k_means(sample, k, spherical=spherical, seed=seed)
        if len(centers) < 2:
            break
        score = _silhouette(sample, labels, len(centers))
        if score > best_score:
            best, best_score = k, score
    return best


def _sklearn_labels(x: Tensor, k: int | None, method: str) -> Tensor:
    try:
        from sklearn import cluster as sk
    except ImportError:
        raise ImportError(
            f"method={method!r} needs scikit-learn: pip install 'torsh-text[topics]'"
        ) from None
    rows: Any = x.cpu().numpy()
    if method == "hdbscan":
        hdbscan: Any = getattr(sk, "HDBSCAN")  # noqa: B009  (the type stubs have none)
        labels = hdbscan(min_cluster_size=min(5, len(rows)), copy=True).fit_predict(rows)
    else:
        labels = sk.AgglomerativeClustering(n_clusters=k, linkage="ward").fit_predict(rows)
    return torch.from_numpy(labels.astype(np.int64)).to(x.device)


def _by_size(labels: Tensor, k: int) -> Tensor:
    """Renumber clusters: the largest is 0, among equals the one seen first; -1 stays."""
    counts = torch.bincount(labels[labels >= 0], minlength=k)
    first = torch.full((k,), len(labels), device=labels.device)
    rows = torch.arange(len(labels), device=labels.device)
    kept = labels >= 0
    first = first.scatter_reduce(0, labels[kept], rows[kept], "amin")
    order = sorted(range(k), key=lambda c: (-int(counts[c]), int(first[c])))
    rank = torch.empty(k + 1, dtype=torch.int64, device=labels.device)
    rank[torch.tensor(order, dtype=torch.int64, device=labels.device)] = torch.arange(
        k, device=labels.device
    )
    rank[k] = -1
    return rank[labels]  # -1 reads the last entry


@torch.no_grad()
def cluster(
    x: Tensor | np.ndarray,
    *,
    k: int | Literal["auto"] = "auto",
    method: Method = "kmeans",
    seed: int = 0,
) -> Clusters:
    """Group vectors; the same input and seed give the same clusters on the same machine.

    ``k="auto"`` takes, among 2 to 64, the number of k-means clusters with the highest mean
    silhouette on at most 2,048 rows chosen by the seed; one cluster if none is above 0. Equal
    rows always share a cluster, and no cluster is empty: there are fewer than asked, with no
    warning beyond ``centers``' size, where fewer rows differ by what float32 distances show.
    HDBSCAN finds its own number.

    Args:
        x: Vectors ``(rows, dim)``, a tensor or a numpy array, finite in float32, of any
            magnitude.
        k: Number of clusters, or ``"auto"``.
        method: ``"kmeans"`` (best of four k-means++ starts), ``"spherical"`` (the same by
            direction), ``"agglomerative"`` (Ward's, quadratic memory) or ``"hdbscan"`` (by
            density, with noise; at least 5 rows a cluster).
        seed: Seed of the starts and of the sample.

    Raises:
        TypeError: If ``x`` is no tensor or array of numbers, or ``k`` neither an integer nor
            ``"auto"``.
        ValueError: If ``k`` or ``method`` does not fit, or a value is not finite.
        ImportError: If scikit-learn is missing for the last two methods.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [5.0, 5.0], [0.1, 1.0], [0.0, 0.9]])
        >>> cluster(x, k=2).labels.tolist()
        [0, 1, 0, 0]

    Reference:
        Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", 2007; Dhillon
        and Modha, "Concept Decompositions for Large Sparse Text Data Using Clustering", 2001.
    """
    if method not in _METHODS:
        raise ValueError(f"method={method!r} is none of {', '.join(map(repr, _METHODS))}")
    if k != "auto" and (not isinstance(k, int) or isinstance(k, bool)):
        raise TypeError(f"k={k!r} is of type {type(k).__name__}; expected an integer or 'auto'")
    if k != "auto" and (method == "hdbscan" or k < 1):
        valid = "'auto' with method='hdbscan'" if method == "hdbscan" else "'auto' or at least 1"
        raise ValueError(f"k={k}; it has to be {valid}")
    x = finite_rows(x, "x")
    if len(x) == 0:
        empty = torch.empty(0, dtype=torch.int64, device=x.device)
        return Clusters(empty, x[:0], x.new_empty(0))
    spherical = method == "spherical"
    # a power of two changes no digit and keeps squares of huge and tiny values in range
    largest = x.abs().amax(1, keepdim=True) if spherical else x.abs().amax()
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    rows = x / scale
    if spherical:
        rows = F.normalize(rows, dim=1)
    if method == "hdbscan":
        single = len(x) < 2
        labels = (
            torch.full((len(x),), -1, device=x.device)
            if single
            else _sklearn_labels(rows, None, method)
        )
    else:
        distinct = len(torch.unique(rows, dim=0))
        number = _choose_k(rows, spherical=spherical, seed=seed) if k == "auto" else k
        number = min(number, distinct)
        if number == 1:
            labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        elif method == "agglomerative":
            labels = _sklearn_labels(rows, number, method)
        else:
            labels, _ = k_means(rows, number, spherical=spherical, seed=seed)
    count = int(labels.max()) + 1
    labels = _by_size(labels, count)
    kept = labels >= 0
    centers = x[:0]
    if count:
        members = F.one_hot(labels[kept], count).to(x.dtype)
        centers = members.T @ rows[kept] / members.sum(0).unsqueeze(1)
    if spherical:
        centers = F.normalize(centers, dim=1)
    scores = torch.zeros(len(x), device=x.device)
    scores[kept] = F.cosine_similarity(rows[kept], centers[labels[kept]])
    return Clusters(labels, centers if spherical else centers * scale, scores)
