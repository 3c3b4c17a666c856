"""The operators behind quantized layers: one for linear maps, one for convolutions.

Registered with torch, so that ``torch.compile`` and ``torch.export`` see one node with plain
tensors going in. ``act_bits=0`` means float activations: the weight is turned back to floats.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torsh_quant import _cpu
from torsh_quant._cpu import ConvShape, channel_sums, exact_conv_scaled, folded, remembered
from torsh_quant._numerics import dequantize_weight, exact_linear, quantize_rows, stored_integers

# Not torch.library.custom_op, whose first call imports the compiler: seconds that a forward pass
# would have to wait.
_LIBRARY = torch.library.Library("torsh_quant", "DEF")
_BLOCK = 2**20  # weights turned to floats at a time on CPUs: what stays in the caches


def activation_bits(asked: int, device: torch.device, layer: str) -> int:
    """Return the width of the activations' integers: ``asked``, or what is exact on this CPU."""
    if device.type != "cpu":
        return asked
    kernels = _cpu.linear_kernels() if layer == "linear" else _cpu.conv_kernels()
    return min(asked, kernels[0].act_bits)


def int_mm_takes(weight_shape: Sequence[int]) -> bool:
    """Whether ``torch._int_mm`` takes a weight ``(out_features, in_features)`` on CUDA."""
    return weight_shape[0] % 8 == 0 and weight_shape[1] % 8 == 0


