"""How many workers a data set needs on this machine, by trying."""

import copy
import math
import multiprocessing
import statistics
import time
from dataclasses import dataclass
from itertools import count as numbers
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from torch.utils.data import DataLoader, Dataset

from torsh_data._loader import StreamLoader
from torsh_data._machine import ranks_here, usable_cpus, usable_memory
from torsh_data._order import Order
from torsh_data._parcel import Parcel, pack, unpack
from torsh_data._reader import Collate, Reader
from torsh_data._requests import Requests
from torsh_data._sizes import format_bytes, parse_bytes
from torsh_data._transfer import move, tensors_in
from torsh_data._workers import Workers

Stage: TypeAlias = Literal["reading", "transform", "collate", "transport"]

_KNEE = 1.1  # a step up has to bring this much, or the trials end
_ENOUGH = 0.95  # the fewest workers that reach this share of the best are taken
_TRIVIAL = 2.0  # reading in the loop has to be that much faster than workers to do without them
_SHARE = 0.5  # of the memory that is left, for workers
_UNEVEN = 2.0  # slowest batch by median batch, from which workers prepare more ahead
_MOST = 64
_WARM = 3  # batches that are no measure for the others


@dataclass(frozen=True)
class Trial:
    """One setting and what it brought.

    Attributes:
        num_workers: How many workers.
        workers: `"process"` or `"thread"`; 0 workers are neither.
        samples_per_s: Samples a second, once all workers had started.
        start_s: Seconds until the first batch came.
        worker_bytes: Memory of one worker: its share of what processes share (PSS).
    """

    num_workers: int
    workers: Workers
    samples_per_s: float
    start_s: float
    worker_bytes: int


@dataclass(frozen=True)
class LoaderPlan:
    """What `tune_workers` found; print it for an explanation.

    Attributes:
        num_workers: The fewest workers that deliver what the machine can.
        workers: Their kind.
        prefetch_factor: Batches that each prepares ahead.
        samples_per_s: What the plan was measured to deliver, to a loop that does nothing.
        trials: All that was measured, in order.
        stages: Seconds a sample spends in each stage of the work.
        bottleneck: The stage that limits the plan.
        cpus: Processors that this rank may use, by affinity and control groups.
        ranks: Ranks on this machine, which share processors and memory.
        ram: Bytes that workers may take.
        reason: Why there are not more workers.
    """

    num_workers: int
    workers: Workers
    prefetch_factor: int
    samples_per_s: float
    trials: tuple[Trial, ...]
    stages: dict[Stage, float]
    bottleneck: Stage
    cpus: float
    ranks: int
    ram: int
    reason: str

    def __str__(self) -> str:
        share = f", a share for one of {self.ranks} ranks" if self.ranks > 1 else ""
        kind = f", workers={self.workers!r}" if self.num_workers else ""
        stages = ", ".join(f"{name} {s * 1e6:,.0f} us" for name, s in self.stages.items())
        lines = [
            f"num_workers={self.num_workers}{kind}, prefetch_factor={self.prefetch_factor}: "
            f"{self.samples_per_s:,.0f} samples/s",
            f"{self.cpus:.3g} processors and {format_bytes(self.ram)} for workers{share}",
            f"{'workers':>12}{'samples/s':>12}{'start s':>9}{'a worker':>10}",
        ]
        for trial in self.trials:
            name = f"{trial.num_workers} {trial.workers}" if trial.num_workers else "0"
            memory = format_bytes(trial.worker_bytes) if trial.worker_bytes else "-"
            lines.append(
                f"{name:>12}{trial.samples_per_s:>12,.0f}{trial.start_s:>9.2f}{memory:>10}"
            )
        return "\n".join(
            [
                *lines,
                f"a sample takes {stages}",
                f"bottleneck: {self.bottleneck}; {_ADVICE[self.bottleneck]}",
                self.reason,
            ]
        )


_ADVICE: dict[Stage, str] = {
    "reading": "keep decoded samples in a SampleCache, or store the data nearer",
    "transform": "move it to the device (DevicePrefetcher(transform=...)), or cache what it does "
    "alike each time in a SampleCache",
    "collate": "let samples be tensors of one shape, or give a faster collate_fn",
    "transport": "send less: uint8 instead of float, no columns that are not used; or use threads",
}


