"""What a data set's first samples tell: their structure, their size, and whether they vary."""

import random
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from torsh_data._rng import stream
from torsh_data._sample_layout import Layout, UnfitError, aligned, describe

PROBES = 3
_OTHER_STREAM = (0x5EED, 0xE70C)  # a seed and an epoch that no loader is likely to read with
REMEDY = (
    "its first result would be used for ever. Take it out of the data set and give it to the "
    "cache, SampleCache(dataset, transform=...), which applies it to each sample that leaves it"
)


def probe(dataset: Dataset[Any], *, may_draw: bool) -> tuple[dict[str, Any], list[Any]]:
    """Read a few samples twice.

    Args:
        dataset: A map-style data set.
        may_draw: Whether reading may take from the global generators, if samples stay the same.

    Returns:
        A description for a `CacheFile`, and the samples.

    Raises:
        ValueError: If a sample draws or differs when it is read again, or cannot be stored.
    """
    samples = []
    size = 0
    layout: Layout | None = None
    for row in range(min(PROBES, len(cast("Any", dataset)))):
        before = _global_states()
        sample = cast("Any", dataset)[row]
        if not may_draw and _global_states() != before:
            raise ValueError(
                f"reading sample {row} draws from a global random generator, so its transform is "
                f"random; {REMEDY}. If it draws and its result is always the same, say so with key="
            )
        token = stream.set(_OTHER_STREAM)
        try:
            again = cast("Any", dataset)[row]
        finally:
            stream.reset(token)
        try:
            layout = layout or Layout(describe(sample))
            stored = layout.encode(sample)
            is_same = _as_bytes(stored) == _as_bytes(layout.encode(again))
        except UnfitError as error:
            if layout is None:
                raise ValueError(f"sample {row}: {error}") from None
            continue
        if not is_same:
            raise ValueError(
                f"sample {row} differs when it is read twice, so its transform is random; {REMEDY}"
            )
        size += 64 + aligned(stored[2])
        samples.append(sample)
    spec = cast("Layout", layout).spec
    return {"layout": spec, "sample_bytes": size // max(1, len(samples))}, samples


def _global_states() -> tuple[Any, ...]:
    numpy = repr(np.random.get_state(legacy=False))
    return random.getstate(), numpy, torch.get_rng_state().numpy().tobytes()


def _as_bytes(stored: tuple[bytes, list[Any], int]) -> tuple[bytes, ...]:
    return stored[0], *(bytes(part) for part in stored[1])
