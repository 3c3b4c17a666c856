"""The demo runs on the packages' present public names, and says so when a step fails."""

import os
import re
import subprocess
import sys

import pytest

from tests.house.packages import PACKAGES, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "docs/examples/demo", *map(str, arguments)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"} | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=800)


def test_demo_uses_all_packages_and_writes_one_page(tmp_path):
    result = run("--quick", "--out", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    page = (tmp_path / "report.html").read_text()
    for package in PACKAGES:
        assert f"✓ {package}" in result.stdout
        assert package in page
    assert page.count("<svg") >= 6
    assert not re.search(r'(src|href)="(?!#|data:)', page), "the page must not need other files"


def test_failing_step_says_what_to_do_and_fails_the_whole(tmp_path):
    (tmp_path / "digits").write_text("in the way")  # a file where the shards should go
    result = run("--quick", "--out", tmp_path, "--only", "stream")
    assert result.returncode == 1
    assert "✗ torsh_data" in result.stdout
    assert "Free some disk space" in result.stdout
    assert "Traceback" in (tmp_path / "stream.error.txt").read_text()
