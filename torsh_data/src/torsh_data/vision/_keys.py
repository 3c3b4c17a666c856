"""The numbers that decide what happens to each image."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

_ALL_KEYS = (-(2**63), 2**63 - 1)

SomeKeys: TypeAlias = "torch.Tensor | npt.NDArray[Any] | Sequence[int] | int | None"


def as_keys(keys: SomeKeys, rng: np.random.Generator | None, count: int) -> torch.Tensor:
    """One key for each of `count` images, from whatever the caller gave.

    Args:
        keys: `count` whole numbers of at most 64 bits, or None.
        rng: Stands for its sample's key if it is the generator of a data set's transform and there
            is one image; otherwise the keys are its next numbers.
        count: How many images there are.

    Returns:
        `(count,)` int64, on the CPU.

    Raises:
        TypeError: If the keys are no whole numbers, or `rng` is no generator.
        ValueError: If the number of the keys is wrong, or both sources are given.

    Example:
        >>> from torsh_data._rng import generator
        >>> as_keys(None, generator(-7), 1)
        tensor([-7])
        >>> as_keys([3, 4], None, 2)
        tensor([3, 4])
    """
    if rng is not None and not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng is a {type(rng).__name__}; use a numpy.random.Generator")
    if keys is None:
        if rng is None:
            return torch.randint(*_ALL_KEYS, (count,))
        own = _sample_key(rng) if count == 1 else None
        return torch.from_numpy(rng.integers(*_ALL_KEYS, count)) if own is None else own
    if rng is not None:
        raise ValueError("keys and rng are both given; a key already decides what is drawn")
    numbers = _whole(keys)
    if len(numbers) != count:
        shape = tuple(np.shape(keys))
        raise ValueError(
            f"keys has shape {shape}, expected one whole number for each of {count} images"
        )
    return numbers


def _whole(keys: Any) -> torch.Tensor:
    if isinstance(keys, torch.Tensor):
        whole = not (keys.is_floating_point() or keys.is_complex() or keys.dtype == torch.bool)
        if whole:
            return keys.detach().reshape(-1).cpu().to(torch.int64)
        raise TypeError(f"keys has dtype {keys.dtype}; use whole numbers, such as torch.int64")
    try:
        array = np.asarray(keys)
    except ValueError:  # rows of different lengths
        array = np.array(None)
    if array.dtype.kind not in "iu" and array.size:
        held = f"dtype {array.dtype}" if isinstance(keys, np.ndarray) else f"{keys!r}"
        raise TypeError(
            f"keys has {held}; use whole numbers of at most 64 bits, one for each image"
        )
    # unsigned numbers keep their 64 bits
    return torch.from_numpy(array.reshape(-1).astype(np.int64))


def _sample_key(rng: np.random.Generator) -> torch.Tensor | None:
    """The key that a transform's generator was started from; None if it is another generator."""
    if not isinstance(rng.bit_generator, np.random.Philox):
        return None
    # the key never changes, however much was drawn; one from NumPy's seeding fills both words
    low, high = rng.bit_generator.state["state"]["key"]
    if high:
        return None
    return torch.from_numpy(np.array([low], dtype=np.uint64).view(np.int64))
