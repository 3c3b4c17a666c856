import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from torsh_text.__main__ import _read_texts

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
    # a blank line behind the first and the third text: they are on lines 1, 3, 4 and 6
    path.write_text("{}\n\n{}\n{}\n  \n{}\n\n".format(*TEXTS), encoding="utf-8")
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
    assert {match["line"] for match in cats["matches"]} == {1, 4}
    assert {match["line"] for match in money["matches"]} == {3, 6}
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
    _run("embed", file, "--out", out, "--model", minilm_path)  # vectors may be replaced


def test_embed_overwrites_nothing_else(tmp_path, minilm_path):
    source, beside = tmp_path / "t.jsonl", tmp_path / "t.json"
    source.write_text('{"text": "A cat"}\n')
    beside.write_text("mine")
    _run("embed", source, "--model", minilm_path)
    assert load_file(tmp_path / "t.safetensors")["vectors"].shape == (1, 384)
    for target, why in ((source, "is the file of the texts"), (beside, "is no file of vectors")):
        failed = _run("embed", source, "--out", target, check=False)
        assert failed.returncode == 1
        assert why in failed.stderr
    assert source.read_text() == '{"text": "A cat"}\n'
    assert beside.read_text() == "mine"


def test_the_table_shows_equal_scores_and_texts_as_they_are(tmp_path, minilm_path):
    path = tmp_path / "texts.txt"
    path.write_text("[/red] same :cat:\n[/red] same :cat:\n")
    shown = _run("search", path, "same", "--k", 2, "--model", minilm_path).stdout
    assert shown.count("[/red] same :cat:") == 2


def test_only_line_feeds_end_lines(tmp_path):
    path = tmp_path / "texts.jsonl"
    texts = ["one\u2028line", "two\x85lines", "three"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_bytes("\r\n\n".join(lines).encode())
    assert _read_texts(path, "text") == (texts, [1, 3, 5])
    plain = tmp_path / "texts.txt"
    plain.write_bytes("one\u2028line\r\n\x0b\ntwo".encode())
    assert _read_texts(plain, "text") == (["one\u2028line", "two"], [1, 3])
    path.write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(SystemExit, match=r"texts\.jsonl:2 .* field 'text' that is a string"):
        _read_texts(path, "text")


def test_errors_are_one_line(file):
    failed = _run("search", file, "x", "--model", "nobody/nothing", check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("torsh-text: 'nobody/nothing' is not in the local model cache")
    assert "Traceback" not in failed.stderr
