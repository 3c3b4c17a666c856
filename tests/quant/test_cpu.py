import gc
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torsh_quant import QuantConv2d, QuantLinear, _cpu
from torsh_quant._cpu import ConvShape

ROOT = Path(__file__).parents[2]


def integers(shape, largest, kind, generator):
    if kind == "random":
        return torch.randint(-largest, largest + 1, shape, generator=generator)
    signs = 1 if kind == "largest" else torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return torch.full(shape, largest) * signs


@pytest.mark.parametrize("kind", ["random", "largest", "largest, any sign"])
@pytest.mark.parametrize(
    ("rows", "columns", "out"),
    [(1, 1, 1), (1, 64, 32), (3, 7, 5), (8, 576, 100), (33, 1023, 65), (17, 4096, 9), (130, 40, 3)],
)
def test_every_trusted_linear_kernel_is_exact(rows, columns, out, kind):
    generator = torch.Generator().manual_seed(rows + columns)
    for kernel in _cpu.linear_kernels():
        if not kernel.fast:
            continue
        pack, run = _cpu._LINEAR[kernel.name]
        for bits in range(2, kernel.act_bits + 1):
            q = integers((rows, columns), 2 ** (bits - 1) - 1, kind, generator)
            weight = integers((out, columns), 127, kind, generator)
            packed = pack(weight.to(torch.int8), torch.ones(out))
            sums = run(q.float(), _cpu.zero_point_for(bits), packed)
            expected = (q.int() @ weight.int().T).float()
            # oneDNN on CPUs with VNNI has the sum of unsigned products as a float before it takes
            # the zero point off: above 24 bits that rounds once.
            most = columns * (2**bits - 1) * 127
            atol = most * 2.0**-24 if most >= 2**24 else 0
            assert ((sums - expected).abs() <= atol).all(), (kernel, bits)


def test_the_lowest_integer_is_exact_too():
    weight = torch.full((4, 512), -128, dtype=torch.int8)
    bits = _cpu.linear_kernels()[0].act_bits
    q = torch.full((2, 512), float(2 ** (bits - 1) - 1))
    sums = _cpu.linear(q, weight, torch.ones(4, 1), bits)
    assert torch.equal(sums, (q.int() @ weight.int().T).float())


