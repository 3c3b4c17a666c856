import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytest.importorskip("tyro")

SOURCES = Path(__file__).parents[2] / "torsh_text" / "src"
TEXTS = ["A cat sleeps", "Stocks fell sharply", "The kitten purrs", "Markets rallied today"]


def _run(*arguments, check=True):
    environment = os.environ | {"PYTHONPATH": str(SOURCES), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "torsh_text", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=check,
        env=environment,
    )


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n\n", encoding="utf-8")
    return path


def test_doctor():
    found = json.loads(_run("doctor", "--json").stdout)
    assert "grouped attention" in found["cpu"]
    assert {"torch", "transformers", "threads", "varlen options", "model hub"} <= set(found)
    assert "HF_HUB_OFFLINE" in found["model hub"]


def test_search(file, minilm_path):
    queries = ("kitty", "stock market prices")
    run = _run("search", file, *queries, "--k", 2, "--model", minilm_path, "--json")
    cats, money = json.loads(run.stdout)
    assert cats["query"] == "kitty"
    assert {match["line"] for match in cats["matches"]} == {0, 2}
    assert {match["line"] for match in money["matches"]} == {1, 3}
    assert cats["matches"][0]["score"] >= cats["matches"][1]["score"]


def test_cluster_of_jsonl(tmp_path, minilm_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    run = _run("cluster", path, "--k", 2, "--field", "body", "--model", minilm_path, "--json")
    found = json.loads(run.stdout)
    assert found["labels"] == [0, 1, 0, 1]
    assert [group["size"] for group in found["groups"]] == [2, 2]
    failed = _run("cluster", path, "--model", minilm_path, check=False)
    assert failed.returncode == 1
    assert "texts.jsonl:1 is no JSON object with a field 'text'" in failed.stderr


def test_embed(file, minilm_path, tmp_path, minilm):
    out = tmp_path / "v.safetensors"
    run = _run("embed", file, "--out", out, "--model", minilm_path)
    assert "4 vectors of 384 entries" in run.stdout
    assert (load_file(out)["vectors"] - minilm.encode(TEXTS)).abs().max() <= 2e-6
    assert json.loads((tmp_path / "v.json").read_text())["texts"] == 4


def test_errors_are_one_line(file):
    failed = _run("search", file, "x", "--model", "nobody/nothing", check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("torsh-text: 'nobody/nothing' is not in the local model cache")
    assert "Traceback" not in failed.stderr
