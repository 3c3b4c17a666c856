"""Triton twins of the int8 functions in ``_codec``: one pass over memory each.

Equal to them bit for bit: every rounding step stands alone (no fused multiply-add, divisions
correctly rounded), and sums run in rank order.
"""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from torsh_dist._codec import LARGEST, SMALLEST
from torsh_dist._wire import Layout

# Adding and taking away 1.5 x 2^23 rounds a float below 2^22 to the nearest integer, ties to even.
ROUNDER = tl.constexpr(12582912.0)
TINY = tl.constexpr(SMALLEST)
HUGE = tl.constexpr(LARGEST)
INF = tl.constexpr(math.inf)

TILE = 2048  # values per program
NUM_WARPS = 4


@triton.jit
def _quantize(values: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return codes as floats, the scales to send and the rest, for ``(groups, group_size)``."""
    magnitude = tl.where(values == values, tl.abs(values), INF)
    largest = tl.max(magnitude, 1)
    finite = largest <= HUGE
    scale = tl.where(finite, tl.div_rn(largest, 127.0), 0.0)
    scale = tl.where(scale < TINY, 0.0, scale)
    some = scale > 0.0
    inverse = tl.where(some, tl.div_rn(1.0, tl.where(some, scale, 1.0)), 0.0)
    values = tl.where(finite[:, None], values, 0.0)
    codes = (values * inverse[:, None] + ROUNDER) - ROUNDER
    rest = values - codes * scale[:, None]
    return codes, tl.where(finite, scale, float("nan")), rest


@triton.jit(do_not_specialize=["first", "chunk", "rank"])
def encode_kernel(
    bucket: tl.tensor,
    residual: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    numel: tl.tensor,
    count: tl.tensor,
    first: tl.tensor,
    chunk: tl.tensor,
    width: tl.tensor,
    code_stride: tl.tensor,
    scale_stride: tl.tensor,
    rank: tl.tensor,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """Encode ``count`` groups of one run, ``chunk`` to a row from group ``first`` on.

    ``bucket`` points at the start of the run.
    """
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, GROUP)[None, :]
    used = group < count
    row = (group // chunk).to(tl.int64)
    column = (first + group % chunk).to(tl.int64)
    value = group.to(tl.int64)[:, None] * GROUP + lane
    owed = (row * width + column * GROUP)[:, None] + lane
    total = tl.load(bucket + value, value < numel, 0.0).to(tl.float32)
    total = tl.load(residual + owed, used[:, None], 0.0) + total
    number, scale, rest = _quantize(total)
    away = row != rank
    tl.store(residual + owed, tl.where(away[:, None], rest, total), used[:, None])
    sent = used & away
    target = (row * code_stride + column * GROUP)[:, None] + lane
    tl.store(codes + target, number.to(tl.int8), sent[:, None])
    tl.store(scales + row * scale_stride + column, scale, sent)


@triton.jit(do_not_specialize=["rank"])
def reduce_kernel(
    residual: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    groups: tl.tensor,
    code_stride: tl.tensor,
    scale_stride: tl.tensor,
    rank: tl.tensor,
    world_size: tl.tensor,
    divisor: tl.tensor,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """Average and encode anew; ``residual`` points at this rank's chunk."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, GROUP)
    used = group < groups
    place = group[:, None] * GROUP + lane[None, :]
    mine = tl.load(residual + place, used[:, None], 0.0)
    total = tl.zeros([GROUPS, GROUP], tl.float32)
    for row in tl.range(world_size):
        if row == rank:
            total += mine
        else:
            number = tl.load(codes + row * code_stride + place, used[:, None], 0)
            scale = tl.load(scales + row * scale_stride + group, used, 0.0)
            total += number.to(tl.float32) * scale[:, None]
    average, step, rest = _quantize(tl.div_rn(total, divisor))
    tl.store(codes + rank * code_stride + place, average.to(tl.int8), used[:, None])
    tl.store(scales + rank * scale_stride + group, step, used)
    tl.store(residual + place, rest * divisor, used[:, None])


@triton.jit(do_not_specialize=["first", "chunk"])
def decode_kernel(
    bucket: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    numel: tl.tensor,
    first: tl.tensor,
    chunk: tl.tensor,
    code_stride: tl.tensor,
    scale_stride: tl.tensor,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """Decode one run, ``chunk`` groups to a row from group ``first`` on.

    ``bucket`` points at the start of the run.
    """
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, GROUP)[None, :]
    row = (group // chunk).to(tl.int64)
    column = (first + group % chunk).to(tl.int64)
    value = group.to(tl.int64)[:, None] * GROUP + lane
    used = group.to(tl.int64) * GROUP < numel
    source = (row * code_stride + column * GROUP)[:, None] + lane
    number = tl.load(codes + source, used[:, None], 0)
    scale = tl.load(scales + row * scale_stride + column, used, 0.0)
    decoded = number.to(tl.float32) * scale[:, None]
    kind = bucket.dtype.element_ty  # pyrefly: ignore[missing-attribute]
    tl.store(bucket + value, decoded.to(kind), value < numel)


def encode(bucket: Tensor, residual: Tensor, rows: Tensor, layout: Layout, rank: int) -> None:
    """Do what ``_codec.encode`` does, one launch per run."""
    size = layout.group_size
    codes, scales = layout.codes.view(rows), layout.scale_view(rows)
    for run in layout.codes.runs:
        count = layout.world_size * run.chunk // size  # with the padding, which is sent as zeros
        start: Any = encode_kernel[_grid(count * size, size)]
        start(
            bucket[run.start :],
            residual,
            codes,
            scales,
            run.numel,
            count,
            run.column // size,
            run.chunk // size,
            residual.stride(0),
            codes.stride(0),
            scales.stride(0),
            rank,
            **_shape(size),
        )


def reduce(residual: Tensor, rows: Tensor, layout: Layout, rank: int) -> None:
    """Do what ``_codec.reduce`` does, in one launch."""
    size = layout.group_size
    codes, scales = layout.codes.view(rows), layout.scale_view(rows)
    start: Any = reduce_kernel[_grid(layout.codes.width, size)]
    start(
        residual[rank],
        codes,
        scales,
        layout.groups,
        codes.stride(0),
        scales.stride(0),
        rank,
        layout.world_size,
        float(layout.world_size),
        **_shape(size),
    )


def decode(bucket: Tensor, rows: Tensor, layout: Layout) -> None:
    """Do what ``_codec.decode`` does, one launch per run."""
    size = layout.group_size
    codes, scales = layout.codes.view(rows), layout.scale_view(rows)
    for run in layout.codes.runs:
        start: Any = decode_kernel[_grid(run.numel, size)]
        start(
            bucket[run.start :],
            codes,
            scales,
            run.numel,
            run.column // size,
            run.chunk // size,
            codes.stride(0),
            scales.stride(0),
            **_shape(size),
        )


def _grid(numel: int, group_size: int) -> tuple[int]:
    return (triton.cdiv(numel, max(TILE, group_size)),)


def _shape(group_size: int) -> dict[str, int | bool]:
    return {
        "GROUP": group_size,
        "GROUPS": max(1, TILE // group_size),
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": False,
    }
