"""Sections of a bucket to rows of bytes and back: plain torch, on any device.

The int8 functions have Triton twins of the same names in ``_kernels``, equal bit for bit. Each
value passes three times: ``encode`` before the exchange, ``reduce`` on the rank that averages it,
``decode`` after the gather.

The residual is what this rank still owes. ``encode`` adds the gradient to it and takes away what
was sent; the rank that averages a value owes the rounding error of the average too, ``world_size``
times because its debts are divided by that. So after each step, exactly but for the rounding of
the sums themselves::

    received + mean over ranks of residual = mean over ranks of (gradient + old residual)
"""

import math

import torch
from torch import Tensor

from torsh_dist._wire import Layout, Section

# A scale below the smallest normal number has no finite inverse: such groups send zeros and their
# values wait in the residual.
SMALLEST = torch.finfo(torch.float32).tiny
# Above this, 127 times the rounded scale may overflow: such values count as infinite.
LARGEST = 2.0**127
_SLAB = 1 << 16  # values handled at a time, so that the intermediate results stay in the cache


def encode(bucket: Tensor, residual: Tensor, rows: Tensor, layout: Layout, rank: int) -> None:
    """Add the gradient to the residual, send codes for what rank ``rank`` does not average.

    The row that ``rank`` averages stays in the residual, exact: it does not travel.

    Args:
        bucket: ``(numel,)``, a floating-point type.
        residual: ``(world_size, width)`` fp32, updated in place.
        rows: ``(world_size, row_bytes)`` uint8, filled where the codes and scales go.
        layout: the layout of the bucket.
        rank: this rank.
    """
    for run in layout.codes.runs:
        for row, columns, values in run.pieces():
            residual[row, columns] += bucket[values]
    owed = residual.unflatten(1, (layout.groups, layout.group_size))
    codes, scales = layout.code_view(rows), layout.scale_view(rows)
    for row in range(layout.world_size):
        if row != rank:
            for slab in _slabs(layout):
                quantize_(owed[row, slab], codes[row, slab], scales[row, slab])


def reduce(residual: Tensor, rows: Tensor, layout: Layout, rank: int) -> None:
    """Average rank ``rank``'s row over all ranks, in rank order, and encode it into its place.

    Args:
        residual: ``(world_size, width)`` fp32; this rank's row holds its exact contribution and
            afterwards ``world_size`` times the rounding error of the average.
        rows: ``(world_size, row_bytes)`` uint8 as received; row ``rank`` is filled.
        layout: the layout of the bucket.
        rank: this rank.
    """
    mine = residual[rank].unflatten(0, (layout.groups, layout.group_size))
    codes, scales = layout.code_view(rows), layout.scale_view(rows)
    for slab in _slabs(layout):
        total = torch.zeros_like(mine[slab])
        for row in range(layout.world_size):
            if row == rank:
                total += mine[slab]
            else:
                total += codes[row, slab] * scales[row, slab, None]
        total /= total.new_full((1,), layout.world_size)  # as in quantize_
        quantize_(total, codes[rank, slab], scales[rank, slab])
        torch.mul(total, layout.world_size, out=mine[slab])


def decode(bucket: Tensor, rows: Tensor, layout: Layout) -> None:
    """Write the averages into the bucket.

    Args:
        bucket: ``(numel,)``, overwritten where coded parameters lie.
        rows: ``(world_size, row_bytes)`` uint8 as gathered.
        layout: the layout of the bucket.
    """
    size = layout.group_size
    codes, scales = layout.codes.view(rows), layout.scale_view(rows)
    for run in layout.codes.runs:
        for row, columns, values in run.pieces():
            # A piece starts on a group; only its last group may be cut short.
            target, source = bucket[values], codes[row, columns]
            first, whole = columns.start // size, target.numel() // size
            edge = whole * size
            steps = scales[row, first : first + whole, None]
            _scaled(source[:edge].view(whole, size), steps, target[:edge].view(whole, size))
            if edge < target.numel():
                _scaled(source[edge:], scales[row, first + whole], target[edge:])


def quantize_(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Encode groups and leave in ``values`` what the codes lack: codes x scale + rest == value.

    The rest is exact: a value and its nearest multiple of the scale are within a factor of 2 of
    each other, or the multiple is zero. A group with an infinity, a NaN or a magnitude above 2^127
    gets the scale NaN, so that it is NaN wherever it is decoded, and leaves no rest.

    Args:
        values: ``(groups, group_size)`` fp32, overwritten with the rest.
        codes: ``(groups, group_size)`` int8, filled with -127 to 127.
        scales: ``(groups,)`` fp32, filled.

    Example:
        >>> values = torch.tensor([[127.0, -2.5, 0.25, 0.0]])
        >>> codes, scales = torch.empty(1, 4, dtype=torch.int8), torch.empty(1)
        >>> quantize_(values, codes, scales)
        >>> codes.tolist(), scales.tolist(), values.tolist()
        ([[127, -2, 0, 0]], [1.0], [[0.0, -0.5, 0.25, 0.0]])
    """
    largest = torch.linalg.vector_norm(values, ord=math.inf, dim=1)
    finite = largest <= LARGEST
    # By a tensor: by a number, CUDA multiplies with the reciprocal, which rounds twice.
    scale = torch.where(finite, largest / largest.new_full((1,), 127.0), 0.0)
    scale = torch.where(scale < SMALLEST, 0.0, scale)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    values.masked_fill_(~finite[:, None], 0.0)
    nearest = (values * inverse[:, None]).round_()
    codes.copy_(nearest)
    values -= nearest.mul_(scale[:, None])
    scales.copy_(torch.where(finite, scale, math.nan))


def pack(bucket: Tensor, rows: Tensor, section: Section) -> None:
    """Copy the runs of a plain section into the rows, rounding to its dtype."""
    target = section.view(rows)
    for run in section.runs:
        for row, columns, values in run.pieces():
            target[row, columns] = bucket[values]


def average(rows: Tensor, section: Section, rank: int) -> None:
    """Average a plain section over the rows, in rank order and at least fp32, into row ``rank``."""
    chunks = section.view(rows)
    total = chunks[0].to(torch.promote_types(section.dtype, torch.float32), copy=True)
    for chunk in chunks[1:]:
        total += chunk
    chunks[rank] = total.div_(len(chunks))


def unpack(bucket: Tensor, rows: Tensor, section: Section) -> None:
    """Copy a plain section back into the bucket."""
    source = section.view(rows)
    for run in section.runs:
        for row, columns, values in run.pieces():
            bucket[values] = source[row, columns]


def _slabs(layout: Layout) -> list[slice]:
    step = max(1, _SLAB // layout.group_size)
    return [slice(first, first + step) for first in range(0, layout.groups, step)]


def _scaled(codes: Tensor, scales: Tensor, target: Tensor) -> None:
    if target.dtype == torch.float32:
        torch.mul(codes, scales, out=target)
    else:
        target.copy_(codes * scales)
