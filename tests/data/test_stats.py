import multiprocessing
import time
from dataclasses import replace

import pytest
import torch

from torsh_data import LoaderStats, StreamLoader
from torsh_data._reader import Delivery
from torsh_data._stats import Stopwatch


class Slow(torch.utils.data.Dataset):
    """Samples that take their time."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return 64

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return {"x": index}


def slow_collate(samples):
    time.sleep(0.02)
    return torch.utils.data.default_collate(samples)


def run(dataset, step=0.0, **options):
    loader = StreamLoader(dataset, 8, seed=0, rank=0, world_size=1, **options)
    for _ in loader:
        time.sleep(step)
    return loader.stats()


def test_names_a_slow_step():
    stats = run([{"x": n} for n in range(64)], step=0.01)
    assert stats.bottleneck == "step"
    assert stats.batches == 8
    assert stats.samples == 64
    assert stats.step_s >= 7 * 0.01
    assert "the loader keeps up" in str(stats)


@pytest.mark.parametrize(("count", "workers"), [(0, "process"), (1, "process"), (2, "thread")])
def test_names_slow_reading(count, workers):
    stats = run(Slow(0.004), step=0.004, num_workers=count, workers=workers)
    assert stats.bottleneck == "read"
    assert stats.read_s >= 64 * 0.004
    assert "num_workers=" in str(stats) or "more workers" in str(stats)
    where = {0: "the loop's own process", 1: "1 worker process", 2: "2 worker threads"}[count]
    assert where in str(stats)


def test_names_a_slow_collate():
    stats = run([{"x": n} for n in range(64)], collate_fn=slow_collate)
    assert stats.bottleneck == "collate"
    assert stats.collate_s >= 8 * 0.02


def test_names_the_way_between_processes():
    made = LoaderStats(100, 1000, 0.5, 8.0, 2.0, 1.0, 0.5, "process", 2, 0.69)
    assert made.bottleneck == "transfer"
    assert "between processes" in str(made)
    assert made.samples_per_s == pytest.approx(99.0)
    busy = LoaderStats(100, 1000, 0.5, 8.0, 2.0, 15.0, 5.0, "process", 2, 0.71)
    assert busy.bottleneck == "read"
    assert "use num_workers=10 or more" in str(busy)
    assert replace(made, workers="thread").bottleneck == "read"  # nothing is handed over


def test_workers_are_busy_only_if_they_work():
    def deliveries(read_s, pause, first=0.0):
        time.sleep(first)
        for _ in range(8):
            time.sleep(pause)
            yield Delivery({}, 4, read_s, 0.0, [])

    def measured(*times):
        watch = Stopwatch("process", 1)
        list(watch.time(deliveries(*times)))
        return watch.stats()

    assert measured(0.004, 0.01).busy < 0.45  # a sleep is never shorter
    assert measured(0.004, 0.01).bottleneck == "transfer"
    late = measured(0.02, 0.01, 0.5)  # the start is no part of it
    assert late.start_s >= 0.5
    assert late.busy > 0.7 or late.wait_s > 0.2  # the machine was busy with something else
    assert late.bottleneck == "read" or late.wait_s > 0.2


class Computes(torch.utils.data.Dataset):
    """Samples that take time of the processor."""

    def __len__(self):
        return 96

    def __getitem__(self, index):
        begun = time.thread_time()
        while time.thread_time() - begun < 0.004:
            pass
        return {"x": index}


@pytest.mark.slow
def test_the_start_of_workers_is_not_their_work(monkeypatch):
    """A spawned worker takes longer to start than all of its work here."""
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", None)
    multiprocessing.set_start_method("spawn")
    stats = run(Computes(), num_workers=2)
    assert stats.start_s > 10 * stats.read_s / 12
    assert stats.bottleneck == "read"


def test_before_the_second_batch_nothing_is_said():
    loader = StreamLoader([{"x": n} for n in range(64)], 8, rank=0, world_size=1)
    assert loader.stats().bottleneck == "none"
    next(iter(loader))
    assert loader.stats().samples_per_s == 0
    assert str(loader.stats()) == "nothing measured yet: take 2 batches or more"


def test_a_new_loop_begins_anew():
    loader = StreamLoader([{"x": n} for n in range(64)], 8, rank=0, world_size=1)
    for _ in range(2):
        assert len(list(loader)) == loader.stats().batches == 8
