"""How many workers a data set needs on this machine, by trying."""

import math
import time
from dataclasses import dataclass
from typing import Any, cast

from torch.utils.data import Dataset

from torsh_data._machine import ranks_here, usable_cpus, usable_memory
from torsh_data._map_style import require_map_style
from torsh_data._reader import Collate
from torsh_data._sizes import format_bytes, parse_bytes
from torsh_data._trials import Bench, Here, Stage, Trial
from torsh_data._workers import Workers

_KNEE = 1.1  # a step up has to bring this much, or the trials end
_ENOUGH = 0.95  # the fewest workers that reach this share of the best are taken
_TRIVIAL = 2.0  # reading in the loop has to be that much faster than workers to do without them
_SHARE = 0.5  # of the memory that is left, for workers
_UNEVEN = 2.0  # slowest batch by median batch, from which workers prepare more ahead
_MOST = 64
_PROBE = 0.02  # of the budget, that a batch of the trials may take
_HERE = 0.2  # of the budget, for reading without workers
_TRIALS = 0.9  # of the budget, until the trials have ended


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
        reason: Why there are not more workers, and what was not tried for want of time.
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

    Samples are read with 0, 1, 2, 4, ... workers, as processes and as threads by turns, up to the
    processors that affinity and control groups leave to this rank, until more of them bring less
    than a tenth. The fewest workers within 5 % of the best are taken: each costs memory, and more
    than enough slow one another down. The count of processors alone tells none of this. No workers
    are the choice only if reading in the loop is twice as fast, because workers read while a step
    runs.

    Where reading leaves the processor idle for most of its time, workers do not stand in each
    other's way, so threads are tried before processes and, after one worker, the most of them first
    and then fewer. Slow samples are read in smaller batches than `batch_size`. A trial that has
    begun ends, but none begins that would not fit into the budget; the plan's `reason` names those
    that were left out.

    Args:
        dataset: What the loader reads, with its transform.
        batch_size: Samples in a batch.
        budget_s: Seconds to spend in all; the start of worker processes counts. It is passed by at
            most the first start of a process, and by a few samples that take longer than a fiftieth
            of it.
        ram: Bytes that the workers of this rank may take together (`"8GB"`); `"auto"` is half of
            what the machine and its control groups have left, divided by the ranks on the machine
            (LOCAL_WORLD_SIZE).
        collate_fn: As that of the loader.

    Returns:
        The plan, with all measurements.

    Raises:
        TypeError: If the data set has no length or index.
        ValueError: If an argument is out of range.

    Example:
        >>> from torsh_data import StreamLoader
        >>> plan = tune_workers([{"x": n} for n in range(256)], batch_size=16, budget_s=0.5)
        >>> [trial.num_workers for trial in plan.trials][:2]
        [0, 1]
        >>> loader = StreamLoader([{"x": 1}], 1, num_workers=plan.num_workers, workers=plan.workers)
    """
    require_map_style(dataset, "dataset", "tune_workers")
    if not budget_s > 0:
        raise ValueError(f"budget_s={budget_s} must be above 0")
    rows = len(cast("Any", dataset))
    if not 1 <= batch_size <= rows:
        raise ValueError(f"batch_size={batch_size} must be in [1, {rows}], the data set's length")
    ranks = ranks_here()
    cpus = usable_cpus() / ranks
    memory = int(usable_memory() * _SHARE / ranks) if ram == "auto" else parse_bytes(ram, "ram")
    begin = time.monotonic()
    bench = Bench(dataset, batch_size, collate_fn, probe_s=_PROBE * budget_s)
    here = bench.stages(_HERE * budget_s)
    most = min(_MOST, math.ceil(cpus), bench.rows // batch_size)
    kinds: tuple[Workers, Workers] = ("thread", "process") if here.waits else ("process", "thread")
    climbs = [_Climb(kind, most, here.waits, cpus) for kind in kinds]
    none = Trial(0, "process", 1 / sum(here.seconds.values()), here.first_s, 0)
    trials = [none]
    while waiting := [climb for climb in climbs if climb.counts]:
        for climb in waiting:
            left = _TRIALS * budget_s - (time.monotonic() - begin)
            each = left / sum(len(other.counts) for other in climbs)
            if climb.may_go_on(left, here, memory):
                trials.append(climb.go_on(bench, each, none))
    chosen, reason = _choose(trials, {climb.kind: climb.limit for climb in climbs})
    untried = [f"{count} {climb.kind}" for climb in climbs for count in climb.untried]
    stages = dict(here.seconds)
    if chosen.num_workers and chosen.workers == "process":
        if time.monotonic() - begin + chosen.start_s < budget_s:
            stages["transport"] = bench.transport(here.batch)
        else:
            untried.append("the transport between processes alone")
    if untried:
        reason += f"; not tried, as budget_s={budget_s:g} was too little: {', '.join(untried)}"
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


def _choose(trials: list[Trial], limits: dict[Workers, str]) -> tuple[Trial, str]:
    here, *others = trials
    best = max((trial.samples_per_s for trial in others), default=0.0)
    if not others:
        return here, "no workers: none could be tried"
    # Workers read while the step runs, so they are worth having even if they are no faster.
    if here.samples_per_s >= _TRIVIAL * best:
        return (
            here,
            f"no workers: they reach {best / here.samples_per_s:.0%} of reading in the loop",
        )
    good = [trial for trial in others if trial.samples_per_s >= _ENOUGH * best]
    chosen = min(good, key=lambda trial: (trial.num_workers, -trial.samples_per_s))
    more = [
        trial
        for trial in others
        if trial.workers == chosen.workers and trial.num_workers > chosen.num_workers
    ]
    if not more:
        return chosen, limits[chosen.workers]
    nearest = min(more, key=lambda trial: trial.num_workers)
    gain = nearest.samples_per_s / chosen.samples_per_s - 1
    return chosen, f"not more: {nearest.num_workers} workers bring {gain:+.0%}"


def _bottleneck(stages: dict[Stage, float], chosen: Trial) -> Stage:
    # Workers share all stages but the last, which the loop's process does for them one by one.
    share = max(1, chosen.num_workers)
    return max(stages, key=lambda name: stages[name] / (1 if name == "transport" else share))


class _Climb:
    """The trials of one kind of workers: which count comes next, and why there is none."""

    def __init__(self, kind: Workers, most: int, waits: bool, cpus: float) -> None:
        self.kind: Workers = kind
        upwards = [count for count in (1 << n for n in range(7)) if count < most] + [most]
        # One is tried first in any case: it tells the memory of a worker, and how long it starts.
        self.counts = [1, *upwards[:0:-1]] if waits else upwards
        self.waits = waits
        self.tried: list[Trial] = []
        self.untried: list[int] = []
        self.limit = f"not more: there are {cpus:.3g} processors for this rank"

    def may_go_on(self, left_s: float, here: Here, memory: int) -> bool:
        """Whether there is time and memory for the next trial."""
        last = self.tried[-1] if self.tried else None
        needed = 3 * here.probe_s + (last.start_s if last else 0.0)
        if left_s < needed:
            self.untried, self.counts = self.counts, list[int]()
            return False
        bytes_each = 2 * here.batch_bytes + (last.worker_bytes if last else 0)
        fitting = [count for count in self.counts if count * bytes_each <= memory]
        if len(fitting) < len(self.counts):
            beyond = min(set(self.counts) - set(fitting))
            self.limit = (
                f"not more: {beyond} workers would take {format_bytes(beyond * bytes_each)}"
            )
            self.counts = fitting
        return bool(self.counts)

    def go_on(self, bench: Bench, seconds: float, none: Trial) -> Trial:
        """Make the next trial."""
        best = max(trial.samples_per_s for trial in [none, *self.tried])
        trial = bench.measure(self.counts.pop(0), self.kind, seconds)
        self.tried.append(trial)
        enough = _ENOUGH if self.waits else _KNEE
        if trial.num_workers > 1 and trial.samples_per_s < enough * best:
            self.counts = []
        return trial
