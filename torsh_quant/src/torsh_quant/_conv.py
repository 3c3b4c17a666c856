"""Convolutions with quantized weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torsh_quant import _cpu
from torsh_quant._cpu import ConvShape, activation_bits, channel_sums, plain_integers
from torsh_quant._numerics import (
    dequantize_weight,
    exact_conv2d,
    low_bytes,
    quantize_rows,
    row_qparams,
    stored_integers,
)

_BLOCK = 2**19  # elements of input or output worked on at a time on CPUs: what stays in the caches


def quantized_conv2d(
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
    layout = output_format(x, channels_last)
    size = output_size(x, len(weight), kernel_size, shape)
    if not size[0]:
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
    if not act_bits:
        return _of_floats(x, weight, scale, zero_point, bias, (height, width), shape, layout)
    bits = activation_bits(act_bits, x.device, "conv")
    if x.device.type != "cpu" or not _cpu.conv_kernels()[0].fast:
        return _in_float64(x, weight, scale, bias, (height, width), shape, bits, layout)
    out = torch.empty(size, dtype=x.dtype, memory_format=layout)
    largest = max(x[0].numel(), out[0].numel(), 1)
    for start in range(0, len(x), max(1, _BLOCK // largest)):
        images = slice(start, start + max(1, _BLOCK // largest))
        _on_cpu(x[images], weight, scale, bias, (height, width), shape, bits, out[images])
    return out


def _on_cpu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel_size: tuple[int, int],
    shape: ConvShape,
    bits: int,
    out: Tensor,
) -> None:
    x = x.float()
    image_scale, zero_point = row_qparams(x, bits)
    q = _padded_bytes(x, image_scale, _cpu.zero_point_for(bits) - zero_point, shape.padding)
    inside = ConvShape(shape.stride, (0, 0), shape.dilation, shape.groups)
    sums = _cpu.conv2d(q, weight, scale, kernel_size, inside, bits)
    columns = x.shape[1] // shape.groups * kernel_size[0] * kernel_size[1]
    offset = image_scale * zero_point * channel_sums(weight, scale, columns)[:, None, None]
    if bias is not None:
        offset += bias[:, None, None]
    if out.dtype == torch.float32 and out.stride() == sums.stride():
        torch.addcmul(offset, sums, image_scale, out=out)
    else:  # a plain copy transposes and converts faster than arithmetic does
        out.copy_(torch.addcmul(offset, sums, image_scale, out=sums))


def _padded_bytes(x: Tensor, scale: Tensor, shift: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Round images to uint8, with a border of each image's own zero."""
    batch, channels, height, width = x.shape
    down, across = padding
    out = torch.empty(
        (batch, channels, height + 2 * down, width + 2 * across),
        dtype=torch.uint8,
        memory_format=output_format(x, channels_last=False),  # to spare a transposing copy
    )
    zero = shift.to(torch.uint8)
    if down:
        out[:, :, :down] = zero
        out[:, :, -down:] = zero
    if across:
        out[..., :across] = zero
        out[..., -across:] = zero
    low_bytes(x, scale, shift, out[:, :, down : down + height, across : across + width])
    return out


def _in_float64(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel_size: tuple[int, int],
    shape: ConvShape,
    bits: int,
    layout: torch.memory_format,
) -> Tensor:
    channels = x.shape[1] // shape.groups
    columns = channels * kernel_size[0] * kernel_size[1]
    flat, channel = plain_integers(weight, scale, columns)
    q, image_scale, zero_point = quantize_rows(x, bits)
    sums = exact_conv2d(
        q + zero_point,
        flat.view(-1, channels, *kernel_size),
        list(shape.stride),
        list(shape.padding),
        list(shape.dilation),
        shape.groups,
    )
    out = sums.float() * channel[:, None, None] * image_scale
    if bias is not None:
        out += bias[:, None, None]
    return out.to(dtype=x.dtype, memory_format=layout)


def _of_floats(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    kernel_size: tuple[int, int],
    shape: ConvShape,
    layout: torch.memory_format,
) -> Tensor:
    channels = x.shape[1] // shape.groups
    height, width = kernel_size
    q = stored_integers(weight, channels * height * width, scale.shape[1])
    floats = dequantize_weight(q, scale, zero_point).view(-1, channels, height, width)
    out = F.conv2d(
        x,
        floats.to(dtype=x.dtype, memory_format=layout),
        None if bias is None else bias.to(x.dtype),
        shape.stride,
        shape.padding,
        shape.dilation,
        shape.groups,
    )
    return out.to(dtype=x.dtype, memory_format=layout)  # autocast may have narrowed it


def output_format(x: Tensor, channels_last: bool) -> torch.memory_format:
    """Return the layout of the output: channels last if the layer or its input is."""
    if channels_last or (
        x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    ):
        return torch.channels_last
    return torch.contiguous_format


def output_size(
    x: Tensor, out_channels: int, kernel_size: Sequence[int], shape: ConvShape
) -> list[int]:
    """Return ``[batch, out_channels, height, width]`` of the output."""
    sides = [
        (x.shape[2 + i] + 2 * shape.padding[i] - shape.dilation[i] * (kernel_size[i] - 1) - 1)
        // shape.stride[i]
        + 1
        for i in range(2)
    ]
    return [x.shape[0], out_channels, *sides]


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return first, second
