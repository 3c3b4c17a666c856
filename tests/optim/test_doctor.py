import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from torsh_optim import SGD, _doctor
from torsh_optim._doctor import ALGORITHMS, TOLERANCE, Finding, doctor, examine, kernel_notes, notes


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return examine()


def test_examine_covers_devices_types_and_algorithms(findings: list[Finding]) -> None:
    assert len(findings) == 5 * len(ALGORITHMS) * (1 + torch.cuda.device_count())
    assert len({(f.device, f.dtype, f.algorithm) for f in findings}) == len(findings)
    cpu = {(f.dtype, f.algorithm): f for f in findings if f.device == "cpu"}
    for algorithm in ("AdamW", "AdvancedAdam with the norm", "LAMB", "SGD"):
        assert cpu["float32", algorithm].implementation == "cpu-fused"
    assert cpu["float32", "Lion"].implementation == "cpu-chunked"
    for algorithm in ("LAMB", "SGD"):
        assert cpu["bfloat16", algorithm].implementation == "cpu-chunked"
    for algorithm in ALGORITHMS:
        found = cpu["complex64", algorithm]
        assert found.implementation == "reference"
        assert "real parameters" in found.remedy
        assert cpu["float64", algorithm].remedy == ""


def test_everything_is_right_here(findings: list[Finding]) -> None:
    for finding in findings:
        assert finding.max_error is not None
        assert finding.max_error <= 8.0, finding  # ten steps of rounding
        assert not finding.wrong


def test_without_a_run_nothing_is_compared() -> None:
    assert {finding.max_error for finding in examine(run=False)} == {None}


class _Wrong(SGD):
    """An optimizer whose fused update forgets an element in every step."""

    def _update_cpu(self, batch: Any) -> None:
        before = [param[0].clone() for param in batch.params]
        super()._update_cpu(batch)
        for param, first in zip(batch.params, before, strict=True):
            param[0] = first


def test_a_wrong_result_is_found_and_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(_doctor, "ALGORITHMS", {"SGD": (_Wrong, {"lr": 1e-3})})
    with pytest.raises(SystemExit) as end:
        doctor()
    assert end.value.code == 1
    assert "SGD WRONG" in capsys.readouterr().out
    found = examine()[0]
    assert found.max_error is not None
    assert found.max_error > TOLERANCE


def test_nan_is_wrong() -> None:
    assert Finding("SGD", "cpu", "float32", "triton", float("nan"), "").wrong
    assert not Finding("SGD", "cpu", "float32", "triton", None, "").wrong


def test_one_thread_is_noted() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        found = any("one thread" in note for note in notes())
    finally:
        torch.set_num_threads(threads)
    assert found == (torch.multiprocessing.cpu_count() > 1)


def test_why_the_kernels_are_not_used_is_noted() -> None:
    for triton in (True, False):
        [note] = kernel_notes(cuda=False, triton=triton)
        assert "no CUDA device" in note
        assert "cpu-fused" in note
    [note] = kernel_notes(cuda=True, triton=False)
    assert "pip install triton" in note
    assert kernel_notes(cuda=True, triton=True) == []
    assert any("no CUDA device" in note for note in notes()) != torch.cuda.is_available()


def test_command_prints_json() -> None:
    pytest.importorskip("tyro")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "torsh_optim", "doctor", "--json", "--no-run"],
        capture_output=True,
        text=True,
        check=True,
        env=env | {"PYTHONPATH": "torsh_optim/src"},
    )
    report = json.loads(run.stdout)
    assert report["versions"]["torch"] == torch.__version__
    assert isinstance(report["notes"], list)
    assert report["findings"][0] == {
        "algorithm": "AdamW",
        "device": "cpu",
        "dtype": "float32",
        "implementation": "cpu-fused",
        "max_error": None,
        "remedy": "",
    }
