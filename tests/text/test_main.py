import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from safetensors.torch import load_file

from torsh_text.__main__ import main
from torsh_text._classify_command import classify
from torsh_text._jsonl import partial_of, read_texts, write_records
from torsh_text._record_commands import ner, paraphrase, summarize
from torsh_text._record_run import origin
from torsh_text._vector_commands import cluster, duplicates, embed, search, topics

pytest.importorskip("tyro")

SOURCES = Path(__file__).parents[2] / "torsh_text" / "src"
TEXTS = ["A cat sleeps", "Stocks fell sharply", "The kitten purrs", "Markets rallied today"]


def _run_process(*arguments, check=True):
    environment = os.environ | {"PYTHONPATH": str(SOURCES), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "torsh_text", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=check,
        env=environment,
    )


def _run(*arguments, check=True):
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


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "texts.txt"
    # a blank line behind the first and the third text: they are on lines 1, 3, 4 and 6
    path.write_text("{}\n\n{}\n{}\n  \n{}\n\n".format(*TEXTS), encoding="utf-8")
    return path


def test_doctor():
    found = json.loads(_run_process("doctor", "--json").stdout)
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
    found = json.loads(_run_process("doctor", "--json").stdout)
    assert found["model cache"].startswith(str(tmp_path))
    assert found["dslim/bert-base-NER"] == "in the model cache"
    assert found["sentence-transformers/all-MiniLM-L6-v2"] == "not in the model cache"


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
    assert "texts.jsonl:1 has no field 'text' but 'body'; name the one" in failed.stderr


def test_embed(file, minilm_path, tmp_path, minilm):
    out = tmp_path / "v.safetensors"
    run = _run("embed", file, "--out", out, "--model", minilm_path)
    assert "4 vectors of 384 entries" in run.stdout
    assert (load_file(out)["vectors"] - minilm.encode(TEXTS)).abs().max() <= 2e-6
    _run("embed", file, "--out", out, "--model", minilm_path)  # vectors may be replaced


def test_embed_overwrites_nothing_else(tmp_path, minilm_path):
    source, beside = tmp_path / "t.jsonl", tmp_path / "mine.safetensors"
    source.write_text('{"text": "A cat"}\n')
    beside.write_text("mine")
    _run("embed", source, "--model", minilm_path)
    assert load_file(tmp_path / "t.safetensors")["vectors"].shape == (1, 384)
    cases = [
        (source, "vectors are written as safetensors"),
        (beside, "is no file of vectors"),
        (tmp_path / "v.npy", "end the name in .safetensors"),
        (tmp_path / "none" / "v.safetensors", "there is no folder"),
    ]
    for target, why in cases:
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
    failed = _run_process("search", file, "x", "--model", "nobody/nothing", check=False)
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
        (duplicates, {"method": "vectors", "ngram": 3}, "ngram='3' is not for --method vectors"),
        (embed, {"field": "body"}, "field='body' is for .jsonl files"),
        (classify, {"out": Path("nowhere/out.jsonl")}, "there is no folder 'nowhere'"),
        (cluster, {"out": Path("/")}, "out='/' is a folder"),
    ],
)
def test_no_option_is_ignored(file, command, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        command(file, **options)


@pytest.mark.parametrize(
    ("via", "model"),
    [("auto", "all-MiniLM"), ("nli", "ModernBERT-base-zeroshot"), ("lm", "SmolLM2-360M")],
)
def test_each_way_has_its_model(file, monkeypatch, via, model):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=model):
        classify(file, labels=("animals", "finance"), via=via)


def test_the_standard_input_needs_a_name_for_its_vectors(tmp_path, minilm_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("A cat\n"))
    with pytest.raises(ValueError, match="have no file; name it with --out"):
        embed(Path("-"))
    out = tmp_path / "v.safetensors"
    for _ in range(2):  # the second time it is there
        monkeypatch.setattr(sys, "stdin", io.StringIO("A cat\n"))
        embed(Path("-"), out=out, model=str(minilm_path))
    assert load_file(out)["vectors"].shape == (1, 384)


