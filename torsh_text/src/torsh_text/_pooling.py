"""One vector for each row of token states."""

from typing import Literal, get_args

import torch
from torch import Tensor

# in the order in which sentence-transformers concatenates several
Pooling = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
POOLINGS: tuple[str, ...] = get_args(Pooling)


def pool_packed(states: Tensor, cu_seqlens: Tensor, modes: tuple[str, ...]) -> Tensor:
    """Pool packed token states, accumulating in float32.

    Args:
        states: ``(tokens, dim)``.
        cu_seqlens: Where each row starts, and the end: ``(rows + 1,)``.
        modes: Names of :data:`POOLINGS`; several are concatenated.

    Returns:
        float32 ``(rows, dim * len(modes))``.

    Example:
        >>> states = torch.tensor([[1.0], [3.0], [7.0]])
        >>> pool_packed(states, torch.tensor([0, 2, 3]), ("mean", "max")).tolist()
        [[2.0, 3.0], [7.0, 7.0]]
    """
    x = states.float()
    offsets = cu_seqlens.long()

    def reduce(values: Tensor, how: str) -> Tensor:
        # unsafe skips a look at the offsets that would wait for the device
        return torch.segment_reduce(values, how, offsets=offsets, axis=0, unsafe=True)

    def one(mode: str) -> Tensor:
        if mode == "cls":
            return x[offsets[:-1]]
        if mode == "lasttoken":
            return x[offsets[1:] - 1]
        if mode in ("mean", "max"):
            return reduce(x, mode)
        lengths = offsets.diff()
        if mode == "mean_sqrt_len_tokens":
            return reduce(x, "sum") / lengths.float().sqrt().unsqueeze(1)
        row_starts = torch.repeat_interleave(offsets[:-1], lengths, output_size=len(x))
        weights = (torch.arange(len(x), device=x.device) - row_starts + 1).float()
        total = (lengths * (lengths + 1) // 2).float()
        return reduce(x * weights.unsqueeze(1), "sum") / total.unsqueeze(1)

    return torch.cat([one(mode) for mode in modes], dim=-1)


def pool_padded(states: Tensor, mask: Tensor, modes: tuple[str, ...]) -> Tensor:
    """Pool padded token states, leaving the padding out and accumulating in float32.

    Args:
        states: ``(rows, length, dim)``.
        mask: ``(rows, length)``, not 0 at tokens; padding may be on either side.
        modes: As for :func:`pool_packed`.

    Returns:
        float32 ``(rows, dim * len(modes))``.
    """
    x = states.float()
    keep = mask.to(torch.bool)
    weights = keep.float()
    rows = torch.arange(len(x), device=x.device)

    def weighted(w: Tensor) -> Tensor:
        return torch.einsum("rld,rl->rd", x, w)

    def one(mode: str) -> Tensor:
        if mode == "cls":
            return x[rows, keep.int().argmax(1)]
        if mode == "lasttoken":
            return x[rows, keep.shape[1] - 1 - keep.int().flip(1).argmax(1)]
        if mode == "max":
            return x.masked_fill(~keep.unsqueeze(2), -torch.inf).amax(1)
        if mode == "mean":
            return weighted(weights) / weights.sum(1, keepdim=True)
        if mode == "mean_sqrt_len_tokens":
            return weighted(weights) / weights.sum(1, keepdim=True).sqrt()
        rank = weights.cumsum(1) * weights
        return weighted(rank) / rank.sum(1, keepdim=True)

    return torch.cat([one(mode) for mode in modes], dim=-1)
