import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

JOBS = Path(__file__).with_name("kill_process.py")


def run(job, folder):
    done = subprocess.run(
        [sys.executable, str(JOBS), job, str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_writer_killed_at_any_step_loses_no_finished_shard(tmp_path):
    steps = run("writer_steps", tmp_path)
    assert steps["shards"] >= 4
    assert steps["first"] > 50
    assert steps["second"] > 15


@pytest.mark.slow
def test_writers_killed_at_random_end_with_the_bytes_of_an_unbroken_run(tmp_path):
    counts = run("writer_random", tmp_path)
    assert counts["deaths"] >= 100
    assert counts["most_lives"] > 2


@pytest.mark.slow
def test_killed_workers_and_workers_of_a_killed_writer_lose_nothing(tmp_path):
    counts = run("workers_random", tmp_path)
    assert counts["main"] >= 4
    assert counts["worker"] >= 4


@pytest.mark.slow
def test_a_reader_killed_at_random_delivers_every_sample_once(tmp_path):
    counts = run("reader_random", tmp_path)
    assert counts["deaths"] >= 100
    assert counts["finished"] >= 1
    assert counts["leaked"] == 0
    assert counts["orphans"] == 0


def test_a_writer_needs_no_more_memory_for_ten_times_its_limit(tmp_path):
    counts = run("memory", tmp_path)
    assert counts["written"] > 9 * counts["room"]
