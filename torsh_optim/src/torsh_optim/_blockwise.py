"""The 8-bit codes of bitsandbytes: blocks of 256 values share a scale and a map of 256 levels."""

import torch
from torch import Tensor

BLOCK = 256


def dynamic_map(*, signed: bool) -> Tensor:
    """Return the 256 levels, ascending: seven decades, each divided twice as finely as the last.

    The ``i``-th decade, up to ``10 ** (i - 6)``, holds the middles of ``2 ** i`` equal parts of its
    upper nine tenths, on both sides of zero, or ``2 ** (i + 1)`` of them on one; 0 and 1 complete
    the map.

    Args:
        signed: The map of first moments; without it that of second moments, which has no negative
            levels.

    Reference:
        Tim Dettmers: 8-Bit Approximations for Parallelism in Deep Learning, 2015,
        arXiv 1511.04561.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        parts = 2**decade if signed else 2 ** (decade + 1)
        bounds = torch.linspace(0.1, 1, parts + 1, dtype=torch.float32)
        middles = (bounds[:-1] + bounds[1:]) / 2 * 10 ** (decade - 6)
        levels += middles.tolist()
        if signed:
            levels += (-middles).tolist()
    return torch.tensor(levels, dtype=torch.float32).sort().values


def _blocks(flat: Tensor) -> Tensor:
    padding = -flat.numel() % BLOCK
    return torch.nn.functional.pad(flat, (0, padding)).view(-1, BLOCK)


def block_decoded(codes: Tensor, absmax: Tensor, levels: Tensor) -> Tensor:
    """Return the float32 values that codes stand for.

    Args:
        codes: uint8, of any shape.
        absmax: Largest magnitude of each block, float32 ``(ceil(codes.numel() / 256),)``.
        levels: The map, float32 ``(256,)``.
    """
    values = _blocks(levels[codes.reshape(-1).long()]) * absmax[:, None]
    return values.view(-1)[: codes.numel()].view(codes.shape)


def block_encoded(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes of the nearest levels and the largest magnitude of each block.

    Rounds as the portable implementation of bitsandbytes does. Its x86 kernel looks the codes up
    for 65,536 values in [-1, 1] instead, which never gives the levels nearest to zero.

    Args:
        values: float32, of any shape.
        levels: The map, float32 ``(256,)``, ascending.
    """
    blocks = _blocks(values.reshape(-1))
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
    return codes.view(-1)[: values.numel()].view(values.shape), absmax
