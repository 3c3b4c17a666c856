import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.text.command_runs import TEXTS, run, run_process
from torsh_text.__main__ import _as_options
from torsh_text._classify_command import classify
from torsh_text._record_commands import detect, summarize
from torsh_text._vector_commands import cluster, duplicates, embed, topics

pytest.importorskip("tyro")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "texts.txt"
    # a blank line behind the first and the third text: they are on lines 1, 3, 4 and 6
    path.write_text("{}\n\n{}\n{}\n  \n{}\n\n".format(*TEXTS), encoding="utf-8")
    return path


def test_doctor():
    found = json.loads(run_process("doctor", "--json").stdout)
    assert "grouped attention" in found["cpu"]
    assert {"torch", "transformers", "threads", "varlen options", "model hub"} <= set(found)
    assert "HF_HUB_OFFLINE is set" in found["model hub"]


def test_doctor_looks_into_the_model_cache(tmp_path, monkeypatch):
    commit = "0" * 40
    for name, files in (("dslim/bert-base-NER", ("config.json", "model.safetensors")),
                        ("sentence-transformers/all-MiniLM-L6-v2", ("config.json",))):  # fmt: skip
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        for file in files:
            (repository / "snapshots" / commit / file).write_text("{}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    found = json.loads(run_process("doctor", "--json").stdout)
    assert found["model cache"].startswith(str(tmp_path))
    assert found["dslim/bert-base-NER"] == "in the model cache"
    missing = "sentence-transformers/all-MiniLM-L6-v2"
    assert found[missing] == "not in the model cache"
    assert "hf download NAME" in found["models that are not here"]
    shown = run_process("doctor").stdout
    assert "cardiffnlp/twitter-roberta-base-sentiment-latest" in shown  # whole, at any width


def test_doctor_knows_an_encoder_that_needs_no_hub(minilm_path):
    remedy = json.loads(run("doctor", "--json").stdout)["encoder without the hub"]
    program = remedy.removeprefix("--model \"$(python -c '").removesuffix("')\"")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(minilm_path)


def test_the_table_shows_equal_scores_and_texts_as_they_are(tmp_path, minilm_path):
    path = tmp_path / "texts.txt"
    path.write_text("[/red] same :cat:\n[/red] same :cat:\n")
    shown = run("search", path, "same", "--k", 2, "--model", minilm_path).stdout
    assert shown.count("[/red] same :cat:") == 2


def test_errors_are_one_line(file):
    failed = run_process("search", file, "x", "--model", "nobody/nothing", check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("torsh-text: 'nobody/nothing' is not in the local model cache")
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (classify, {"via": "lm"}, "via='lm' compares labels; name them with --labels"),
        (classify, {"top_k": 2}, "top_k=2: sentiment gives one label"),
        (summarize, {"write": "x", "sentences": 2}, "sentences=2 chooses sentences, which --write"),
        (summarize, {"write": "x", "method": "mmr"}, "method='mmr' chooses sentences"),
        (summarize, {"write": "x", "model": "y"}, "model='y' chooses sentences"),
        (summarize, {"max_new_tokens": 9}, "max_new_tokens=9 needs --write"),
        (summarize, {"long": "error"}, "long='error' needs --write"),
        (classify, {"template": "{}"}, "template='{}' is for labels"),
        (classify, {"multi_label": True}, "multi_label=True: sentiment gives one label"),
        (classify, {"min_score": 0.2}, "min_score=0.2: sentiment gives one label"),
        (duplicates, {"model": "x"}, "model='x' is not for --method words"),
        (duplicates, {"cache": Path("c")}, "cache='c' is not for --method words"),
        (duplicates, {"method": "vectors", "threshold": 7.0}, "threshold=7.0 is not above 0"),
        (duplicates, {"threshold": 7.0}, "threshold=7.0 is not above 0"),
        (topics, {"method": "nmf"}, "--method nmf needs a number of topics; give it with --k"),
        (topics, {"method": "nmf", "k": 2, "model": "x"}, "model='x' is not for --method nmf"),
        (topics, {"method": "nmf", "k": 2, "long": "mean"}, "long='mean' is not for --method nmf"),
        (topics, {"method": "hdbscan", "k": 2}, "k=2; it has to be 'auto' with method='hdbscan'"),
        (cluster, {"method": "hdbscan", "k": 3}, "k=3; it has to be 'auto' with method='hdbscan'"),
        (classify, {"labels": ("good,bad",)}, "put spaces between names: --labels good bad"),
        (detect, {"languages": ("de, fr",)}, "put spaces between names: --languages de fr"),
        (
            detect,
            {"out": Path("x.csv")},
            "gets a record a line; end its name in .jsonl",
        ),
        (
            topics,
            {"out": Path("x.jsonl")},
            "gets one JSON value; end its name in .json",
        ),
        (topics, {"save": Path("/none/x.st")}, "save='/none/x.st': there is no folder '/none'"),
        (topics, {"plot": Path("/none/x.svg")}, "plot='/none/x.svg': there is no folder '/none'"),
        (topics, {"plot": Path("x.svg"), "save": Path("x.svg")}, "save and plot are both 'x.svg'"),
        (duplicates, {"method": "vectors", "ngram": 3}, "ngram='3' is not for --method vectors"),
        (embed, {"field": "body"}, "field='body' is for .jsonl files"),
        (classify, {"out": Path("nowhere/out.jsonl")}, "there is no folder 'nowhere'"),
        (cluster, {"out": Path("/")}, "out='/' is a folder"),
    ],
)
def test_no_option_is_ignored(file, command, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        command(file, **options)


@pytest.mark.parametrize("cached", [False, True])
def test_ctrl_c_promises_only_what_is_true(file, minilm_path, tmp_path, monkeypatch, cached):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    command = ["embed", file, "--model", minilm_path]
    command += ["--cache", tmp_path / "cache"] if cached else []
    monkeypatch.setattr("torsh_text.Encoder.encode", interrupted)
    kept = "the same command goes on from here"
    promise = "; " + (
        kept if cached else "--cache FOLDER would keep what it computes for the next run"
    )
    assert run(*command, check=False).stderr == f"torsh-text: interrupted{promise}"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("pass top_k=1 instead", "pass --top-k 1 instead"),
        ("use long='mean' or long='error'", "use --long mean or --long error"),
        ("labels=['good', 'so so'] has 2 names", "--labels good 'so so' has 2 names"),
        ("multi_label=True needs via='nli'", "--multi-label needs --via nli"),
        ("min_score=0.5.", "--min-score 0.5."),
        ("load it with dtype='float32'", "load it with dtype='float32'"),
        ("template=x and model=None and along='a'", "template=x and model=None and along='a'"),
    ],
)
def test_messages_name_options_as_they_are_typed(message, shown):
    names = ["top_k", "long", "labels", "multi_label", "via", "min_score", "template", "model"]
    assert _as_options(message, names) == shown


def test_errors_and_warnings_speak_the_commands_language(file, minilm_path):
    failed = run("classify", file, "--via", "lm", check=False)
    assert failed.stderr == "torsh-text: --via lm compares labels; name them with --labels"
    failed = run("embed", ".", check=False)
    assert failed.stderr == "torsh-text: '.' is a folder; name a file of texts"
    with file.open("a") as more:
        more.write("word " * 600 + "\n")
    done = run_process("classify", file, "--labels", "a", "b", "--model", minilm_path)
    assert "--long mean" in done.stderr
    assert "long=" not in done.stderr


def test_every_window_tells_what_it_cut(tmp_path, minilm_path):
    path = tmp_path / "t.txt"
    lines = ["word " * 300] + ["short"] * 1023
    path.write_text("\n".join([*lines, *lines[1:], "other " * 300]))
    done = run_process("classify", path, "--labels", "a", "b", "--model", minilm_path, "--json")
    assert len(re.findall(r"^torsh-text: 1 of 2 ", done.stderr, re.MULTILINE)) == 2