def test_search_uses_the_prompts_of_the_model(file, minilm, tmp_path):
    from torsh_text import Encoder

    folder, out = tmp_path / "model", tmp_path / "found.json"
    prompts = {"query": "Markets and stocks: ", "passage": "Here: "}
    Encoder(minilm.backbone, minilm.tokenizer, prompts=prompts).save_pretrained(folder)
    search(file, ("a cat",), k=4, model=str(folder), out=out)
    told = minilm.encode([f"Here: {text}" for text in TEXTS])
    cosines = told / told.norm(dim=1, keepdim=True)
    query = minilm.encode("Markets and stocks: a cat")
    expected = (cosines @ (query / query.norm())).sort(descending=True).values
    (found,) = json.loads(out.read_text())
    # printed with four digits
    assert [m["score"] for m in found["matches"]] == pytest.approx(expected.tolist(), abs=6e-5)


def test_json_to_a_file(file, minilm_path, tmp_path, capsys):
    out, model = tmp_path / "out.json", str(minilm_path)
    for command in (cluster, topics):
        command(file, k=2, model=model, json=True)
        printed = json.loads(capsys.readouterr().out)
        command(file, k=2, model=model, out=out, overwrite=True)
        assert json.loads(out.read_text()) == printed
        assert "4 texts in" in capsys.readouterr().out
        with pytest.raises(FileExistsError, match="name another or add --overwrite"):
            command(file, k=2, model=model, out=out)
    with pytest.raises(ValueError, match="is the file of the texts"):
        search(file, ("x",), out=file, overwrite=True)