def tune_workers(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    budget_s: float = 10.0,
    ram: str | int = "auto",
    collate_fn: Collate | None = None,
) -> LoaderPlan:
    """Measure how many workers a `StreamLoader` of this data set should have here.

    Real batches are read with 0, 1, 2, 4, ... workers, as processes and as threads, up to the
    processors that affinity and control groups leave to this rank, until more of them bring less
    than a tenth. The fewest workers within 5 % of the best are taken: each costs memory, and more
    than enough slow one another down. The count of processors alone tells none of this. No workers
    are the choice only if reading in the loop is twice as fast, because workers read while a step
    runs.

    Args:
        dataset: What the loader reads, with its transform.
        batch_size: Samples in a batch.
        budget_s: Seconds to spend in all, about; the start of worker processes counts.
        ram: Bytes that the workers of this rank may take together (`"8GB"`); `"auto"` is half of
            what the machine and its control groups have left, divided by the ranks on the machine
            (LOCAL_WORLD_SIZE).
        collate_fn: As that of the loader.

    Returns:
        The plan, with all measurements.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> plan = tune_workers([{"x": n} for n in range(256)], batch_size=16, budget_s=0.5)
        >>> plan.num_workers, plan.trials[0].num_workers
        (0, 0)
        >>> loader = StreamLoader([{"x": 1}], 1, num_workers=plan.num_workers, workers=plan.workers)
    """
    if not budget_s > 0:
        raise ValueError(f"budget_s={budget_s} must be above 0")
    rows = len(cast("Any", dataset))
    if not 1 <= batch_size <= rows:
        raise ValueError(f"batch_size={batch_size} must be in [1, {rows}], the data set's length")
    ranks = ranks_here()
    cpus = usable_cpus() / ranks
    memory = int(usable_memory() * _SHARE / ranks) if ram == "auto" else parse_bytes(ram, "ram")
    bench = _Bench(dataset, batch_size, collate_fn)
    begin = time.monotonic()
    here = bench.stages(budget_s * 0.2)
    trials = [Trial(0, "process", 1 / sum(here.seconds.values()), here.first_s, 0)]
    reasons: dict[Workers, str] = {}
    kinds: tuple[Workers, Workers] = ("process", "thread")
    for kind in kinds:
        left = budget_s * (0.6 if kind == "process" else 1.0) - (time.monotonic() - begin)
        tried, reasons[kind] = _climb(bench, kind, cpus, memory, here, trials[0], left)
        trials += tried
    chosen, reason = _choose(trials, reasons)
    stages = dict(here.seconds)
    if chosen.num_workers and chosen.workers == "process":
        stages["transport"] = bench.transport(here.batch)
    factor = 4 if here.unevenness > _UNEVEN else 2
    ahead = chosen.num_workers * here.batch_bytes
    if factor * ahead > memory:
        factor = 2
    return LoaderPlan(
        chosen.num_workers,
        chosen.workers,
        factor,
        chosen.samples_per_s,
        tuple(trials),
        stages,
        _bottleneck(stages, chosen),
        cpus,
        ranks,
        memory,
        reason,
    )


def _choose(trials: list[Trial], reasons: dict[Workers, str]) -> tuple[Trial, str]:
    here, *others = trials
    best = max((trial.samples_per_s for trial in others), default=0.0)
    # Workers read while the step runs, so they are worth having even if they are no faster.
    if here.samples_per_s >= _TRIVIAL * best:
        return (
            here,
            f"no workers: they reach {best / here.samples_per_s:.0%} of reading in the loop",
        )
    good = [trial for trial in others if trial.samples_per_s >= _ENOUGH * best]
    chosen = min(good, key=lambda trial: (trial.num_workers, -trial.samples_per_s))
    return chosen, reasons[chosen.workers]


def _bottleneck(stages: dict[Stage, float], chosen: Trial) -> Stage:
    # Workers share all stages but the last, which the loop's process does for them one by one.
    share = max(1, chosen.num_workers)
    return max(stages, key=lambda name: stages[name] / (1 if name == "transport" else share))


def _climb(
    bench: "_Bench",
    kind: Workers,
    cpus: float,
    memory: int,
    here: "_Here",
    none: Trial,
    budget_s: float,
) -> tuple[list[Trial], str]:
    """Trials with more and more workers, and why they ended."""
    most = min(_MOST, math.ceil(cpus), bench.batches)
    tried: list[Trial] = []
    begin, best = time.monotonic(), none.samples_per_s
    count = 1
    while count <= most:
        left = budget_s - (time.monotonic() - begin)
        if tried and left <= 0:
            return tried, f"not more: the budget ended after {tried[-1].num_workers} workers"
        each = 2 * here.batch_bytes + (tried[-1].worker_bytes if tried else 0)
        if count * each > memory:
            return tried, f"not more: {count} workers would take {format_bytes(count * each)}"
        tried.append(bench.measure(count, kind, max(0.1, left / 3)))
        rate = tried[-1].samples_per_s
        if rate < _KNEE * best and count > 1:
            return tried, f"not more: {count} workers bring {rate / best - 1:+.0%}"
        best = max(best, rate)
        count = count * 2 if count * 2 <= most or count == most else most
    return tried, f"not more: there are {cpus:.3g} processors for this rank"


