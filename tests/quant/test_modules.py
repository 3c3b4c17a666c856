import copy
import io

import pytest
import torch
from torch import nn

from torsh_quant import QuantConv2d, QuantLinear, _cpu, quantize
from torsh_quant._numerics import quantize_rows

SCHEMES = ["w8a8", "w8a16", "w8a16-asym", "w4a16", "w4a16-g16-asym", "w4a8", "w3a16", "w6a7-tensor"]
CONVS = [
    {"in_channels": 3, "out_channels": 8, "kernel_size": 3, "padding": 1, "stride": 2},
    {"in_channels": 8, "out_channels": 8, "kernel_size": (3, 2), "padding": "same", "groups": 4},
    {
        "in_channels": 8,
        "out_channels": 6,
        "kernel_size": 3,
        "padding": 2,
        "dilation": 2,
        "padding_mode": "reflect",
        "bias": False,
    },
    {"in_channels": 4, "out_channels": 4, "kernel_size": 1, "padding": "valid"},
]
even_window = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def linear(scheme="w8a8"):
    layer = nn.Linear(48, 20).eval()
    return layer, QuantLinear.from_float(layer, scheme), torch.randn(5, 48)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_is_close_to_the_float_layer(scheme):
    layer, quantized, x = linear(scheme)
    error = (quantized(x) - layer(x)).norm() / layer(x).norm()
    bits = quantized.scheme.weight.bits
    assert error < {8: 0.02, 6: 0.06, 4: 0.12, 3: 0.25}[bits]
    # Float activations: exactly the float layer with the weights the integers stand for.
    if not quantized.act_bits:
        torch.testing.assert_close(quantized(x), quantized.to_float()(x))


@even_window
@pytest.mark.parametrize("arguments", CONVS)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a16", "w4a8"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_conv_is_close_to_the_float_layer(arguments, scheme, channels_last):
    layer = nn.Conv2d(**arguments).eval()
    if channels_last:
        layer = layer.to(memory_format=torch.channels_last)
    quantized = QuantConv2d.from_float(layer, scheme)
    x = torch.randn(4, arguments["in_channels"], 9, 11)
    out, expected = quantized(x), layer(x)
    assert (out - expected).norm() / expected.norm() < (0.03 if "w8" in scheme else 0.16)
    assert out.stride() == expected.stride()
    assert quantized.to_float()(x).stride() == expected.stride()
    torch.testing.assert_close(quantized(x[0]), out[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_loads_bit_for_bit(scheme):
    _, quantized, x = linear(scheme)
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = QuantLinear(48, 20, scheme=scheme)
    fresh(x)  # packs the zeros, which loading must make it forget
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), quantized(x))
    with torch.device("meta"):
        empty = QuantLinear(48, 20, scheme=scheme)
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(x), quantized(x))
    for name, tensor in quantized.state_dict().items():
        assert torch.equal(tensor, empty.state_dict()[name])


def test_state_is_small_plain_tensors():
    _, quantized, _ = linear("w4a16-g16")
    state = quantized.state_dict()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} == {
        "weight": (torch.uint8, (20, 24)),
        "scale": (torch.float32, (20, 3)),
        "bias": (torch.float32, (20,)),
    }
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    assert not any(tensor.is_quantized for tensor in state.values())


def test_conv_state_on_the_meta_device():
    layer = nn.Conv2d(4, 6, 3, bias=False).eval()
    quantized = QuantConv2d.from_float(layer, "w8a8")
    empty = QuantConv2d(4, 6, 3, bias=False, device="meta")
    empty.load_state_dict(quantized.state_dict(), assign=True)
    x = torch.randn(2, 4, 7, 7)
    assert torch.equal(empty(x), quantized(x))


def test_foreign_state_is_refused():
    layer, quantized, _ = linear("w8a8")
    with pytest.raises(RuntimeError, match=r"weight is torch.float32, not the torch.int8 of w8a8"):
        quantized.load_state_dict(layer.state_dict(), strict=False)
    other = QuantLinear.from_float(layer, "w4a16")
    with pytest.raises(RuntimeError, match=r"weight is torch.uint8"):
        quantized.load_state_dict(other.state_dict())
    state = quantized.state_dict()
    del state["scale"]
    with pytest.raises(RuntimeError, match=r"Missing key.*scale"):
        quantized.load_state_dict(state)
    state = quantized.state_dict()
    state._metadata[""]["version"] = 9
    with pytest.raises(RuntimeError, match="has version 9; this is 1"):
        QuantLinear(48, 20).load_state_dict(state)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g16-asym"])
