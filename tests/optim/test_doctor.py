import json
import os
import subprocess
import sys

import pytest
import torch

from torsh_optim._doctor import examine


def test_examine_covers_devices_and_types() -> None:
    found = examine()
    assert len(found) == 5 * (1 + torch.cuda.device_count())
    cpu = {finding.dtype: finding for finding in found if finding.device == "cpu"}
    assert cpu["float32"].implementation == "cpu-fused"
    assert cpu["complex64"].implementation == "reference"
    assert "real parameters" in cpu["complex64"].remedy
    for finding in found:
        assert finding.max_error is not None
        assert finding.max_error <= 8.0, finding  # ten steps of rounding


def test_command_prints_json() -> None:
    pytest.importorskip("tyro")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "torsh_optim", "doctor", "--json", "--no-run"],
        capture_output=True,
        text=True,
        check=True,
        env=env | {"PYTHONPATH": "torsh_optim/src"},
    )
    report = json.loads(run.stdout)
    assert report["versions"]["torch"] == torch.__version__
    assert report["adamw"][0] == {
        "device": "cpu",
        "dtype": "float32",
        "implementation": "cpu-fused",
        "max_error": None,
        "remedy": "",
    }