@dataclass(frozen=True)
class _Here:
    """One process's work, without workers."""

    seconds: dict[Stage, float]
    first_s: float
    unevenness: float
    batch: Any
    batch_bytes: int


class _Timed:
    """A transform that notes how long it takes."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform
        self.seconds = 0.0

    def __call__(self, *arguments: Any) -> Any:
        begin = time.perf_counter()
        result = self.transform(*arguments)
        self.seconds += time.perf_counter() - begin
        return result


class _Bench:
    def __init__(self, dataset: Dataset[Any], batch_size: int, collate_fn: Collate | None) -> None:
        self.dataset, self.batch_size, self.collate_fn = dataset, batch_size, collate_fn
        self.rows = len(cast("Any", dataset))
        self.batches = self.rows // batch_size

    def stages(self, seconds: float) -> _Here:
        """Time reading, transform and collate in this process."""
        dataset = self.dataset
        timed = _Timed(getattr(dataset, "transform", None))
        if callable(timed.transform) and hasattr(dataset, "__dict__"):
            dataset = copy.copy(dataset)  # shares everything but the transform
            cast("Any", dataset).transform = timed
        reader = Reader(dataset, self.collate_fn, seed=0, pad=False)
        order = Order(self.rows, seed=0, window=self.rows)
        begin = time.perf_counter()
        # The first batch opens files and fills caches: no measure for the others.
        requests = (r for epoch in numbers() for r in self._requests(order, epoch))
        batch = reader[next(requests)].batch()
        first, timed.seconds = time.perf_counter() - begin, 0.0
        taken: list[tuple[float, float]] = []
        while not taken or time.perf_counter() - begin < seconds:
            delivery = reader[next(requests)]
            taken.append((delivery.read_s, delivery.collate_s))
        each = 1 / (len(taken) * self.batch_size)
        read, collate = (sum(part) * each for part in zip(*taken, strict=True))
        stages: dict[Stage, float] = {"reading": read - timed.seconds * each}
        if timed.seconds:
            stages["transform"] = timed.seconds * each
        stages["collate"] = collate
        whole = [sum(pair) for pair in taken]
        size = sum(tensor.nbytes for tensor in tensors_in(batch))
        return _Here(stages, first, max(whole) / statistics.median(whole), batch, size)

    def _requests(self, order: Order, epoch: int) -> Requests:
        return Requests(order, epoch, 0, self.batch_size, 0, 1, True)

    def measure(self, count: int, kind: Workers, seconds: float) -> Trial:
        """Time whole batches from a number of workers, once all of them work."""
        loader = StreamLoader(
            self.dataset,
            self.batch_size,
            num_workers=count,
            workers=kind,
            collate_fn=self.collate_fn,
            rank=0,
            world_size=1,
        )
        warm = max(1, min(2 * count, self.batches // 3))
        begin = time.perf_counter()
        spent, delivered, start, memory = 0.0, 0, 0.0, 0
        while not delivered or (spent < seconds and time.perf_counter() - begin < 2 * seconds):
            before = set(multiprocessing.active_children())
            asked = since = time.perf_counter()
            for number, _ in enumerate(loader, 1):
                now = time.perf_counter()
                if number == 1:
                    start = start or now - asked
                if number == warm:
                    workers = set(multiprocessing.active_children()) - before
                    memory = max([memory, *(_shared_part(worker.pid) for worker in workers)])
                    since = time.perf_counter()
                if number > warm and now - since > seconds - spent:
                    break
            now = time.perf_counter()
            spent += now - since
            delivered += number - warm if number > warm else number
        return Trial(count, kind, delivered * self.batch_size / spent, start, memory)

    def transport(self, batch: Any) -> float:
        """Seconds a sample for handing batches from one process to another, and nothing else."""
        batches = DataLoader(
            _Copies(batch), batch_size=None, num_workers=1, collate_fn=_as_is, prefetch_factor=2
        )
        begin, number = time.perf_counter(), 0
        for number, content in enumerate(batches):
            unpack(content) if isinstance(content, Parcel) else content
            if number == _WARM:
                begin = time.perf_counter()
        return (time.perf_counter() - begin) / max(1, number - _WARM) / self.batch_size


class _Copies(Dataset[Any]):
    """The same batch again and again, each time in new memory."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 20 + _WARM

    def __getitem__(self, index: int) -> Any:
        copied = move(self.batch, lambda tensor: tensor.clone(), torch.device("cpu"))
        return pack(copied) if isinstance(copied, dict) else copied


def _as_is(batch: Any) -> Any:
    return batch


def _shared_part(process: int | None) -> int:
    """Memory of a process, what it shares divided among those that share it."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
