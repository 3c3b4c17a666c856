import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import default_collate

from torsh_data import _trials as trials
from torsh_data import _tune as module
from torsh_data._machine import usable_cpus, usable_memory
from torsh_data._trials import Bench, Trial
from torsh_data._tune import LoaderPlan, tune_workers


class Sleepy:
    """Reading waits, so workers of any kind help."""

    def __init__(self, seconds=0.002, transform=None):
        self.seconds, self.transform = seconds, transform

    def __len__(self):
        return 256

    def __getitem__(self, n):
        time.sleep(self.seconds)
        sample = {"x": torch.zeros(8), "n": n}
        return sample if self.transform is None else self.transform(sample)


def test_waiting_reads_get_workers_and_the_plan_says_why(monkeypatch):
    monkeypatch.setattr(module, "usable_cpus", lambda: 2.0)
    plan = tune_workers(Sleepy(), 8, budget_s=2)
    assert plan.num_workers in (1, 2)  # on a busy machine the second may not help
    assert plan.bottleneck == "reading"
    assert plan.stages["reading"] >= 0.002  # a sleep is never shorter
    assert "transform" not in plan.stages
    assert {t.num_workers for t in plan.trials} == {0, 1, 2}
    text = str(plan)
    assert text.startswith(f"num_workers={plan.num_workers}, workers='")
    assert "bottleneck: reading; keep decoded samples in a SampleCache" in text
    assert "not more: there are 2 processors for this rank" in text
    process = next(t for t in plan.trials if t.workers == "process" and t.num_workers == 1)
    assert process.worker_bytes > 1e6


def slow(sample):
    time.sleep(0.003)
    return sample


def test_time_in_a_transform_is_told_from_reading(monkeypatch):
    monkeypatch.setattr(module, "usable_cpus", lambda: 1.0)
    plan = tune_workers(Sleepy(0.0001, slow), 8, budget_s=1)
    assert plan.bottleneck == "transform"
    assert plan.stages["transform"] > plan.stages["reading"]
    assert "move it to the device" in str(plan)


def slow_collate(samples):
    time.sleep(0.02)
    return default_collate(samples)


def test_a_slow_collate_is_named():
    plan = tune_workers([{"x": n} for n in range(64)], 4, budget_s=1, collate_fn=slow_collate)
    assert plan.bottleneck == "collate"


def test_the_fewest_workers_that_are_nearly_the_fastest_are_chosen():
    def trial(count, speed, kind="process"):
        return Trial(count, kind, speed, 1.0, 0)

    limits = {"process": "no more processes", "thread": "no more threads"}

    def choose(*trials):
        chosen, why = module._choose(list(trials), limits)
        return chosen.num_workers, chosen.workers, why

    here = trial(0, 100.0)
    assert choose(here, trial(1, 45.0), trial(2, 50.0))[0] == 0  # twice as fast in the loop
    assert "no workers: they reach 50%" in choose(here, trial(1, 45.0), trial(2, 50.0))[2]
    assert choose(here, trial(1, 49.9))[0] == 0
    assert choose(here, trial(1, 50.1))[0] == 1  # not twice as fast
    assert choose(here, trial(1, 80.0), trial(2, 81.0))[:2] == (1, "process")
    assert choose(here, trial(1, 80.0), trial(2, 81.0))[2] == "not more: 2 workers bring +1%"
    assert choose(here, trial(1, 80.0), trial(2, 90.0))[2] == "no more processes"
    assert choose(here) == (0, "process", "no workers: none could be tried")
    assert choose(here, trial(1, 100.0), trial(2, 300.0), trial(4, 305.0))[0] == 2
    assert choose(here, trial(2, 300.0), trial(2, 310.0, "thread"))[1:] == (
        "thread",
        "no more threads",
    )


