import copy
import json
import os
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import torsh_quant
from torsh_quant import QuantConv1d, QuantEmbedding, QuantLinear, quantize
from torsh_quant._file import FORMAT, _text, load, save, saved_layers
from torsh_quant._journal import digest_of

ROOT = Path(__file__).parents[2]


def small_net():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2, padding_mode="reflect", padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(36, 5),
    ).eval()


def lively(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net


@pytest.fixture
def x():
    return torch.randn(4, 2, 6, 6)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    net = small_net()
    place = tmp_path_factory.mktemp("saved") / "net.safetensors"
    save(quantize(net, "w4a16-g9", overrides={"6": "w8a8"}), place)
    return net, place.read_bytes()


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)
    assert repr(one) == repr(other)


OPTIONS = [
    {"scheme": "w8a8"},
    {"scheme": "w8a8-static", "data": True},
    {"scheme": "w4a8", "data": True, "method": ["equalize", "gptq", "bias_correction"]},
    {"scheme": "w4a16-g9-asym", "overrides": {"6": "w3a16"}},
    {"scheme": "w8a8-static-tensor", "data": True, "overrides": {"3": None}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda one: one["scheme"])
def test_what_is_saved_is_loaded(options, path, x):
    net = lively(small_net())
    made = quantize(net, **options | ({"data": [x]} if "data" in options else {}))
    save(made, path)
    before = copy.deepcopy(net.state_dict())
    for model in (net, copy.deepcopy(net).to("meta"), copy.deepcopy(net).double().train()):
        again = load(path, model)
        same(again, made)
        assert torch.equal(again(x), made(x))
        assert not again.training
        assert not any(tensor.is_inference() for tensor in again.state_dict().values())
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in before)
    assert type(net[0]) is nn.Conv2d


def test_the_same_model_gives_the_same_bytes(saved, path):
    net, raw = saved
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        save(load_bytes(raw, path, net).to(device), path)
        assert path.read_bytes() == raw


def load_bytes(raw, path, net):
    path.write_bytes(raw)
    return load(path, net)


def test_the_file_is_plain_safetensors(saved, path):
    path.write_bytes(saved[1])
    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()[FORMAT])
        assert file.get_tensor("0.weight").dtype == torch.uint8
    assert document["version"] == 1
    assert document["torsh_quant"] == torsh_quant.__version__
    assert document["layers"]["3"]["stride"] == [2, 2]
    assert not list(path.parent.glob(".*"))


@pytest.mark.gpu
def test_devices(saved, path, x):
    net, raw = saved
    path.write_bytes(raw)
    here = load(path, net)
    there = load(path, net, device="cuda")
    assert {tensor.device.type for tensor in there.state_dict().values()} == {"cuda"}
    same(there.cpu(), here)
    assert load(path, copy.deepcopy(net).cuda())[0].weight.is_cuda


def test_inplace(saved, path, x):
    net, raw = saved
    path.write_bytes(raw)
    other = copy.deepcopy(net)
    assert load(path, other, inplace=True) is other
    same(other, load(path, net))
    broken = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"the model has no layer '3'|is a Conv2d"):
        load(path, broken, inplace=True)
    assert type(broken[0]) is nn.Linear


def test_one_layer_needs_no_model(path):
    for made in (
        QuantLinear.from_float(nn.Linear(8, 4), "w4a16-g4-asym"),
        QuantEmbedding.from_float(nn.Embedding(5, 6, padding_idx=2), "w4a16"),
        QuantConv1d.from_float(nn.Conv1d(2, 3, 2, padding="same", dilation=2), "w8a8"),
    ):
        if isinstance(made, QuantLinear):
            made.input_scale = torch.rand(8)
        save(made.eval(), path)
        same(load(path), made)


def test_others_need_a_model(saved, path):
    path.write_bytes(saved[1])
    with pytest.raises(ValueError, match=r"of 3 quantized layers; pass the float model"):
        load(path)
    assert [type(layer).__name__ for layer in saved_layers(path).values()] == [
        "QuantConv2d",
        "QuantConv2d",
        "QuantLinear",
    ]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight
        self.again.weight = self.inner.weight
        self.register_buffer("hidden", torch.arange(8.0), persistent=False)
        self.register_buffer("grown", torch.ones(2), persistent=False)

    def forward(self, ids):
        return self.head(self.again(self.inner(self.table(ids) + self.hidden)))


