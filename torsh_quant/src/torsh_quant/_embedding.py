"""Vectors from a table of integers."""

import torch
from torch import Tensor

from torsh_quant._numerics import dequantize_weight, stored_integers


def quantized_embedding(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """Look up ``x`` ``(...)``; see :class:`QuantEmbedding`."""
    rows = x.reshape(-1)
    q = stored_integers(weight.index_select(0, rows), embedding_dim, scale.shape[1])
    offset = None if zero_point is None else zero_point.index_select(0, rows)
    floats = dequantize_weight(q, scale.index_select(0, rows), offset)
    return floats.to(dtype).view(*x.shape, embedding_dim)
