import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import torsh_quant
from torsh_quant import __main__, _doctor, quantize
from torsh_quant._file import load, save
from torsh_quant._hf import text_batches

ROOT = Path(__file__).parents[2]
FACTORY = """
import torch
from pathlib import Path
from tests.quant.conftest import digits_net

def net():
    made = digits_net()
    made.load_state_dict(torch.load(Path(__file__).parent / "weights.pt", weights_only=True))
    return made.train()

def number():
    return 3

def broken():
    raise RuntimeError("no weights here")
"""


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    sources = [str(ROOT / "torsh_quant" / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "torsh_quant", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sources), "COLUMNS": "200"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command in this process: its exit code, what it printed, and what it said."""

    def called(*arguments: object, cwd: Path) -> tuple[int, str, str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["torsh-quant", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", [str(cwd), *sys.path])
        monkeypatch.setattr("warnings.showwarning", None)  # set by the command, put back here
        code = 0
        try:
            __main__.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        return code, *capsys.readouterr()

    return called


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """A folder with a module that makes the digits net, and images in two kinds of file."""
    pytest.importorskip("tyro")
    place = tmp_path_factory.mktemp("digits")
    (place / "digits_model.py").write_text(FACTORY)
    torch.save(digits.net.state_dict(), place / "weights.pt")
    save_file({"input": digits.images[:200].clone()}, place / "images.safetensors")
    torch.save(digits.images[:200].clone(), place / "images.pt")
    return place


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny model of Hugging Face's in a folder, with a tokenizer, and some text."""
    pytest.importorskip("tyro")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("llama") / "model"
    words = {word: number for number, word in enumerate(["[UNK]", "a", "b", "c", "d", "e"])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(place)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=6,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    (place.parent / "text.txt").write_text("a b c d\n\ne d c b a a\nb b c d e\n" * 20)
    return place


def test_quantize_writes_what_the_function_makes(folder, digits):
    done = run(
        *("quantize", "digits_model:net", "out.safetensors", "--scheme", "w4a16-g9"),
        *("--method", "gptq", "bias_correction", "--data", "images.safetensors"),
        *("--batch-size", 64, "--skip", "10", "--override", "8=w8a8", "0=float", "--json"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["scheme"] for row in found["rows"]] == [
        "float",
        "w4a16-g9",
        "w4a16-g9",
        "w8a8",
        "float",
    ]
    assert found["file_bytes"] == (folder / "out.safetensors").stat().st_size
    expected = quantize(
        digits.net,
        "w4a16-g9",
        data=digits.images[:200].split(64),
        method=["gptq", "bias_correction"],
        skip=("10",),
        overrides={"8": "w8a8", "0": None},
    )
    made = load(folder / "out.safetensors", digits.net)
    with torch.no_grad():
        torch.testing.assert_close(made(digits.images), expected(digits.images))
    assert digits.accuracy(made) > 0.93


def test_quantize_and_explain_in_tables(folder, call):
    arguments = ("quantize", "digits_model:net", "static.safetensors", "--scheme", "w8a8-static")
    arguments += ("--data", "images.pt", "--observer", "minmax", "--resume", "run")
    code, table, said = call(*arguments, cwd=folder)
    assert code == 0, said
    assert "w8a8-static" in table
    assert (folder / "run" / "journal.json").exists()
    assert table.splitlines()[-1].startswith("static.safetensors: ")
    before = (folder / "static.safetensors").read_bytes()
    assert call(*arguments, cwd=folder) == (
        2,
        "",
        "torsh-quant: 'static.safetensors' exists; --force replaces it\n",
    )
    assert call(*arguments, "--force", cwd=folder)[0] == 0
    assert (folder / "static.safetensors").read_bytes() == before
    code, table, said = call("explain", "static.safetensors", cwd=folder)
    assert code == 0, said
    assert table.count("w8a8-static") == 5
    code, text, said = call("explain", "digits_model:net", "--scheme", "w4a8", "--json", cwd=folder)
    assert code == 0, said
    assert [row["layer"] for row in json.loads(text)["rows"]] == ["0", "2", "5", "8", "10"]


def test_sensitivity(folder, call):
    pytest.importorskip("matplotlib")
    code, text, said = call(
        *("sensitivity", "digits_model:net", "--data", "images.safetensors", "--score", "mse"),
        *("--schemes", "w8a8", "w2a16", "--plot", "out.svg", "--json"),
        cwd=folder,
    )
    assert code == 0, said
    found = json.loads(text)
    assert (found["score"], found["samples"], len(found["rows"])) == ("mse", 200, 10)
    assert "<svg" in (folder / "out.svg").read_text()
    code, table, said = call(
        *("sensitivity", "digits_model:net", "--data", "images.pt", "--max-batches", 1), cwd=folder
    )
    assert code == 0, said
    assert table.splitlines()[0].split() == ["layer", "(kl)", "w8a8", "w4a16"]


def test_hugging_face(llama, call):
    text, out = llama.parent / "text.txt", llama.parent / "out"
    (llama / "pytorch_model.bin.index.json").write_text("{}")
    done = run(
        *("quantize", llama, out, "--scheme", "w4a16", "--method", "smoothquant"),
        *("--data", text, "--length", 16, "--override", "embed_tokens=w8a16", "--json"),
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    names = {path.name for path in out.iterdir()}
    assert {"quantized.safetensors", "config.json", "tokenizer.json"} <= names
    assert not {"model.safetensors", "pytorch_model.bin.index.json"} & names
    made = load(out)
    assert type(made.model.embed_tokens).__name__ == "QuantEmbedding"
    assert made(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 6)
    code, table, said = call("explain", out, cwd=llama.parent)
    assert code == 0, said
    assert "model.layers.1.mlp.down_proj" in table
    arguments = ("sensitivity", llama, "--data", text, "--length", 16, "--schemes", "w4a16")
    code, table, said = call(*arguments, cwd=llama.parent)
    assert code == 0, said
    code, _, said = call("quantize", llama, llama, "--force", cwd=llama.parent)
    assert code == 2
    assert "must be a folder other than MODEL's" in said


def test_text_for_tokenizers_that_pad(llama):
    transformers = pytest.importorskip("transformers")
    text = llama.parent / "text.txt"
    blocks = text_batches(llama, text, batch_size=3, length=50)
    assert [tuple(one["input_ids"].shape) for one in blocks] == [(3, 50), (3, 50)]
    assert blocks[0]["input_ids"][0, :6].tolist() == [1, 2, 3, 4, 5, 4]
    padding = transformers.AutoTokenizer.from_pretrained(llama)
    padding.pad_token = "[UNK]"
    padding.save_pretrained(llama.parent / "padding")
    lines = text_batches(llama.parent / "padding", text, batch_size=32, length=5)
    assert [len(one["input_ids"]) for one in lines] == [32, 28]
    assert lines[0]["attention_mask"][0].tolist() == [1, 1, 1, 1, 0]
    empty = llama.parent / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(ValueError, match="has no text"):
        text_batches(llama, empty, batch_size=1, length=1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("quantize", "nowhere:net", "o"), 2, "there is no module 'nowhere', which MODEL names"),
        (("quantize", "digits_model:no", "o"), 2, "module 'digits_model' has no 'no'"),
        (("quantize", "digits_model:number", "o"), 2, "returned int, not an nn.Module"),
        (("quantize", "digits_model", "o"), 2, "neither a folder nor of the form package.module"),
        (("quantize", "digits_model:broken", "o"), 1, "no weights here"),
        (("quantize", "digits_model:net", "no/o"), 2, "there is no folder 'no'"),
        (
            ("quantize", "digits_model:net", "o", "--scheme", "w9a9"),
            1,
            "scheme='w9a9' is not known",
        ),
        (("quantize", "digits_model:net", "o", "--override", "8"), 2, "not of the form PATTERN="),
        (("quantize", "digits_model:net", "o", "--data", "no.pt"), 2, "there is no file 'no.pt'"),
        (("quantize", "digits_model:net", "o", "--data", "digits_model.py"), 2, "text needs a"),
        (("quantize", "digits_model:net", "o", "--data", "bad.pt"), 2, "holds no plain tensors"),
        (("quantize", "digits_model:net", "o", "--data", "named.pt"), 2, "has x, but Sequential"),
        (("quantize", "digits_model:net", "o", "--data", "ragged.pt"), 2, "tensors of one length"),
        (("explain", "images.safetensors"), 1, "it is a plain safetensors file"),
        (("explain", "."), 1, "has no config.json"),
        (("sensitivity", "digits_model:net", "--data", "images.pt", "--plot", "a.b"), 2, "picture"),
    ],
    ids=lambda one: "-".join(one[1:]) if isinstance(one, tuple) else str(one)[:20],
)
def test_errors_are_one_line(folder, arguments, code, message, call):
    (folder / "bad.pt").write_bytes(b"no tensors")
    torch.save({"x": torch.zeros(3, 1, 8, 8)}, folder / "named.pt")
    torch.save({"input": torch.zeros(3, 1), "y": torch.zeros(2)}, folder / "ragged.pt")
    found, printed, said = call(*arguments, cwd=folder)
    assert (found, printed) == (code, "")
    assert message in said
    assert said.startswith("torsh-quant: ")
    assert said.count("\n") == 1
    assert not (folder / "o").exists()


def test_explain_of_a_single_layer(tmp_path, capsys):
    save(quantize(nn.Linear(64, 32).eval(), "w4a16"), tmp_path / "layer.safetensors")
    __main__.explain(str(tmp_path / "layer.safetensors"))
    assert "(model)  w4a16" in capsys.readouterr().out


def test_doctor_json():
    pytest.importorskip("tyro")
    done = run("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["torsh_quant"] == torsh_quant.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert len(found["self_check"]) == 2
    assert all(found["self_check"].values())
    assert {path["scheme"] for path in found["paths"]} == {"w8a8", "w4a8", "w8a16", "w4a16"}


def test_doctor_tables(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    __main__.doctor()
    text = capsys.readouterr().out
    assert "exact" in text
    assert "WRONG" not in text
    assert "ONEDNN_MAX_CPU_ISA=AVX2 keeps a library" in text


def test_doctor_fails_where_sums_are_wrong(capsys, monkeypatch):
    pytest.importorskip("rich")
    wrong = replace(_doctor.diagnose(), self_check={"linear: a kernel": False})
    monkeypatch.setattr(__main__, "diagnose", lambda: wrong)
    with pytest.raises(SystemExit):
        __main__.doctor()
    assert "WRONG" in capsys.readouterr().out


def test_without_its_extra_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro.extras", None)
    with pytest.raises(SystemExit, match=r"pip install 'torsh-quant\[cli\]'"):
        __main__.main()
