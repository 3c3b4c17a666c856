"""Where the time of a loop goes: to the loader or to the step, and to which part of the loader."""

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, TypeAlias

from torsh_data._reader import Batch, Delivery
from torsh_data._workers import Workers

Bottleneck: TypeAlias = Literal["none", "step", "read", "collate", "transfer"]

_IDLE = 0.1  # share of the time for which a loop may wait before the loader counts as slow
_MOST = 64  # workers that are advised
_BUSY = 0.7  # share of the time from which workers count as fully used


@dataclass(frozen=True)
class LoaderStats:
    """What a `StreamLoader` measured since its loop began; print it for an explanation.

    Attributes:
        batches: Batches delivered.
        samples: Samples in them.
        start_s: Seconds until the first batch came, start of workers included.
        wait_s: Seconds that the loop waited for all others.
        step_s: Seconds that the loop was busy between batches.
        read_s: Seconds of reading and transforming, summed over workers.
        collate_s: Seconds of putting samples together, summed over workers.
        workers: `"process"` or `"thread"`.
        num_workers: How many there are.
        busy: Share of the time for which they worked, from when each had delivered its first batch.
    """

    batches: int
    samples: int
    start_s: float
    wait_s: float
    step_s: float
    read_s: float
    collate_s: float
    workers: Workers
    num_workers: int
    busy: float

    @property
    def samples_per_s(self) -> float:
        """Samples a second, without the start; 0 before the second batch."""
        spent = self.wait_s + self.step_s
        later = self.samples * (self.batches - 1) / self.batches if self.batches else 0.0
        return later / spent if spent else 0.0

    @property
    def bottleneck(self) -> Bottleneck:
        """What limits the loop; `"none"` before the second batch of a worker.

        Its own `"step"`, or the loader's `"read"`, `"collate"` or `"transfer"` between processes.
        """
        spent = self.wait_s + self.step_s
        if self.batches <= max(1, self.num_workers) or not spent:
            return "none"
        if self.wait_s < _IDLE * spent:
            return "step"
        slower: Bottleneck = "read" if self.read_s >= self.collate_s else "collate"
        if not self.num_workers:
            return slower
        return slower if self.busy > _BUSY or self.workers == "thread" else "transfer"

    def __str__(self) -> str:
        if self.bottleneck == "none":
            return f"nothing measured yet: take {max(1, self.num_workers) + 1} batches or more"
        spent = self.wait_s + self.step_s
        made = self.read_s + self.collate_s
        per_batch = 1000 / self.batches
        own = f"{self.num_workers} worker {'processes' if self.workers == 'process' else 'threads'}"
        lines = [
            f"{self.batches:,} batches, {self.samples_per_s:,.0f} samples/s",
            f"the loop waited {self.wait_s / spent:.0%} of the time "
            f"({self.wait_s * 1000 / (self.batches - 1):.1f} ms a batch; "
            f"{self.start_s:.2f} s for the first)",
            f"a batch takes {self.read_s * per_batch:.1f} ms to read and transform, "
            f"{self.collate_s * per_batch:.1f} ms to collate, in "
            + (own if self.num_workers else "the loop's own process"),
        ]
        remedies = {
            "step": "the step is the bottleneck: the loader keeps up",
            "read": "reading and transforming is the bottleneck: ",
            "collate": "collate_fn is the bottleneck: let samples be tensors of one shape, or ",
            "transfer": "handing batches over between processes is the bottleneck: send smaller "
            "tensors (uint8 instead of float), fewer of them, or use workers='thread'",
        }
        advice = remedies[self.bottleneck]
        if self.bottleneck in ("read", "collate"):
            enough = -(-made // self.step_s) if self.step_s else 0
            advice += (
                f"use num_workers={int(enough)} or more"
                if self.num_workers < enough <= _MOST
                else "use more workers, a cheaper transform, or a SampleCache of decoded samples"
            )
        return "\n".join([*lines, advice])


class Stopwatch:
    """Takes the times of one loop."""

    def __init__(self, workers: Workers, num_workers: int) -> None:
        self._workers: Workers = workers
        self._num_workers = num_workers
        self._batches = self._samples = 0
        self._start = self._wait = self._step = self._read = self._collate = 0.0
        self._since = self._until = self._before = 0.0

    def time(self, arriving: Iterator[Delivery]) -> Iterator[Batch]:
        """Pass batches on, and note how long they took to come and until the next was wanted."""
        asked = perf_counter()
        for delivery in arriving:
            batch: Any = delivery.batch()
            came = perf_counter()
            if self._batches:
                self._wait += came - asked
            else:
                self._start = came - asked
            self._batches += 1
            self._samples += delivery.samples
            self._read += delivery.read_s
            self._collate += delivery.collate_s
            self._until = came
            if self._batches <= self._num_workers:  # before that, some workers may not have started
                self._since, self._before = came, self._read + self._collate
            yield batch
            asked = perf_counter()
            self._step += asked - came

    def stats(self) -> LoaderStats:
        """What was measured so far."""
        had = self._num_workers * (self._until - self._since)
        made = self._read + self._collate - self._before
        return LoaderStats(
            self._batches,
            self._samples,
            self._start,
            self._wait,
            self._step,
            self._read,
            self._collate,
            self._workers,
            self._num_workers,
            min(1.0, made / had) if had else 0.0,
        )
