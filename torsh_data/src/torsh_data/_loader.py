"""Batches from a map-style data set, in an order that can be left and taken up again anywhere."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
import xxhash
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    Sampler,
    Subset,
    default_collate,
    get_worker_info,
)

from torsh_data._dataset import ShardedDataset
from torsh_data._order import CHUNK, Ids, Order
from torsh_data._parcel import Parcel, pack, unpack
from torsh_data._rng import fold, sample_keys, stream
from torsh_data._sizes import parse_bytes

Batch: TypeAlias = Any  # what collate_fn returns
Collate: TypeAlias = Callable[[list[Any]], Batch]
State: TypeAlias = dict[str, int | str]
DropLast: TypeAlias = bool | Literal["pad"]

_VERSION = 1
_WINDOW = "2GB"
_OURS = ("key", "index", "valid")


class StreamLoader:
    """Batches in random order, whose place in the stream is a few numbers.

    The order of samples is a pure function of (seed, epoch, position), so nothing has to be
    replayed or rounded: a loader that loads the state of another goes on with the next sample, with
    any other number of workers, ranks or samples in a batch. Step after step, rank `r` of `w` takes
    the positions from `position + r * batch_size` on, then the position moves by `w * batch_size`.
    The state counts the batches that the loop has received, not those that workers have prepared,
    and it is the same on all ranks, so rank 0 alone can save it.

    Batches of mappings get two more entries: `index`, the sample ids, and `key`, a hash of (seed,
    epoch, sample id) that drives augmentation (`vision.RandAugment()(images, keys=batch["key"])`),
    both LongTensors `(batch,)`. Other batches are passed on as they are.

    Iterating goes on from where the loader stands, which after construction, `load_state_dict`,
    `set_epoch` or `skip` is where these put it. Leaving a loop early ends that epoch: the next loop
    starts the next one, as with a `DataLoader`; to go on instead, load the state that was saved.

    Args:
        dataset: Any data set with `__len__` and `__getitem__`; `__getitems__` is used if there.
        batch_size: Samples in one rank's batch, at least 1.
        shuffle: False takes the samples in storage order.
        seed: Any integer; selects the order, the keys and the generators of transforms.
        window: How much of the data set is mixed at a time, as bytes (`"2GB"`) or a number of rows.
            Up to two windows are in use at once, so half the memory that the page cache may take is
            a good size, and what fits in whole is shuffled uniformly. Data sets other than
            `ShardedDataset` have no blocks to respect and are always shuffled uniformly.
        epoch: The first epoch.
        num_workers: Worker processes; 0 reads in this process.
        collate_fn: Makes a batch of a list of samples; torch's `default_collate` by default.
        drop_last: What to do with the samples that do not fill the last global batch. True leaves
            them out; False deals them out to the ranks in equal parts, so that a rank may get
            a smaller batch or none; `"pad"` fills up with the first samples of the epoch, with
            a BoolTensor `valid` `(batch,)` in all batches that tells them apart.
        rank: This process's number; by default that of `torch.distributed`, else RANK, else 0.
        world_size: Number of processes; by default as `rank`, from WORLD_SIZE.
        prefetch_factor: Batches that each worker prepares ahead.

    Raises:
        ValueError: If an argument is out of range, or there is not one whole global batch.

    Example:
        >>> squares = [{"x": n * n} for n in range(10)]
        >>> loader = StreamLoader(squares, batch_size=4, seed=1)
        >>> first = next(iter(loader))
        >>> loader.state_dict()["position"]
        4
        >>> resumed = StreamLoader(squares, batch_size=2, seed=1)
        >>> resumed.load_state_dict(loader.state_dict())
        >>> rest = [n for batch in resumed for n in batch["index"].tolist()]
        >>> sorted(rest + first["index"].tolist())
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        window: str | int = _WINDOW,
        epoch: int = 0,
        num_workers: int = 0,
        collate_fn: Collate | None = None,
        drop_last: DropLast = True,
        rank: int | None = None,
        world_size: int | None = None,
        prefetch_factor: int = 2,
    ) -> None:
        if isinstance(dataset, str | Path):
            raise TypeError(
                f"dataset={str(dataset)!r} is a path; use StreamLoader(ShardedDataset(path), ...)"
            )
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"dataset is a {type(dataset).__name__} without a length and an index; "
                "StreamLoader needs a map-style data set, write a stream to shards first "
                "(write_shards)"
            )
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("epoch", epoch, 0),
            ("num_workers", num_workers, 0),
            ("prefetch_factor", prefetch_factor, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number, at least {least}")
        if drop_last not in (True, False, "pad"):
            raise ValueError(f"drop_last={drop_last!r}; use True, False or 'pad'")
        if (rank is None) != (world_size is None):
            raise ValueError(f"rank={rank} and world_size={world_size} must be given together")
        if rank is not None and not 0 <= rank < cast("int", world_size):
            raise ValueError(f"rank={rank} must be in [0, world_size={world_size})")
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.collate_fn = collate_fn
        self.drop_last: DropLast = drop_last
        self.prefetch_factor = prefetch_factor
        self._topology = None if rank is None else (rank, cast("int", world_size))
        self._rows = len(cast("Any", dataset))
        if self._rows < 1:
            raise ValueError("dataset is empty")
        self._order = _plan(dataset, self._rows, batch_size, seed, window if shuffle else 0)
        self._fingerprint: str | None = None
        self._epoch, self._position = epoch, 0
        self._running: object | None = None  # the newest iterator, while it may move the state
        self._left_midway = False
        self._steps()

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to."""
        return self._epoch

    @property
    def seed(self) -> int:
        """The seed of the order, the keys and the transforms' generators."""
        return self._order.seed

    @property
    def rank(self) -> int:
        """This process's number among those that share the stream."""
        return self._find_topology()[0]

    @property
    def world_size(self) -> int:
        """How many processes share the stream."""
        return self._find_topology()[1]

    def _find_topology(self) -> tuple[int, int]:
        # asked for at each use: a Trainer makes the process group after the loader
        if self._topology is not None:
            return self._topology
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    def _steps(self) -> tuple[int, int]:
        """Samples that one global step takes, and whole steps in an epoch."""
        _, world = self._find_topology()
        step = world * self.batch_size
        if self.drop_last is True and step > self._rows:
            raise ValueError(
                f"batch_size={self.batch_size} on {world} rank(s) takes {step} samples a step, the "
                f"data set has {self._rows}; use smaller batches, drop_last=False or 'pad'"
            )
        return step, self._rows // step

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank, wherever the loader stands."""
        rank, world = self._find_topology()
        step, whole = self._steps()
        rest = self._rows - whole * step
        if self.drop_last is True or rest == 0:
            return whole
        return whole + (self.drop_last == "pad" or _share(rest, rank, world)[1] > 0)

    def state_dict(self) -> State:
        """The place in the stream: JSON-able, below 500 bytes, the same on all ranks."""
        if self._fingerprint is None:
            self._fingerprint = _fingerprint(self.dataset, self._rows)
        return {
            "version": _VERSION,
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._order.seed,
            "window": self._order.window,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state_dict: Mapping[str, int | str]) -> None:
        """Go on from a saved place at the next iteration.

        Args:
            state_dict: From `state_dict` of a loader on the same data with the same order; workers,
                ranks and batch size may differ.

        Raises:
            ValueError: If the state is of another data set, seed, window or version. A data set is
                known by its `fingerprint` (`ShardedDataset`, `datasets.Dataset`), a `Subset` by its
                indices too and a `ConcatDataset` by its parts; any other only by its class and
                length, so other contents of the same length pass unless it has an attribute
                `fingerprint`, a str that changes with them.
        """
        own = self.state_dict()
        missing = [name for name in own if name not in state_dict]
        if missing:
            raise ValueError(f"state_dict has no {missing[0]!r}; it is not of a StreamLoader")
        for name, remedy in (
            ("version", "save it with a torsh-data of this version"),
            ("fingerprint", "open the data set that it was saved with"),
            ("seed", "make the loader with that seed"),
            ("window", "make the loader with window= that many rows (0 is shuffle=False)"),
        ):
            if state_dict[name] != own[name]:
                raise ValueError(
                    f"state_dict has {name}={state_dict[name]!r}, this loader has {own[name]!r}; "
                    f"{remedy}, or start anew"
                )
        epoch, position = state_dict["epoch"], state_dict["position"]
        for name, value in (("epoch", epoch), ("position", position)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"state_dict has {name}={value!r}, not a place in a stream")
        if int(position) > self._rows:
            raise ValueError(f"state_dict has position={position}, beyond {self._rows} samples")
        self._move(int(epoch), int(position))

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; the place in the current one is kept.

        Args:
            epoch: At least 0.
        """
        if epoch < 0:
            raise ValueError(f"epoch={epoch} must be at least 0")
        if epoch != self._epoch:
            self._move(epoch, 0)

    def skip(self, n_batches: int) -> None:
        """Move on without reading, across epochs, for instance past a spike of the loss.

        Args:
            n_batches: Batches to leave out on each rank, from the one that would come next.
        """
        if n_batches < 0:
            raise ValueError(f"n_batches={n_batches} must be at least 0")
        epoch, position = self._epoch, self._position
        step, _ = self._steps()
        while n_batches:
            left = self._batches_left(position)
            taken = min(n_batches, left)
            position += taken * step
            n_batches -= taken
            if taken == left:
                epoch, position = epoch + 1, 0
        self._move(epoch, position)

    def _move(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        self._running, self._left_midway = None, False

    def _batches_left(self, position: int) -> int:
        """Global batches from a position to the end of the epoch."""
        step, _ = self._steps()
        left = self._rows - position
        return max(0, left // step if self.drop_last is True else -(-left // step))

    def __iter__(self) -> Iterator[Batch]:
        if self._left_midway:
            self._move(self._epoch + 1, 0)
        if self._batches_left(self._position) == 0:  # after a resume with larger batches
            self._move(self._epoch + 1, 0)
        me = self._running = object()
        return self._deliver(me, self._epoch, self._position)

    def _deliver(self, me: object, epoch: int, position: int) -> Iterator[Batch]:
        rank, world = self._find_topology()
        step, _ = self._steps()
        requests = _Requests(
            self._order, epoch, position, self.batch_size, rank, world, self.drop_last
        )
        source = _Reader(self.dataset, self.collate_fn, self._order.seed, self.drop_last == "pad")
        batches: DataLoader[Batch] = DataLoader(
            source,
            batch_size=None,
            sampler=requests,
            num_workers=self.num_workers,
            collate_fn=_as_is,
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            generator=torch.Generator().manual_seed(fold(self._order.seed, epoch) >> 1),
        )
        last = len(requests)
        if not last and self._running is me:  # the other ranks share the few samples that are left
            self._move(epoch + 1, 0)
        for number, received in enumerate(batches, 1):
            batch = unpack(received) if isinstance(received, Parcel) else received
            if self._running is me:
                # Before the yield: whoever stops asking after len(self) batches, as Trainers do,
                # never runs what comes after the last one.
                if number == last:
                    self._move(epoch + 1, 0)
                else:
                    self._position = position + number * step
                    self._left_midway = True
            yield batch


def _share(rest: int, rank: int, world: int) -> tuple[int, int]:
    """Offset and size of a rank's part of an incomplete global batch."""
    start = rest * rank // world
    return start, rest * (rank + 1) // world - start


def _plan(dataset: Dataset[Any], rows: int, batch_size: int, seed: int, window: str | int) -> Order:
    if window == 0 and not isinstance(window, bool):
        return Order(rows, seed)
    block_rows = dataset.block_rows if isinstance(dataset, ShardedDataset) else 1
    if not isinstance(dataset, ShardedDataset):
        if window != _WINDOW:
            warnings.warn(
                f"window={window!r} has no effect: a {type(dataset).__name__} has no blocks and is "
                "shuffled uniformly",
                stacklevel=3,
            )
        return Order(rows, seed, rows)
    if isinstance(window, int):
        wanted = window
    else:
        wanted = int(parse_bytes(window, "window") / dataset.nbytes * rows)
    if wanted < min(batch_size, rows):
        raise ValueError(
            f"window={window!r} holds {wanted} rows, less than one batch of {batch_size}; use a "
            "larger window"
        )
    return Order(rows, seed, min(wanted, rows), block_rows)


def _fingerprint(dataset: Dataset[Any], rows: int) -> str:
    for name in ("fingerprint", "_fingerprint"):  # ours, and that of datasets.Dataset
        known = getattr(dataset, name, None)
        if isinstance(known, str):
            return known
    digest = xxhash.xxh3_128(f"{type(dataset).__name__}:{rows}".encode())
    if isinstance(dataset, Subset):
        indices = np.asarray(dataset.indices)
        plain = indices.astype(np.int64).tobytes() if indices.dtype.kind in "iu" else None
        digest.update(repr(list(dataset.indices)).encode() if plain is None else plain)
        digest.update(_fingerprint(dataset.dataset, len(cast("Any", dataset.dataset))).encode())
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            digest.update(_fingerprint(part, len(cast("Any", part))).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Request:
    """One batch to read."""

    epoch: int
    ids: Ids
    valid: int


class _Requests(Sampler[_Request]):
    """One rank's batches from a position to the end of the epoch."""

    def __init__(
        self,
        order: Order,
        epoch: int,
        position: int,
        batch_size: int,
        rank: int,
        world: int,
        drop_last: DropLast,
    ) -> None:
        self.order, self.epoch, self.position = order, epoch, position
        self.batch_size, self.rank, self.world, self.drop_last = batch_size, rank, world, drop_last
        self.step = batch_size * world
        self.whole, self.rest = divmod(order.rows - position, self.step)

    def _tail(self) -> tuple[Ids, int] | None:
        """Positions of the incomplete last batch, and how many of them are not padding."""
        if self.drop_last is True or self.rest == 0:
            return None
        begin = self.order.rows - self.rest
        if self.drop_last == "pad":
            positions = begin + np.arange(self.batch_size) + self.rank * self.batch_size
            valid = int(np.clip(self.order.rows - positions[0], 0, self.batch_size))
            return positions % self.order.rows, valid
        start, size = _share(self.rest, self.rank, self.world)
        return (begin + start + np.arange(size), size) if size else None

    def __len__(self) -> int:
        return self.whole + (self._tail() is not None)

    def __iter__(self) -> Iterator[_Request]:
        size = self.batch_size
        together = max(1, CHUNK // size)
        mine = self.position + self.rank * size + np.arange(size)
        for first in range(0, self.whole, together):
            steps = np.arange(first, min(first + together, self.whole)) * self.step
            ids = self.order(self.epoch, (steps[:, None] + mine).reshape(-1))
            for batch in ids.reshape(-1, size):
                yield _Request(self.epoch, batch, size)
        tail = self._tail()
        if tail is not None:
            yield _Request(self.epoch, self.order(self.epoch, tail[0]), tail[1])


class _Reader(Dataset[Batch]):
    """Reads one batch for each request, here or in a worker."""

    def __init__(
        self, dataset: Dataset[Any], collate: Collate | None, seed: int, pad: bool
    ) -> None:
        self.dataset, self.collate, self.seed, self.pad = dataset, collate, seed, pad

    def __getitem__(self, index: _Request) -> Batch:
        request = index
        token = stream.set((self.seed, request.epoch))
        try:
            batch = self._read(request.ids)
        finally:
            stream.reset(token)
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
        return batch if get_worker_info() is None else pack(batch)

    def _read(self, ids: Ids) -> Batch:
        dataset = cast("Any", self.dataset)
        is_plain = isinstance(dataset, ShardedDataset) and dataset.transform is None
        if is_plain and self.collate is None:
            return dataset.read_batch(ids)
        if hasattr(dataset, "__getitems__"):
            samples = dataset.__getitems__(ids.tolist())
        else:
            samples = [dataset[i] for i in ids.tolist()]
        return (self.collate or default_collate)(samples)


def _as_is(batch: Batch) -> Batch:
    return batch
