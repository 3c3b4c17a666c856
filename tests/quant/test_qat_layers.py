import copy

import pytest
import torch
from torch import nn

from torsh_quant._fold import folded
from torsh_quant._numerics import dequantize_weight, quantize_weight, weight_qparams
from torsh_quant._qat import convert, freeze_batch_norm, prepare_qat
from torsh_quant._qat_layers import QATLinear

KINDS = [
    (nn.Linear, nn.BatchNorm1d, (9, 6)),
    (nn.Conv1d, nn.BatchNorm1d, (9, 6, 7)),
    (nn.Conv2d, nn.BatchNorm2d, (9, 6, 5, 5)),
    (nn.Conv3d, nn.BatchNorm3d, (5, 6, 4, 4, 4)),
]


def pair(layer, norm, *, bias=True):
    torch.manual_seed(0)
    rest = () if layer is nn.Linear else (3,)
    net = nn.Sequential(layer(6, 4, *rest, bias=bias), norm(4))
    with torch.no_grad():
        net[1].weight.uniform_(-1.5, 1.5)  # negative gains too
        net[1].bias.normal_()
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
    return net


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", ["lsq", "ste"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_evaluation_it_is_the_folded_layer(kind, method, bias):
    layer, norm, shape = kind
    net, x = pair(layer, norm, bias=bias), torch.randn(shape)
    qat = prepare_qat(net, "w4a16", data=x, method=method).eval()
    weight, shift = folded(net[0], net[1])
    plain = copy.deepcopy(net[0])
    spec, size = qat[0].scheme.weight, qat[0].group_size
    scale, _ = weight_qparams(weight.flatten(1), spec, size)
    q = quantize_weight(weight.flatten(1), scale, None, spec)
    plain.weight = nn.Parameter(dequantize_weight(q, scale).view_as(weight))
    plain.bias = nn.Parameter(shift)
    torch.testing.assert_close(qat(x), plain(x), rtol=1e-5, atol=1e-5)
    # Frozen, training computes the same.
    freeze_batch_norm(qat)
    torch.testing.assert_close(qat.train()(x), plain(x), rtol=1e-5, atol=1e-5)
    assert not qat[1].training


@pytest.mark.parametrize("kind", KINDS)
def test_switched_off_it_is_the_float_layer(kind):
    layer, norm, shape = kind
    net, x = pair(layer, norm), torch.randn(shape)
    qat = prepare_qat(net, "w4a4-static", data=x).train()
    qat[0].enabled = False
    net.train()
    assert torch.equal(qat(x), net(x))
    assert torch.equal(qat[1].running_mean, net[1].running_mean)
    assert torch.equal(qat[1].running_var, net[1].running_var)
    qat(x).square().sum().backward()
    assert qat[0].weight_scale.grad is None


def test_statistics_in_training_are_those_of_the_layer_itself():
    net, x = pair(*KINDS[2][:2]), torch.randn(9, 6, 5, 5)
    qat, net = prepare_qat(net, "w8a8", data=x).train(), net.train()
    before = net[1].running_mean.clone()
    qat(x), net(x)
    assert not torch.equal(before, net[1].running_mean)
    # 8 bits on both sides.
    torch.testing.assert_close(qat[1].running_mean, net[1].running_mean, rtol=0.02, atol=0.02)
    torch.testing.assert_close(qat[1].running_var, net[1].running_var, rtol=0.02, atol=0.02)


def test_a_gain_of_zero_stays_finite_and_trains():
    net, x = pair(nn.Conv2d, nn.BatchNorm2d), torch.randn(9, 6, 5, 5)
    net[1].weight.data[1] = 0
    for scheme in ("w4a16", "w4a16-asym"):
        qat = prepare_qat(net, scheme, data=x).train()
        qat(x).pow(3).sum().backward()
        assert qat[1].weight.grad[1] != 0
        assert all(torch.isfinite(p.grad).all() for p in qat.parameters())
        qat.eval()
        torch.testing.assert_close(convert(qat)(x), qat(x), rtol=1e-4, atol=1e-5)


def linear(scheme, method="lsq"):
    torch.manual_seed(1)
    return prepare_qat(nn.Sequential(nn.Linear(8, 4)), scheme, method=method)[0]


