import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from torsh_quant import _cpu
from torsh_quant._numerics import (
    dequantize_weight,
    fold_groups,
    pack_int4,
    quantize_rows,
)


def LINEAR(x, weight, scale, zero_point, bias, act_bits, act_scale=None, act_zero_point=None):  # noqa: N802
    return torch.ops.torsh_quant.linear(
        x, weight, scale, zero_point, bias, act_bits, act_scale, act_zero_point
    )


def CONV(x, weight, scale, zero_point, bias, act_bits, *window):  # noqa: N802
    return torch.ops.torsh_quant.convolution(
        x, weight, scale, zero_point, bias, act_bits, None, None, *window
    )


def linear_in_integers(x, weight, scale, bias, bits):
    """All in float64, exact for these sums of integers (CUDA multiplies no int64)."""
    folded, channel = fold_groups(weight, scale)
    q, step, zero = quantize_rows(x.reshape(-1, x.shape[-1]), bits)
    sums = (q + zero).double() @ folded.double().T
    out = sums * channel.double() * step.double()
    out = out if bias is None else out + bias.double()
    return out.view(*x.shape[:-1], len(folded))


@pytest.mark.parametrize(
    "shape", [(1, 64), (7, 64), (2, 3, 64), (64,), (0, 64), (2, 0, 64), (40, 64)]
)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_against_integers(shape, groups, has_bias, device):
    x = torch.randn(shape, device=device) * 3 + 1
    weight = torch.randint(-127, 128, (24, 64), dtype=torch.int8, device=device)
    scale = torch.rand(24, groups, device=device) + 0.1
    bias = torch.randn(24, device=device) if has_bias else None
    out = LINEAR(x, weight, scale, None, bias, 8)
    bits = _cpu.activation_bits(8, x.device, "linear")
    expected = linear_in_integers(x, weight, scale, bias, bits)
    assert out.shape == expected.shape
    if out.numel():
        # A handful of float32 roundings of terms the size of the largest output.
        limit = 8 * torch.finfo(torch.float32).eps * expected.abs().max().item() * 4
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=limit)


def test_linear_of_packed_integers_equals_unpacked(device):
    q = torch.randint(-8, 8, (10, 54), dtype=torch.int8, device=device)
    scale = torch.rand(10, 2, device=device)
    x = torch.randn(5, 54, device=device)
    packed = pack_int4(q, 27)
    for bits in (0, 7):
        assert torch.equal(
            LINEAR(x, packed, scale, None, None, bits), LINEAR(x, q, scale, None, None, bits)
        )


def test_linear_row_does_not_depend_on_the_others(device):
    x = torch.randn(50, 96, device=device)
    weight = torch.randint(-127, 128, (16, 96), dtype=torch.int8, device=device)
    scale, bias = torch.rand(16, 1, device=device), torch.randn(16, device=device)
    together = LINEAR(x, weight, scale, None, bias, 8)
    alone = torch.cat([LINEAR(row[None], weight, scale, None, bias, 8) for row in x])
    assert torch.equal(together, alone)


def test_linear_takes_any_strides(device):
    x = torch.randn(64, 9, device=device).T
    weight = torch.randint(-127, 128, (8, 64), dtype=torch.int8, device=device)
    scale = torch.rand(8, 1, device=device)
    expected = LINEAR(x.contiguous(), weight, scale, None, None, 8)
    assert torch.equal(LINEAR(x, weight, scale, None, None, 8), expected)
    expected = LINEAR(x.contiguous(), weight, scale, None, None, 0)
    # The float product may add 64 terms of up to 127 in another order.
    torch.testing.assert_close(
        LINEAR(x, weight, scale, None, None, 0), expected, rtol=1e-5, atol=1e-3
    )


def test_linear_nan_stays_in_its_row():
    x = torch.ones(3, 8)
    x[1, 4] = torch.nan
    out = LINEAR(x, torch.ones(2, 8, dtype=torch.int8), torch.ones(2, 1), None, None, 8)
    assert out.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [3, 3000])  # 3,000: more than one block of the weight