@pytest.mark.parametrize("quantized_table", [False, True])
def test_ties_and_hidden_buffers(path, quantized_table):
    net, ids = Tied().eval(), torch.arange(11)
    skip, overrides = ("head",), {}
    if quantized_table:
        skip, overrides = ("lm_head",), {"table": "w8a16", "head": "w8a16"}
    made = quantize(net, "w8a8", skip=skip, overrides=overrides)
    assert made.head.weight is made.table.weight
    assert made.again.weight is made.inner.weight
    made.hidden.mul_(2)
    save(made, path)
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    assert {"table.weight", "head.weight"} & names == {"table.weight"}
    assert "hidden" in names
    untied = copy.deepcopy(net)
    untied.head.weight = nn.Parameter(torch.zeros(11, 8))
    for model in (net, copy.deepcopy(net).to("meta"), untied):
        again = load(path, model)
        assert again.head.weight is again.table.weight
        assert again.again.weight is again.inner.weight
        assert torch.equal(again(ids), made(ids))
    other = copy.deepcopy(net)
    other.grown = torch.zeros(7)  # its shape is the model's own affair
    assert load(path, other).grown.tolist() == [0.0] * 7
    assert net.hidden[1] == 1
    with pytest.raises(ValueError, match=r"'grown' is not in the file, and the model has no"):
        load(path, other.to("meta"))


def test_versions_of_states(path):
    seen = []

    class Versioned(nn.Sequential):
        _version = 3

        def _load_from_state_dict(self, state, prefix, metadata, *others):
            seen.append(metadata.get("version"))
            super()._load_from_state_dict(state, prefix, metadata, *others)

    net = Versioned(nn.Linear(2, 2)).eval()
    save(quantize(net), path)
    load(path, net)
    assert seen == [3]


def test_channels_last(path, x):
    net = small_net().to(memory_format=torch.channels_last)
    made = quantize(net, "w8a8")
    save(made, path)
    assert load(path, net)[3].channels_last
    assert load(path, net)[:4](x).stride() == made[:4](x).stride()


def test_loaded_in_inference_mode(saved, path, x):
    net, raw = saved
    path.write_bytes(raw)
    with torch.inference_mode():
        again = load(path, net)
    assert not any(tensor.is_inference() for tensor in again.state_dict().values())
    assert again(x).shape == (4, 5)


def test_parts_of_one_storage(path):
    net = quantize(nn.Sequential(nn.Linear(4, 4)).eval())
    whole = torch.arange(8.0)
    net.register_buffer("left", whole[:4])
    net.register_buffer("right", whole[2:6])
    save(net, path)
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("left", torch.zeros(4))
    model.register_buffer("right", torch.zeros(4))
    assert torch.equal(load(path, model).right, whole[2:6])


def test_modules_that_keep_weights_elsewhere(path):
    net = nn.ModuleDict({"rnn": nn.GRU(4, 4), "head": nn.Linear(4, 2)}).eval()
    x = torch.randn(3, 1, 4)
    save(quantize(net, "w8a8"), path)
    fresh = nn.ModuleDict({"rnn": nn.GRU(4, 4), "head": nn.Linear(4, 2)})
    assert torch.equal(load(path, fresh).rnn(x)[0], net.rnn(x)[0])
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    made = quantize(encoder.eval(), "w8a8")
    save(made, path)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():  # where torch would take its fused float path
        assert torch.equal(load(path, encoder)(x), made(x))


def test_models_that_do_not_fit(saved, path):
    net, raw = saved
    path.write_bytes(raw)
    cases = [
        (1, nn.Identity(), r"has '1.bias', '1.num_batches_tracked'|but the model has not"),
        (2, nn.Linear(3, 3), r"does not have '2.bias', '2.weight'"),
        (3, nn.Conv2d(4, 4, 3, groups=2), r"'3' has stride=\[2, 2\] in the file, but \[1, 1\]"),
        (6, nn.Linear(36, 6), r"'6' has out_features=5 in the file, but 6 in the model"),
        (6, nn.Conv2d(1, 1, 1), r"'6' is a Linear in the file, but a Conv2d in the model"),
        (6, QuantLinear(36, 5), r"pass the float model, not a quantized one"),
        (1, nn.BatchNorm2d(7), r"'1.bias' is F32 \(4,\) in .*, but float32 \(7,\)|'1.weight' is"),
    ]
    for index, layer, message in cases:
        other = copy.deepcopy(net)
        other[index] = layer
        with pytest.raises(ValueError, match=message):
            load(path, other)
    with pytest.raises(ValueError, match=r"the model has no layer '6'"):
        load(path, net[:5])


