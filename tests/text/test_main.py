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


def test_errors_are_one_line(file):
    failed = _run("search", file, "x", "--model", "nobody/nothing", check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("torsh-text: 'nobody/nothing' is not in the local model cache")
    assert "Traceback" not in failed.stderr


def test_embed_keeps_vectors_in_a_cache(file, minilm_path, tmp_path):
    cache = tmp_path / "cache"
    for out in ("a", "b"):
        target = tmp_path / f"{out}.safetensors"
        _run("embed", file, "--out", target, "--cache", cache, "--model", minilm_path)
    first, second = (load_file(tmp_path / f"{out}.safetensors")["vectors"] for out in "ab")
    assert first.equal(second)
    assert any(cache.iterdir())


def test_topics(file, minilm_path, tmp_path):
    picture = tmp_path / "map.svg"
    run = _run(
        "topics", file, "--k", 2, "--model", minilm_path, "--plot", picture,
        "--save", tmp_path / "model", "--json",
    )  # fmt: skip
    found = json.loads(run.stdout)
    assert found["labels"] == [0, 1, 0, 1]
    assert {"cat", "kitten"} & set(found["topics"][0]["words"])
    assert "<svg" in picture.read_text()


def _records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_detect(tmp_path):
    path, out = tmp_path / "t.txt", tmp_path / "out.jsonl"
    path.write_text("Guten Morgen, wie geht es dir?\n\nOù est la gare ?\n", encoding="utf-8")
    run = _run("detect", path, "--out", out)
    assert "2 records" in run.stdout
    found = _records(out)
    assert [(r["line"], r["languages"][0]["name"]) for r in found] == [(1, "German"), (3, "French")]
    failed = _run("detect", path, "--out", out, check=False)
    assert "exists; name another or add --overwrite" in failed.stderr
    assert "de 0." in _run("detect", path).stdout or "de 1." in _run("detect", path).stdout
    two = _run("detect", path, "--languages", "en", "fr", "--top-k", 2, "--json").stdout
    assert all(len(json.loads(line)["languages"]) == 2 for line in two.splitlines())


def test_classify_by_named_labels(file, minilm_path, tmp_path):
    out = tmp_path / "out.jsonl"
    _run("classify", file, "--labels", "animals", "finance", "--model", minilm_path, "--out", out)
    names = [record["labels"][0]["name"] for record in _records(out)]
    assert names == ["animals", "finance", "animals", "finance"]


def test_summarize_by_sentences(tmp_path, minilm_path):
    path = tmp_path / "t.txt"
    path.write_text("Cats sleep a lot. Kittens sleep even more. Stocks fell. Cats purr.\n")
    run = _run("summarize", path, "--sentences", 2, "--model", minilm_path, "--json")
    record = json.loads(run.stdout)
    source = path.read_text()
    parts = [source[s["start"] : s["end"]] for s in record["sentences"]]
    assert len(parts) == 2
    assert record["summary"] == " ".join(parts)


def test_ner_and_classifier(tmp_path):
    """Random weights: that models, records and pages come through."""
    transformers = pytest.importorskip("transformers")
    from tests.text.architectures import make_tokenizer, random_texts

    config = transformers.AutoConfig.for_model(
        "bert", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=500, id2label={0: "O", 1: "B-PER", 2: "I-PER"},
        label2id={"O": 0, "B-PER": 1, "I-PER": 2}, initializer_range=1.0,
    )  # fmt: skip
    folder = tmp_path / "model"
    make_tokenizer().save_pretrained(folder)
    transformers.BertForTokenClassification(config).save_pretrained(folder)
    texts = random_texts([5, 9])
    path = tmp_path / "t.txt"
    path.write_text("\n".join(texts))
    out, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    _run("ner", path, "--model", folder, "--out", out)
    for record, text in zip(_records(out), texts, strict=True):
        for entity in record["entities"]:
            assert text[entity["start"] : entity["end"]] == entity["text"]
    _run("ner", path, "--model", folder, "--html", page)
    assert "<html" in page.read_text()
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    run = _run("classify", path, "--model", folder, "--top-k", 3, "--json")
    for line in run.stdout.splitlines():
        labels = json.loads(line)["labels"]
        assert sum(label["score"] for label in labels) == pytest.approx(1.0, abs=1e-5)