def test_conversions_leave_integers_and_scales_alone(scheme):
    _, quantized, x = linear(scheme)
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    for convert in (nn.Module.half, nn.Module.bfloat16, nn.Module.double):
        convert(quantized)
        for name, tensor in quantized.state_dict().items():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
    assert quantized.type(torch.float16).weight.dtype == before["weight"].dtype
    assert quantized(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(
        quantized(x.half()).float(), quantized(x.half().float()), rtol=2e-3, atol=2e-3
    )


def test_a_change_of_the_weight_is_seen():
    _, quantized, x = linear("w8a8")
    before = quantized(x)
    with torch.no_grad():
        quantized.scale.mul_(2)
    assert quantized.bias is not None
    torch.testing.assert_close(quantized(x) - quantized.bias, 2 * (before - quantized.bias))
    other = copy.deepcopy(quantized)
    other.weight.zero_()
    assert torch.equal(other(x), other.bias.expand(5, 20))
    assert not torch.equal(quantized(x), other(x))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_a_copy_made_in_inference_mode_sees_what_is_loaded(scheme):
    _, quantized, x = linear(scheme)
    quantized(x)
    state = {name: torch.zeros_like(tensor) for name, tensor in quantized.state_dict().items()}
    with torch.inference_mode():
        other = copy.deepcopy(quantized)
        assert torch.equal(other(x), quantized(x))
        other.load_state_dict(state)
        assert not other(x).any()


def test_loading_renews_what_was_changed_behind_the_versions():
    _, quantized, x = linear("w8a8")
    expected, state = quantized(x), copy.deepcopy(quantized.state_dict())
    quantized.weight.data.zero_()
    quantized.weight.data.copy_(state["weight"] // 2)
    version = quantized.weight._version
    quantized._load_from_state_dict({}, "", {}, False, [], [], [])
    assert quantized.weight._version == version
    assert not torch.equal(quantized(x), expected)
    quantized.load_state_dict(state)
    assert torch.equal(quantized(x), expected)


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_tie_at_the_top_of_the_range(kind, bits, monkeypatch):
    found = _cpu.linear_kernels() if kind == "linear" else _cpu.conv_kernels()
    for kernel in found:
        monkeypatch.setattr(_cpu, f"{kind}_kernels", lambda dims=2, kernel=kernel: (kernel,))
        narrow = min(bits, kernel.act_bits)
        top, span = 0.5, 2.0**narrow - 2  # a step of 1, and half of it above zero
        x = top - span * torch.rand(3, 4, 6, 6)
        x[:, 0, 0, 0], x[:, 3, 4, 4] = top - span, top
        layer: nn.Linear | nn.Conv2d = nn.Conv2d(4, 8, 3, bias=False)
        if kind == "linear":
            layer, x = nn.Linear(144, 8, bias=False), x.flatten(1)
        nn.init.ones_(layer.weight)
        quantized = quantize(layer.eval(), f"w8a{bits}")
        _, scale, _ = quantize_rows(x, narrow)
        assert (scale == 1).all()
        # Six deviations of a sum of independent roundings; a tie that wraps is off by 2**bits.
        limit = 6 * (layer.weight[0].numel() / 12) ** 0.5
        assert (quantized(x) - layer(x)).abs().max() < limit, kernel


def test_linear_input_that_does_not_fit():
    for scheme in ("w8a8", "w4a16", "w4a8"):
        quantized = QuantLinear(64, 8, scheme=scheme)
        for width in (62, 63, 65):
            with pytest.raises(
                ValueError, match=rf"x of shape \(2, {width}\) does not fit in_features=64"
            ):
                quantized(torch.randn(2, width))
        with pytest.raises(ValueError, match=r"x of shape \(\).*last dimension must be 64"):
            quantized(torch.tensor(1.0))
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
            with pytest.raises(TypeError, match=rf"x is {dtype}; QuantLinear takes.*x\.float\(\)"):
                quantized(torch.ones(2, 64, dtype=dtype))


def test_conv_input_that_does_not_fit():
    for scheme in ("w8a8", "w4a16"):
        quantized = QuantConv2d(4, 8, 3, groups=2, scheme=scheme)
        for shape in ((1, 2, 5, 5), (5, 5, 5), (4, 5), (1, 1, 4, 5, 5)):
            with pytest.raises(ValueError, match=r"in_channels=4 of QuantConv2d; pass \(batch, 4,"):
                quantized(torch.randn(shape))
        with pytest.raises(TypeError, match=r"x is torch.int32; QuantConv2d takes"):
            quantized(torch.ones(1, 4, 5, 5, dtype=torch.int32))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_built_and_run_without_gradients(mode):
    layer, expected, x = linear("w8a8")
    with mode():
        quantized = QuantLinear.from_float(layer, "w8a8")
        assert torch.equal(quantized(x), expected(x))
        assert not quantized.weight.is_inference()


def small_net():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)
    ).eval()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g9-asym", "w4a8"])
def test_export_and_compile(scheme):
    net, x = quantize(small_net(), scheme), torch.randn(3, 2, 6, 6)
    expected = net(x)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
    assert torch.equal(program.module()(x), expected)
    assert program.module()(torch.randn(7, 2, 6, 6)).shape == (7, 10)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"torsh_quant.convolution.default", "torsh_quant.linear.default"} <= targets
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)


@pytest.mark.slow
def test_inductor():
    net, x = quantize(small_net(), "w8a8"), torch.randn(3, 2, 6, 6)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, fullgraph=True)(x), net(x))


def test_too_many_inputs_for_32_bit_sums():
    with pytest.raises(ValueError, match="in_features=131072 of 'QuantLinear' may overflow"):
        QuantLinear(131_072, 1, device="meta")
    QuantLinear(131_071, 1, device="meta")
    QuantLinear(131_072, 1, scheme="w8a16", device="meta")


def test_the_most_inputs_there_may_be():
    layer = nn.Linear(131_071, 1, bias=False).eval()
    nn.init.ones_(layer.weight)
    x = torch.ones(2, 131_071)
    out = QuantLinear.from_float(layer, "w8a8")(x)
    torch.testing.assert_close(out, torch.full((2, 1), 131_071.0))


def test_repr_names_the_scheme():
    assert repr(QuantLinear(64, 2, scheme="w4a16-g32")) == (
        "QuantLinear(64, 2, bias=True, scheme='w4a16-g32', group_size=32)"
    )
    assert "kernel_size=(3, 3)" in repr(QuantConv2d(1, 2, 3))