def test_linear_of_floats_against_float64(dtype, rows, device):
    q = torch.randint(-128, 128, (rows, 512), dtype=torch.int8, device=device)
    scale = torch.rand(rows, 4, device=device) / 128
    zero_point = torch.randint(-128, 128, (rows, 4), dtype=torch.int8, device=device)
    x, bias = torch.randn(2, 512, device=device, dtype=dtype), torch.randn(rows, device=device)
    out = LINEAR(x, q, scale, zero_point, bias, 0)
    weight = dequantize_weight(q, scale, zero_point).to(dtype).double()
    expected = x.double() @ weight.T + bias.to(dtype).double()
    assert out.dtype == dtype
    tolerance = torch.finfo(dtype).eps * 16  # sums of 512 terms of size one
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance * 30)


@pytest.mark.parametrize("act_bits", [0, 8])
def test_autocast_keeps_the_dtype_of_the_input(act_bits):
    weight, scale = torch.randint(-127, 128, (8, 72), dtype=torch.int8), torch.rand(8, 1)
    x, images = torch.randn(3, 72), torch.randn(2, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert LINEAR(x, weight, scale, None, None, act_bits).dtype == torch.float32
        out = CONV(images, weight, scale, None, None, act_bits, *CONVS["same"], False)
        assert out.dtype == torch.float32


CONVS = {
    "same": ([3, 3], [1, 1], [1, 1], [1, 1], 1),
    "strided": ([3, 3], [2, 2], [1, 1], [1, 1], 1),
    "dilated groups": ([3, 2], [1, 2], [2, 0], [2, 1], 4),
    "depthwise": ([3, 3], [1, 1], [1, 1], [1, 1], 8),
    "pointwise": ([1, 1], [1, 1], [0, 0], [1, 1], 1),
}


def conv_in_integers(x, weight, scale, bias, bits, window, stride, padding, dilation, groups):
    folded, channel = fold_groups(weight, scale)
    q, step, zero = quantize_rows(x, bits)
    kernel = folded.view(len(folded), -1, *window).double()
    total = F.conv2d((q + zero).double(), kernel, None, stride, padding, dilation, groups).round()
    return total * channel.double()[:, None, None] * step.double() + bias.double()[:, None, None]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CONVS)
def test_conv_against_integers(name, layout, device):
    window, *_, groups = CONVS[name]
    x = (
        torch.randn(3, 8, 9, 10, device=device)
        * torch.tensor([1.0, 9.0, 0.1], device=device)[:, None, None, None]
    )
    x = (x + 0.5).contiguous(memory_format=layout)
    columns = 8 // groups * window[0] * window[1]
    weight = torch.randint(-127, 128, (16, columns), dtype=torch.int8, device=device)
    scale, bias = torch.rand(16, 1, device=device), torch.randn(16, device=device)
    for channels_last in (False, True):
        out = CONV(x, weight, scale, None, bias, 8, *CONVS[name], channels_last)
        bits = _cpu.activation_bits(8, x.device, "conv")
        expected = conv_in_integers(x, weight, scale, bias, bits, *CONVS[name])
        for image, right in zip(out.double(), expected, strict=True):
            # Padding is exactly zero, so borders are as close as the inside.
            limit = 64 * torch.finfo(torch.float32).eps * right.abs().max().item()
            torch.testing.assert_close(image, right, rtol=0, atol=limit)
        nhwc = channels_last or layout == torch.channels_last
        expected_layout = torch.channels_last if nhwc else torch.contiguous_format
        assert out.is_contiguous(memory_format=expected_layout)


def test_conv_image_does_not_depend_on_the_others(device):
    x = (
        torch.randn(4, 8, 6, 6, device=device)
        * torch.logspace(0, 3, 4, device=device)[:, None, None, None]
    )
    weight = torch.randint(-127, 128, (4, 72), dtype=torch.int8, device=device)
    arguments = (torch.rand(4, 1, device=device), None, None, 8, *CONVS["same"], False)
    together = CONV(x, weight, *arguments)
    assert torch.equal(together, torch.cat([CONV(i[None], weight, *arguments) for i in x]))


