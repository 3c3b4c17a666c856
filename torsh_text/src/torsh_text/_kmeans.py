"""k-means in torch: seeded, repeatable, on any device, in bounded memory."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_ENTRIES = 2**24
_STARTS = 4
_ROUNDS = 300


def nearest(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest center of each row, the first among equals.

    Args:
        x: ``(rows, dim)``.
        centers: ``(k, dim)``.

    Returns:
        Squared distances ``(rows,)`` and centers ``(rows,)``.

    Example:
        >>> nearest(torch.tensor([[0.0], [3.0]]), torch.tensor([[1.0], [1.0], [5.0]]))[1].tolist()
        [0, 0]
    """
    half_norms = centers.square().sum(1) / 2
    distances: list[Tensor] = []
    labels: list[Tensor] = []
    for part in x.split(max(1, _BLOCK_ENTRIES // len(centers))):
        # |x|^2 is the same for every center: leaving it out keeps the digits that decide
        gap, label = (half_norms - part @ centers.T).min(1)
        labels.append(label)
        distances.append((2 * gap + part.square().sum(1)).clamp_min(0))
    return torch.cat(distances), torch.cat(labels)


def seed_centers(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Choose k rows far apart by greedy k-means++; equal rows are never chosen twice.

    Args:
        x: ``(rows, dim)`` with at least ``k`` different rows.
        k: How many.
        generator: Source of randomness on the CPU.
    """
    tries = 2 + int(math.log(k))
    first = int(torch.randint(len(x), (1,), generator=generator))
    chosen = [first]
    closest = (x - x[first]).square().sum(1)
    while len(chosen) < k:
        weights = closest.double().cpu()
        if float(weights.sum()) <= 0:  # rows that differ by less than float32 squares show
            left = torch.ones(len(x), dtype=torch.float64)
            left[chosen] = 0
            weights = left
        picks = torch.multinomial(weights, tries, replacement=True, generator=generator)
        picks = picks.to(x.device)
        distances = torch.stack([(x - x[pick]).square().sum(1) for pick in picks])
        candidates = torch.minimum(closest, distances)
        best = int(candidates.sum(1).argmin())
        chosen.append(int(picks[best]))
        closest = candidates[best]
    return x[torch.tensor(chosen, device=x.device)]


def group_sums(x: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sums and sizes of clusters by matrix products: no atomic additions, so repeatable."""
    sums = x.new_zeros(k, x.shape[1])
    sizes = x.new_zeros(k)
    step = max(1, _BLOCK_ENTRIES // k)
    for part, label in zip(x.split(step), labels.split(step), strict=True):
        members = F.one_hot(label, k).to(x.dtype)
        sums += members.T @ part
        sizes += members.sum(0)
    return sums, sizes


def lloyd(x: Tensor, centers: Tensor, *, spherical: bool = False) -> tuple[Tensor, Tensor, float]:
    """Move centers to their rows' means until no row changes its center.

    A center that loses all rows takes the row farthest from its own center; it may end without
    rows where rows differ by less than float32 distances show.

    Args:
        x: ``(rows, dim)``; of length one if spherical.
        centers: First centers ``(k, dim)``.
        spherical: Keep centers at length one.

    Returns:
        Labels ``(rows,)``, centers ``(k, dim)`` and the sum of squared distances.
    """
    k = len(centers)
    distances, labels = nearest(x, centers)
    for _ in range(_ROUNDS):
        sums, sizes = group_sums(x, labels, k)
        empty = (sizes == 0).nonzero().flatten()
        before = filled = labels
        if len(empty):
            far = distances.topk(min(len(empty), len(x))).indices
            filled = labels.index_copy(0, far, empty[: len(far)])
            sums, sizes = group_sums(x, filled, k)
        centers = sums / sizes.clamp_min(1).unsqueeze(1)
        if spherical:
            centers = F.normalize(centers, dim=1)
        distances, labels = nearest(x, centers)
        # rows too close for float32 fall back to one center as soon as they are parted
        if torch.equal(labels, filled) or torch.equal(labels, before):
            break
    return labels, centers, float(distances.double().sum())


def k_means(x: Tensor, k: int, *, spherical: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the best of four seeded runs: labels ``(rows,)`` and centers ``(found, dim)``.

    Every center has rows; ``found`` is below ``k`` where rows are too close to be told apart.

    Args:
        x: ``(rows, dim)`` with at least ``k`` different rows.
        k: Number of clusters.
        spherical: Whether only directions count; ``x`` then has rows of length one.
        seed: Seed of the four starts.
    """
    generator = torch.Generator().manual_seed(seed)
    shift = torch.zeros_like(x[0]) if spherical else x.mean(0)
    x = x - shift  # distances keep more digits near zero
    runs = [lloyd(x, seed_centers(x, k, generator), spherical=spherical) for _ in range(_STARTS)]
    labels, centers, _ = min(runs, key=lambda run: run[2])
    used, labels = labels.unique(return_inverse=True)
    return labels, centers[used] + shift
