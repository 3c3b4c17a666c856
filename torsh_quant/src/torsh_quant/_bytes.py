"""Static layers that read bytes and may write them: what :func:`fuse` puts into a graph.

A tensor of bytes stands for ``(byte - zero) * scale``. Its scale and zero are those of the layer
that reads it, so between two layers nothing is turned to floats and back: bias, skip connection,
activation and rounding happen where the integer sums come out of the kernel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from torsh_quant import _cpu
from torsh_quant._cpu import channel_sums, plain_integers, remembered
from torsh_quant._numerics import (
    ConvShape,
    exact_convolution,
    exact_linear,
    low_bytes,
    narrowed,
)

Convolve = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Grid:
    """What the bytes of a tensor stand for: ``(byte - zero) * scale``."""

    scale: float
    zero: int
    bits: int


def byte_bits(asked: int, device: torch.device) -> int:
    """Return how many bits of a byte are used: one figure for all layers of a device."""
    layers = ("linear", "conv2d", "conv3d")
    return min(_cpu.activation_bits(asked, device, layer) for layer in layers)


def grid_of(scale: Tensor, zero_point: Tensor, asked: int) -> Grid:
    """Return the grid of the bytes that a layer with these buffers reads."""
    bits = byte_bits(asked, scale.device)

    def build() -> Grid:
        step, offset = narrowed(scale, zero_point, asked, bits)
        zero = _cpu.zero_point_for(bits) - int(offset.item())
        # Where less than a step is below zero, byte 0 stands for it alone. Taken for zero itself,
        # kernels need no zero point, and ReLU comes with the rounding.
        return Grid(step.item(), 0 if zero == 1 else zero, bits)

    return cast("Grid", remembered(scale, zero_point, f"grid {asked} {bits}", build))


def to_bytes(x: Tensor, scale: Tensor, zero_point: Tensor, asked: int) -> Tensor:
    """Round floats to the bytes that a layer reads; images come out channels last."""
    grid = grid_of(scale, zero_point, asked)
    return _rounded(x, grid)


def _rounded(x: Tensor, grid: Grid) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device, memory_format=_format(x.ndim))
    # A 0-dim tensor divides as the layers without fusion do; a Python number would be inverted.
    scale, zero = x.new_tensor(grid.scale, dtype=torch.float32), x.new_tensor(float(grid.zero))
    low_bytes(x.float(), scale, zero.float(), out, grid.bits)
    return out


def _floats(x: Tensor, grid: Grid | None) -> Tensor:
    return x.float() if grid is None else (x.float() - grid.zero) * grid.scale


def _format(ndim: int) -> torch.memory_format:
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(ndim, torch.contiguous_format)


def _clamped(out: Tensor, low: float | None, high: float | None) -> Tensor:
    return out if low is None and high is None else out.clamp_(low, high)


def max_pool(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Take the largest byte of each window: torch's own pooling does not take bytes."""
    if any(padding):  # each window has a byte of its own, and none is below 0
        x = F.pad(x, [side for border in reversed(padding) for side in (border, border)])
    for dim, (side, step) in enumerate(zip(kernel_size, stride, strict=True), 2):
        size = (x.shape[dim] - side) // step + 1
        parts = [
            x.as_strided(
                (*x.shape[:dim], size, *x.shape[dim + 1 :]),
                (*x.stride()[:dim], x.stride(dim) * step, *x.stride()[dim + 1 :]),
                x.storage_offset() + start * x.stride(dim),
            )
            for start in range(side)
        ]
        x = parts[0]
        for part in parts[1:]:
            x = torch.maximum(x, part)
    return x


