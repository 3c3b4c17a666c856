import json
import os
import subprocess
import sys

import pyarrow as pa
import pytest
import torch

from torsh_data import ShardedDataset, write_shards

pytest.importorskip("tyro")


def run(*arguments, piped="", **environment):
    return subprocess.run(
        [sys.executable, "-m", "torsh_data", *map(str, arguments)],
        input=piped,
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


def test_convert_and_sheet(tmp_path):
    images = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    for name, colour in (("night", "black"), ("snow", "white")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for n in range(3):
            images.new("RGB", (8, 8), colour).save(tmp_path / "pictures" / name / f"{n}.png")
    done = run("convert", tmp_path / "pictures", tmp_path / "shards", "--shuffle-seed", 0)
    assert done.returncode == 0, done.stderr
    assert "6 samples in 1 shards" in done.stdout
    assert done.stdout.endswith("2 classes: night, snow\n")
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
    joined = run("convert", tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "both")
    assert "7 samples in 1 shards" in joined.stdout
    again = run("convert", tmp_path / "a.jsonl", tmp_path / "both")
    assert again.returncode != 0
    assert again.stderr.startswith("torsh-data: ")
    nothing = run("convert", tmp_path / "nowhere", tmp_path / "out")
    assert nothing.stderr.startswith("torsh-data: ")
    assert "Traceback" not in nothing.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [(("--window", "foo"), "window='foo' is not a size"), (("--batch-size", 0), "batch_size=0")],
)
def test_wrong_options_of_inspect_are_one_line(folder, options, text):
    result = run("inspect", folder, *options)
    assert result.returncode == 1
    assert text in result.stderr
    assert "Traceback" not in result.stderr


def test_verify_takes_urls_and_says_what_has_no_checksums(folder, tmp_path):
    good = run("verify", f"file://{folder}")
    assert good.returncode == 0, good.stderr
    assert "all as written" in good.stdout
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n')
    for source, text in (
        (tmp_path / "a.jsonl", "has no checksums to check"),
        ("memory://nowhere", "torsh-data: "),
        (tmp_path / "nowhere", "torsh-data: "),
    ):
        result = run("verify", source)
        assert result.returncode == 1
        assert text in result.stderr
        assert "Errno" not in result.stderr
        assert "Traceback" not in result.stderr


def test_doctor_names_what_is_missing_and_where_from():
    table = run("doctor", COLUMNS="120")
    assert "huggingface hub" in table.stdout
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["aiohttp"]
    if facts["s3fs"] is None:
        assert "missing: pip install s3fs" in table.stdout


def test_convert_takes_types(tmp_path):
    (tmp_path / "a.csv").write_text("n,m\n1,2\n")
    done = run("convert", tmp_path / "a.csv", tmp_path / "out", "--types", "n=string", "m=int8")
    assert done.returncode == 0, done.stderr
    assert ShardedDataset(tmp_path / "out").schema.types == [pa.string(), pa.int8()]
    for types in ("n", "n=number"):
        wrong = run("convert", tmp_path / "a.csv", tmp_path / "two", "--types", types)
        assert wrong.stderr.startswith(f"torsh-data: --types {types!r}")


def test_write_takes_json_lines_from_another_program(tmp_path):
    lines = "".join(f'{{"text": "line {n}", "label": {n % 3}}}\n\n' for n in range(50))
    result = run("write", tmp_path / "out", "--block-bytes", "200B", piped=lines)
    assert result.returncode == 0, result.stderr
    assert "50 samples in 1 shards" in result.stdout
    data = ShardedDataset(tmp_path / "out")
    assert data[49] == {"text": "line 49", "label": 1}
    assert len(data._starts) > 2
    mixed = run("write", tmp_path / "mixed", "--shuffle-seed", 1, piped=lines)
    assert mixed.returncode == 0, mixed.stderr
    texts = [sample["text"] for sample in ShardedDataset(tmp_path / "mixed")]
    assert texts != [f"line {n}" for n in range(50)]
    assert sorted(texts) == sorted(f"line {n}" for n in range(50))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"a": 1}\n{"a": 2,\n', "line 2: Expecting property name"),
        ('{"a": 1}\n[2]\n', "line 2 is a list; a line is an object"),
    ],
)
def test_write_names_the_bad_line(tmp_path, lines, message):
    result = run("write", tmp_path / "out", piped=lines)
    assert result.returncode == 1
    assert result.stderr.startswith(f"torsh-data: {message}")