def test_a_bad_text_is_named_by_its_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "\\ud800"}\n')
    for call in (lambda: embed(path), lambda: search(path, ("x",)), lambda: cluster(path)):
        with pytest.raises(ValueError, match=r"t.jsonl:3: character 0 is a lone surrogate"):
            call()


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A folder with a model that answers with the first word, and takes 20 tokens."""
    from tests.text.writers import train_to_keep_first_word, writer_tokenizer

    folder = tmp_path_factory.mktemp("writer")
    tokenizer = writer_tokenizer()
    tokenizer.model_max_length = 20
    tokenizer.save_pretrained(folder)
    train_to_keep_first_word().save_pretrained(folder)
    return str(folder)


def test_summarize_in_a_models_words(tmp_path, writer):
    from tests.text.writers import words

    path, out = tmp_path / "t.txt", tmp_path / "out.jsonl"
    texts = [f"{text} ." for text in words([5, 9, 3])]
    long = " ".join(texts * 3)
    path.write_text("\n".join([*texts, long]))
    summarize(path, write=writer, max_new_tokens=4, out=out)
    *short, last = _records(out)
    assert [r["summary"] for r in short] == [text.split()[0] for text in texts]
    assert all(r["pieces"] == 1 and r["finished"] for r in short)
    assert last["pieces"] > 1
    assert last["summary"] == texts[0].split()[0]


def test_paraphrase_goes_on_behind_what_the_model_refuses(tmp_path, writer, minilm_path):
    from tests.text.writers import words

    path, out = tmp_path / "t.jsonl", tmp_path / "out.jsonl"
    texts = words([5, 40, 7])
    lines = [json.dumps({"text": text}) + "\n" for text in [*texts, "\ud800"]]
    path.write_text("".join(lines))
    how = {"model": writer, "encoder": str(minilm_path), "min_similarity": -1.0, "max_overlap": 1.0}
    with pytest.raises(SystemExit, match="2 of 4 texts were refused"):
        paraphrase(path, out=out, **how)
    first, long, third, broken = _records(out)
    for record, text in ((first, texts[0]), (third, texts[2])):
        written = {p["text"] for p in record["paraphrases"]}
        assert text.split()[0] in written
        assert all(-1 <= p["similarity"] <= 1 for p in record["paraphrases"])
    assert long["error"].startswith("the text does not fit the model")
    assert "lone surrogate" in broken["error"]


def test_a_page_leaves_out_what_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tests.text.architectures import make_tokenizer

    config = transformers.AutoConfig.for_model(
        "bert", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=500, id2label={0: "O", 1: "B-PER"}, label2id={"O": 0, "B-PER": 1},
    )  # fmt: skip
    folder, path, page = tmp_path / "model", tmp_path / "t.jsonl", tmp_path / "page.html"
    make_tokenizer().save_pretrained(folder)
    transformers.BertForTokenClassification(config).save_pretrained(folder)
    path.write_text('{"text": "w5 w6"}\n{"text": "\\ud800"}\n')
    with pytest.raises(SystemExit, match=r"t.jsonl:2 is left out: character 0 is a lone"):
        ner(path, model=str(folder), html=page)
    assert "w5" in page.read_text()


def test_a_retrained_model_does_not_continue_another_ones_records(tmp_path, writer):
    from tests.text.writers import words

    path, out = tmp_path / "t.txt", tmp_path / "out.jsonl"
    path.write_text("\n".join(words([4] * 20)))
    summarize(path, write=writer, max_new_tokens=4, out=out)
    whole = out.read_bytes()
    header = b""

    def stops(texts):
        nonlocal header
        header = partial_of(out).read_bytes()
        raise RuntimeError("stop")

    out.unlink()
    settings = {
        "command": "summarize",
        "max_new_tokens": 4,
        "long": "map-reduce",
        "write": origin(writer),
    }
    with pytest.raises(RuntimeError, match="stop"):
        write_records(
            read_texts(path, "text"), stops, out, settings=settings, window=8, overwrite=False,
            progress=False,
        )  # fmt: skip
    partial_of(out).write_bytes(header + b"".join(whole.splitlines(keepends=True)[:8]))
    weights = Path(writer) / "model.safetensors"
    before = weights.stat()
    os.utime(weights, ns=(0, 0))
    with pytest.raises(ValueError, match="left by another command"):
        summarize(path, write=writer, max_new_tokens=4, out=out)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    summarize(path, write=writer, max_new_tokens=4, out=out)
    assert out.read_bytes() == whole


@pytest.mark.parametrize("cached", [False, True])
def test_ctrl_c_promises_only_what_is_true(file, minilm_path, tmp_path, monkeypatch, cached):
    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)

    command = ["embed", file, "--model", minilm_path]
    command += ["--cache", tmp_path / "cache"] if cached else []
    monkeypatch.setattr("torsh_text.Encoder.encode", interrupted)
    kept = "the same command goes on from here"
    promise = "; " + (
        kept if cached else "--cache FOLDER would keep what it computes for the next run"
    )
    assert _run(*command, check=False).stderr == f"torsh-text: interrupted{promise}"


def test_refuses_before_it_computes(file):
    with pytest.raises(ValueError, match="queries is empty; write what to look for"):
        search(file, ())
    for command in (cluster, topics):
        with pytest.raises(ValueError, match=r"map\.xyz' is no kind of picture; .*\.svg"):
            command(file, plot=Path("map.xyz"))


def test_says_that_there_are_fewer_texts_than_asked_for(file, minilm_path, capsys):
    with pytest.warns(UserWarning, match=r"k=1000 is more than the 4 texts of .*; all are ranked"):
        search(file, ("cats",), k=1000, model=str(minilm_path), json=True)
    assert len(json.loads(capsys.readouterr().out)[0]["matches"]) == 4
    with pytest.raises(ValueError, match="k=0 is not positive"):
        search(file, ("cats",), k=0)


def test_a_text_that_is_too_long_is_named_by_its_line(tmp_path, minilm_path):
    path = tmp_path / "t.txt"
    path.write_text("A cat\n\n" + "word " * 600 + "\n")
    with pytest.raises(ValueError, match=r"t\.txt:3 has more than max_length"):
        embed(path, model=str(minilm_path), long="error")
    embed(path, model=str(minilm_path), long="mean", device="cpu")


def test_a_device_that_is_not_there(file, minilm_path):
    with pytest.raises(ValueError, match="device='cuda:99'"):
        embed(file, model=str(minilm_path), device="cuda:99")


@pytest.fixture
def copies(tmp_path):
    path = tmp_path / "copies.jsonl"
    texts = ["Shares fell on Monday.", "Rain is expected.", "shares fell, on Monday!", "A cat sat."]
    rows = [json.dumps({"n": i, "text": text}) for i, text in enumerate(texts)]
    path.write_text(rows[0] + "\n\n" + "\n".join(rows[1:]))
    return path


def test_duplicates_by_words(copies, tmp_path, capsys, monkeypatch):
    out, keep = tmp_path / "groups.json", tmp_path / "kept.jsonl"
    duplicates(copies, out=out, keep=keep)
    assert "3 of 4 texts in" in capsys.readouterr().out
    (group,) = json.loads(out.read_text())
    assert [(m["line"], m["score"]) for m in group] == [(1, 1.0), (4, 1.0)]
    assert [json.loads(row)["n"] for row in keep.read_text().splitlines() if row] == [0, 1, 3]
    with pytest.raises(FileExistsError, match=r"keep=.* exists"):
        duplicates(copies, keep=keep)
    with pytest.raises(ValueError, match="is the file of the texts"):
        duplicates(copies, keep=copies, overwrite=True)
    duplicates(copies)
    shown = capsys.readouterr().out
    assert "4: shares fell, on Monday!" in shown
    assert "1 groups among 4 texts" in shown
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n\na\nb\n"))
    duplicates(Path("-"), keep=keep, overwrite=True)
    assert keep.read_text() == "a\nb\n"


def test_duplicates_by_vectors(tmp_path, minilm_path):
    path = tmp_path / "t.txt"
    path.write_text(
        "How do I reset my password?\nWhere is my order?\nHow can I reset my password?\n"
    )
    run = _run(
        "duplicates", path, "--method", "vectors", "--threshold", 0.9, "--model", minilm_path,
        "--json",
    )  # fmt: skip
    (group,) = json.loads(run.stdout)
    assert [m["line"] for m in group] == [1, 3]


def test_template_and_threshold_of_labels(file, minilm_path, minilm, tmp_path):
    from torsh_text import ZeroShot

    out, names = tmp_path / "out.jsonl", ("animals", "finance")
    how = {"template": "A story of {}.", "top_k": 2}
    classify(file, labels=names, model=str(minilm_path), out=out, **how)
    expected = ZeroShot(minilm).predict(TEXTS, names, **how)
    for record, row in zip(_records(out), expected, strict=True):
        assert [x["name"] for x in record["labels"]] == [x.name for x in row]
        assert [x["score"] for x in record["labels"]] == pytest.approx(
            [x.score for x in row], abs=1e-4
        )
    on_cpu = tmp_path / "cpu.jsonl"
    classify(file, labels=names, model=str(minilm_path), device="cpu", out=on_cpu, **how)
    assert _records(on_cpu) == _records(out)
    with pytest.raises(ValueError, match="multi_label=True needs via='nli'"):
        classify(file, labels=names, model=str(minilm_path), multi_label=True)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A folder with a classifier of three labels, of random weights."""
    transformers = pytest.importorskip("transformers")
    from tests.text.architectures import make_tokenizer

    config = transformers.AutoConfig.for_model(
        "bert", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=500, num_labels=3, initializer_range=1.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("classifier")
    make_tokenizer().save_pretrained(folder)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def test_several_labels(file, classifier, tmp_path):
    out = tmp_path / "out.jsonl"
    classify(file, model=classifier, multi_label=True, min_score=0.0, out=out)
    assert all(len(record["labels"]) == 3 for record in _records(out))
    classify(file, model=classifier, multi_label=True, min_score=1.0, out=out, overwrite=True)
    assert all(record["labels"] == [] for record in _records(out))
    with pytest.raises(ValueError, match=r"min_score=0.3 leaves labels out of a list"):
        classify(file, model=classifier, min_score=0.3)


def test_a_model_without_a_head(file, minilm_path):
    model = str(minilm_path)
    with pytest.raises(
        ValueError, match=r"has no trained head for this: .*; give a classifier, or"
    ):
        classify(file, model=model)
    with pytest.raises(ValueError, match="give an entailment classifier, or --via embed"):
        classify(file, model=model, labels=("a", "b"), via="nli")
    with pytest.raises(ValueError, match=r"give a model that tags tokens, such as dslim"):
        ner(file, model=model)