def _integer_linear_elsewhere(q: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    integers, channel = remembered(
        weight, scale, "integers", lambda: folded(weight, scale, q.shape[1])
    )
    if q.is_cuda and int_mm_takes(integers.shape):
        rows = max(0, 32 - q.shape[0])  # it wants more than 16
        sums = torch._int_mm(F.pad(q, (0, 0, 0, rows)).to(torch.int8), integers.T)[: q.shape[0]]
    else:
        sums = exact_linear(q, integers)
    return sums.float().mul_(channel)


def _float_linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    in_features = x.shape[-1]

    def floats(rows: slice) -> Tensor:
        q = stored_integers(weight[rows], in_features, scale.shape[1])
        offset = None if zero_point is None else zero_point[rows]
        return dequantize_weight(q, scale[rows], offset).to(x.dtype)

    bias = None if bias is None else bias.to(x.dtype)
    block = max(64, _BLOCK // max(in_features, 1))
    if x.device.type != "cpu" or len(weight) <= block:
        return F.linear(x, floats(slice(None)), bias)
    out = x.new_empty((*x.shape[:-1], len(weight)))
    for start in range(0, len(weight), block):
        rows = slice(start, start + block)
        out[..., rows] = F.linear(x, floats(rows), None if bias is None else bias[rows])
    return out


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    act_bits: int,
) -> Tensor:
    """Apply a quantized weight to ``x`` ``(..., in_features)``; see :class:`QuantLinear`."""
    if not act_bits:
        return _float_linear(x, weight, scale, zero_point, bias)
    rows = x.reshape(-1, x.shape[-1])
    shape = (*x.shape[:-1], len(weight))
    if not rows.shape[0]:
        return x.new_empty(shape)
    bits = activation_bits(act_bits, x.device, "linear")
    q, row_scale, zero_point = quantize_rows(rows, bits)
    if x.device.type == "cpu":
        out = _cpu.linear(q, weight, scale, bits)
    else:
        out = _integer_linear_elsewhere(q, weight, scale)
    out.addcmul_(zero_point, channel_sums(weight, scale, x.shape[-1]))
    out = out.mul_(row_scale) if bias is None else torch.addcmul(bias, out, row_scale, out=out)
    return out.view(shape).to(x.dtype)


def _linear_shape(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    act_bits: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _output_format(x: Tensor, channels_last: bool) -> torch.memory_format:
    if channels_last or (
        x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    ):
        return torch.channels_last
    return torch.contiguous_format


def _output_size(
    x: Tensor, out_channels: int, kernel_size: Sequence[int], shape: ConvShape
) -> list[int]:
    sides = [
        (x.shape[2 + i] + 2 * shape.padding[i] - shape.dilation[i] * (kernel_size[i] - 1) - 1)
        // shape.stride[i]
        + 1
        for i in range(2)
    ]
    return [x.shape[0], out_channels, *sides]


def _integer_conv(
    q: Tensor,
    weight: Tensor,
    scale: Tensor,
    kernel_size: tuple[int, int],
    shape: ConvShape,
    bits: int,
) -> Tensor:
    if q.device.type == "cpu":
        return _cpu.conv2d(q, weight, scale, kernel_size, shape, bits)
    channels = q.shape[1] // shape.groups
    flat, channel = remembered(
        weight,
        scale,
        "integers",
        lambda: folded(weight, scale, channels * kernel_size[0] * kernel_size[1]),
    )
    return exact_conv_scaled(q, flat.view(-1, channels, *kernel_size), channel, shape)


def conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    act_bits: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """Convolve ``x`` ``(batch, channels, height, width)``; see :class:`QuantConv2d`."""
    shape = ConvShape(_pair(stride), _pair(padding), _pair(dilation), groups)
    height, width = _pair(kernel_size)
    channels = x.shape[1] // groups
    layout = _output_format(x, channels_last)
    size = _output_size(x, len(weight), kernel_size, shape)
    if not size[0]:
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
    if not act_bits:
        q = stored_integers(weight, channels * height * width, scale.shape[1])
        floats = dequantize_weight(q, scale, zero_point).view(-1, channels, height, width)
        floats, offset = floats.to(x.dtype), None if bias is None else bias.to(x.dtype)
        out = F.conv2d(x, floats, offset, shape.stride, shape.padding, shape.dilation, groups)
        return out.contiguous(memory_format=layout)
    bits = activation_bits(act_bits, x.device, "conv")
    q, image_scale, zero_point = quantize_rows(x, bits)
    padded = _padded(q, zero_point, shape.padding)
    inside = ConvShape(shape.stride, (0, 0), shape.dilation, groups)
    out = _integer_conv(padded, weight, scale, (height, width), inside, bits)
    offset = zero_point * image_scale
    offset = offset * channel_sums(weight, scale, channels * height * width)[:, None, None]
    if bias is not None:
        offset += bias[:, None, None]
    torch.addcmul(offset, out, image_scale, out=out)
    return out.to(dtype=x.dtype, memory_format=layout)


def _padded(q: Tensor, zero_point: Tensor, padding: tuple[int, int]) -> Tensor:
    """Return int8 images with a border of each image's own zero."""
    batch, channels, height, width = q.shape
    down, across = padding
    if not (down or across):
        return q.to(torch.int8)
    out = torch.empty(
        (batch, channels, height + 2 * down, width + 2 * across),
        dtype=torch.int8,
        device=q.device,
        memory_format=_output_format(q, channels_last=False),  # to spare a slow transposing copy
    )
    out.copy_(-zero_point)
    out[:, :, down : down + height, across : across + width] = q
    return out


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return first, second


def _conv2d_shape(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    act_bits: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    shape = ConvShape(_pair(stride), _pair(padding), _pair(dilation), groups)
    return torch.empty(
        _output_size(x, weight.shape[0], kernel_size, shape),
        dtype=x.dtype,
        device=x.device,
        memory_format=_output_format(x, channels_last),
    )


def _remember_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, zero_point, _, _ = inputs
    ctx.save_for_backward(weight, scale, zero_point)
    ctx.in_features = x.shape[-1]


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale, zero_point = ctx.saved_tensors
    floats = dequantize_weight(
        stored_integers(weight, ctx.in_features, scale.shape[1]), scale, zero_point
    )
    return (grad @ floats.to(grad.dtype), None, None, None, None, None)


def _remember_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, zero_point, _, _, kernel, *window, _ = inputs
    ctx.save_for_backward(weight, scale, zero_point)
    ctx.size, ctx.kernel, ctx.window = x.shape, kernel, window


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale, zero_point = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.window
    channels = ctx.size[1] // groups
    height, width = ctx.kernel
    q = stored_integers(weight, channels * height * width, scale.shape[1])
    floats = dequantize_weight(q, scale, zero_point).view(-1, channels, height, width)
    back = torch.nn.grad.conv2d_input(
        ctx.size, floats.to(grad.dtype), grad, stride, padding, dilation, groups
    )
    return (back, *(None,) * 11)


def _register(
    schema: str,
    kernel: Callable[..., Tensor],
    shape: Callable[..., Tensor],
    remember: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    _LIBRARY.define(schema, tags=[torch.Tag.pt2_compliant_tag])
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    full = f"torsh_quant::{name}"
    torch.library.register_fake(full, shape, lib=_LIBRARY)
    # The gradient of the input passes rounding as if it were not there (straight through).
    torch.library.register_autograd(full, backward, setup_context=remember, lib=_LIBRARY)


_register(
    "linear(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, "
    "int act_bits) -> Tensor",
    linear,
    _linear_shape,
    _remember_linear,
    _linear_backward,
)
_register(
    "conv2d(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, "
    "int act_bits, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    "int groups, bool channels_last) -> Tensor",
    conv2d,
    _conv2d_shape,
    _remember_conv2d,
    _conv2d_backward,
)