@pytest.mark.parametrize("kind", ["random", "largest", "largest, any sign"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("channels", "out", "window", "shape"),
    [
        (16, 32, (3, 3), ConvShape((1, 1), (1, 1), (1, 1), 1)),
        (1, 5, (3, 3), ConvShape((1, 1), (0, 0), (1, 1), 1)),
        (32, 33, (3, 3), ConvShape((2, 1), (1, 2), (1, 1), 1)),
        (8, 24, (2, 5), ConvShape((1, 1), (0, 0), (2, 1), 4)),
        (32, 32, (3, 3), ConvShape((1, 1), (1, 1), (1, 1), 32)),
        (64, 16, (1, 1), ConvShape((1, 1), (0, 0), (1, 1), 1)),
        (3, 8, (7, 7), ConvShape((2, 2), (3, 3), (1, 1), 1)),
    ],
)
def test_conv_kernel_is_exact(channels, out, window, shape, layout, kind):
    generator = torch.Generator().manual_seed(channels)
    bits = _cpu.conv_kernels()[0].act_bits
    images = integers((2, channels, 12, 11), 2 ** (bits - 1) - 1, kind, generator)
    images += _cpu.zero_point_for(bits)
    weight = integers((out, channels // shape.groups, *window), 127, kind, generator)
    # Unfolded by hand: groups of patches times groups of channels.
    patches = F.unfold(images.double(), window, shape.dilation, shape.padding, shape.stride)
    grouped = patches.view(2, shape.groups, -1, patches.shape[2]).long()
    matrix = weight.view(shape.groups, out // shape.groups, -1)
    expected = torch.einsum("bgkp,gok->bgop", grouped, matrix).reshape(2, out, -1)
    q = images.to(torch.uint8).contiguous(memory_format=layout)
    stored = weight.to(torch.int8).flatten(1)
    sums = _cpu.convolution(q, stored, torch.ones(out, 1), window, shape)
    assert torch.equal(sums.flatten(2), expected.float())


def test_float64_stands_in_where_no_kernel_is_exact(monkeypatch):
    q = torch.randint(-127, 128, (5, 31)).float()
    weight = torch.randint(-127, 128, (6, 31), dtype=torch.int8)
    monkeypatch.setattr(_cpu, "linear_kernels", lambda: (_cpu.FLOAT64,))
    sums = _cpu.linear(q, weight, torch.full((6, 1), 0.5), 8)
    assert torch.equal(sums, (q.int() @ weight.int().T).float() * 0.5)


def test_a_kernel_that_this_torch_lacks_is_left_out(monkeypatch):
    def missing(weight, scale):
        raise AttributeError("no such operator")

    monkeypatch.setitem(_cpu._LINEAR, "FBGEMM int8", (missing, _cpu._LINEAR["FBGEMM int8"][1]))
    assert _cpu._exact_linear_bits("FBGEMM int8") == 0


def test_packed_copies_follow_their_tensors():
    built = []

    def build():
        built.append(len(built))
        return built[-1]

    weight, scale = torch.zeros(2), torch.zeros(2)
    assert [_cpu.remembered(weight, scale, "a", build) for _ in range(3)] == [0, 0, 0]
    assert _cpu.remembered(weight, scale, "b", build) == 1
    weight.add_(1)
    assert _cpu.remembered(weight, scale, "a", build) == 2
    scale.add_(1)
    assert _cpu.remembered(weight, scale, "a", build) == 3
    assert _cpu.remembered(weight, scale.clone(), "a", build) == 4
    before = len(_cpu._packs)
    del weight
    assert len(_cpu._packs) == before - 1


def test_packed_copies_follow_their_storage():
    weight, scale = torch.zeros(2), torch.zeros(2)
    assert _cpu.remembered(weight, scale, "a", lambda: 1) == 1
    weight.data = torch.ones(2)
    assert _cpu.remembered(weight, scale, "a", lambda: 2) == 2
    weight.data.zero_()  # what torch does not count has to be told
    assert _cpu.remembered(weight, scale, "a", lambda: 3) == 2
    _cpu.forget(weight)
    _cpu.forget(weight)
    assert _cpu.remembered(weight, scale, "a", lambda: 3) == 3


def test_nothing_is_kept_for_inference_tensors():
    with torch.inference_mode():
        weight, scale = torch.zeros(2), torch.zeros(2)
        before = len(_cpu._packs)
        assert [_cpu.remembered(weight, scale, "a", lambda i=i: i) for i in range(2)] == [0, 1]
        assert len(_cpu._packs) == before


@pytest.mark.parametrize("scheme", ["w8a8", "w8a7", "w4a8"])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_packed_copies_go_with_the_layer(kind, fast, scheme, monkeypatch):
    if not fast:
        monkeypatch.setattr(_cpu, "linear_kernels", lambda: (_cpu.FLOAT64,))
        monkeypatch.setattr(_cpu, "conv_kernels", lambda dims=2: (_cpu.FLOAT64,))
    gc.collect()
    before = len(_cpu._packs)
    if kind == "linear":
        layer = QuantLinear.from_float(nn.Linear(64, 8), scheme)
        layer(torch.randn(2, 64))
    else:
        layer = QuantConv2d.from_float(nn.Conv2d(4, 8, 4), scheme)
        layer(torch.randn(2, 4, 6, 6))
    del layer
    gc.collect()
    assert len(_cpu._packs) == before


def test_packing_leaves_the_engine_as_it_was():
    engine = torch.backends.quantized.engine
    if "onednn" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch has one engine")
    try:
        torch.backends.quantized.engine = "onednn"
        _cpu._pack_fbgemm(torch.ones(2, 4, dtype=torch.int8), torch.ones(2))
        assert torch.backends.quantized.engine == "onednn"
    finally:
        torch.backends.quantized.engine = engine


def test_threads_may_share_a_layer():
    weight = torch.randint(-127, 128, (64, 64), dtype=torch.int8)
    scale = torch.ones(64, 1)
    q = torch.randint(-63, 64, (9, 64)).float()
    expected = (q.int() @ weight.int().T).float()
    wrong = []

    def work():
        for _ in range(20):
            if not torch.equal(_cpu.linear(q, weight, scale, 7), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these variables are for x86")
def test_without_vnni_activations_are_narrower_and_still_exact():
    """The same tests in a process in which no library may use VNNI."""
    environment = {
        **os.environ,
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        "TORSH_QUANT_NO_VNNI": "1",
    }
    here = "tests/quant"
    plugins = ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    tests = [f"{here}/test_cpu.py", f"{here}/test_ops.py", "-k", "exact or integers or narrow"]
    if "TORSH_QUANT_NO_VNNI" in os.environ:
        assert _cpu.linear_kernels()[0] == _cpu.IntegerKernel("FBGEMM int8", 7)
        assert _cpu.conv_kernels()[0] == _cpu.IntegerKernel("oneDNN int8", 7)
        return
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qx", *plugins, *tests],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
