"""Streams of uniform numbers, one for each text.

For a batch the first numbers of all texts are made at once by NumPy; for a few texts, and for the
numbers beyond, one by one in Python, which is faster there. Both give the same.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain

import numpy as np
import xxhash

from torsh_data._rng import Keys, fold, mix_int, sample_keys, stream, uniform

_FEW = 16
_GAMMA = 0x9E3779B97F4A7C15
_SCALE = 2.0**-53

Draw = Callable[[], float]


def draws(keys: Keys, ahead: int) -> Iterator[Draw]:
    """For each key a function that gives its next number in [0, 1), whatever stands beside it.

    Args:
        keys: `(n,)`.
        ahead: How many numbers most texts need; no limit, and without influence on the numbers.
    """
    if len(keys) < _FEW:
        for key in keys.tolist():
            yield _numbers(key, 0).__next__
        return
    rows = np.stack([uniform(keys, draw) for draw in range(ahead)], axis=1).tolist()
    for row, key in zip(rows, keys.tolist(), strict=True):
        yield chain(row, _numbers(key, ahead)).__next__


def content_keys(seed: int, texts: Sequence[str]) -> Keys:
    """A key of each text by its content, and by the (seed, epoch) of the loader that reads it."""
    digests = [xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) for text in texts]
    loader_seed, epoch = stream.get()
    own = _folded(seed, loader_seed)
    if len(texts) < _FEW:
        base = _folded(own, epoch)
        found = [mix_int(mix_int(digest + _GAMMA) + base) for digest in digests]
        return np.array(found, dtype=np.uint64).view(np.int64)
    return sample_keys(own, epoch, np.array(digests, dtype=np.uint64).view(np.int64))


_folded = lru_cache(maxsize=64)(fold)


def _numbers(key: int, draw: int) -> Iterator[float]:
    """The numbers of `uniform` from `draw` on."""
    while True:
        yield (mix_int(key + _GAMMA * (2 * draw + 1)) >> 11) * _SCALE
        draw += 1