@pytest.mark.parametrize("method", ["lsq", "ste"])
def test_input_ranges_start_with_the_first_training_batch(method):
    layer, x = linear("w8a4-static", method), torch.randn(16, 8)
    assert not layer.saw_data
    before = layer.eval()(x)
    assert not layer.saw_data
    layer.train()(torch.zeros(3, 8))  # no range either
    assert not layer.saw_data
    layer(x)
    assert layer.saw_data
    assert not torch.equal(layer.eval()(x), before)
    scale, _ = layer.input_qparams()
    layer.train()(x * 3)
    assert torch.equal(layer.input_qparams()[0], scale) == (method == "lsq")
    layer.freeze_ranges()
    scale, _ = layer.input_qparams()
    layer(x * 9)
    assert torch.equal(layer.input_qparams()[0], scale)


def test_running_range_follows_by_its_momentum():
    layer = linear("w8a8-static", "ste").train()
    layer(torch.tensor([[-1.0, 3, 0, 0, 0, 0, 0, 0]]))
    layer(torch.tensor([[-2.0, 5, 0, 0, 0, 0, 0, 0]]))
    assert layer.act_low.item() == pytest.approx(-1.05)
    assert layer.act_high.item() == pytest.approx(3.1)
    layer(torch.tensor([[torch.inf, 5, 0, 0, 0, 0, 0, 0]]))
    assert layer.act_high.item() == pytest.approx(3.1)


def test_frozen_scales_stay_though_an_optimizer_moves_the_parameter():
    layer, x = linear("w8a4-static").train(), torch.randn(16, 8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    assert layer.act_scale.item() != 1
    scale = layer.input_qparams()[0].detach().clone()
    layer.freeze_ranges()
    layer(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.input_qparams()[0], scale)
    assert layer.act_scale.grad is not None


@pytest.mark.parametrize("method", ["lsq", "ste"])
@pytest.mark.parametrize("scheme", ["w4a4-static", "w3a16-asym", "w8a8-tensor", "w4a8-g4"])
def test_state_round_trip(scheme, method):
    layer, x = linear(scheme, method).train(), torch.randn(16, 8)
    layer(x).sum().backward()
    if layer.scheme.is_static:
        layer.freeze_ranges()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.1)
    other = linear(scheme, method)
    with torch.no_grad():
        other.weight.add_(1)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(x), layer.eval()(x))
    assert other.ranges_frozen == layer.ranges_frozen
    assert other.saw_data
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))


def test_state_of_the_float_layer_loads_and_renews_the_scales():
    layer, x = linear("w4a16"), torch.randn(16, 8)
    layer(x)
    plain = nn.Linear(8, 4)
    plain.weight.data *= 10
    found = layer.load_state_dict(plain.state_dict(), strict=False)
    assert not found.unexpected_keys
    fresh = prepare_qat(nn.Sequential(plain), "w4a16")[0]
    assert torch.equal(layer(x), fresh(x))
    with pytest.raises(ValueError, match=r"version 9; known is 1"):
        layer.set_extra_state(torch.tensor([9, 1, 1, 1], dtype=torch.uint8))


def test_half_precision_and_autocast():
    layer, x = linear("w4a8-static").train(), torch.randn(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    torch.testing.assert_close(out.float(), layer(x), rtol=0.05, atol=0.05)  # bf16: 8 bits
    layer = layer.to(torch.bfloat16)
    assert layer.weight_unit.dtype == torch.float32
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_one_sample_and_an_empty_batch():
    conv = prepare_qat(nn.Sequential(nn.Conv2d(2, 3, 2)), "w8a8")[0]
    x = torch.randn(2, 5, 5)
    torch.testing.assert_close(conv(x), conv(x[None])[0])
    assert linear("w8a8")(torch.zeros(0, 8)).shape == (0, 4)
    assert linear("w8a4-static").train()(torch.zeros(0, 8)).shape == (0, 4)


def test_compiled_it_computes_the_same():
    layer, x = linear("w4a8-static").train(), torch.randn(16, 8)
    layer(x)
    expected = layer(x)
    found = torch.compile(layer, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert layer.weight_scale.grad is not None


def test_it_is_a_linear_layer():
    layer = linear("w4a8")
    assert isinstance(layer, (QATLinear, nn.Linear))
    assert "scheme='w4a8', method='lsq'" in repr(layer)
