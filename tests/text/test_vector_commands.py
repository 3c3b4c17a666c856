import io
import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.text.command_runs import TEXTS, run
from torsh_text import TopicModel, similarity
from torsh_text._vector_commands import cluster, duplicates, embed, search, topics

pytest.importorskip("tyro")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "texts.txt"
    # a blank line behind the first and the third text: they are on lines 1, 3, 4 and 6
    path.write_text("{}\n\n{}\n{}\n  \n{}\n\n".format(*TEXTS), encoding="utf-8")
    return path


def test_search(file, minilm_path):
    queries = ("kitty", "stock market prices")
    done = run("search", file, *queries, "--k", 2, "--model", minilm_path, "--json")
    cats, money = json.loads(done.stdout)
    assert cats["query"] == "kitty"
    assert {match["line"] for match in cats["matches"]} == {1, 4}
    assert {match["line"] for match in money["matches"]} == {3, 6}
    assert cats["matches"][0]["score"] >= cats["matches"][1]["score"]


def test_cluster_of_jsonl(tmp_path, minilm_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    done = run("cluster", path, "--k", 2, "--field", "body", "--model", minilm_path, "--json")
    found = json.loads(done.stdout)
    assert found["labels"] == [0, 1, 0, 1]
    assert [group["size"] for group in found["groups"]] == [2, 2]
    failed = run("cluster", path, "--model", minilm_path, check=False)
    assert failed.returncode == 1
    assert "texts.jsonl:1: the line has no field 'text' but 'body'; name the one" in failed.stderr


def test_embed(file, minilm_path, tmp_path, minilm):
    out = tmp_path / "v.safetensors"
    done = run("embed", file, "--out", out, "--model", minilm_path)
    assert "4 vectors of 384 entries" in done.stdout
    assert (load_file(out)["vectors"] - minilm.encode(TEXTS)).abs().max() <= 2e-6
    run("embed", file, "--out", out, "--model", minilm_path)  # vectors may be replaced


def test_embed_overwrites_nothing_else(tmp_path, minilm_path):
    source, beside = tmp_path / "t.jsonl", tmp_path / "mine.safetensors"
    source.write_text('{"text": "A cat"}\n')
    beside.write_text("mine")
    run("embed", source, "--model", minilm_path)
    assert load_file(tmp_path / "t.safetensors")["vectors"].shape == (1, 384)
    cases = [
        (source, "vectors are written as safetensors"),
        (beside, "is no file of vectors"),
        (tmp_path / "v.npy", "end the name in .safetensors"),
        (tmp_path / "none" / "v.safetensors", "there is no folder"),
    ]
    for target, why in cases:
        failed = run("embed", source, "--out", target, check=False)
        assert failed.returncode == 1
        assert why in failed.stderr
    assert source.read_text() == '{"text": "A cat"}\n'
    assert beside.read_text() == "mine"


def test_embed_keeps_vectors_in_a_cache(file, minilm_path, tmp_path):
    cache = tmp_path / "cache"
    for out in ("a", "b"):
        target = tmp_path / f"{out}.safetensors"
        run("embed", file, "--out", target, "--cache", cache, "--model", minilm_path)
    first, second = (load_file(tmp_path / f"{out}.safetensors")["vectors"] for out in "ab")
    assert first.equal(second)
    assert any(cache.iterdir())


def test_topics(file, minilm_path, tmp_path):
    picture = tmp_path / "map.svg"
    done = run(
        "topics", file, "--k", 2, "--model", minilm_path, "--plot", picture,
        "--save", tmp_path / "model", "--json",
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["labels"] == [0, 1, 0, 1]
    assert {"cat", "kitten"} & set(found["topics"][0]["words"])
    assert "<svg" in picture.read_text()


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


def test_refuses_before_it_computes(file):
    with pytest.raises(ValueError, match="there is nothing to look for; write it behind"):
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
    done = run(
        "duplicates", path, "--method", "vectors", "--threshold", 0.9, "--model", minilm_path,
        "--json",
    )  # fmt: skip
    (group,) = json.loads(done.stdout)
    assert [m["line"] for m in group] == [1, 3]


def test_maps_and_models_replace_nothing(file, minilm_path, tmp_path, capsys):
    picture, saved, out = (tmp_path / name for name in ("map.png", "model.st", "topics.json"))
    how = {"k": 2, "model": str(minilm_path)}
    topics(file, plot=picture, save=saved, out=out, **how)
    assert capsys.readouterr().out.splitlines() == [
        f"topic model in {saved}", f"map in {picture}", f"4 texts in {out}",
    ]  # fmt: skip
    assert TopicModel.load(saved).k == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    kept = picture.read_bytes(), saved.read_bytes(), file.read_bytes()
    for command, option in ((topics, "plot"), (topics, "save"), (cluster, "plot")):
        target = picture if option == "plot" else saved
        with pytest.raises(FileExistsError, match=rf"{option}=.* exists; name another or add"):
            command(file, **{option: target}, **how)
    text = file.rename(tmp_path / "texts.svg")
    for option in ("plot", "save"):
        with pytest.raises(ValueError, match=rf"{option}=.* is the file of the texts"):
            topics(text, **{option: text}, overwrite=True, **how)
    assert (picture.read_bytes(), saved.read_bytes(), text.read_bytes()) == kept
    cluster(text, plot=picture, overwrite=True, json=True, **how)
    json.loads(capsys.readouterr().out)  # and nothing else


def test_nmf_needs_no_encoder(file, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    topics(file, method="nmf", k=2, json=True)
    assert len(json.loads(capsys.readouterr().out)["labels"]) == 4
    with pytest.raises(FileNotFoundError, match="all-MiniLM-L6-v2"):  # which the map needs
        topics(file, method="nmf", k=2, plot=file.with_suffix(".svg"))


def test_scores_have_six_places(file, minilm_path, minilm, capsys):
    search(file, ("a cat",), k=1, model=str(minilm_path), json=True)
    (found,) = json.loads(capsys.readouterr().out)
    score = found["matches"][0]["score"]
    exact = float(similarity(minilm.encode(["a cat"]), minilm.encode(TEXTS)).max())
    assert score == round(score, 6) == pytest.approx(exact, abs=2e-6)
