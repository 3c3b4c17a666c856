"""Convolutions with quantized weights."""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from torsh_quant import _cpu
from torsh_quant._cpu import ConvShape, activation_bits, channel_sums, plain_integers
from torsh_quant._numerics import (
    dequantize_weight,
    exact_convolution,
    low_bytes,
    narrowed,
    quantize_rows,
    quantize_static,
    row_qparams,
    stored_integers,
)

_BLOCK = 2**19  # elements of input or output worked on at a time on CPUs: what stays in the caches


def quantized_convolution(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    act_bits: int,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """Convolve ``x`` ``(batch, channels, ...)``; see :class:`QuantConv2d`."""
    if len(kernel_size) == 1:  # an image of one row
        out = quantized_convolution(
            x[:, :, None],
            weight,
            scale,
            zero_point,
            bias,
            act_bits,
            act_scale,
            act_zero_point,
            (1, *kernel_size),
            (1, *stride),
            (0, *padding),
            (1, *dilation),
            groups,
            False,
        )
        return out[:, :, 0].contiguous()
    sides = tuple(kernel_size)
    shape = ConvShape(tuple(stride), tuple(padding), tuple(dilation), groups)
    layout = output_format(x, channels_last)
    size = output_size(x, len(weight), kernel_size, shape)
    if not size[0]:
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
    if not act_bits:
        return _of_floats(x, weight, scale, zero_point, bias, sides, shape, layout)
    bits = activation_bits(act_bits, x.device, f"conv{len(sides)}d")
    static = None
    if act_scale is not None and act_zero_point is not None:
        static = narrowed(act_scale, act_zero_point, act_bits, bits)
    if x.device.type != "cpu" or not _cpu.conv_kernels(len(sides))[0].fast:
        return _in_float64(x, weight, scale, bias, sides, shape, bits, static, layout)
    out = torch.empty(size, dtype=x.dtype, memory_format=layout)
    largest = max(x[0].numel(), out[0].numel(), 1)
    for start in range(0, len(x), max(1, _BLOCK // largest)):
        images = slice(start, start + max(1, _BLOCK // largest))
        _on_cpu(x[images], weight, scale, bias, sides, shape, bits, static, out[images])
    return out


def _on_cpu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel_size: tuple[int, ...],
    shape: ConvShape,
    bits: int,
    static: tuple[Tensor, Tensor] | None,
    out: Tensor,
) -> None:
    x = x.float()
    image_scale, zero_point = row_qparams(x, bits) if static is None else static
    zero_byte = _cpu.zero_point_for(bits) - zero_point
    q = _padded_bytes(x, image_scale, zero_byte, shape.padding, None if static is None else bits)
    inside = ConvShape(shape.stride, (0,) * len(shape.padding), shape.dilation, shape.groups)
    columns = x.shape[1] // shape.groups * prod(kernel_size)
    offset = channel_sums(weight, scale, columns) * (image_scale * zero_byte).view(-1, 1)
    offset = offset.neg_() if bias is None else torch.sub(bias, offset, out=offset)
    if static is not None:
        out.copy_(
            _cpu.convolution(
                q, weight, scale, kernel_size, inside, image_scale.item(), offset.view(-1)
            )
        )
        return
    sums = _cpu.convolution(q, weight, scale, kernel_size, inside)
    offset = offset.view(*offset.shape, *(1,) * len(kernel_size))
    if out.dtype == torch.float32 and out.stride() == sums.stride():
        torch.addcmul(offset, sums, image_scale, out=out)
    else:  # a plain copy transposes and converts faster than arithmetic does
        out.copy_(torch.addcmul(offset, sums, image_scale, out=sums))


def _padded_bytes(
    x: Tensor, scale: Tensor, shift: Tensor, padding: tuple[int, ...], bits: int | None
) -> Tensor:
    """Round images to uint8, with a border of each image's own zero; clamped if ``bits``."""
    batch, channels, *sides = x.shape
    whole = [side + 2 * border for side, border in zip(sides, padding, strict=True)]
    out = torch.empty(
        (batch, channels, *whole),
        dtype=torch.uint8,
        memory_format=output_format(x, channels_last=False),  # to spare a transposing copy
    )
    zero = shift.to(torch.uint8)
    inside = out
    for dim, (side, border) in enumerate(zip(sides, padding, strict=True), 2):
        if border:
            inside.narrow(dim, 0, border).copy_(zero)
            inside.narrow(dim, side + border, border).copy_(zero)
            inside = inside.narrow(dim, border, side)
    low_bytes(x, scale, shift, inside, bits)
    return out


def _in_float64(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel_size: tuple[int, ...],
    shape: ConvShape,
    bits: int,
    static: tuple[Tensor, Tensor] | None,
    layout: torch.memory_format,
) -> Tensor:
    channels = x.shape[1] // shape.groups
    flat, channel = plain_integers(weight, scale, channels * prod(kernel_size))
    if static is None:
        q, image_scale, zero_point = quantize_rows(x, bits)
    else:
        image_scale, zero_point = static
        q = quantize_static(x, image_scale, zero_point, bits)
    sums = exact_convolution(q + zero_point, flat.view(-1, channels, *kernel_size), shape)
    ones = (1,) * len(kernel_size)
    out = sums.float() * channel.view(-1, *ones) * image_scale
    if bias is not None:
        out += bias.view(-1, *ones)
    return out.to(dtype=x.dtype, memory_format=layout)


def _of_floats(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    kernel_size: tuple[int, ...],
    shape: ConvShape,
    layout: torch.memory_format,
) -> Tensor:
    channels = x.shape[1] // shape.groups
    q = stored_integers(weight, channels * prod(kernel_size), scale.shape[1])
    floats = dequantize_weight(q, scale, zero_point).view(-1, channels, *kernel_size)
    floats = floats.to(dtype=x.dtype, memory_format=layout)
    run = F.conv2d if len(kernel_size) == 2 else F.conv3d
    bias = None if bias is None else bias.to(x.dtype)
    out = run(x, floats, bias, shape.stride, shape.padding, shape.dilation, shape.groups)
    return out.to(dtype=x.dtype, memory_format=layout)  # autocast may have narrowed it


def output_format(x: Tensor, channels_last: bool) -> torch.memory_format:
    """Return the layout of the output: channels last if the layer or its input is."""
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    if channels_last or (x.is_contiguous(memory_format=last) and not x.is_contiguous()):
        return last
    return torch.contiguous_format


def output_size(
    x: Tensor, out_channels: int, kernel_size: Sequence[int], shape: ConvShape
) -> list[int]:
    """Return ``[batch, out_channels, ...]`` of the output."""
    sides = [
        (x.shape[2 + i] + 2 * shape.padding[i] - shape.dilation[i] * (side - 1) - 1)
        // shape.stride[i]
        + 1
        for i, side in enumerate(kernel_size)
    ]
    return [x.shape[0], out_channels, *sides]