def test_folded_norms_must_be_there(path, x):
    net = lively(small_net())
    save(quantize(net, "w8a8", data=[x]), path)
    other = copy.deepcopy(net)
    other[1] = nn.ReLU()
    with pytest.raises(ValueError, match="'1' is an Identity in the file, but ReLU in the model"):
        load(path, other)


def test_what_cannot_be_saved(path, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Linear has no quantized layer; call quantize"):
        save(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match="'weight' is on the meta device"):
        save(QuantLinear(4, 2, device="meta"), path)

    class Mine(QuantLinear):
        pass

    with pytest.raises(ValueError, match=r"is of the class .*Mine, which a file cannot name"):
        save(Mine(4, 2), path)
    net = quantize(nn.Sequential(nn.Linear(2, 2)).eval())
    monkeypatch.setattr(nn.Sequential, "get_extra_state", lambda self: {"a": 1})
    with pytest.raises(ValueError, match="'_extra_state' is a dict, not a tensor"):
        save(net, path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        save(QuantLinear(4, 2), tmp_path / "no" / "net.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load(path)
    assert not list(tmp_path.iterdir())


def test_foreign_files_are_named(path, tmp_path):
    weight = torch.zeros(2, 2)
    cases = {
        "a GPTQ checkpoint": {"l.qweight": weight, "l.qzeros": weight, "l.g_idx": weight},
        "an AWQ checkpoint": {"l.qweight": weight, "l.qzeros": weight},
        "compressed-tensors": {"l.weight_packed": weight, "l.weight_scale": weight},
        "a plain safetensors file, as of float models": {"l.weight": weight},
    }
    for message, tensors in cases.items():
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
        with pytest.raises(ValueError, match=f"holds no quantized model: it is .*{message}"):
            load(path, nn.Linear(2, 2))
    save_file({"a": weight}, path, {"format": "torsh-text-topics"})
    with pytest.raises(ValueError, match="a file of the format 'torsh-text-topics'"):
        load(path)
    torch.save({"weight": weight}, path)
    with pytest.raises(ValueError, match=r"it is a zip file, such as torch\.save writes"):
        load(path)
    torch.save({"weight": weight}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"it is a pickle.*it is not read"):
        load(path)
    for content, message in (
        (b"GGUF\3\0\0\0" + bytes(64), "a GGUF file"),
        (b"", "it is empty"),
        (b"text, and more of it", "it is damaged or no safetensors file"),
        (b"\x80\0\0\0\0\0\0\0{", "cut short: not even its header is all there"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load(path)
    with pytest.raises(FileNotFoundError, match=r"quantized\.safetensors"):
        load(tmp_path)


def test_cut_short_anywhere(saved, path):
    net, raw = saved
    for length in range(0, len(raw), 97):
        with pytest.raises(ValueError, match=r"cut short|empty|damaged"):
            load_bytes(raw[:length], path, net)
    with pytest.raises(ValueError, match=r"damaged"):
        load_bytes(raw + b"\0", path, net)


def test_flipped_anywhere(saved, path):
    net, raw = saved
    begin = int.from_bytes(raw[:8], "little") + 8
    expected = load_bytes(raw, path, net)
    generator = random.Random(0)
    for number in range(600):
        damaged = bytearray(raw)
        place = generator.randrange(begin) if number % 2 else generator.randrange(begin, len(raw))
        damaged[place] ^= 1 << generator.randrange(8)
        try:
            found = load_bytes(damaged, path, net)
        except ValueError:
            continue
        assert place < begin  # a blank that is now another kind of blank
        same(found, expected)


def rewritten(raw, path, change, *, sign=True):
    """The file with another document in its header, checksum and all."""
    path.write_bytes(raw)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        document = json.loads(file.metadata()[FORMAT])
    document = change(document, tensors) or document
    if sign and isinstance(document, dict):
        document.pop("digest", None)
        items = [("header", _text(document)), *sorted(tensors.items())]
        document["digest"] = digest_of(items)
    save_file(tensors, path, {FORMAT: json.dumps(document)})


EDITS = [
    (
        ("layers", "6", "in_features"),
        2**60,
        "in_features=1152921504606846976 of '6' is not a whole",
    ),
    (("layers", "6", "in_features"), -36, "in_features=-36 of '6'"),
    (("layers", "6", "in_features"), 36.0, r"in_features=36\.0 of '6'"),
    (("layers", "6", "in_features"), True, "in_features=True of '6'"),
    (("layers", "6", "in_features"), 2**31 - 1, "may overflow 32-bit sums"),
    (("layers", "6", "out_features"), 2**31 - 1, "'6' has out_features=2147483647 in the file"),
    (("layers", "6", "bias"), 1, "bias=1 of '6' is neither true nor false"),
    (("layers", "6", "input_scale"), True, "does not have '6.input_scale'"),
    (("layers", "6", "kind"), "Linear", "kind='Linear' of '6' is not known; use QuantLinear"),
    (("layers", "6", "kind"), ["QuantLinear"], "kind=.* of '6' is not known"),
    (("layers", "6", "kind"), "QuantConv2d", "the record of '6' has unknown keys"),
    (("layers", "6", "more"), 1, r"the record of '6' has unknown keys: \['more'\]"),
    (("layers", "6"), None, "a value is of the wrong type"),
    (("layers", "6", "scheme"), "w8a8", "scheme='w8a8' of '6' is not an object"),
    (("layers", "6", "scheme", "act"), {}, "missing keys"),
    (("layers", "6", "scheme", "act", "dynamic"), False, "is not supported"),
    (("layers", "6", "scheme", "weight", "bits"), 9, "bits=9 is not an integer format"),
    (("layers", "6", "scheme", "weight", "bits"), 4, "'6.weight' is I8"),
    (("layers", "6", "scheme", "weight", "group"), 2**30, "does not divide 36 weights"),
    (("layers", "6", "scheme", "weight", "group"), "row", "group='row' of '6' is not one of"),
    (("layers", "6", "scheme", "weight", "group"), 4, r"'6.scale' is F32 \(5, 1\) .*\(5, 9\)"),
    (("layers", "3", "kernel_size"), [3], "is not a list of 2 numbers"),
    (("layers", "3", "kernel_size"), [2**30, 2**30], "more than any file holds"),
    (("layers", "3", "padding"), "same", "'3' is no convolution: .*same"),
    (("layers", "3", "padding"), [-1, 0], "padding=-1 of '3'"),
    (("layers", "3", "padding"), {"same": 1}, "is not a list of 2 numbers"),
    (("layers", "3", "groups"), 3, "'3' is no convolution: in_channels must be divisible"),
    (("layers", "3", "padding_mode"), "none", "padding_mode='none' of '3' is not one of zeros"),
    (("layers", "5"), {"kind": "QuantLinear"}, "the record of '5' has missing keys"),
    (("layers",), [], "a value is of the wrong type"),
    (("identities",), ["9"], "'9' is an Identity in the file"),
    (("identities",), [1], "a value is of the wrong type"),
    (("tied",), {"6.bias": "none"}, "'6.bias' is tied to 'none'"),
    (("tied",), {"6.bias": 5}, "a value is of the wrong type"),
    (("buffers",), ["nowhere"], "has no values of the buffers 'nowhere'"),
    (("versions",), {"1": "2"}, "a value is of the wrong type"),
    (("version",), "1", "it has no version"),
    (("version",), True, "it has no version"),
    (("more",), 1, "its keys are not those of version 1"),
]


@pytest.mark.parametrize(("keys", "value", "message"), EDITS, ids=lambda one: str(one)[:40])
def test_edited_headers(saved, path, keys, value, message):
    def change(document, tensors):
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    rewritten(saved[1], path, change)
    with pytest.raises(ValueError, match=message):
        load(path, saved[0])


def test_newer_versions_say_who_wrote_them(saved, path):
    def change(document, tensors):
        document |= {"version": 2, "torsh_quant": "9.1.0", "new": 1}

    rewritten(saved[1], path, change)
    message = r"has version 2 of its format, written by torsh_quant 9\.1\.0.*upgrade torsh-quant"
    with pytest.raises(ValueError, match=message):
        load(path, saved[0])


def test_headers_that_are_no_objects(saved, path):
    for text in ("[]", "1", "{", '"' + "x" * 9, "[" * 100_000, '{"version": ' + "9" * 5000 + "}"):
        save_file({"a": torch.zeros(1)}, path, {FORMAT: text})
        with pytest.raises(ValueError, match=r"the header of .* is damaged"):
            load(path, saved[0])


def test_changed_tensors(saved, path):
    net, raw = saved

    def wrong_dtype(document, tensors):
        tensors["6.weight"] = tensors["6.weight"].view(torch.uint8)

    def integer_bias(document, tensors):
        tensors["1.bias"] = tensors["1.bias"].int()

    def missing(document, tensors):
        del tensors["6.scale"]

    def unexpected(document, tensors):
        tensors["6.extra"] = torch.zeros(1)

    def one_more(document, tensors):
        tensors["6.weight"][0, 0] += 1

    for change, message in (
        (wrong_dtype, r"'6\.weight' is U8 \(5, 36\) in .*, but int8 \(5, 36\) in the model"),
        (integer_bias, r"'1\.bias' is I32 \(4,\)"),
        (missing, r"does not have '6\.scale'; pass the model"),
        (unexpected, r"has, but the model has not, '6\.extra'; pass the model"),
    ):
        rewritten(raw, path, change)
        with pytest.raises(ValueError, match=message):
            load(path, net)
    rewritten(raw, path, one_more, sign=False)
    with pytest.raises(ValueError, match="is damaged: its checksum does not fit"):
        load(path, net)


TABLES = [
    ("shape", [2**60, 2**60]),
    ("shape", [-5, -36]),
    ("shape", [180]),
    ("shape", [36, 5]),
    ("shape", "all"),
    ("dtype", "U8"),
    ("dtype", "F8_E4M3"),
    ("dtype", "F4"),
    ("dtype", "object"),
    ("data_offsets", [0, 2**63]),
    ("data_offsets", [-180, 0]),
    ("data_offsets", [180, 0]),
    ("data_offsets", [0, 180]),
    ("data_offsets", []),
    ("more", 1),
]


@pytest.mark.parametrize(("field", "value"), TABLES, ids=str)
def test_edited_tables_of_tensors(saved, path, field, value):
    net, raw = saved
    begin = int.from_bytes(raw[:8], "little") + 8
    header = json.loads(raw[8:begin])
    header["6.weight"][field] = value
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if field != "more":
        with pytest.raises(ValueError, match=r"net\.safetensors"):
            load_bytes(len(text).to_bytes(8, "little") + text + raw[begin:], path, net)
    for length in (0, 1, len(text) - 1, len(text) + 1, 2**31, 2**63 - 1, 2**64 - 1):
        with pytest.raises(ValueError, match=r"holds no quantized model"):
            load_bytes(length.to_bytes(8, "little") + text + raw[begin:], path, net)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_edit_is_refused_or_harmless(saved, tmp_path_factory, data):
    place = tmp_path_factory.getbasetemp() / "edited.safetensors"

    def change(document, tensors):
        while True:
            key = data.draw(st.sampled_from(sorted(document)))
            if not isinstance(document[key], dict) or not document[key] or data.draw(st.booleans()):
                break
            document = document[key]
        if data.draw(st.booleans()):
            document[key] = data.draw(VALUES)
        else:
            del document[key]

    rewritten(saved[1], place, change, sign=data.draw(st.integers(0, 3)) > 0)
    with suppress(ValueError):
        load(place, saved[0])


@pytest.mark.parametrize("where", ["safetensors", "replace"])
def test_a_write_that_fails_leaves_the_old_file(saved, path, where, monkeypatch):
    net, raw = saved
    made = load_bytes(raw, path, net)

    def fail(*_):
        raise OSError("no space left on device")

    if where == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        monkeypatch.setattr("torsh_quant._file._on_disk", fail)
    with pytest.raises(OSError, match="no space left"):
        save(made, path)
    assert path.read_bytes() == raw
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_hugging_face_folders(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    model = transformers.LlamaForCausalLM(config).eval()
    made = quantize(model, "w4a16")
    model.save_pretrained(tmp_path)
    save(made, tmp_path / "quantized.safetensors")
    again = load(tmp_path)
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(again(ids).logits, made(ids).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    tokens = again.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (2, 10)
    described = json.loads((tmp_path / "config.json").read_text())
    for name in ("PreTrainedTokenizer", "mine.Model", "torch"):
        described["architectures"] = [name]
        (tmp_path / "config.json").write_text(json.dumps(described))
        with pytest.raises(ValueError, match=r"must be one class of transformers"):
            load(tmp_path)


def test_loads_in_a_process_that_never_saw_the_model(saved, path):
    path.write_bytes(saved[1])
    code = (
        "import sys, torch; from torch import nn; from torsh_quant._file import load\n"
        "layers = [nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),\n"
        "  nn.Conv2d(4, 4, 3, stride=2, groups=2, padding_mode='reflect', padding=1, bias=False),\n"
        "  nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5)]\n"
        "net = load(sys.argv[1], nn.Sequential(*layers))\n"
        "print(net[6].weight.sum().item(), 'numpy' in sys.modules)"
    )
    source = os.pathsep.join([str(ROOT / "torsh_quant" / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=True,
    )
    total = load(path, saved[0])[6].weight.sum().item()
    assert done.stdout.split()[0] == str(total)
