import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import default_collate

from torsh_data import _tune as module
from torsh_data._machine import usable_cpus, usable_memory
from torsh_data._tune import LoaderPlan, Trial, tune_workers


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

    reasons = {"process": "processes", "thread": "threads"}

    def choose(*trials):
        chosen, why = module._choose(list(trials), reasons)
        return chosen.num_workers, chosen.workers, why

    here = trial(0, 100.0)
    assert choose(here, trial(1, 45.0), trial(2, 50.0))[0] == 0  # twice as fast in the loop
    assert "no workers: they reach 50%" in choose(here, trial(1, 45.0), trial(2, 50.0))[2]
    assert choose(here, trial(1, 80.0), trial(2, 81.0)) == (1, "process", "processes")
    assert choose(here, trial(1, 100.0), trial(2, 300.0), trial(4, 305.0))[0] == 2
    assert choose(here, trial(2, 300.0), trial(2, 310.0, "thread"))[1:] == ("thread", "threads")


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


def test_trials_end_at_the_knee(monkeypatch):
    """More workers that bring nothing are not tried further."""
    rates = {1: 100.0, 2: 190.0, 4: 200.0, 8: 900.0}
    monkeypatch.setattr(
        module._Bench,
        "measure",
        lambda self, count, kind, seconds: Trial(count, kind, rates[count], 0.1, 1000),
    )
    monkeypatch.setattr(module, "usable_cpus", lambda: 8.0)
    plan = tune_workers(Sleepy(0.01), 8, budget_s=5)
    assert [t.num_workers for t in plan.trials] == [0, 1, 2, 4, 1, 2, 4]
    assert plan.num_workers == 2  # within 5 % of the four
    assert "not more: 4 workers bring +5%" in str(plan)


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
