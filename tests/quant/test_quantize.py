import copy

import pytest
import torch
from torch import nn

from torsh_quant import (
    QuantConv2d,
    QuantLinear,
    Scheme,
    _explain,
    dequantize,
    model_bytes,
    quantize,
)
from torsh_quant._cpu import FLOAT64


def mlp(dtype=torch.float32):
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).to(dtype).eval()


def test_copy_by_default_and_in_place_if_asked():
    net = mlp()
    quantized = quantize(net)
    assert isinstance(net[0], nn.Linear)
    assert isinstance(quantized[0], QuantLinear)
    assert quantize(net, inplace=True) is net
    assert isinstance(net[0], QuantLinear)


def test_report_counts_bytes_and_errors():
    net = mlp()
    report = quantize(net, "w4a16-g32").quant_report
    first = report.rows[0]
    assert (first.layer, first.scheme) == ("0", "w4a16-g32")
    assert first.bytes_before == 4 * (32 * 64 + 64)
    assert first.bytes_after == 32 * 64 // 2 + 4 * 64 + 4 * 64
    quantized = quantize(net, "w4a16-g32")
    change = (quantized[0].dequantized_weight() - net[0].weight).detach()
    assert first.max_error == pytest.approx(change.abs().max().item())
    assert first.mean_error == pytest.approx((change.norm() / net[0].weight.norm()).item())
    assert (report.bytes_before, report.bytes_after) == (model_bytes(net), model_bytes(quantized))
    assert str(report).splitlines()[-1].startswith("model")


def test_skip_and_overrides():
    net = nn.Sequential(mlp(), mlp(), nn.Linear(8, 4)).eval()
    quantized = quantize(net, "w8a8", skip=("2",), overrides={"1": "w4a16", "1.2": None})
    schemes = {row.layer: row.scheme for row in quantized.quant_report.rows}
    assert schemes == {"0.0": "w8a8", "0.2": "w8a8", "1.0": "w4a16", "1.2": "float", "2": "float"}
    assert type(quantized[2]) is nn.Linear


def test_the_default_leaves_a_language_model_head():
    net = nn.ModuleDict({"fc": nn.Linear(4, 4), "lm_head": nn.Linear(4, 9)}).eval()
    assert type(quantize(net)["lm_head"]) is nn.Linear
    assert type(quantize(net, skip=())["lm_head"]) is QuantLinear


def test_patterns_that_name_nothing():
    with pytest.raises(ValueError, match=r"overrides names no layer .*'9'; there are '0', '2'"):
        quantize(mlp(), overrides={"9": "w8a8"})
    with pytest.raises(ValueError, match="skip names no layer"):
        quantize(mlp(), skip=("head",))


def test_refusals():
    with pytest.raises(RuntimeError, match=r"training mode; call model.eval\(\)"):
        quantize(mlp().train())
    with pytest.raises(RuntimeError, match="'0' is quantized already; start from the float model"):
        quantize(quantize(mlp()))
    with pytest.raises(RuntimeError, match=r"'0.weight' is on the meta device; load"):
        quantize(mlp().to("meta"))
    with pytest.raises(RuntimeError, match=r"ReLU has no nn.Linear, nn.Conv1d"):
        quantize(nn.ReLU().eval())
    with pytest.raises(RuntimeError, match="has no quantized layer"):
        dequantize(mlp())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(value):
    net = mlp()
    net[2].weight.data[3, 5] = value
    with pytest.raises(ValueError, match=r"the weight of '2' has NaN or infinity.*skip=\('2',\)"):
        quantize(net)
    assert type(quantize(net, skip=("2",))[0]) is QuantLinear


def test_strict_refuses_slow_paths(monkeypatch):
    quantize(mlp(), "w8a8", strict=True)
    with pytest.raises(
        RuntimeError, match=r"'0' as w4a16 would run slowly.*'w4a8' runs on integers"
    ):
        quantize(mlp(), "w4a16", strict=True)
    monkeypatch.setattr(_explain, "linear_kernels", lambda: (FLOAT64,))
    with pytest.raises(RuntimeError, match="no int8 kernel of this build of torch is exact"):
        quantize(mlp(), "w8a8", strict=True)


