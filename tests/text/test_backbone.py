import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.text.architectures import make_model, make_tokenizer, random_texts
from torsh_text import Encoder
from torsh_text._backbone import (
    digest,
    find_model,
    first_position,
    read_layout,
    resolve_device,
    resolve_dtype,
)


@pytest.fixture
def folder(tmp_path):
    """A plain transformers folder of a tiny model."""
    make_model("bert").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def _edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_layout_of_minilm(minilm_path):
    layout = read_layout(minilm_path)
    assert (layout.pooling, layout.normalize, layout.max_length) == (("mean",), True, 256)
    assert layout.transformer == minilm_path
    assert layout.dense == ()


@pytest.mark.parametrize(
    ("settings", "modes"),
    [
        ({"pooling_mode": "cls"}, ("cls",)),
        ({"pooling_mode": ["mean", "max"]}, ("mean", "max")),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, ("lasttoken",)),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, ("cls", "max")),
        ({}, ("mean",)),
    ],
)
def test_old_and_new_pooling_settings(tmp_path, settings, modes):
    entries = [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(entries))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    layout = read_layout(tmp_path)
    assert layout.pooling == modes
    assert not layout.normalize


def test_refuses_modules_and_pooling_it_does_not_know(tmp_path):
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "", "type": "a.b.LSTM"}]))
    with pytest.raises(ValueError, match=r"a\.b\.LSTM"):
        read_layout(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "", "type": "x.Pooling"}]))
    (tmp_path / "config.json").write_text('{"pooling_mode": "median"}')
    with pytest.raises(ValueError, match="median"):
        read_layout(tmp_path)
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_layout(tmp_path)


def test_prompts_are_read(folder):
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "w5 ", "document": ""}, "default_prompt_name": "query"})
    )
    encoder = Encoder.from_pretrained(folder, device="cpu", max_length=32)
    assert encoder.prompts == {"query": "w5 "}
    expected = encoder.encode(["w5 w9"], prompt="")
    assert torch.equal(encoder.encode(["w9"]), expected)


def test_weights_in_a_bin_file_load_without_pickle(folder):
    expected = Encoder.from_pretrained(folder, device="cpu", max_length=32).encode(["w7 w8"])
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = Encoder.from_pretrained(folder, device="cpu", max_length=32).encode(["w7 w8"])
    assert torch.equal(found, expected)


def test_missing_weights_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors .*encoder\.layer\.1\.output\.dense"):
        Encoder.from_pretrained(folder, device="cpu")


def test_an_unused_pooler_needs_no_weights_and_no_gradient(folder):
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if not key.startswith("pooler")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    encoder = Encoder.from_pretrained(folder, device="cpu", max_length=32)
    encoder.train()
    encoder(encoder.pack(["w4 w5", "w6"])).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)


@pytest.mark.parametrize("activation", ["torch.nn.modules.activation.Tanh", None])
def test_dense_layers_are_applied(folder, activation):
    plain = Encoder.from_pretrained(folder, device="cpu", max_length=32)
    weight, bias = torch.randn(8, 64), torch.randn(8)
    entries = [
        {"path": "", "type": "x.Transformer"},
        {"path": "1_Pooling", "type": "x.Pooling"},
        {"path": "2_Dense", "type": "x.Dense"},
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "2_Dense").mkdir()
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "2_Dense/model.safetensors")
    settings = {"in_features": 64, "out_features": 8, "activation_function": activation}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(settings))
    encoder = Encoder.from_pretrained(folder, device="cpu", max_length=32)
    texts = random_texts([5, 9])
    expected = plain.encode(texts) @ weight.T + bias
    expected = expected.tanh() if activation else expected
    assert encoder.dim == 8
    torch.testing.assert_close(encoder.encode(texts), expected, atol=1e-6, rtol=1e-5)
    _edit(folder / "2_Dense" / "config.json", activation_function="my.Odd")
    with pytest.raises(ValueError, match="activation 'Odd'"):
        Encoder.from_pretrained(folder, device="cpu")


def test_offline_and_not_cached_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="hf download nobody/no-such-model"):
        Encoder.from_pretrained("nobody/no-such-model", local_files_only=True)


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "a/b/c"])
def test_missing_folders_are_not_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_model(name, revision=None, local_files_only=True, trust_remote_code=False)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model: neither config.json"):
        Encoder.from_pretrained(tmp_path)
    (tmp_path / "few_shot.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"the folder of a FewShot; FewShot\.load reads"):
        Encoder.from_pretrained(tmp_path)


def test_positions_and_lengths(folder):
    assert first_position(make_model("bert")) == 0
    assert first_position(make_model("roberta")) == 2
    with pytest.raises(ValueError, match="max_length=513 is beyond the 512 positions"):
        Encoder(make_model("roberta"), make_tokenizer(), max_length=513)
    assert Encoder(make_model("roberta"), make_tokenizer()).max_length == 512


def test_resolve_dtype():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_dtype("auto", cpu) == torch.float32
    assert resolve_dtype("auto", cuda) == torch.bfloat16
    assert resolve_dtype("float16", cpu) == torch.float16
    for bad in ("int8", "float99", torch.int32):
        with pytest.raises(ValueError, match="no floating-point dtype"):
            resolve_dtype(bad, cpu)


def test_resolve_device():
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")
    assert resolve_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="device='gpu' is no device; use 'cpu' or 'cuda'"):
        resolve_device("gpu")
    with pytest.raises(ValueError, match=r"device='cuda:99', but torch sees \d+ CUDA devices"):
        resolve_device("cuda:99")


def test_digest_sees_every_part():
    state = {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    seen = {
        digest(state, "x"),
        digest(state, "y"),
        digest(state | {"a": torch.arange(4.0).view(2, 2)}, "x"),
        digest(state | {"a": torch.arange(4.0).nextafter(torch.tensor(9.0))}, "x"),
        digest({"a": state["a"], "c": state["b"]}, "x"),
        digest(state, "x", ""),
    }
    assert len(seen) == 6
    assert digest(dict(reversed(state.items())), "x") in seen


def test_fingerprint_follows_the_parameters(folder):
    encoder = Encoder.from_pretrained(folder, device="cpu", max_length=32)
    first = encoder.fingerprint
    copy = folder.with_name(folder.name + "-copy")
    shutil.copytree(folder, copy)
    assert Encoder.from_pretrained(copy, device="cpu", max_length=32).fingerprint == first
    assert Encoder.from_pretrained(copy, device="cpu", max_length=31).fingerprint != first
    with torch.no_grad():
        encoder.backbone.embeddings.word_embeddings.weight[7, 7] += 1e-3
    assert encoder.fingerprint != first
