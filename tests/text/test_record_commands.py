import json
import os
from pathlib import Path

import pytest

from tests.text.command_runs import TEXTS, records, run
from torsh_text import FewShot
from torsh_text._classify_command import classify
from torsh_text._jsonl import partial_of, read_texts, write_records
from torsh_text._record_commands import detect, ner, paraphrase, summarize
from torsh_text._record_run import origin
from torsh_text._sentiment import DEFAULT

pytest.importorskip("tyro")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "texts.txt"
    # a blank line behind the first and the third text: they are on lines 1, 3, 4 and 6
    path.write_text("{}\n\n{}\n{}\n  \n{}\n\n".format(*TEXTS), encoding="utf-8")
    return path


def test_detect(tmp_path):
    path, out = tmp_path / "t.txt", tmp_path / "out.jsonl"
    path.write_text("Guten Morgen, wie geht es dir?\n\nOù est la gare ?\n", encoding="utf-8")
    done = run("detect", path, "--out", out)
    assert "2 records" in done.stdout
    found = records(out)
    assert [(r["line"], r["languages"][0]["name"]) for r in found] == [(1, "German"), (3, "French")]
    failed = run("detect", path, "--out", out, check=False)
    assert "exists; name another or add --overwrite" in failed.stderr
    assert "de 0." in run("detect", path).stdout or "de 1." in run("detect", path).stdout
    two = run("detect", path, "--languages", "en", "fr", "--top-k", 2, "--json").stdout
    assert all(len(json.loads(line)["languages"]) == 2 for line in two.splitlines())


def test_classify_by_named_labels(file, minilm_path, tmp_path):
    out = tmp_path / "out.jsonl"
    run("classify", file, "--labels", "animals", "finance", "--model", minilm_path, "--out", out)
    names = [record["labels"][0]["name"] for record in records(out)]
    assert names == ["animals", "finance", "animals", "finance"]


def test_summarize_by_sentences(tmp_path, minilm_path):
    path = tmp_path / "t.txt"
    path.write_text("Cats sleep a lot. Kittens sleep even more. Stocks fell. Cats purr.\n")
    done = run("summarize", path, "--sentences", 2, "--model", minilm_path, "--json")
    record = json.loads(done.stdout)
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
    run("ner", path, "--model", folder, "--out", out)
    for record, text in zip(records(out), texts, strict=True):
        for entity in record["entities"]:
            assert text[entity["start"] : entity["end"]] == entity["text"]
    run("ner", path, "--model", folder, "--html", page)
    assert "<html" in page.read_text()
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    done = run("classify", path, "--model", folder, "--top-k", 3, "--json")
    for line in done.stdout.splitlines():
        labels = json.loads(line)["labels"]
        assert sum(label["score"] for label in labels) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("via", "model"),
    [("auto", "all-MiniLM"), ("nli", "ModernBERT-base-zeroshot"), ("lm", "SmolLM2-360M")],
)
def test_each_way_has_its_model(file, monkeypatch, via, model):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=model):
        classify(file, labels=("animals", "finance"), via=via)


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
    *short, last = records(out)
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
    first, long, third, broken = records(out)
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


def test_a_retrained_model_does_not_continue_another_onesrecords(tmp_path, writer):
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


def test_template_and_threshold_of_labels(file, minilm_path, minilm, tmp_path):
    from torsh_text import ZeroShot

    out, names = tmp_path / "out.jsonl", ("animals", "finance")
    how = {"template": "A story of {}.", "top_k": 2}
    classify(file, labels=names, model=str(minilm_path), out=out, **how)
    expected = ZeroShot(minilm).predict(TEXTS, names, **how)
    for record, row in zip(records(out), expected, strict=True):
        assert [x["name"] for x in record["labels"]] == [x.name for x in row]
        assert [x["score"] for x in record["labels"]] == pytest.approx(
            [x.score for x in row], abs=1e-4
        )
    on_cpu = tmp_path / "cpu.jsonl"
    classify(file, labels=names, model=str(minilm_path), device="cpu", out=on_cpu, **how)
    assert records(on_cpu) == records(out)
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
    assert all(len(record["labels"]) == 3 for record in records(out))
    classify(file, model=classifier, multi_label=True, min_score=1.0, out=out, overwrite=True)
    assert all(record["labels"] == [] for record in records(out))
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


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, minilm):
    """The folder of a FewShot that tells animals from money."""
    folder = tmp_path_factory.mktemp("few") / "shot"
    FewShot(minilm).fit(
        ["a dog", "a horse", "a bank", "taxes"], ["pet", "pet", "coin", "coin"]
    ).save(folder)
    return str(folder)


def test_a_few_shot_folder_classifies(file, learnt, tmp_path):
    out = tmp_path / "out.jsonl"
    classify(file, model=learnt, top_k=2, out=out, device="cpu")
    assert [[x["name"] for x in r["labels"]] for r in records(out)] == [
        ["pet", "coin"], ["coin", "pet"], ["pet", "coin"], ["coin", "pet"],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="multi_label=True: a FewShot gives one label"):
        classify(file, model=learnt, multi_label=True)
    with pytest.raises(ValueError, match="is a classifier trained for coin, pet; leave out"):
        classify(file, model=learnt, labels=("coin", "pet"))


def test_a_trained_classifier_needs_no_labels(file, classifier):
    labels = ("LABEL_2", "LABEL_0", "LABEL_1")
    with pytest.raises(ValueError, match="trained for LABEL_0, LABEL_1, LABEL_2; leave out --lab"):
        classify(file, model=classifier, labels=labels)


def _put_into_cache(folder, model, commit):
    repository = folder / f"models--{model.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_text("{}")


def _leave_unfinished(file, out, **settings):
    """Write one record of a command, then fail."""

    def work(texts):
        if texts != TEXTS[:1]:
            raise RuntimeError("stop")
        return [{}]

    with pytest.raises(RuntimeError, match="stop"):
        write_records(
            read_texts(file, "text"), work, out, settings=settings, window=1, overwrite=False,
            progress=False,
        )  # fmt: skip


def test_models_that_nobody_named_are_told_apart_too(file, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    how = {"labels": [], "via": "auto", "multi_label": False, "top_k": None, "min_score": None}
    out = tmp_path / "out.jsonl"
    _put_into_cache(tmp_path, DEFAULT, "a" * 40)
    _leave_unfinished(file, out, command="classify", **how, long="truncate", model=origin(DEFAULT))
    _put_into_cache(tmp_path, DEFAULT, "b" * 40)
    with pytest.raises(ValueError, match=r"by another command or other texts \(changed: model\)"):
        classify(file, out=out)
    partial_of(out).unlink()
    how = {"languages": [], "top_k": 1, "min_score": 0.0}
    _leave_unfinished(file, out, command="detect", **how, model={"name": "lid", "files": "0"})
    with pytest.raises(ValueError, match=r"by another command or other texts \(changed: model\)"):
        detect(file, out=out)


def test_what_a_model_that_writes_did_not_read_is_marked(tmp_path, writer):
    from tests.text.writers import words

    path, out = tmp_path / "t.txt", tmp_path / "out.jsonl"
    path.write_text("\n".join(f"{text} ." for text in words([5, 60])))
    with pytest.warns(UserWarning, match="lost their end"):
        summarize(path, write=writer, max_new_tokens=4, long="truncate", out=out)
    assert [record.get("truncated") for record in records(out)] == [None, True]
