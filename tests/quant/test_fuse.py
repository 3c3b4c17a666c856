"""Static layers joined into graphs in which bytes go from one to the next."""

import gc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torsh_quant import _cpu, fuse, quantize
from torsh_quant._bytes import byte_bits, grid_of, max_pool, to_bytes
from torsh_quant._numerics import narrowed, quantize_static


class Residual(nn.Module):
    """Two blocks as ResNets have them: one with a plain skip, one with a convolution in it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.third = nn.Conv2d(8, 12, 3, padding=1, stride=2)
        self.fourth = nn.Conv2d(12, 12, 3, padding=1)
        self.side = nn.Conv2d(8, 12, 1, stride=2)
        self.last = nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.max_pool2d(self.stem(x).relu(), 2)
        x = (self.second(F.relu(self.first(x))) + x).relu()
        x = (self.fourth(F.relu(self.third(x))) + self.side(x)).relu()
        return self.head(self.last(x).mean((2, 3)))


class Bottleneck(nn.Module):
    """As MobileNetV2 has them: ReLU6, depthwise, and a sum that goes on without activation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.expand = nn.Conv2d(6, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.project = nn.Conv2d(16, 6, 1)
        self.last = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(F.relu6(self.depthwise(F.relu6(self.expand(x)))))
        return self.last(x)


class Branches(nn.Module):
    """Joined channels, a value that floats use too, and a hidden layer after Flatten."""

    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(2, 4, 3, padding=1)
        self.right = nn.Conv2d(2, 3, 5, padding=2)
        self.both = nn.Conv2d(7, 4, 3)
        self.hidden = nn.Linear(4 * 36, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.both(torch.cat([self.left(x).relu(), self.right(x).clamp(-1, 1)], 1))
        out = self.head(self.hidden(x.flatten(1)).relu())
        return out, x.sigmoid().mean()


class Rows(nn.Module):
    def __init__(self, dims):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.first = conv(2, 6, 3, padding=1)
        self.second = conv(6, 6, 3, padding=1)

    def forward(self, x):
        x = self.first(x).relu()
        return self.second(x) + x


NETS = {
    "residual": (Residual, (2, 8, 8)),
    "bottleneck": (Bottleneck, (2, 8, 8)),
    "branches": (Branches, (2, 8, 8)),
    "1d": (lambda: Rows(1), (2, 9)),
    "3d": (lambda: Rows(3), (2, 5, 6, 4)),
}


def quantized(kind, scheme="w8a8-static", **options):
    torch.manual_seed(3)
    make, size = NETS[kind]
    x = torch.randn(6, *size)
    return quantize(make().eval(), scheme, data=[x], observer="minmax", **options), x


def operators(joined):
    calls = [node.target for node in joined.graph.nodes if node.op == "call_function"]
    return [target._opname for target in calls if isinstance(target, torch._ops.OpOverload)]


def first(out):
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a6-static", "w4a8-static"])
@pytest.mark.parametrize("kind", NETS)
@torch.no_grad()
def test_a_joined_model_gives_what_its_layers_give(kind, scheme, fast, monkeypatch):
    if not fast:
        monkeypatch.setattr(_cpu, "conv_kernels", lambda dims=2: (_cpu.FLOAT64,))
        monkeypatch.setattr(_cpu, "takes_bytes", lambda bits: False)
    model, x = quantized(kind, scheme)
    joined = fuse(model, x)
    for batch, beyond in ((x, 1), (x[:1], 1), (x[2:5], 1), (torch.randn(7, *x.shape[1:]), 3)):
        expected, found = model(batch), joined(batch)
        assert first(found).shape == first(expected).shape
        # A skip connection carries bytes, half a step of which is 1/2**(bits + 1) of the range;
        # what else differs are single roundings. Bytes also end where the range of the calibration
        # data does.
        change = (first(found) - first(expected)).norm() / first(expected).norm()
        assert change < beyond * 4 / 2 ** int(scheme[3]), change


@pytest.mark.parametrize("kind", NETS)
@torch.no_grad()
def test_kernels_and_exact_arithmetic_agree(kind, monkeypatch):
    model, x = quantized(kind)
    joined = fuse(model, x)
    found = first(joined(x))
    bits = _cpu.conv_kernels()[0].act_bits
    for dims in (2, 3):
        assert _cpu.conv_kernels(dims)[0].act_bits == bits
    exact = _cpu.IntegerKernel("exact", bits, fast=False)
    monkeypatch.setattr(_cpu, "conv_kernels", lambda dims=2: (exact,))
    monkeypatch.setattr(_cpu, "takes_bytes", lambda bits: False)
    for module in model.modules():
        _cpu.forget(module.weight) if hasattr(module, "weight") else None
    for _, buffer in joined.named_buffers():
        _cpu.forget(buffer)
    expected = first(joined(x))
    # The same integers, but for sums that lie on the edge between two.
    torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) / 40)
    assert (found - expected).abs().mean() < expected.abs().mean() / 200


def test_bytes_go_from_layer_to_layer():
    assert operators(fuse(*quantized("residual"))) == [
        "to_bytes",
        "byte_convolution",
        "max_pool",
        "byte_convolution",
        "byte_convolution",  # with the skip connection
        "byte_convolution",
        "byte_convolution",
        "byte_convolution",  # the other convolution's output is added here
        "byte_convolution",
        "mean",
        "to_bytes",
        "byte_linear",
    ]
    assert operators(fuse(*quantized("bottleneck"))) == ["to_bytes"] + ["byte_convolution"] * 5
    assert operators(fuse(*quantized("1d"))) == ["to_bytes"] + ["byte_convolution"] * 2


