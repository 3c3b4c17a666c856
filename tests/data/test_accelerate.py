"""accelerate keeps the stream's place with its own checkpoints, on one process and on two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torsh_data import StreamLoader

SCRIPT = Path(__file__).with_name("accelerate_process.py")


def run(folder, processes, steps, what):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(SCRIPT), str(folder), str(steps), what]
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root / "torsh_data" / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    name = "begun" if what == "begin" else "resumed"
    ranks = [json.loads((folder / f"{name}_{r}.json").read_text()) for r in range(processes)]
    return [[n for part in parts for n in part] for parts in zip(*ranks, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_goes_on_with_another_number_of_processes(tmp_path, before, after):
    samples = [{"x": n} for n in range(120)]
    loader = StreamLoader(samples, 12, seed=3, rank=0, world_size=1)
    unbroken = [batch["index"].tolist() for batch in loader]
    begun = run(tmp_path, before, 4, "begin")
    resumed = run(tmp_path, after, 4, "resume")
    assert begun + resumed == unbroken
