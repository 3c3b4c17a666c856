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


def test_convert_write_and_sheet(tmp_path):
    images = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    for name, colour in (("night", "black"), ("snow", "white")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for n in range(3):
            images.new("RGB", (8, 8), colour).save(tmp_path / "pictures" / name / f"{n}.png")
    done = run("convert", tmp_path / "pictures", tmp_path / "shards", "--shuffle-seed", 0)
    assert done.returncode == 0, done.stderr
    assert "6 samples in 1 shards" in done.stdout
    drawn = run("sheet", tmp_path / "shards", tmp_path / "s.png", "--samples", 2)
    assert drawn.returncode == 0, drawn.stderr
    with images.open(tmp_path / "s.png") as picture:
        assert picture.size[0] > 100
    refused = run("sheet", tmp_path / "shards", tmp_path / "s.png", "--column", "picture")
    assert refused.returncode != 0
    assert refused.stderr.strip() == "torsh-data: no column 'picture'; there are ['image', 'label']"
    for name, rows in (("a", 4), ("b", 3)):
        lines = "".join(json.dumps({"n": n}) + "\n" for n in range(rows))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    joined = run("write", tmp_path / "both", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert "7 samples in 1 shards" in joined.stdout
    again = run("write", tmp_path / "both", tmp_path / "a.jsonl")
    assert again.returncode != 0
    assert again.stderr.startswith("torsh-data: ")
    nothing = run("convert", tmp_path / "nowhere", tmp_path / "out")
    assert nothing.stderr.startswith("torsh-data: ")
    assert "Traceback" not in nothing.stderr