def test_an_error_leaves_a_model_changed_in_place_as_it_was():
    net = mlp()
    modules = list(net.modules())
    with pytest.raises(RuntimeError, match="'2' as w4a16 would run slowly"):
        quantize(net, "w8a8", overrides={"2": "w4a16"}, strict=True, inplace=True)
    with pytest.raises(ValueError, match="group_size=48 does not divide in_features=64 of '2'"):
        quantize(net, "w8a8", overrides={"2": "w4a16-g48"}, inplace=True)
    assert list(net.modules()) == modules


def test_a_shared_layer_stays_shared():
    layer = nn.Linear(8, 8)
    quantized = quantize(nn.Sequential(layer, nn.ReLU(), layer).eval())
    assert quantized[0] is quantized[2]


def test_a_shared_weight_is_stored_once():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    quantized = quantize(nn.Sequential(first, second).eval())
    assert quantized[0].weight is quantized[1].weight
    assert not torch.equal(quantized[0].bias, quantized[1].bias)
    assert model_bytes(quantized) == 64 + 3 * 32


def test_a_weight_tied_to_an_embedding_stays_float():
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    net = nn.Sequential(embedding, nn.Linear(4, 4), head).eval()
    with pytest.warns(UserWarning, match=r"'2' stays float: its weight is tied to a float layer"):
        quantized = quantize(net)
    assert quantized[2].weight is quantized[0].weight
    assert "tied" in str(quantized.quant_report)


def test_a_layer_with_hooks_stays_float():
    net = mlp()
    net[0].register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.warns(UserWarning, match="'0' stays float: it has hooks"):
        assert type(quantize(net)[0]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_float_types(dtype):
    net = mlp(dtype)
    x = torch.randn(3, 32, dtype=dtype)
    out = quantize(net)(x)
    assert out.dtype == dtype
    assert (out - net(x)).norm() / net(x).norm() < 0.03


def test_a_layer_alone():
    layer = nn.Conv2d(2, 3, 3).eval()
    assert type(quantize(layer)) is QuantConv2d
    assert type(quantize(layer, inplace=True)) is QuantConv2d
    assert type(dequantize(quantize(layer))) is nn.Conv2d


def test_dequantize_returns_the_weights_of_the_integers():
    net = mlp()
    quantized = quantize(net, "w4a16")
    x = torch.randn(4, 32)
    back = dequantize(quantized)
    torch.testing.assert_close(back(x), quantized(x))
    assert not hasattr(back, "quant_report")
    assert isinstance(quantized[0], QuantLinear)
    assert dequantize(quantized, dtype=torch.bfloat16)[0].weight.dtype == torch.bfloat16
    # Its weights lie on the grid already: quantizing again changes nothing.
    again = quantize(dequantize(quantize(net, "w8a16")), "w8a16")
    assert torch.equal(again[0].weight, quantize(net, "w8a16")[0].weight)


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_does_not_bypass_the_layers(norm_first):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    quantized = quantize(encoder)
    x = torch.randn(2, 5, 32)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3:] = True
    with torch.no_grad():
        for arguments in ({}, {"src_key_padding_mask": mask}):
            out, expected = quantized(x, **arguments), encoder(x, **arguments)
            kept = ~mask if arguments else slice(None)
            assert (out - expected)[kept].norm() / expected[kept].norm() < 0.03


def test_copies_and_state_of_a_model():
    net, x = mlp(), torch.randn(3, 32)
    quantized = quantize(net, "w4a8")
    assert torch.equal(copy.deepcopy(quantized)(x), quantized(x))
    torch.manual_seed(1)
    fresh = quantize(mlp(), Scheme.parse("w4a8"))
    assert not torch.equal(fresh(x), quantized(x))
    fresh.load_state_dict(quantized.state_dict())
    assert torch.equal(fresh(x), quantized(x))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["w8a7", "w4a16", "w4a7"])
def test_moving_to_the_gpu_and_back(scheme):
    quantized = quantize(mlp(), scheme)
    x = torch.randn(40, 32)
    before = quantized(x)
    torch.testing.assert_close(quantized.cuda()(x.cuda()).cpu(), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(quantized.cpu()(x), before)
