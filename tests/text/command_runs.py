"""Running the commands as a shell does."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from torsh_text.__main__ import main

SOURCES = Path(__file__).parents[2] / "torsh_text" / "src"
TEXTS = ["A cat sleeps", "Stocks fell sharply", "The kitten purrs", "Markets rallied today"]


def run_process(*arguments, check=True):
    environment = os.environ | {"PYTHONPATH": str(SOURCES), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "torsh_text", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=check,
        env=environment,
    )


def run(*arguments, check=True):
    """The same in this process, which has imported everything already."""
    out, status = io.StringIO(), 0
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(errors):
        patch.setattr(sys, "argv", ["torsh-text", *map(str, arguments)])
        patch.setattr("warnings.formatwarning", None)  # main sets its own
        try:
            main()
        except SystemExit as stop:
            errors.write(str(stop.code or ""))
            status = 1 if isinstance(stop.code, str) else stop.code or 0
    assert not (check and status), errors.getvalue()
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), errors.getvalue())


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
