import torch
from torch import nn

from torsh_quant import _explain, explain, quantize
from torsh_quant._cpu import FLOAT64, IntegerKernel


def net():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.Conv2d(32, 32, 3),
        nn.Flatten(),
        nn.Linear(512, 512),
        nn.Linear(512, 4),
    ).eval()


def wide(monkeypatch, bits):
    kernels = (IntegerKernel("an int8 kernel", bits), FLOAT64)
    monkeypatch.setattr(_explain, "linear_kernels", lambda: kernels)
    monkeypatch.setattr(_explain, "conv_kernels", lambda dims=2: kernels)


def test_rows_follow_the_model(monkeypatch):
    wide(monkeypatch, 8)
    found = explain(quantize(net(), "w8a8", overrides={"4": None}))
    assert [row.layer for row in found.rows] == ["0", "1", "3", "4"]
    first, second, third, last = found.rows
    assert first.gain == "below 1x"
    assert "only 9 products per output" in first.reason
    assert "channels_last" in second.reason
    assert (third.kernel, third.act_bits, third.reason) == ("an int8 kernel", 8, "")
    assert third.bytes_float == 4 * 512 * 513
    assert third.bytes_now == 512 * 512 + 8 * 512
    assert (last.scheme, last.reason) == ("float", "not quantized")
    assert found.fallbacks == ()


def test_narrow_activations_are_named(monkeypatch):
    wide(monkeypatch, 7)
    row = explain(quantize(net(), "w8a8")).rows[2]
    assert row.act_bits == 7
    assert "activations use 7 bits" in row.reason
    assert explain(quantize(net(), "w8a7")).rows[2].reason == ""


def test_fallbacks_are_named(monkeypatch):
    wide(monkeypatch, 8)
    found = explain(quantize(net(), "w4a16"))
    assert len(found.fallbacks) == 4
    assert found.rows[2].act_bits is None
    assert "'w4a8' runs on integers" in found.rows[2].reason
    monkeypatch.setattr(_explain, "linear_kernels", lambda: (FLOAT64,))
    row = explain(quantize(net(), "w8a8")).rows[2]
    assert row.fallback
    assert row.kernel == "float64, exact but slow"


def test_channels_last_is_seen():
    found = explain(quantize(net().to(memory_format=torch.channels_last), "w8a8"))
    assert "channels_last" not in found.rows[1].reason


def test_the_table_names_every_layer():
    text = str(explain(quantize(net(), "w8a8")))
    assert len(text.splitlines()) == 5
    assert text.splitlines()[0].split()[:3] == ["layer", "scheme", "kernel"]
