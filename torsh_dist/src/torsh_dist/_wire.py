"""How one bucket of gradients is cut up for the wire.

A bucket holds whole parameters one behind the other. They are sorted into sections by what they
travel as: 8-bit codes with scales, or a plain floating-point type. Every parameter is cut into one
equal chunk per rank, and the chunks of a rank lie in one row of bytes, so that a bucket takes two
collectives whatever it holds::

    bucket   [ w1 ........ | b1 | w2 ................. | b2 ]
    row r    [ codes of w1's chunk r, w2's | their scales | b1's chunk r, b2's | pad ]

How a parameter is cut depends on nothing but its size, so the average does not depend on how DDP
fills its buckets: not on their size, and not on whether they were rebuilt since the start.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGN = 16  # bytes a CUDA thread moves at once


@dataclass(frozen=True)
class Run:
    """A stretch of the bucket: value ``i`` of it is in row ``i // chunk``.

    Attributes:
        name: the parameter, or "" where several neighbours travel as one.
        start: first value in the bucket.
        numel: number of values.
        column: first value in each row of the section.
        chunk: values per row; for codes a multiple of the group size.
    """

    name: str
    start: int
    numel: int
    column: int
    chunk: int

    def pieces(self) -> Iterator[tuple[int, slice, slice]]:
        """Yield row, columns in the row and values in the bucket of each chunk that holds any."""
        for row, first in enumerate(range(0, self.numel, self.chunk)):
            numel = min(self.chunk, self.numel - first)
            start = self.start + first
            yield row, slice(self.column, self.column + numel), slice(start, start + numel)


@dataclass(frozen=True)
class Section:
    """The runs that travel as ``dtype``: ``width`` values at byte ``first`` of every row."""

    dtype: torch.dtype
    runs: tuple[Run, ...]
    width: int
    first: int

    def view(self, rows: Tensor) -> Tensor:
        """View the section in ``(world_size, row_bytes)`` as ``(world_size, width)``."""
        return rows[:, self.first : self.first + self.width * self.dtype.itemsize].view(self.dtype)


@dataclass(frozen=True)
class Layout:
    """Where everything in a bucket goes.

    Attributes:
        codes: the section of int8 codes, one run per parameter; ``width`` is 0 without any.
        plain: the other sections.
        world_size: number of rows.
        group_size: values per scale.
        row_bytes: bytes one rank sends to one other in one phase.
    """

    codes: Section
    plain: tuple[Section, ...]
    world_size: int
    group_size: int
    row_bytes: int

    @property
    def groups(self) -> int:
        """Groups per row."""
        return self.codes.width // self.group_size

    def code_view(self, rows: Tensor) -> Tensor:
        """View the codes in ``(world_size, row_bytes)`` as ``(world_size, groups, group_size)``."""
        return self.codes.view(rows).unflatten(1, (self.groups, self.group_size))

    def scale_view(self, rows: Tensor) -> Tensor:
        """View the scales in ``(world_size, row_bytes)`` as ``(world_size, groups)`` fp32."""
        first = self.codes.width
        return rows[:, first : first + 4 * self.groups].view(torch.float32)


def plan(
    params: Sequence[tuple[str, int, torch.dtype]], world_size: int, group_size: int = 256
) -> Layout:
    """Lay out a bucket.

    Args:
        params: name, number of values and what to travel as, in the bucket's order.
        world_size: number of ranks, >= 1.
        group_size: values per scale of the int8 section.

    Returns:
        The layout, the same on every rank that passes the same arguments.

    Example:
        >>> layout = plan([("w", 300, torch.int8), ("b", 5, torch.float32)], 2)
        >>> layout.groups, layout.plain[0].width, layout.row_bytes  # 256 + 4 + 3 x 4 = 272
        (1, 3, 272)
    """
    merged: dict[torch.dtype, list[tuple[str, int, int]]] = {torch.int8: []}
    start = 0
    previous: torch.dtype | None = None
    for name, numel, dtype in params:
        stretches = merged.setdefault(dtype, [])
        if dtype == previous != torch.int8:
            _, first, before = stretches.pop()
            stretches.append(("", first, before + numel))
        else:
            stretches.append((name, start, numel))
        start += numel
        previous = dtype

    codes = _section(torch.int8, merged.pop(torch.int8), world_size, group_size, 0)
    end = codes.width + 4 * (codes.width // group_size)
    plain: list[Section] = []
    for dtype in sorted(merged, key=lambda dtype: -dtype.itemsize):
        first = ceil(end, dtype.itemsize) * dtype.itemsize
        plain.append(_section(dtype, merged[dtype], world_size, 1, first))
        end = first + plain[-1].width * dtype.itemsize
    return Layout(codes, tuple(plain), world_size, group_size, ceil(end, _ALIGN) * _ALIGN)


def coded_bytes(numel: int, world_size: int, group_size: int) -> int:
    """Return the bytes a parameter takes as codes and scales in all rows, padding included."""
    return ceil(ceil(numel, group_size), world_size) * world_size * (group_size + 4)


def ceil(numerator: int, denominator: int) -> int:
    """Divide and round up."""
    return -(-numerator // denominator)


def _section(
    dtype: torch.dtype,
    stretches: Sequence[tuple[str, int, int]],
    world_size: int,
    group_size: int,
    first: int,
) -> Section:
    runs: list[Run] = []
    width = 0
    for name, start, numel in stretches:
        chunk = ceil(ceil(numel, group_size), world_size) * group_size
        runs.append(Run(name, start, numel, width, chunk))
        width += chunk
    return Section(dtype, tuple(runs), width, first)
