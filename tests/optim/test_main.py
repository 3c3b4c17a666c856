import os
import subprocess
import sys

import pytest

import torsh_optim

ENV = {**os.environ, "PYTHONPATH": "torsh_optim/src", "COLUMNS": "100"}


def command(*args: str, blocked: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-m", "torsh_optim"]
    if blocked is not None:
        start = [
            "-c",
            f"import sys, runpy; sys.modules[{blocked!r}] = None; "
            "runpy.run_module('torsh_optim', run_name='__main__', alter_sys=True)",
        ]
    return subprocess.run(
        [sys.executable, "-W", "error", *start, *args], capture_output=True, text=True, env=ENV
    )


def test_bare_command_prints_its_help() -> None:
    pytest.importorskip("tyro")
    run = command()
    assert run.returncode == 0, run.stderr
    assert "usage: torsh-optim" in run.stdout
    assert "--version" in run.stdout
    for name in ("groups", "convert", "doctor"):
        assert f"• {name} " in run.stdout


def test_help_names_the_options_as_they_are_typed() -> None:
    pytest.importorskip("tyro")
    run = command("convert", "--help")
    assert "--from {torsh,torch,apex,te,bnb,deepspeed}" in run.stdout
    assert "from_" not in run.stdout


def test_groups() -> None:
    pytest.importorskip("tyro")
    pytest.importorskip("torchvision")
    run = command("groups", "torchvision:resnet18", "--layer-decay", "0.5", "--json")
    assert run.returncode == 0, run.stderr
    assert '"model": "torchvision:resnet18"' in run.stdout


def test_version_needs_no_extra() -> None:
    run = command("--version", blocked="tyro")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == f"torsh-optim {torsh_optim.__version__}\n"


@pytest.mark.parametrize("blocked", ["tyro", "rich"])
def test_without_the_extra_one_line_says_how_to_get_it(blocked: str) -> None:
    run = command("doctor", blocked=blocked)
    assert run.returncode == 1
    assert run.stderr.strip() == (
        "torsh-optim needs its command-line extra: pip install 'torsh-optim[cli]'"
    )


def test_missing_file_is_one_line() -> None:
    pytest.importorskip("tyro")
    run = command("convert", "none.pt", "other.pt", "--from", "torch", "--to", "torsh")
    assert run.returncode == 1
    assert len(run.stderr.strip().splitlines()) == 1
    assert "none.pt" in run.stderr
