"""Tensors and arrays that callers give, as tensors that are only read."""

import warnings

import numpy as np
import torch
from torch import Tensor

_CPU_BLOCK = 2 * 2**20  # decoded rows stay in a core's cache: five times as fast as 64 MiB
_GPU_BLOCK = 64 * 2**20


def as_tensor(x: Tensor | np.ndarray, name: str) -> Tensor:
    """Return the same memory as a tensor.

    Args:
        x: A tensor, or an array of numbers, such as a memory map.
        name: What messages call it.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(x, Tensor):
        return x
    if not isinstance(x, np.ndarray):
        quantized = callable(getattr(x, "dequantize", None))
        raise TypeError(
            f"{name} is a {type(x).__name__}; pass "
            + (f"{name}.dequantize()" if quantized else "a tensor or array of vectors (rows, dim)")
        )
    if x.dtype.kind not in "fiu" or not x.dtype.isnative:
        raise TypeError(f"{name} holds {x.dtype}; pass an array of floats, such as float32")
    if min(x.strides, default=0) < 0:  # torch has no such views
        x = x.copy()
    with warnings.catch_warnings():  # a read-only array, such as a map of a file, is only read
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(x)


def rows_at_a_time(dim: int, device: torch.device) -> int:
    """Return how many rows of float32 to work on at once."""
    return max(1, (_CPU_BLOCK if device.type == "cpu" else _GPU_BLOCK) // (4 * max(dim, 1)))
