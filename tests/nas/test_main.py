import json
import subprocess
import sys
from pathlib import Path

import pytest

import torsh_nas as nas
from tests.nas.nets import CellNet, generator

pytest.importorskip("tyro")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(nas.__file__).parents[1])
    code = (
        f"import sys; sys.path.insert(0, {source!r}); from torsh_nas.__main__ import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_doctor() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torsh_nas", "doctor", "--json"],
        capture_output=True, text=True, timeout=120, check=False,
        env={"PYTHONPATH": str(Path(nas.__file__).parents[1]), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["torsh_nas"] == nas.__version__
    assert report["threads"] >= 1
    assert "256 x 256 layer takes" in report["clock"]
    assert "torsh-nas doctor" in command("doctor").stdout


def test_show(tmp_path: Path) -> None:
    arch = nas.space(CellNet()).sample(generator())
    arch.to_json(tmp_path / "arch.json")
    out = tmp_path / "cell.svg"
    done = command("show", str(tmp_path / "arch.json"), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert all(label in done.stdout for label in arch)
    assert "<svg" in out.read_text()


def test_show_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    done = command("show", str(path))
    assert done.returncode == 1
    assert done.stderr.startswith("torsh-nas show: not a torsh_nas.architecture file")
    assert command("show", str(tmp_path / "missing.json")).returncode == 1
