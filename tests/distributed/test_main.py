import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torsh_dist._doctor import examine

SOURCES = str(Path(__file__).parents[2] / "torsh_dist" / "src")


def torsh_dist(*arguments):
    env = os.environ | {"PYTHONPATH": SOURCES}
    command = [sys.executable, "-m", "torsh_dist", *arguments]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, check=True
    ).stdout


def test_doctor_starts_two_processes_and_prints_json():
    pytest.importorskip("tyro")
    report = json.loads(torsh_dist("doctor", "--json"))
    found = {one["what"]: one["found"] for one in report["findings"]}
    assert "gloo" in found["backends"]
    assert found["two processes"].startswith("all-reduce of 4 MB through loopback in")


def test_doctor_prints_a_table():
    pytest.importorskip("tyro")
    pytest.importorskip("rich")
    assert "host name" in torsh_dist("doctor", "--no-run")


def test_an_absent_interface_has_a_remedy(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "absent0")
    remedies = {one.what: one.remedy for one in examine(run=False)}
    assert "GLOO_SOCKET_IFNAME=absent0 does not exist" in remedies["interfaces"]
