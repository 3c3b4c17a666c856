import json
import os
import subprocess
import sys

import pytest
import torch

from torsh_data import write_shards

pytest.importorskip("tyro")


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "torsh_data", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )


@pytest.fixture
def folder(tmp_path):
    samples = ({"x": torch.full((4,), n), "text": f"{n}"} for n in range(500))
    write_shards(samples, tmp_path / "data", shard_bytes="8kB", block_bytes="1kB")
    return tmp_path / "data"


def test_doctor_says_what_there_is():
    result = run("doctor", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["torch"] == torch.__version__
    assert facts["advice"] == []


def test_inspect_shows_the_contents(folder):
    result = run("inspect", folder, "--json", "--window", "4kB", "--batch-size", "32")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["rows"] == 500 == sum(facts["files"].values())
    assert facts["shards"] == len(facts["files"]) > 1
    assert facts["columns"]["column text"] == "string"
    assert facts["a_batch_of_32_is_worth"] > 1
    table = run("inspect", folder)
    assert "column text" in table.stdout


def test_verify_names_the_damage_and_fails(folder):
    good = run("verify", folder)
    assert good.returncode == 0
    assert "all as written" in good.stdout
    path = folder / "shard-00001.arrow"
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)
    bad = run("verify", folder)
    assert bad.returncode == 1
    assert "shard-00001.arrow: block" in bad.stdout
    path.unlink()
    missing = run("verify", folder)
    assert missing.returncode == 1
    assert "shard-00001.arrow is missing" in missing.stderr


def test_without_tyro_the_extra_is_named(tmp_path):
    (tmp_path / "tyro").mkdir()
    (tmp_path / "tyro" / "__init__.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    result = run("doctor", PYTHONPATH=path)
    assert result.returncode == 1
    assert result.stderr.strip().endswith("pip install 'torsh-data[cli]'")
