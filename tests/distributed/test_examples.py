import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "docs" / "examples" / "train_on_processes.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.parametrize(
    ("command", "processes"),
    [
        ([SCRIPT], 1),
        pytest.param([SCRIPT, "2"], 2, marks=pytest.mark.slow),
        pytest.param([*TORCHRUN, SCRIPT], 2, marks=pytest.mark.slow),
    ],
)
def test_the_tutorial_starts_three_ways(command, processes):
    pytest.importorskip("sklearn")
    env = os.environ | {
        "PYTHONPATH": str(ROOT / "torsh_dist" / "src"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, timeout=200, check=True
    )
    (line,) = re.findall(r"(\d) process\(es\): loss ([\d.]+), sent ([\d.]+)x", done.stdout)
    assert int(line[0]) == processes
    assert float(line[1]) == pytest.approx(0.26, abs=0.02)
    assert float(line[2]) == pytest.approx(1.0 if processes == 1 else 0.27, abs=0.01)
