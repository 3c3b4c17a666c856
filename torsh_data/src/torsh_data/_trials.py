"""Measuring a data set: in this process, and with one setting of workers."""

import copy
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count as numbers
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from torch.utils.data import DataLoader, Dataset

from torsh_data._loader import StreamLoader
from torsh_data._order import Order
from torsh_data._parcel import Parcel, pack, unpack
from torsh_data._reader import Collate, Reader
from torsh_data._requests import Request, Requests
from torsh_data._transfer import move, tensors_in
from torsh_data._workers import Workers

Stage: TypeAlias = Literal["reading", "transform", "collate", "transport"]

_WARM = 3  # batches that are no measure for the others
_WAITS = 0.3  # share of the time on a processor below which reading counts as waiting


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
class Here:
    """One process's work, without workers.

    Attributes:
        seconds: A sample's, stage by stage.
        first_s: Until the first sample came.
        unevenness: Slowest batch by median batch.
        waits: Whether the processor was idle for most of the time.
        probe_s: Seconds that a batch of the trials takes.
        batch: One of them.
        batch_bytes: Bytes of a whole batch.
    """

    seconds: dict[Stage, float]
    first_s: float
    unevenness: float
    waits: bool
    probe_s: float
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


class Bench:
    """Measures a data set.

    Args:
        dataset: What is read.
        batch_size: Samples in a batch of the loader that is planned.
        collate_fn: As that of the loader.
        probe_s: Seconds that a batch of the trials may take; slow samples come in smaller ones.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        collate_fn: Collate | None,
        probe_s: float,
    ) -> None:
        self.dataset, self.batch_size, self.collate_fn = dataset, batch_size, collate_fn
        self.rows = len(cast("Any", dataset))
        self.probe_s = probe_s
        self.probe = 1  # samples in a batch of the trials

    def stages(self, seconds: float) -> Here:
        """Time reading, transform and collate in this process."""
        dataset = self.dataset
        timed = _Timed(getattr(dataset, "transform", None))
        if callable(timed.transform) and hasattr(dataset, "__dict__"):
            dataset = copy.copy(dataset)  # shares everything but the transform
            cast("Any", dataset).transform = timed
        reader = Reader(dataset, self.collate_fn, seed=0, pad=False)
        order = Order(self.rows, seed=0, window=self.rows)
        begin = time.perf_counter()
        # The first sample opens files and fills caches: no measure for the others.
        epochs = numbers()
        reader[next(self._requests(order, next(epochs)))]
        first = time.perf_counter() - begin
        while True:  # larger batches, up to the real ones, as long as they take little enough
            delivery = reader[next(self._requests(order, next(epochs)))]
            spent = delivery.read_s + delivery.collate_s
            if self.probe == self.batch_size or 2 * spent > self.probe_s:
                break
            larger = int(self.probe * min(8.0, self.probe_s / max(spent, 1e-9)))
            self.probe = min(self.batch_size, larger)
        requests = (r for epoch in epochs for r in self._requests(order, epoch))
        timed.seconds = 0.0
        taken: list[tuple[float, float]] = []
        wall, processor = time.perf_counter(), time.process_time()
        while not taken or time.perf_counter() - begin < seconds:
            delivery = reader[next(requests)]
            taken.append((delivery.read_s, delivery.collate_s))
        processor, wall = time.process_time() - processor, time.perf_counter() - wall
        each = 1 / (len(taken) * self.probe)
        read, collate = (sum(part) * each for part in zip(*taken, strict=True))
        stages: dict[Stage, float] = {"reading": read - timed.seconds * each}
        if timed.seconds:
            stages["transform"] = timed.seconds * each
        stages["collate"] = collate
        whole = [sum(pair) for pair in taken]
        batch = delivery.batch()
        size = sum(tensor.nbytes for tensor in tensors_in(batch)) * self.batch_size // self.probe
        return Here(
            stages,
            first,
            max(whole) / statistics.median(whole),
            processor < _WAITS * wall,
            wall / len(taken),
            batch,
            size,
        )

    def _requests(self, order: Order, epoch: int) -> Iterator[Request]:
        return iter(Requests(order, epoch, 0, self.probe, 0, 1, True))

    def measure(self, count: int, kind: Workers, seconds: float) -> Trial:
        """Time whole batches from a number of workers, once all of them work.

        Ends as soon as the seconds are over and each worker has delivered.
        """
        loader = StreamLoader(
            self.dataset,
            self.probe,
            num_workers=count,
            workers=kind,
            collate_fn=self.collate_fn,
            rank=0,
            world_size=1,
        )
        warm = min(2 * count, self.rows // self.probe // 3)
        begin = time.perf_counter()
        spent, delivered, start, memory = 0.0, 0, 0.0, 0
        while not delivered or time.perf_counter() - begin < seconds:
            before = set(multiprocessing.active_children())
            asked = since = now = time.perf_counter()
            for number, _ in enumerate(loader, 1):
                now = time.perf_counter()  # here, because leaving the loop waits for the workers
                if number == 1:
                    start = start or now - asked
                if number == max(1, warm):
                    workers = set(multiprocessing.active_children()) - before
                    memory = max([memory, *(_shared_part(worker.pid) for worker in workers)])
                if number == warm:
                    since = now
                # Workers deliver together, so only whole rounds of them are a measure.
                if now - begin >= seconds and number > warm and (number - warm) % count == 0:
                    break
            spent += now - since
            delivered += number - warm
        return Trial(count, kind, delivered * self.probe / spent, start, memory)

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
        return (time.perf_counter() - begin) / max(1, number - _WARM) / self.probe


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
