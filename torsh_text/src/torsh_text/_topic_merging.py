"""Which topics to merge."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._topic import TopicMerge


def merge_topics(
    groups: Sequence[tuple[int, ...]], totals: Tensor, sizes: Sequence[int], k: int
) -> tuple[list[tuple[int, ...]], list[TopicMerge]]:
    """Merge two topics at a time until ``k`` are left (Ward's criterion).

    The two whose merger adds least to the squared distances of documents from their centers:
    small topics are taken up first, and no topic swallows the others, as by plain cosines.

    Args:
        groups: Parts of each topic.
        totals: Sum of the vectors of each part, float64 ``(parts, dim)``.
        sizes: Documents of each part.
        k: Topics that shall be left.

    Returns:
        Parts of each topic, the largest first, and what was merged, in order.

    Example:
        >>> totals = torch.tensor([[4.0, 0.0], [0.0, 2.0], [0.3, 0.9]], dtype=torch.float64)
        >>> merge_topics([(0,), (1,), (2,)], totals, [4, 2, 1], 2)[0]
        [(0,), (1, 2)]
    """
    sums = torch.stack([totals[list(group)].sum(0) for group in groups])
    counts = torch.tensor([sum(sizes[part] for part in group) for group in groups]).double()
    alive = dict(enumerate(groups))
    merges: list[TopicMerge] = []

    def costs(a: int) -> Tensor:
        """What merging topic ``a`` with each other one adds."""
        means = sums / counts.clamp_min(1).unsqueeze(1)
        added = (means - means[a]).square().sum(1) * counts * counts[a]
        added = added / (counts + counts[a]).clamp_min(1)
        added[[i for i in range(len(sums)) if i == a or i not in alive]] = math.inf
        return added

    table = torch.stack([costs(a) for a in range(len(groups))])
    while len(alive) > k:
        a, b = divmod(int(table.argmin()), len(groups))
        if counts[b] > counts[a]:
            a, b = b, a
        similarity = float(F.cosine_similarity(sums[a], sums[b], dim=0))
        merges.append(TopicMerge(alive[a], alive[b], similarity))
        alive[a] = tuple(sorted(alive[a] + alive.pop(b)))
        sums[a] += sums[b]
        counts[a] += counts[b]
        fresh = costs(a)
        table[a], table[:, a] = fresh, fresh
        table[b], table[:, b] = math.inf, math.inf

    def size(group: tuple[int, ...]) -> int:
        return sum(sizes[part] for part in group)

    return sorted(alive.values(), key=lambda group: (-size(group), group)), merges
