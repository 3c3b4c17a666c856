"""Batches from a map-style data set, in an order that can be left and taken up again anywhere."""

import os
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeAlias, cast

import torch
from torch.utils.data import Dataset

from torsh_data._announce import announcer
from torsh_data._dataset import ShardedDataset
from torsh_data._fingerprint import identify
from torsh_data._mixture import Mixture
from torsh_data._order import Order
from torsh_data._reader import Batch, Collate, Delivery, Reader
from torsh_data._replaced import add_packed, pack_errors, sharded_in
from torsh_data._requests import DropLast, EpochOrder, Requests, share
from torsh_data._rng import fold
from torsh_data._sizes import parse_bytes
from torsh_data._stats import LoaderStats, Stopwatch
from torsh_data._workers import Workers, deliveries

State: TypeAlias = dict[str, int | str]

_VERSION = 1
_WINDOW = "2GB"
END = object()  # drawn instead of a batch where a rank has none while the epoch ends
_FEW_BLOCKS = 16  # in a window


class StreamLoader:
    """Batches in random order, whose place in the stream is a few numbers.

    The order of samples is a pure function of (seed, epoch, position), so nothing has to be
    replayed or rounded: a loader that loads the state of another goes on with the next sample, with
    any other number of workers, ranks or samples in a batch. Step after step, rank `r` of `w` takes
    the positions from `position + r * batch_size` on, then the position moves by `w * batch_size`.
    The state counts the batches that the loop has received, not those that workers have prepared,
    and the place is the same on all ranks, so rank 0 alone can save it.

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
            `ShardedDataset` have no blocks to respect and are always shuffled uniformly. The
            default is less where a process cannot keep two such windows of decoded blocks, as
            those of Parquet files without a `cache_dir`. In a
            `Mixture` each part has a window of this size.
        epoch: The first epoch.
        num_workers: How many workers read ahead; 0 reads in the loop itself, `"auto"` takes three
            seconds to find out (`tune_workers` with its own choice of `workers`).
        workers: `"process"`, or `"thread"` for data sets that release the interpreter's lock while
            they work (`torchvision.io` decoding, most of NumPy and torch): batches are handed over
            without a copy, and memory is shared. The data set must allow several threads, as
            `ShardedDataset` does.
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
        num_workers: int | Literal["auto"] = 0,
        workers: Workers = "process",
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
        if num_workers == "auto":
            from torsh_data._tune import tune_workers

            plan = tune_workers(dataset, batch_size, budget_s=3.0, collate_fn=collate_fn)
            num_workers, workers = plan.num_workers, plan.workers
            prefetch_factor = plan.prefetch_factor
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("epoch", epoch, 0),
            ("num_workers", num_workers, 0),
            ("prefetch_factor", prefetch_factor, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number, at least {least}")
        if workers not in ("process", "thread"):
            raise ValueError(f"workers={workers!r}; use 'process' or 'thread'")
        if drop_last not in (True, False, "pad"):
            raise ValueError(f"drop_last={drop_last!r}; use True, False or 'pad'")
        if (rank is None) != (world_size is None):
            raise ValueError(f"rank={rank} and world_size={world_size} must be given together")
        if rank is not None and not 0 <= rank < cast("int", world_size):
            raise ValueError(f"rank={rank} must be in [0, world_size={world_size})")
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.workers: Workers = workers
        self.collate_fn = collate_fn
        self.drop_last: DropLast = drop_last
        self.prefetch_factor = prefetch_factor
        self._topology = None if rank is None else (rank, cast("int", world_size))
        self._rows = len(cast("Any", dataset))
        if self._rows < 1:
            raise ValueError("dataset is empty")
        self._order = _plan(dataset, batch_size, seed, window if shuffle else 0)
        self._sharded = sharded_in(dataset)
        self._fingerprint: str | None = None
        self._epoch, self._position = epoch, 0
        self._batches = 0  # of this epoch, that came before the position
        self._is_placed = False  # by a state or skip(), and nothing was received since
        self._running: object | None = None  # the newest iterator, while it may move the state
        self._left_midway = False
        self._watch = Stopwatch(workers, num_workers)
        self._steps()

    def __repr__(self) -> str:
        workers = f"{self.num_workers} {self.workers} workers" if self.num_workers else "no workers"
        return (
            f"StreamLoader({self._rows:,} samples in batches of {self.batch_size}, {workers}; next "
            f"is epoch {self._epoch}, position {self._position:,})"
        )

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
        return self._count(0)

    def _count(self, position: int) -> int:
        """Batches of this rank from a position on."""
        rank, world = self._find_topology()
        step, _ = self._steps()
        whole, rest = divmod(self._rows - position, step)
        if self.drop_last is True or rest == 0:
            return whole
        return whole + (self.drop_last == "pad" or share(rest, rank, world)[1] > 0)

    def state_dict(self) -> State:
        """The place in the stream: JSON-able, below 500 bytes, the same on all ranks.

        Besides the place, `errors` has the ids of samples that were replaced (`on_error=`), as runs
        such as `"12-75,300"`, one after the other with `;` for each `ShardedDataset` that is read.
        These alone differ: a rank knows of its own. They take a few bytes more for each run.
        """
        if self._fingerprint is None:
            self._fingerprint = identify(self.dataset)
        return {
            "version": _VERSION,
            "epoch": self._epoch,
            "position": self._position,
            "batches": self._batches,
            "seed": self._order.seed,
            "window": self._order.window,
            "fingerprint": self._fingerprint,
            "errors": pack_errors(self._sharded),
        }

    def load_state_dict(self, state_dict: Mapping[str, int | str]) -> None:
        """Go on from a saved place at the next iteration.

        The samples that were replaced stay so, and count against `max_errors` together with those
        that this process has found itself: a restart does not start that budget anew. To know what
        all ranks had found, load the state of each, one after the other. To read replaced samples
        again, when their files have been mended, set the state's `errors` to `""`.

        Args:
            state_dict: From `state_dict` of a loader on the same data with the same order; workers,
                ranks and batch size may differ.

        Raises:
            ValueError: If the state is of another data set, seed, window or version, or has more
                `errors` than the data set's `max_errors`. A data set is known by its `fingerprint`
                (`ShardedDataset`, `datasets.Dataset`), a `Subset` by its indices too and
                a `ConcatDataset` by its parts; any other only by its class and length, so other
                contents of the same length pass unless it has an attribute `fingerprint`, a str
                that changes with them.
        """
        own = self.state_dict()
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict is a {type(state_dict).__name__}, not a loader's state")
        optional = ("batches", "errors")
        missing = [name for name in own if name not in state_dict and name not in optional]
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
        place = dict(state_dict)
        place.setdefault("batches", int(place["position"]) // self._steps()[0])
        for name in ("epoch", "position", "batches"):
            value = place[name]
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"state_dict has {name}={value!r}, not a place in a stream")
        epoch, position, batches = (int(place[n]) for n in ("epoch", "position", "batches"))
        if position > self._rows:
            raise ValueError(f"state_dict has position={position}, beyond {self._rows} samples")
        if _caller() in ("lightning", "pytorch_lightning"):
            self._compare_counts(position, batches)
        add_packed(state_dict.get("errors", ""), self._sharded)
        self._move(epoch, position, batches)
        self._is_placed = True

    def _compare_counts(self, position: int, batches: int) -> None:
        # Lightning goes on counting batches where the old run was, and ends the epoch when it has
        # as many as a whole epoch of this loader has.
        surplus = batches + self._count(position) - self._count(0)
        if surplus > 0:
            step, _ = self._steps()
            raise ValueError(
                f"Lightning would lose the last {surplus} batches of this epoch: the checkpoint is "
                f"in its middle, {batches} batches with {position} samples came before, and this "
                f"loader takes {step} a batch on all ranks; go on with at most "
                f"{position // max(1, batches)} (batch_size= times the number of ranks; "
                "accumulate_grad_batches= makes up for it), or from a checkpoint of the end of an "
                "epoch"
            )
        if surplus < 0:
            warnings.warn(
                f"the epoch goes on with smaller batches: Lightning sees all samples, but as it "
                f"counts {-surplus} batches too few, it will not validate at the end of this epoch",
                stacklevel=3,
            )

    def stats(self) -> LoaderStats:
        """Where the time of the newest loop went; print it to see what limits the loop.

        Example:
            >>> loader = StreamLoader([{"x": n} for n in range(64)], batch_size=8)
            >>> for batch in loader:
            ...     _ = sum(range(20_000))  # a step that takes its time
            >>> loader.stats().batches, loader.stats().bottleneck in ("step", "read", "collate")
            (8, True)
        """
        return self._watch.stats()

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; one that a state or `skip` has just led into goes on.

        Args:
            epoch: At least 0.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"epoch={epoch!r} must be a whole number, at least 0")
        if epoch != self._epoch or not self._is_placed:
            self._move(epoch, 0)

    @property
    def batch_sampler(self) -> "_EpochCount":
        """Where Lightning says which epoch begins (`batch_sampler.sampler.set_epoch`).

        From a checkpoint of the end of an epoch it restores no loader's state, only this count.
        """
        return _EpochCount(self)

    def skip(self, n_batches: int) -> None:
        """Move on without reading, across epochs, for instance past a spike of the loss.

        Args:
            n_batches: Batches to leave out on each rank, from the one that would come next.
        """
        if isinstance(n_batches, bool) or not isinstance(n_batches, int) or n_batches < 0:
            raise ValueError(f"n_batches={n_batches!r} must be a whole number, at least 0")
        epoch, position, batches = self._epoch, self._position, self._batches
        step, _ = self._steps()
        while n_batches:
            left = self._batches_left(position)
            taken = min(n_batches, left)
            position, batches = position + taken * step, batches + taken
            n_batches -= taken
            if taken == left:
                epoch, position, batches = epoch + 1, 0, 0
        self._move(epoch, position, batches)
        self._is_placed = True

    def _move(self, epoch: int, position: int, batches: int = 0) -> None:
        self._epoch, self._position, self._batches = epoch, position, batches
        self._running, self._left_midway, self._is_placed = None, False, False

    def _batches_left(self, position: int) -> int:
        """Global batches from a position to the end of the epoch."""
        step, _ = self._steps()
        left = self._rows - position
        return max(0, left // step if self.drop_last is True else -(-left // step))

    def __iter__(self) -> Iterator[Batch]:
        # nothing is decided before the first batch is asked for: Lightning makes the iterator of
        # the first epoch before it says which epoch that is
        return _received(self._draw())

    def _draw(self) -> Generator[tuple[Batch, Callable[[], None]]]:
        """Batches, each with what to call when the loop receives it, which moves the state."""
        if self._left_midway:
            self._move(self._epoch + 1, 0)
        if self._batches_left(self._position) == 0:  # after a resume with larger batches
            self._move(self._epoch + 1, 0)
        me = self._running = object()
        yield from self._deliver(me, self._epoch, self._position)

    def _deliver(
        self, me: object, epoch: int, position: int
    ) -> Generator[tuple[Batch, Callable[[], None]]]:
        rank, world = self._find_topology()
        step, _ = self._steps()
        announce = announcer(self.dataset)
        requests = Requests(
            self._order, epoch, position, self.batch_size, rank, world, self.drop_last, announce
        )
        reader = Reader(self.dataset, self.collate_fn, self._order.seed, self.drop_last == "pad")
        watch = self._watch = Stopwatch(self.workers, self.num_workers)
        before = self._batches
        arriving = deliveries(
            reader,
            requests,
            workers=self.workers,
            count=self.num_workers,
            ahead=self.prefetch_factor,
            seed=fold(self._order.seed, epoch) >> 1,
        )
        with closing(arriving):  # an error's traceback would keep the workers for longer
            counted = _collecting_errors(arriving, self._sharded)
            for number, batch in enumerate(watch.time(counted), 1):
                reached = min(position + number * step, self._rows)
                yield batch, partial(self._arrive, me, reached, before + number)
        if position + len(requests) * step < self._rows and self.drop_last is False:
            # the other ranks share the few samples that are left
            yield END, partial(self._arrive, me, self._rows, 0)

    def _arrive(self, me: object, position: int, batches: int) -> None:
        if self._running is not me:
            return
        if self._batches_left(position) == 0:
            self._move(self._epoch + 1, 0)
        else:
            self._position, self._batches = position, batches
            self._left_midway, self._is_placed = True, False


def _received(drawn: Generator[tuple[Batch, Callable[[], None]]]) -> Iterator[Batch]:
    for batch, arrive in drawn:
        if batch is END:
            arrive()
            return
        # Before the yield: whoever stops asking after len(self) batches, as Trainers do, never runs
        # what comes after the last one.
        arrive()
        yield batch


def _collecting_errors(
    arriving: Iterator[Delivery], datasets: Sequence[ShardedDataset]
) -> Iterator[Delivery]:
    """Let this process know, and count, what its workers replaced."""
    for delivery in arriving:
        if delivery.errors:
            for dataset, errors in zip(datasets, delivery.errors, strict=True):
                dataset.add_errors(errors)
        yield delivery


class _EpochCount:
    """A Trainer's count of epochs, which a loader follows when it is behind."""

    def __init__(self, loader: StreamLoader) -> None:
        self._loader = loader
        self.batch_size = loader.batch_size
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, unless the loader is there or beyond."""
        if epoch > self._loader.epoch:
            self._loader.set_epoch(epoch)


def _caller() -> str:
    """The package that called into this one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("torsh_data."):
        frame = frame.f_back
    return "" if frame is None else str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _plan(dataset: Dataset[Any], least: int, seed: int, window: str | int) -> EpochOrder:
    """The order of a data set; a window has to hold `least` rows, 0 for a part of a mixture."""
    rows = len(cast("Any", dataset))
    if isinstance(dataset, Mixture):
        parts = [_plan(part, 0, seed, window) for part in dataset.datasets]
        return dataset.order(seed, parts)
    if window == 0 and not isinstance(window, bool):
        return Order(rows, seed)
    if not isinstance(dataset, ShardedDataset):
        if window != _WINDOW and least:
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
    if wanted < min(least, rows):
        raise ValueError(
            f"window={window!r} holds {wanted} rows, less than one batch of {least}; use a "
            "larger window"
        )
    largest = dataset.largest_window()
    if window == _WINDOW and largest >= dataset.block_rows:
        wanted = min(wanted, max(largest, least))
    dataset.require_cache(min(wanted, rows))
    order = Order(rows, seed, min(wanted, rows), dataset.block_rows)
    blocks = order.window / order.block_rows
    if blocks < _FEW_BLOCKS and order.window < rows:
        batch = min(least or 256, rows)
        worth = 1 / (1 / (2 * blocks) + 1 / batch)  # two windows of blocks of one kind each
        if worth < batch / 8:
            warnings.warn(
                f"window={window!r} holds {blocks:.1f} blocks of {order.block_rows} rows, too few "
                f"to mix them: where the rows of a block are alike, such as of one class, a batch "
                f"of {batch} is worth about {max(1, round(worth))}; use a larger window= or write "
                "the data anew (torsh-data convert) in smaller blocks or shuffled (shuffle_seed=)",
                stacklevel=3,
            )
    return order
