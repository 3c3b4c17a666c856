import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import torsh_quant
from torsh_quant import __main__, _doctor

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "torsh_quant" / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "torsh_quant", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_doctor_json():
    pytest.importorskip("tyro")
    done = run("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["torsh_quant"] == torsh_quant.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert len(found["self_check"]) == 2
    assert all(found["self_check"].values())
    assert {path["scheme"] for path in found["paths"]} == {"w8a8", "w4a8", "w8a16", "w4a16"}


def test_doctor_tables(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    __main__.doctor()
    text = capsys.readouterr().out
    assert "exact" in text
    assert "WRONG" not in text
    assert "ONEDNN_MAX_CPU_ISA=AVX2 keeps a library" in text


def test_doctor_fails_where_sums_are_wrong(capsys, monkeypatch):
    pytest.importorskip("rich")
    wrong = replace(_doctor.diagnose(), self_check={"linear: a kernel": False})
    monkeypatch.setattr(__main__, "diagnose", lambda: wrong)
    with pytest.raises(SystemExit):
        __main__.doctor()
    assert "WRONG" in capsys.readouterr().out


def test_without_its_extra_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro.extras", None)
    with pytest.raises(SystemExit, match=r"pip install 'torsh-quant\[cli\]'"):
        __main__.main()
