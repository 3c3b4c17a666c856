import json
import os
from pathlib import Path

import pytest
from torch import OutOfMemoryError

from torsh_text._record_run import origin, run

TEXTS = [f"text {i}" for i in range(40)]
BAD = {0, 7, 8, 39}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "t.jsonl"
    texts = [text + " bad" * (i in BAD) for i, text in enumerate(TEXTS)]
    texts[20] = "lone \ud800"
    # a blank line behind each
    path.write_text("".join(json.dumps({"text": text}) + "\n\n" for text in texts))
    return path


def _lengths(texts):
    """Refuses as models do: by the text's place in what was passed."""
    for index, text in enumerate(texts):
        text.encode()
        if "bad" in text:
            raise ValueError(f"texts[{index}] is bad")
    return [{"length": len(text)} for text in texts]


def _run(file, work=_lengths, **changes):
    options = {
        "out": None, "overwrite": False, "json": False, "settings": {}, "window": 16,
        "show": lambda record: str(record["length"]),
    }  # fmt: skip
    run(file, "text", lambda: work, **options | changes)


def _check(records):
    assert [r["line"] for r in records] == [2 * i + 1 for i in range(40)]
    for i, record in enumerate(records):
        if i in BAD:
            assert record["error"] == "the text is bad"
        elif i == 20:
            assert record["error"] == "character 5 is a lone surrogate or no UTF-8"
        else:
            assert record == {"line": 2 * i + 1, "length": len(TEXTS[i])}


def test_refused_texts_get_a_record_and_the_others_go_on(file, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    with pytest.raises(SystemExit, match="5 of 40 texts were refused; the field 'error'"):
        _run(file, out=out)
    _check([json.loads(line) for line in out.read_text().splitlines()])
    assert "40 records in" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="5 of 40"):
        _run(file, json=True)
    _check([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    with pytest.raises(SystemExit, match="5 of 40"):
        _run(file)
    assert "(the text is bad)" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "message"), [(ValueError, "top_k=0"), (RuntimeError, "training")])
def test_a_wrong_option_is_no_fault_of_the_texts(file, tmp_path, kind, message):
    def work(texts):
        raise kind(message)

    with pytest.raises(kind, match=message):
        _run(file, work, out=tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]


def test_memory_running_out_is_no_fault_of_a_text(file):
    def work(texts):
        if len(texts) > 1:
            raise OutOfMemoryError("out of memory")
        return [{"length": 1}]

    with pytest.raises(OutOfMemoryError):
        _run(file, work)


def test_a_model_that_does_not_load_does_not_block_the_right_one(tmp_path):
    file, out = tmp_path / "t.txt", tmp_path / "out.jsonl"
    file.write_text("a\nbb\n")

    def misspelt():
        raise FileNotFoundError("no model")

    options = {"out": out, "overwrite": False, "json": False, "show": str}
    with pytest.raises(FileNotFoundError):
        run(file, "text", misspelt, settings={"model": "typo"}, **options)
    run(file, "text", lambda: _lengths, settings={"model": "right"}, **options)
    assert len(out.read_text().splitlines()) == 2


def test_never_replaces_the_texts(file):
    with pytest.raises(ValueError, match="is the file of the texts; name another"):
        _run(file, out=file, overwrite=True)


def test_loads_only_when_there_is_something_to_do(file, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("")
    with pytest.raises(FileExistsError):
        run(
            file, "text", lambda: 1 / 0, out=out, overwrite=False, json=False, settings={}, show=str
        )


def test_origin_changes_with_the_files_of_a_model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "notes.md"):
        (folder / name).write_text(name)
    first = origin(folder)
    assert first == origin(str(folder)) == {"name": str(folder), "files": first["files"]}
    (folder / "notes.md").write_text("changed")
    assert origin(folder) == first
    os.utime(folder / "model.safetensors", ns=(0, 0))
    second = origin(folder)
    assert second != first
    (folder / "config.json").write_text("longer than before")
    assert origin(folder) not in (first, second)
    single = folder / "lid.ftz"
    single.write_bytes(b"x")
    assert origin(single) != origin(Path(f"{single}.gone")) == f"{single}.gone"


def test_origin_of_a_hub_model_is_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="not in the local model cache"):
        origin("owner/name")
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        folder = repository / "snapshots" / commit
        folder.mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (folder / file).write_text("{}")
        (repository / "refs" / "main").write_text(commit)
        assert origin("owner/name") == {"name": "owner/name", "commit": commit}