def byte_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    act_bits: int,
    act_scale: Tensor,
    act_zero_point: Tensor,
    low: float | None,
    high: float | None,
    out_bits: int,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:
    """Multiply bytes ``(..., in_features)`` with a weight; bytes come out if ``out_scale``."""
    columns = x.shape[-1]
    rows = x.reshape(-1, columns)
    act, out = (act_scale, act_zero_point, act_bits), (out_scale, out_zero_point, out_bits)

    def plan() -> Callable[[Tensor], Tensor]:
        grid, target = grid_of(*act), _grid_or_none(*out)
        if x.device.type != "cpu" or not _cpu.takes_bytes(grid.bits):
            integers, channel = plain_integers(weight, scale, columns)
            channel, integers = channel * grid.scale, integers.clone()

            def exact(rows: Tensor) -> Tensor:
                sums = exact_linear(rows.float() - grid.zero, integers).float() * channel
                return _finished(sums if bias is None else sums + bias, low, high, target)

            return exact
        packed = _cpu.packed_linear(weight, scale, columns)
        offset = _offset(weight, scale, bias, grid, columns)
        figures = (grid.scale, offset, _unary(low, high), _output(target))
        return lambda rows: _fewer_bits(_cpu.run_linear(rows, packed, *figures), target)

    made = _planned(weight, scale, (bias, *act, *out, low, high), plan)
    return made(rows).view(*x.shape[:-1], len(weight))


