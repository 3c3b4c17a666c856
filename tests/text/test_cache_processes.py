import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

JOBS = Path(__file__).with_name("cache_process.py")


def in_process(job, folder):
    run = subprocess.run(
        [sys.executable, str(JOBS), job, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # children are forked
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_killed_at_every_step(tmp_path):
    steps = in_process("kills", tmp_path)
    assert len(steps) == 5
    assert min(steps.values()) >= 12
    assert sum(steps.values()) >= 100


def test_killed_at_random_times(tmp_path):
    found = in_process("random_kills", tmp_path)
    assert found["deaths"] >= 10  # of 59; the others were done before
    assert found["said"] >= 20


def test_processes_write_at_the_same_time(tmp_path):
    found = in_process("writers", tmp_path)
    assert found["rows"] == found["known"] == 610
    assert found["reads"] > 1


def test_processes_write_within_a_limit(tmp_path):
    found = in_process("small_writers", tmp_path)
    assert 0 < found["known"] <= found["rows"] <= 150


def test_a_full_disk_leaves_the_cache_whole(tmp_path):
    assert in_process("full_disk", tmp_path / "cache") == {"refused": 9}


def test_a_disk_that_fills_does_not_kill_a_reader(tmp_path):
    found = in_process("disk_full_under_a_reader", tmp_path)
    assert found == {"status": 0, "during": 300, "after": 300, "kept": 300, "rows": 500}


def test_a_file_that_is_cut_does_not_kill_a_reader(tmp_path):
    assert in_process("file_cut_under_a_reader", tmp_path) == {"left": 100, "known": 400}


def test_a_folder_that_may_not_be_written(tmp_path):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        Path(folder).chmod(0o755)
        found = in_process("read_only_folder", folder)
    assert set(found) == {"cache", "new"}
    assert all("cannot be written; use readonly=True" in message for message in found.values())
