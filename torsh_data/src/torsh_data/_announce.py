"""Telling the remote parts of a data set what will be read."""

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import numpy as np
from torch.utils.data import ConcatDataset, Dataset, Subset

from torsh_data._dataset import ShardedDataset
from torsh_data._mixture import Mixture
from torsh_data._order import Ids

Announce: TypeAlias = Callable[[Ids], None]


def announcer(dataset: Dataset[Any]) -> Announce | None:
    """What takes ids in the order in which they will be read; None if nothing is far away."""
    if isinstance(dataset, ShardedDataset):
        return dataset.will_read if dataset.is_remote else None
    if isinstance(dataset, Subset):
        inner = announcer(dataset.dataset)
        indices = np.asarray(dataset.indices, np.int64)
        return None if inner is None else lambda ids: inner(indices[ids])
    if isinstance(dataset, Mixture):
        inners = [announcer(part) for part in dataset.datasets]
        return _to_parts(inners, lambda ids: dataset._places(ids)[:2])
    if isinstance(dataset, ConcatDataset):
        ends = np.asarray(dataset.cumulative_sizes, np.int64)
        starts = np.concatenate([[0], ends[:-1]])

        def places(ids: Ids) -> tuple[Ids, Ids]:
            part = np.searchsorted(ends, ids, side="right")
            return part, ids - starts[part]

        inners = [announcer(cast("Dataset[Any]", part)) for part in dataset.datasets]
        return _to_parts(inners, places)
    return None


def _to_parts(
    parts: list[Announce | None], places: Callable[[Ids], tuple[Ids, Ids]]
) -> Announce | None:
    if not any(parts):
        return None

    def announce(ids: Ids) -> None:
        which, rows = places(ids)
        for number, part in enumerate(parts):
            if part is not None and len(mine := rows[which == number]):
                part(mine)

    return announce
