"""The global order of samples: a pure function of (seed, epoch, position).

Nothing is materialised. A position is sent through keyed permutations, each a Feistel network on
mixed radices with cycle walking, so the sample at any position of any epoch costs the same, and
saving the place in the stream means saving one number.

Data larger than memory is stored in blocks that are cheap to read whole. With a window, the blocks
are dealt to windows, then positions are permuted inside windows, and once more inside windows that
are shifted by half: each batch mixes the blocks of two neighbouring windows, and no more than two
windows of data are in use at a time. Blocks are dealt by strata: where n blocks fill a window, the
data set is cut into n parts in storage order and each window gets one random block of each, so it
has its share of everything that is stored in long runs, such as classes.

Reference:
    Black, Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002 (generalised Feistel networks
    and cycle walking). The two half-shifted windows over strata are ours.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from torsh_data._rng import fold, mix

Ids: TypeAlias = npt.NDArray[np.int64]
_Words: TypeAlias = npt.NDArray[np.uint64]

CHUNK = 8192  # positions drawn together: below that the cost of a call shows in each sample
_ROUNDS = 10
_HALF = np.uint64(32)
_ROUND_KEYS = [np.uint64(fold(step)) for step in range(_ROUNDS)]
_BLOCKS, _WINDOWS, _SHIFTED = range(3)


@dataclass(frozen=True)
class Order:
    """A shuffle of `rows` samples that can be evaluated anywhere.

    Args:
        rows: Number of samples, at least 1.
        seed: Any integer.
        window: Rows that are mixed together; `rows` or more is a uniform shuffle of everything, 0
            is no shuffle at all.
        block_rows: Rows that lie together in storage and are best read together.

    Example:
        >>> order = Order(rows=10, seed=0, window=10)
        >>> sorted(order(epoch=0, positions=np.arange(10)).tolist())
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        >>> bool(order(4, np.array([7]))[0] == order(4, np.arange(10))[7])
        True
    """

    rows: int
    seed: int = 0
    window: int = 0
    block_rows: int = 1

    def __call__(self, epoch: int, positions: Ids) -> Ids:
        """The sample ids at `positions` `(n,)`, each in [0, rows), of one epoch."""
        if self.window == 0:
            return positions
        keys = [fold(self.seed, epoch, stage) for stage in (_BLOCKS, _WINDOWS, _SHIFTED)]
        if self.window >= self.rows or self.block_rows == 1:
            place = positions.astype(np.uint64)
            return _permute(place, self.rows, np.uint64(keys[_BLOCKS])).view(np.int64)
        # The last block may be short: permute as if it were full, and walk on from places that do
        # not exist until one does. Fewer than block_rows places of the data set are affected.
        place = self._permute_full_blocks(positions, keys)
        outside = np.flatnonzero(place >= self.rows)
        while len(outside):
            place[outside] = self._permute_full_blocks(place[outside], keys)
            outside = outside[place[outside] >= self.rows]
        return place

    def _permute_full_blocks(self, positions: Ids, keys: list[int]) -> Ids:
        blocks = -(-self.rows // self.block_rows)
        total = blocks * self.block_rows
        windows = -(-total // self.window)
        place = positions
        if windows > 1:
            half = total // (2 * windows)
            inner = np.flatnonzero((place >= half) & (place < total - half))
            place = place.copy()
            shifted = _permute_in_windows(
                place[inner] - half, total - 2 * half, windows - 1, keys[_SHIFTED]
            )
            place[inner] = shifted + half
        place = _permute_in_windows(place, total, windows, keys[_WINDOWS])
        slot, row = np.divmod(place, self.block_rows)
        strata = max(1, round(blocks / windows))  # as many as blocks fill a window
        turn, stratum = np.divmod(slot, strata)
        least, longer = divmod(blocks, strata)
        block = stratum * least + np.minimum(stratum, longer) + turn
        block = _permute_in_windows(block, blocks, strata, keys[_BLOCKS])
        return block * self.block_rows + row


def _permute_in_windows(place: Ids, total: int, windows: int, key: int) -> Ids:
    """Permute each of `windows` equal parts of [0, total) on its own; sizes differ by one."""
    size, longer = divmod(total, windows)
    edge = longer * (size + 1)
    behind = place >= edge
    window = np.where(behind, longer + (place - edge) // size, place // (size + 1))
    start = window * size + np.minimum(window, longer)
    keys = mix(window.view(np.uint64) + np.uint64(key))
    sizes = size + (window < longer)
    inside = (place - start).view(np.uint64)
    return start + _permute(inside, size + (longer > 0), keys, sizes.view(np.uint64)).view(np.int64)


def _permute(
    place: _Words, size: int, key: _Words | np.uint64, sizes: _Words | None = None
) -> _Words:
    """A keyed permutation of [0, size), or of [0, sizes[i]) with sizes[i] in (size - 1, size)."""
    left = math.isqrt(size - 1) + 1
    right = -(-size // left)
    limit = np.uint64(size) if sizes is None else sizes
    place = _feistel(place, np.uint64(left), np.uint64(right), key)
    outside = np.flatnonzero(place >= limit)
    while len(outside):
        keys = key[outside] if isinstance(key, np.ndarray) else key
        limits = limit[outside] if isinstance(limit, np.ndarray) else limit
        walked = _feistel(place[outside], np.uint64(left), np.uint64(right), keys)
        place[outside] = walked
        outside = outside[walked >= limits]
    return place


def _feistel(place: _Words, left: np.uint64, right: np.uint64, key: _Words | np.uint64) -> _Words:
    """A permutation of [0, left * right): each half in turn is rotated by a hash of the other."""
    x, y = np.divmod(place, right)
    for step in range(_ROUNDS):
        modulus, hashed = (left, y) if step % 2 == 0 else (right, x)
        bits = mix(hashed + (key ^ _ROUND_KEYS[step]))
        # the high half of the hash, scaled to the modulus without a division
        turn = ((bits >> _HALF) * modulus) >> _HALF
        turn += x if step % 2 == 0 else y
        turn -= modulus * (turn >= modulus)
        if step % 2 == 0:
            x = turn
        else:
            y = turn
    return x * right + y


def effective_batch(order: Order, batch_size: int, batches: int = 400, epoch: int = 0) -> float:
    """How many independent samples a batch is worth on data stored in sorted order.

    A batch of `b` samples that are drawn independently has a mean storage position with a variance
    of 1 / (12 b), in units of the data set. The measure is the `b` that would explain the variance
    of the means found: 1 is a batch from one place, more than `batch_size` comes from drawing
    without replacement.

    Args:
        order: The shuffle to measure.
        batch_size: Samples in a batch.
        batches: Batches to look at, spread evenly over the epoch.
        epoch: The epoch to look at.

    Returns:
        (1 / 12) / variance of the batches' mean positions.

    Example:
        >>> effective_batch(Order(rows=65_536), batch_size=256) < 1.1  # no shuffle
        True
        >>> effective_batch(Order(rows=65_536, window=65_536), batch_size=256) > 200
        True
    """
    full = order.rows // batch_size
    chosen = np.linspace(0, full - 1, min(batches, full)).astype(np.int64)
    means = [
        order(epoch, np.arange(b * batch_size, (b + 1) * batch_size)).mean() / order.rows
        for b in chosen
    ]
    return float(1 / 12 / np.mean((np.array(means) - 0.5) ** 2))
