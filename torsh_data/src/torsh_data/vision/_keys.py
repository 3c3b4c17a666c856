"""The numbers that decide what happens to each image."""

import numpy as np
import torch

_ALL_KEYS = (-(2**63), 2**63 - 1)


def as_keys(
    keys: torch.Tensor | int | None, rng: np.random.Generator | None, count: int
) -> torch.Tensor:
    """One key for each of `count` images, from whatever the caller gave.

    Args:
        keys: `count` int64 numbers, or None.
        rng: Stands for its sample's key if it is the generator of a data set's transform and there
            is one image; otherwise the keys are its next numbers.
        count: How many images there are.

    Returns:
        `(count,)` int64, on the CPU.

    Raises:
        ValueError: If the number or the dtype of the keys is wrong, or both sources are given.

    Example:
        >>> from torsh_data._rng import generator
        >>> as_keys(None, generator(-7), 1)
        tensor([-7])
    """
    if keys is None:
        if rng is None:
            return torch.randint(*_ALL_KEYS, (count,))
        own = _sample_key(rng) if count == 1 else None
        return torch.from_numpy(rng.integers(*_ALL_KEYS, count)) if own is None else own
    if rng is not None:
        raise ValueError("keys and rng are both given; a key already decides what is drawn")
    if isinstance(keys, int):
        keys = torch.tensor(keys)
    keys = keys.reshape(-1).cpu()
    if len(keys) != count or keys.dtype != torch.int64:
        raise ValueError(
            f"keys has shape {tuple(keys.shape)} and dtype {keys.dtype}, expected one int64 "
            f"number for each of {count} images"
        )
    return keys


def _sample_key(rng: np.random.Generator) -> torch.Tensor | None:
    """The key that a transform's generator was started from; None if it is another generator."""
    if not isinstance(rng.bit_generator, np.random.Philox):
        return None
    # the key never changes, however much was drawn; one from NumPy's seeding fills both words
    low, high = rng.bit_generator.state["state"]["key"]
    if high:
        return None
    return torch.from_numpy(np.array([low], dtype=np.uint64).view(np.int64))