def test_what_floats_need_stays_float():
    model, x = quantized("branches")
    joined = fuse(model, x)
    found = operators(joined)
    assert found.count("byte_convolution") == 3
    assert found.count("byte_linear") == 2
    assert "cat" in found
    assert "sigmoid" in found
    assert found.count("to_bytes") == 2  # the input of both branches, and what sigmoid takes too
    layers = [n for n in joined.graph.nodes if "byte_" in str(n.target)]
    writes = [n.args[-2] is not None for n in layers]
    assert writes == [True, True, False, True, False]
    partly = quantize(
        Residual().eval(), "w8a8-static", data=[x], overrides={"first": None, "second": "w8a8"}
    )
    kept = operators(fuse(partly, x))
    assert {"conv2d", "convolution", "byte_convolution", "relu", "add"} <= set(kept)
    with torch.no_grad():
        torch.testing.assert_close(fuse(partly, x)(x), partly(x), rtol=0.05, atol=0.05)


@torch.no_grad()
def test_layers_with_one_grid_only_share_their_bytes():
    model, x = quantized("residual")
    assert torch.equal(model.side.act_scale, model.third.act_scale)
    model.side.act_scale.mul_(1.5)
    joined = fuse(model, x)
    assert operators(joined).count("to_bytes") == 4
    assert (joined(x) - model(x)).norm() / model(x).norm() < 3 / 2**8


@torch.no_grad()
def test_all_sizes_stay_free():
    model, _ = quantized("residual")
    joined = fuse(model, torch.randn(1, 2, 8, 8))
    for size in ((3, 2, 12, 10), (1, 2, 8, 8)):
        x = torch.randn(size)
        assert (joined(x) - model(x)).norm() / model(x).norm() < 3 / 2**8


@torch.no_grad()
def test_dictionaries_are_keyword_arguments():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, left, right):
            return {"out": self.inner(left - right)}

    batch = {"left": torch.randn(5, 4), "right": torch.randn(5, 4)}
    model = quantize(Named().eval(), "w8a8-static", data=[batch])
    found = fuse(model, batch)(**batch)["out"]
    torch.testing.assert_close(found, model(**batch)["out"], rtol=0, atol=0.02)


def test_a_model_without_static_layers_is_refused():
    model = quantize(nn.Sequential(nn.Linear(4, 4)).eval())
    with pytest.raises(RuntimeError, match="Sequential has no static layer to join"):
        fuse(model, torch.randn(2, 4))


@torch.no_grad()
def test_buffers_are_shared_and_packed_copies_die_with_them():
    gc.collect()
    before = len(_cpu._packs)
    model, x = quantized("residual")
    joined = fuse(model, x)
    expected = joined(x)
    assert set(joined.state_dict()) == set(model.state_dict())
    assert joined.get_buffer("stem.weight").data_ptr() == model.stem.weight.data_ptr()
    joined.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    assert torch.equal(joined(x), expected)
    model.stem.bias.add_(1)
    assert not torch.equal(joined(x), expected)
    del model, joined
    gc.collect()
    assert len(_cpu._packs) == before


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11, of its own
@torch.no_grad()
def test_a_joined_model_can_be_exported_and_compiled(tmp_path):
    model, x = quantized("bottleneck")
    joined = fuse(model, x)
    program = torch.export.export(joined, (x,))
    torch.export.save(program, tmp_path / "joined.pt2")
    assert torch.equal(torch.export.load(tmp_path / "joined.pt2").module()(x), joined(x))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(joined, backend="aot_eager")(x), joined(x))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2), st.integers(4, 9), st.booleans())
@settings(deadline=None, max_examples=40)
def test_pooling_of_bytes(side, step, border, size, last):
    border = min(border, side // 2)
    x = torch.randint(0, 256, (2, 3, size, size + 1), dtype=torch.uint8)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    expected = F.max_pool2d(x.float(), side, step, border)
    found = max_pool(x, (side, side), (step, step), (border, border))
    assert torch.equal(found.float(), expected)


@given(st.floats(-4, 0), st.floats(0.1, 4), st.sampled_from([8, 7, 4]))
@settings(deadline=None, max_examples=40)
def test_bytes_are_the_integers_of_layers(low, high, bits):
    used = byte_bits(bits, torch.device("cpu"))
    levels = 2 ** (bits - 1) - 1
    scale = torch.tensor((high - low) / (2 * levels))
    zero_point = torch.ceil(high / scale) - levels
    x = low - 1 + (high - low + 2) * torch.rand(301, generator=torch.Generator().manual_seed(0))
    step, offset = narrowed(scale, zero_point, bits, used)
    integers = quantize_static(x, step, offset, used)
    grid = grid_of(scale, zero_point, bits)
    shift = 2 ** (used - 1)
    expected = integers + shift
    if shift - offset == 1:  # less than a step is below zero: it is taken for zero
        assert grid.zero == 0
        x, expected = x[x <= high], (expected - 1).clamp(min=0)[x <= high]
    found = to_bytes(x, scale, zero_point, bits)
    assert torch.equal(found.float(), expected)
    assert int(found.max()) < 2**used


def test_bytes_pass_a_flatten_of_channels_last():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    net = net.eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    static = quantize(net, "w8a8-static", data=[x])
    joined = fuse(static, x)
    to_bytes = [node for node in joined.graph.nodes if "to_bytes" in str(node.target)]
    assert len(to_bytes) == 1
    torch.testing.assert_close(joined(x), static(x), rtol=0, atol=1e-5)  # order of float sums
