"""Several data sets in fixed shares, in an order that can be left and taken up again anywhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any, cast

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset

from torsh_data._fingerprint import identify
from torsh_data._map_style import require_map_style
from torsh_data._order import Ids, Order
from torsh_data._requests import EpochOrder
from torsh_data._rng import fold, stream

_PERIOD = 2**14  # places within which parts are interleaved at random
_MOST_PARTS = 100  # so that rounding never takes all places of the largest part


class Mixture(Dataset[Any]):
    """Data sets mixed in given shares, sample by sample.

    A `StreamLoader` over a mixture draws from the parts in their shares, each part in its own
    shuffled order (with its own window, where it has blocks), and has the same small state as over
    a single data set: it resumes exactly, on any number of workers and ranks. A part that is used
    up begins anew in another order, and goes on in the next epoch where this one stopped, so small
    parts repeat and large ones are seen to the end over several epochs, whatever the shares.

    The shares hold over an epoch and over each 16,384 samples of it, up to rounding to whole
    samples; within these the parts are interleaved at random.

    Samples of all parts make one batch, so they should have the same columns.

    Args:
        parts: For each name a map-style data set and its weight, above 0; at most 100. Only the
            ratio of the weights counts.
        epoch_size: Samples in an epoch, at least 1; by default as many as all parts hold.

    Attributes:
        names: Names of the parts, in order.
        shares: Share of each part, by name.
        rows: Samples that all parts hold.

    Raises:
        TypeError: If `parts` is no mapping of pairs, or a data set has no length or index.
        ValueError: If there are no parts or too many, one is empty, or a weight is not above 0.

    Example:
        >>> from torsh_data import StreamLoader
        >>> code = [{"n": n} for n in range(100)]
        >>> prose = [{"n": -n} for n in range(1, 31)]
        >>> mixed = Mixture({"code": (code, 3), "prose": (prose, 1)}, epoch_size=40)
        >>> batches = list(StreamLoader(mixed, batch_size=8))
        >>> sum(int((batch["n"] >= 0).sum()) for batch in batches)  # three quarters of 40
        30
        >>> places = mixed.locate(batches[0]["index"])
        >>> places[0][0] in ("code", "prose")
        True
    """

    def __init__(
        self, parts: Mapping[str, tuple[Dataset[Any], float]], epoch_size: int | None = None
    ) -> None:
        if not isinstance(parts, Mapping):
            raise TypeError(
                f"parts is a {type(parts).__name__}; give each data set a name and a weight: "
                "Mixture({'code': (code, 0.7), 'prose': (prose, 0.3)})"
            )
        if not parts:
            raise ValueError("parts is empty; give at least one name: (dataset, weight)")
        if len(parts) > _MOST_PARTS:
            raise ValueError(
                f"parts has {len(parts)} data sets, {_MOST_PARTS} fit; join similar ones with "
                "torch.utils.data.ConcatDataset"
            )
        for name, part in parts.items():
            if not isinstance(part, tuple) or len(part) != 2:
                raise TypeError(
                    f"parts[{name!r}] is a {type(part).__name__}; give a pair (dataset, weight)"
                )
            dataset, weight = part
            require_map_style(dataset, f"parts[{name!r}]", "Mixture")
            if not len(cast("Any", dataset)):
                raise ValueError(f"parts[{name!r}] holds an empty data set")
            if not isinstance(weight, Real):
                raise TypeError(f"parts[{name!r}] has weight={weight!r}; give a number above 0")
            if not 0 < weight < float("inf"):
                raise ValueError(f"parts[{name!r}] has weight={weight}; it must be above 0")
        self.names = list(parts)
        self.datasets = [dataset for dataset, _ in parts.values()]
        total = sum(weight for _, weight in parts.values())
        self.shares = {name: weight / total for name, (_, weight) in parts.items()}
        self._ends = np.cumsum([len(cast("Any", d)) for d in self.datasets], dtype=np.int64)
        self.rows = int(self._ends[-1])
        if epoch_size is None:
            epoch_size = self.rows
        if isinstance(epoch_size, bool) or not isinstance(epoch_size, int) or epoch_size < 1:
            raise ValueError(f"epoch_size={epoch_size!r} must be a whole number, at least 1")
        self.epoch_size = epoch_size

    def __repr__(self) -> str:
        shares = ", ".join(f"{share:.3g} {name}" for name, share in self.shares.items())
        return f"Mixture({shares}; {self.epoch_size:,} samples an epoch)"

    def __len__(self) -> int:
        return self.epoch_size

    @property
    def fingerprint(self) -> str:
        """Changes if a part, its name, its share or the size of an epoch changes."""
        digest = xxhash.xxh3_128(f"{self.epoch_size}".encode())
        for (name, share), dataset in zip(self.shares.items(), self.datasets, strict=True):
            digest.update(f"{name}\n{share!r}\n{identify(dataset)}\n".encode())
        return digest.hexdigest()

    def order(self, seed: int, orders: Sequence[EpochOrder]) -> "MixedOrder":
        """The order of a loader, given that of each part."""
        return MixedOrder(
            self.epoch_size, seed, tuple(orders), tuple(self.shares.values()), self.rows
        )

    def locate(self, ids: Ids | torch.Tensor | Sequence[int]) -> list[tuple[str, int]]:
        """Name of the part and sample of it, for each id in a batch's `index`."""
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        part, row, _ = self._places(array)
        return [(self.names[p], r) for p, r in zip(part.tolist(), row.tolist(), strict=True)]

    def _places(self, ids: Ids) -> tuple[Ids, Ids, Ids]:
        """Part, row in it, and how many times its samples have come before in this epoch."""
        if len(ids) and ids.min() < 0:
            raise IndexError(f"sample {ids.min()} of a mixture; ids start at 0")
        turn, place = np.divmod(ids, self.rows)
        part = np.searchsorted(self._ends, place, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        return part, place - starts[part], turn

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, ids: Sequence[int]) -> list[Any]:
        """Several samples, each part asked once for those of the same round through it."""
        part, row, turn = self._places(np.asarray(ids, dtype=np.int64).reshape(-1))
        samples: list[Any] = [None] * len(part)
        seed, epoch = stream.get()
        for which, again in sorted(set(zip(part.tolist(), turn.tolist(), strict=True))):
            mine = np.flatnonzero((part == which) & (turn == again))
            dataset = cast("Any", self.datasets[which])
            # a sample that comes again in an epoch is transformed with other random numbers
            token = stream.set((fold(seed, again) if again else seed, epoch))
            try:
                if hasattr(dataset, "__getitems__"):
                    found = dataset.__getitems__(row[mine].tolist())
                else:
                    found = [dataset[r] for r in row[mine].tolist()]
            finally:
                stream.reset(token)
            for k, sample in zip(mine.tolist(), found, strict=True):
                samples[k] = sample
        return samples