def byte_convolution(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    act_bits: int,
    act_scale: Tensor,
    act_zero_point: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    other: Tensor | None,
    other_bits: int,
    other_scale: Tensor | None,
    other_zero_point: Tensor | None,
    low: float | None,
    high: float | None,
    out_bits: int,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:
    """Convolve bytes, add ``other``, clamp; bytes come out if ``out_scale``."""
    flat = len(kernel_size) == 1  # an image of one row
    if flat:
        x, other = x[:, :, None], None if other is None else other[:, :, None]
        kernel_size, stride, dilation = (1, *kernel_size), (1, *stride), (1, *dilation)
        padding = (0, *padding)
    sides = tuple(kernel_size)
    shape = ConvShape(tuple(stride), tuple(padding), tuple(dilation), groups)
    act, out = (act_scale, act_zero_point, act_bits), (out_scale, out_zero_point, out_bits)
    added = (other_scale, other_zero_point, other_bits)
    channels = x.shape[1] // groups

    def plan() -> Convolve:
        integers = x.device.type == "cpu" and _cpu.conv_kernels(len(sides))[0].fast
        make = _onednn_convolution if integers else _float64_convolution
        grids = (grid_of(*act), _grid_or_none(*added), _grid_or_none(*out))
        return make(weight, scale, bias, channels, sides, shape, *grids, low, high)

    figures = (bias, *act, *added, *out, channels, sides, shape, low, high)
    result = _planned(weight, scale, figures, plan)(x, other, weight, scale)
    return result[:, :, 0].contiguous() if flat else result


def _planned(
    weight: Tensor, scale: Tensor, figures: tuple[Any, ...], plan: Callable[[], Any]
) -> Callable[..., Tensor]:
    """Return what ``plan()`` makes of a weight and other figures, kept until one changes."""
    tensors = [one for one in figures if isinstance(one, Tensor)]
    if any(one.is_inference() for one in tensors):
        return plan()
    key = tuple(
        (id(one), one._version, one.data_ptr()) if isinstance(one, Tensor) else one
        for one in figures
    )
    # The tensors are kept too: an id is free for another one when its own is gone.
    kept = remembered(weight, scale, key, lambda: (plan(), tensors))
    return cast("Callable[..., Tensor]", kept[0])


def _onednn_convolution(
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    channels: int,
    kernel_size: tuple[int, ...],
    shape: ConvShape,
    grid: Grid,
    source: Grid | None,
    target: Grid | None,
    low: float | None,
    high: float | None,
) -> Convolve:
    offset = _offset(weight, scale, bias, grid, channels * prod(kernel_size))
    borders: list[int] = []
    if grid.zero and any(shape.padding):
        borders = [side for border in reversed(shape.padding) for side in (border, border)]
        shape = ConvShape(shape.stride, (0,) * len(shape.padding), shape.dilation, shape.groups)
    packs: dict[torch.Size, Any] = {}
    unary, output = _unary(low, high), _output(target)
    if target is not None and target.zero == 0 and unary[0] == "relu":
        unary = _unary(None, None)  # no byte is below zero
    fits = unary[0] == "none" or len(kernel_size) == 2  # oneDNN has no activations in 3-d
    accumulates = len(kernel_size) == 2 and unary[0] in ("none", "relu")
    accumulates = accumulates and (source is None) == (target is None)
    added_scale, added_zero = (1.0, 0) if source is None else (source.scale, source.zero)

    # The weight comes with every call: kept here, it would keep itself.
    def run(x: Tensor, other: Tensor | None, weight: Tensor, scale: Tensor) -> Tensor:
        if borders:
            x = F.pad(x, borders, value=grid.zero)
        packed = _cpu.packed_convolution(packs, x, weight, scale, kernel_size, shape)
        if other is None and fits:
            out = _cpu.run_convolution(x, packed, shape, grid.scale, offset, unary, output)
            return _fewer_bits(out, target)
        if other is None or not accumulates:
            sums = _cpu.run_convolution(x, packed, shape, grid.scale, offset)
            if other is not None:
                sums += _floats(other, source)
            return _finished(sums, low, high, target)
        other = other.clone(memory_format=_format(other.ndim))  # the kernel writes over it
        total = (other, added_scale, added_zero)
        out = _cpu.run_convolution(x, packed, shape, grid.scale, offset, unary, output, total)
        return _fewer_bits(out, target)

    return run


def _float64_convolution(
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    channels: int,
    kernel_size: tuple[int, ...],
    shape: ConvShape,
    grid: Grid,
    source: Grid | None,
    target: Grid | None,
    low: float | None,
    high: float | None,
) -> Convolve:
    flat, channel = plain_integers(weight, scale, channels * prod(kernel_size))
    integers = flat.clone().view(-1, channels, *kernel_size)  # never the weight itself
    ones = (1,) * len(kernel_size)
    channel = channel.view(-1, *ones) * grid.scale
    offset = None if bias is None else bias.view(-1, *ones)

    def run(x: Tensor, other: Tensor | None, weight: Tensor, scale: Tensor) -> Tensor:
        out = exact_convolution(x.float() - grid.zero, integers, shape).float() * channel
        if offset is not None:
            out += offset
        if other is not None:
            out += _floats(other, source)
        return _finished(out, low, high, target)

    return run


def _finished(out: Tensor, low: float | None, high: float | None, target: Grid | None) -> Tensor:
    out = _clamped(out, low, high)
    return out if target is None else _rounded(out, target)


def _fewer_bits(out: Tensor, target: Grid | None) -> Tensor:
    if target is None or target.bits == 8:
        return out
    return out.clamp_(max=2**target.bits - 1)


def _grid_or_none(scale: Tensor | None, zero_point: Tensor | None, asked: int) -> Grid | None:
    if scale is None or zero_point is None:
        return None
    return grid_of(scale, zero_point, asked)


def _offset(
    weight: Tensor, scale: Tensor, bias: Tensor | None, grid: Grid, columns: int
) -> Tensor | None:
    """Return the bias with what the zero of the input adds to all sums taken off."""
    if not grid.zero:
        return bias
    share = channel_sums(weight, scale, columns)
    if bias is None:
        return share * (-grid.scale * grid.zero)
    return torch.sub(bias, share, alpha=grid.scale * grid.zero)


def _unary(low: float | None, high: float | None) -> _cpu.Unary:
    if low is None and high is None:
        return ("none", [])
    if low == 0 and high is None:
        return ("relu", [])
    return ("hardtanh", [-3e38 if low is None else low, 3e38 if high is None else high])


def _output(target: Grid | None) -> _cpu.Output:
    if target is None:
        return (1.0, 0, torch.float32)
    return (target.scale, target.zero, torch.uint8)