def test_conv_of_no_images(device):
    weight = torch.zeros(4, 72, dtype=torch.int8, device=device)
    scale = torch.ones(4, 1, device=device)
    for bits in (0, 8):
        x = torch.zeros(0, 8, 6, 6, device=device)
        assert CONV(x, weight, scale, None, None, bits, *CONVS["same"], False).shape == (0, 4, 6, 6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # its own
@pytest.mark.parametrize("act_bits", [0, 8])
@pytest.mark.parametrize("gradient", [False, True])
def test_operators_obey_the_rules_of_torch(act_bits, gradient):
    weight = torch.randint(-127, 128, (4, 72), dtype=torch.int8)
    x = torch.randn(5, 72, requires_grad=gradient)
    arguments = (weight, torch.rand(4, 2), None, torch.rand(4), act_bits, None, None)
    opcheck(torch.ops.torsh_quant.linear.default, (x, *arguments))
    images = torch.randn(2, 8, 6, 6, requires_grad=gradient)
    opcheck(
        torch.ops.torsh_quant.convolution.default,
        (
            images,
            weight,
            torch.rand(4, 2),
            None,
            torch.rand(4),
            act_bits,
            None,
            None,
            *CONVS["same"],
            False,
        ),
    )


@pytest.mark.parametrize("act_bits", [0, 8])
def test_gradient_of_the_input_is_that_of_the_float_layer(act_bits):
    weight = torch.randint(-127, 128, (4, 72), dtype=torch.int8)
    scale = torch.rand(4, 2)
    floats = dequantize_weight(weight, scale)
    x = torch.randn(5, 72, requires_grad=True)
    (found,) = torch.autograd.grad(LINEAR(x, weight, scale, None, None, act_bits).sum(), x)
    torch.testing.assert_close(found, floats.sum(0).expand(5, 72))
    images = torch.randn(2, 8, 6, 6, requires_grad=True)
    _, stride, padding, dilation, groups = CONVS["strided"]
    out = CONV(images, weight, scale, None, None, act_bits, *CONVS["strided"], False)
    signs = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, images, signs)
    expected = F.conv2d(images, floats.view(4, 8, 3, 3), None, stride, padding, dilation, groups)
    torch.testing.assert_close(found, torch.autograd.grad(expected, images, signs)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("out", [24, 13])  # 13: not what cuBLAS takes
def test_cpu_and_gpu_get_the_same_integers(out):
    x = torch.randn(33, 64)
    weight = torch.randint(-127, 128, (out, 64), dtype=torch.int8)
    scale = torch.ones(out, 1)
    ours = LINEAR(x, weight, scale, None, None, 7)
    theirs = LINEAR(x.cuda(), weight.cuda(), scale.cuda(), None, None, 7).cpu()
    q, step, _ = quantize_rows(x, 7)
    assert torch.equal((ours / step).round(), (theirs / step).round())
    # The kernels multiply the sums by the steps in orders of their own: three roundings.
    torch.testing.assert_close(ours, theirs, rtol=3.6e-7, atol=0)
    q_gpu, _, _ = quantize_rows(x.cuda(), 7)
    assert torch.equal(q, q_gpu.cpu())


def test_narrow_kernels_narrow_the_request(monkeypatch):
    asked = torch.device("cpu")
    narrow = (_cpu.IntegerKernel("FBGEMM int8", 7), _cpu.FLOAT64)
    monkeypatch.setattr(_cpu, "linear_kernels", lambda: narrow)
    assert _cpu.activation_bits(8, asked, "linear") == 7
    assert _cpu.activation_bits(6, asked, "linear") == 6
    assert _cpu.activation_bits(8, torch.device("cuda"), "linear") == 8


def test_conv_in_float64_gives_the_same(monkeypatch):
    x = torch.randn(3, 8, 9, 10) + 0.3
    bits = _cpu.conv_kernels()[0].act_bits
    weight = torch.randint(-127, 128, (16, 72), dtype=torch.int8)
    scale, bias = torch.rand(16, 2), torch.randn(16)
    arguments = (x, weight, scale, None, bias, bits, *CONVS["strided"], False)
    fast = CONV(*arguments)
    monkeypatch.setattr(_cpu, "conv_kernels", lambda dims=2: (_cpu.FLOAT64,))
    # The sums are the same integers; the zero point is added before or after rounding to floats.
    torch.testing.assert_close(
        CONV(*arguments), fast, rtol=1e-5, atol=1e-5 * fast.abs().max().item()
    )


def test_conv_of_many_blocks_of_images():
    x = torch.randn(7, 8, 96, 96)
    weight, scale = torch.randint(-127, 128, (4, 72), dtype=torch.int8), torch.rand(4, 1)
    arguments = (scale, None, torch.randn(4), 8, *CONVS["same"])
    for channels_last in (False, True):
        out = CONV(x, weight, *arguments, channels_last)
        one = torch.cat([CONV(image[None], weight, *arguments, channels_last) for image in x])
        assert torch.equal(out, one)