@dataclass(frozen=True)
class MixedOrder:
    """Positions of an epoch to sample ids, for parts that each have an order.

    The epoch is cut into periods. In each, every part has its share of the places, and a keyed
    permutation says which. So the number of a part's samples before any period is known without
    counting, and within one it is counted; that number is a position in the part's endless order.

    Args:
        rows: Positions in an epoch.
        seed: Any integer.
        orders: Order of each part.
        shares: Share of each part; they sum to 1.
        total: Rows of all parts; an id beyond it is a sample that comes again.
    """

    rows: int
    seed: int
    orders: tuple[EpochOrder, ...]
    shares: tuple[float, ...]
    total: int

    @property
    def window(self) -> int:
        """Rows of all parts that are mixed together; 0 without shuffle."""
        return sum(order.window for order in self.orders)

    def __call__(self, epoch: int, positions: Ids) -> Ids:
        """The sample ids at `positions` `(n,)` of one epoch."""
        ids = np.empty(len(positions), np.int64)
        before = epoch * _counts(self.shares, self.rows)
        period, offset = np.divmod(positions, _PERIOD)
        for number in np.unique(period).tolist():
            here = np.flatnonzero(period == number)
            first, end = number * _PERIOD, min((number + 1) * _PERIOD, self.rows)
            key = fold(self.seed, epoch if self.window else 0, number)
            part, rank = _interleave(self.shares, first, end, key)
            count = _counts(self.shares, first)[part] + rank
            part, count = part[offset[here]], count[offset[here]]
            for which in np.unique(part).tolist():
                mine = part == which
                ids[here[mine]] = self._of_part(which, count[mine], int(before[which]))
        return ids

    def _of_part(self, which: int, count: Ids, before: int) -> Ids:
        """Ids of a part's samples, which are number `count` in the epoch."""
        order = self.orders[which]
        start = sum(other.rows for other in self.orders[:which])
        turn, position = np.divmod(count + before, order.rows)
        row = np.empty(len(count), np.int64)
        for number in np.unique(turn).tolist():
            mine = turn == number
            row[mine] = order(number, position[mine])
        return (turn - before // order.rows) * self.total + start + row


def _counts(shares: tuple[float, ...], places: int) -> Ids:
    """How many of the first `places` positions each part has.

    The part with the largest share takes what rounding leaves, and has enough for that.

    Example:
        >>> _counts((0.5, 0.3, 0.2), 9).tolist(), _counts((0.5, 0.3, 0.2), 10).tolist()
        ([4, 3, 2], [5, 3, 2])
    """
    counts = np.floor(np.array(shares) * places + 0.5).astype(np.int64)
    largest = int(np.argmax(shares))
    counts[largest] += places - counts.sum()
    return counts


@lru_cache(maxsize=4)
def _interleave(shares: tuple[float, ...], first: int, end: int, key: int) -> tuple[Ids, Ids]:
    """Part of each position of a period, and how many of that part come before in it."""
    quota = _counts(shares, end) - _counts(shares, first)
    size = end - first
    place = Order(size, key, size)(0, np.arange(size))
    part = np.searchsorted(np.cumsum(quota), place, side="right")
    by_part = np.argsort(part, kind="stable")
    rank = np.empty(size, np.int64)
    rank[by_part] = np.arange(size) - np.repeat(np.cumsum(quota) - quota, quota)
    return part, rank
