"""Which samples a rank's batches hold, from a position to the end of the epoch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
from torch.utils.data import Sampler

from torsh_data._order import CHUNK, Ids

DropLast: TypeAlias = bool | Literal["pad"]


class EpochOrder(Protocol):
    """A shuffle of `rows` samples that can be evaluated anywhere: `Order` or `MixedOrder`."""

    @property
    def rows(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def window(self) -> int: ...
    def __call__(self, epoch: int, positions: Ids) -> Ids: ...


def share(rest: int, rank: int, world: int) -> tuple[int, int]:
    """Offset and size of a rank's part of an incomplete global batch; rank 0 has the most."""
    start = -(-rest * rank // world)
    return start, -(-rest * (rank + 1) // world) - start


@dataclass(frozen=True)
class Request:
    """One batch to read."""

    epoch: int
    ids: Ids
    valid: int


class Requests(Sampler[Request]):
    """One rank's batches from a position to the end of the epoch."""

    def __init__(
        self,
        order: EpochOrder,
        epoch: int,
        position: int,
        batch_size: int,
        rank: int,
        world: int,
        drop_last: DropLast,
        announce: Callable[[Ids], None] | None = None,
    ) -> None:
        self.order, self.epoch, self.position = order, epoch, position
        self.batch_size, self.rank, self.world, self.drop_last = batch_size, rank, world, drop_last
        self.announce = announce
        self.step = batch_size * world
        self.whole, self.rest = divmod(order.rows - position, self.step)

    def _tail(self) -> tuple[Ids, int] | None:
        """Positions of the incomplete last batch, and how many of them are not padding."""
        if self.drop_last is True or self.rest == 0:
            return None
        begin = self.order.rows - self.rest
        if self.drop_last == "pad":
            positions = begin + np.arange(self.batch_size) + self.rank * self.batch_size
            valid = int(np.clip(self.order.rows - positions[0], 0, self.batch_size))
            return positions % self.order.rows, valid
        start, size = share(self.rest, self.rank, self.world)
        return (begin + start + np.arange(size), size) if size else None

    def __len__(self) -> int:
        return self.whole + (self._tail() is not None)

    def _ids(self, first: int, count: int) -> Ids:
        """Samples of whole batches, from number `first` on."""
        mine = self.position + self.rank * self.batch_size + np.arange(self.batch_size)
        steps = np.arange(first, min(first + count, self.whole)) * self.step
        return self.order(self.epoch, (steps[:, None] + mine).reshape(-1))

    def __iter__(self) -> Iterator[Request]:
        size = self.batch_size
        together = max(1, CHUNK // size)
        ahead = np.empty(0, np.int64)
        for first in range(0, self.whole, together):
            ids = ahead if len(ahead) else self._ids(first, together)
            if self.announce is not None:
                ahead = self._ids(first + together, together)
                self.announce(np.concatenate([ids, ahead]))
            for batch in ids.reshape(-1, size):
                yield Request(self.epoch, batch, size)
        tail = self._tail()
        if tail is not None:
            yield Request(self.epoch, self.order(self.epoch, tail[0]), tail[1])