def test_memory_and_ranks_are_respected(monkeypatch):
    plan = tune_workers(Sleepy(), 8, budget_s=1, ram="1kB")
    assert all(t.num_workers <= 1 or t.workers == "thread" for t in plan.trials)
    monkeypatch.setattr(module, "usable_cpus", lambda: 8.0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    shared = tune_workers(Sleepy(), 8, budget_s=1)
    assert shared.ranks == 8
    assert shared.cpus == 1
    assert max(t.num_workers for t in shared.trials) == 1
    assert "a share for one of 8 ranks" in str(shared)


class Computes:
    """Reading takes a processor's time."""

    def __len__(self):
        return 256

    def __getitem__(self, n):
        begun = time.thread_time()
        while time.thread_time() - begun < 0.002:
            pass
        return {"x": torch.zeros(8), "n": n}


def tune_by(monkeypatch, dataset, rates, **options):
    """The plan if trials bring these rates."""

    def measure(self, count, kind, seconds):
        return Trial(count, kind, rates[count], 0.0, 1000)

    monkeypatch.setattr(Bench, "measure", measure)
    monkeypatch.setattr(module, "usable_cpus", lambda: 8.0)
    return tune_workers(dataset, 8, **{"budget_s": 2.0} | options)


def test_trials_end_at_the_knee(monkeypatch):
    """More workers that bring nothing are not tried further."""
    rates = {1: 1000.0, 2: 1900.0, 4: 2000.0, 8: 9000.0}
    plan = tune_by(monkeypatch, Computes(), rates)
    assert [(t.num_workers, t.workers[0]) for t in plan.trials[1:]] == [
        (1, "p"), (1, "t"), (2, "p"), (2, "t"), (4, "p"), (4, "t")
    ]  # fmt: skip
    assert plan.num_workers == 2  # within 5 % of the four
    assert plan.reason == "not more: 4 workers bring +5%"


def test_where_reading_waits_the_most_workers_are_tried_first(monkeypatch):
    """They do not stand in each other's way, so fewer bring less, and one such trial shows it."""
    plan = tune_by(monkeypatch, Sleepy(0.01), {1: 100.0, 2: 200.0, 4: 400.0, 8: 800.0})
    assert [(t.num_workers, t.workers[0]) for t in plan.trials[1:]] == [
        (1, "t"), (1, "p"), (8, "t"), (8, "p"), (4, "t"), (4, "p")
    ]  # fmt: skip
    assert (plan.num_workers, plan.workers) == (8, "thread")
    assert plan.reason == "not more: there are 8 processors for this rank"
    narrow = tune_by(monkeypatch, Sleepy(0.01), {1: 100.0, 2: 300.0, 4: 305.0, 8: 310.0})
    assert narrow.num_workers == 2
    assert narrow.reason == "not more: 4 workers bring +2%"


def test_what_the_budget_leaves_out_is_named(monkeypatch):
    plan = tune_by(monkeypatch, Sleepy(0.05), {1: 10.0}, budget_s=0.05)
    assert [t.num_workers for t in plan.trials] == [0]
    assert plan.reason == (
        "no workers: none could be tried; not tried, as budget_s=0.05 was too little: "
        "1 thread, 8 thread, 4 thread, 2 thread, 1 process, 8 process, 4 process, 2 process"
    )


def test_slow_samples_are_tried_in_small_batches(monkeypatch):
    """A batch of 128 would take longer than all of the budget."""
    monkeypatch.setattr(module, "usable_cpus", lambda: 2.0)
    plan = tune_workers(Sleepy(0.02), 128, budget_s=2)
    assert {t.num_workers for t in plan.trials} == {0, 1, 2}
    assert plan.trials[0].samples_per_s <= 50  # a sleep is never shorter
    bench = Bench(Sleepy(0.02), 128, None, probe_s=0.05)
    here = bench.stages(0.2)
    assert 1 <= bench.probe <= 2
    assert here.waits
    assert here.batch_bytes == 128 * (32 + 8 + 16)  # x, n, key and index
    fast = Bench([{"x": n} for n in range(256)], 128, None, probe_s=1.0)
    assert not fast.stages(0.1).waits
    assert fast.probe == 128


def test_the_end_of_a_trial_is_no_part_of_its_rate(monkeypatch):
    """Leaving a loader waits for the batches that its workers are at."""

    class Loader:
        def __init__(self, *_, **__):
            pass

        def __iter__(self):
            try:
                while True:
                    time.sleep(0.005)
                    yield None
            finally:
                time.sleep(0.5)

    monkeypatch.setattr(trials, "StreamLoader", Loader)
    trial = Bench(Sleepy(), 1, None, probe_s=1.0).measure(2, "thread", 0.1)
    assert 60 < trial.samples_per_s <= 200  # 30 with the end


def test_the_plan_is_frozen():
    plan = LoaderPlan(0, "process", 2, 1.0, (), {"reading": 1.0}, "reading", 1, 1, 10**9, "")
    with pytest.raises(AttributeError):
        plan.num_workers = 3
    assert replace(plan, num_workers=3).num_workers == 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"budget_s": 0}, "budget_s=0 must be above 0"),
        ({"batch_size": 0}, r"batch_size=0 must be in \[1, 8\]"),
        ({"batch_size": 9}, r"batch_size=9 must be in \[1, 8\]"),
        ({"ram": "much"}, "ram='much' is not a size"),
    ],
)
def test_arguments_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        tune_workers([1] * 8, **{"batch_size": 2, **options})


@pytest.mark.parametrize(
    ("dataset", "match"),
    [
        ("shards", "dataset='shards' is a path; give tune_workers a ShardedDataset"),
        (iter([1]), "dataset is a list_iterator without a length and an index; tune_workers needs"),
    ],
)
def test_what_is_no_data_set_is_refused(dataset, match):
    with pytest.raises(TypeError, match=match):
        tune_workers(dataset, 2)


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_control_groups_of_version_2_limit_each_level(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    root = tmp_path / "fs"
    write(
        root / "a", cpu__max="50000 100000\n", memory__max="1000000\n", memory__current="900000\n"
    )
    write(root / "a", memory__stat="anon 5\ninactive_file 300000\n")
    write(root / "a/b", cpu__max="max 100000\n", memory__max="max\n", memory__current="5\n")
    assert usable_cpus(root, own) == 0.5
    assert usable_memory(root, own) == 1_000_000 - 600_000


def test_control_groups_of_version_1(tmp_path):
    own = tmp_path / "own"
    own.write_text("4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n")
    root = tmp_path / "fs"
    write(root / "cpu,cpuacct", cpu__cfs_quota_us="25000\n", cpu__cfs_period_us="100000\n")
    write(root / "memory", memory__limit_in_bytes="2000\n", memory__usage_in_bytes="500\n")
    assert usable_cpus(root, own) == 0.25
    assert usable_memory(root, own) == 1500
    write(root / "cpu,cpuacct", cpu__cfs_quota_us="-1\n")
    write(root / "memory", memory__limit_in_bytes=f"{2**63 - 4096}\n")
    assert usable_cpus(root, own) == usable_cpus(root, Path("/nowhere"))
    assert usable_memory(root, own) > 1500
