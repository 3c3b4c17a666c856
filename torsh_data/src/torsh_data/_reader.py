"""Reading one batch, here or in a worker."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeAlias, cast

import torch
from torch.utils.data import Dataset, default_collate, get_worker_info

from torsh_data._dataset import ShardedDataset
from torsh_data._order import Ids
from torsh_data._parcel import Parcel, pack, unpack
from torsh_data._replaced import Reports, sharded_in
from torsh_data._requests import Request
from torsh_data._rng import sample_keys, stream

Batch: TypeAlias = Any  # what collate_fn returns
Collate: TypeAlias = Callable[[list[Any]], Batch]

_OURS = ("key", "index", "valid")


@dataclass(frozen=True)
class Delivery:
    """A batch, packed if it comes from another process, and what making it took.

    Attributes:
        content: The batch or its `Parcel`.
        samples: Samples in it.
        read_s: Seconds of reading and transforming.
        collate_s: Seconds of putting samples together.
        errors: Samples that a worker process replaced for the first time, and why, for each data
            set of `sharded_in`; empty if there are none.
    """

    content: Batch | Parcel
    samples: int
    read_s: float
    collate_s: float
    errors: Sequence[Mapping[int, str]]

    def batch(self) -> Batch:
        """The batch as the loop gets it."""
        return unpack(self.content) if isinstance(self.content, Parcel) else self.content


class Reader(Dataset[Delivery]):
    """Reads one batch for each request, here or in a worker."""

    def __init__(
        self, dataset: Dataset[Any], collate: Collate | None, seed: int, pad: bool
    ) -> None:
        self.dataset, self.collate, self.seed, self.pad = dataset, collate, seed, pad
        self._reports = Reports(sharded_in(dataset))

    def __getitem__(self, index: Request) -> Delivery:
        request = index
        token = stream.set((self.seed, request.epoch))
        begun = perf_counter()
        try:
            samples = self._read(request.ids)
        finally:
            stream.reset(token)
        read = perf_counter()
        batch = self._mark(self._collated(samples), request)
        content = pack(batch) if get_worker_info() and isinstance(batch, dict) else batch
        errors = self._reports.take() if get_worker_info() else []
        return Delivery(content, len(request.ids), read - begun, perf_counter() - read, errors)

    def _mark(self, batch: Batch, request: Request) -> Batch:
        """Add what a loader adds to batches of mappings."""
        if not isinstance(batch, dict):
            if self.pad:
                raise TypeError(
                    f"drop_last='pad' marks the padding in the batch, which is a "
                    f"{type(batch).__name__}; let samples be mappings or use drop_last=False"
                )
            return batch
        taken = [name for name in _OURS[: 2 + self.pad] if name in batch]
        if taken:
            raise ValueError(
                f"samples have a column {taken[0]!r}, which StreamLoader adds to its batches; "
                "rename it, or leave it out with columns="
            )
        batch["key"] = torch.from_numpy(sample_keys(self.seed, request.epoch, request.ids))
        batch["index"] = torch.from_numpy(request.ids.copy())
        if self.pad:
            batch["valid"] = torch.arange(len(request.ids)) < request.valid
        return batch

    def _read(self, ids: Ids) -> list[Any] | dict[str, Any]:
        """The samples, or all of them column by column where nothing is to be done to each."""
        dataset = cast("Any", self.dataset)
        is_plain = isinstance(dataset, ShardedDataset) and dataset.transform is None
        if is_plain and self.collate is None:
            return dataset.read_batch(ids)
        if hasattr(dataset, "__getitems__"):
            return dataset.__getitems__(ids.tolist())
        return [dataset[i] for i in ids.tolist()]

    def _collated(self, samples: list[Any] | dict[str, Any]) -> Batch:
        return samples if isinstance(samples, dict) else (self.collate or default_collate)(samples)
