"""A streaming histogram whose counts depend on the values alone, not on how they came."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

HALF = 4096  # bins on either side of zero
CENTRE = HALF - 1
SIZE = 2 * HALF - 1
CHUNK = 2**16  # elements that stay in a core's cache from the first to the last pass
CUDA_CHUNK = 2**24  # up to here float32 counts exactly


class Histogram:
    """Counts of values in bins of equal width, in 64 KB however many values there are.

    A bin is a power of two wide: the smallest one with which 4,096 bins reach from zero to the
    largest magnitude seen. Bin ``k`` holds the values whose quotient by the width, rounded towards
    zero, is ``k``. Where a value lies beyond, the width is doubled and bins are merged in pairs,
    which gives exactly the counts that the wider bins would have given from the start. So the
    histogram is a function of the values: their order, how they were split into batches, their
    dtype and the device do not matter. Zeros are counted apart, for every quantizer holds them
    exactly, and there may be many.

    Attributes:
        counts: int64 ``(8191,)``, bin 0 in the middle, without the zeros.
        zeros: How many values were zero.
        low: The smallest value seen, or 0 if that is smaller; float32.
        high: The largest, or 0 if that is larger; float32.

    Example:
        >>> histogram = Histogram()
        >>> histogram.add(torch.tensor([0.0, 0.5, 3.0, -1.0]), -1.0, 3.0)
        >>> histogram.width, histogram.zeros, int(histogram.counts.sum())
        (0.0009765625, 1, 3)
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(SIZE, dtype=torch.int64)
        self.zeros = 0
        self.low = self.high = 0.0

    @property
    def largest(self) -> float:
        """The largest magnitude seen."""
        return max(-self.low, self.high)

    @property
    def width(self) -> float:
        """Width of a bin: a power of two."""
        return _width(self.largest)

    def add(self, x: Tensor, low: float, high: float) -> None:
        """Count values.

        Args:
            x: Any shape and real dtype, finite.
            low: The smallest value of ``x`` as float32, or less.
            high: The largest value, or more.
        """
        before = self.width if self.largest else None
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.counts.device != x.device:
            self.counts = self.counts.to(x.device)
        if before is not None and before < self.width:
            self._merge(int(min(self.width / before, 2 * HALF)))  # by then all is in bin 0
        flat, per_bin = x.detach().reshape(-1), 1 / self.width
        size = CUDA_CHUNK if x.is_cuda else CHUNK
        real = torch.empty(min(size, flat.numel()), dtype=torch.float32, device=x.device)
        whole, filled = torch.empty_like(real, dtype=torch.int32), torch.empty_like(real)
        zeros = flat.numel()
        for part in flat.split(size):
            scaled, index = real[: part.numel()].copy_(part), whole[: part.numel()]
            # count_nonzero branches: thirty times as long for the output of ReLU
            zeros -= int(torch.ne(scaled, 0, out=filled[: part.numel()]).sum())
            index.copy_(scaled.mul_(per_bin)).add_(CENTRE)  # a conversion rounds towards zero
            self.counts += torch.bincount(index, minlength=SIZE)
        self.counts[CENTRE] -= zeros
        self.zeros += zeros

    def _merge(self, ratio: int) -> None:
        bins = torch.arange(-CENTRE, HALF, device=self.counts.device)
        wider = torch.div(bins, ratio, rounding_mode="trunc") + CENTRE
        self.counts = torch.zeros_like(self.counts).index_add_(0, wider, self.counts)

    def edges(self) -> Tensor:
        """Return the ends of the bins, none beyond the data: float64 ``(8192,)`` on the CPU."""
        places = torch.arange(-HALF, HALF, dtype=torch.float64)
        places[HALF:] += 1
        return (places * self.width).clamp_(self.low, self.high)

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of all there is to go on with."""
        return {
            "counts": self.counts.clone(),
            "zeros": torch.tensor(self.zeros),
            "low": torch.tensor(self.low, dtype=torch.float32),
            "high": torch.tensor(self.high, dtype=torch.float32),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: If the tensors are not those of a histogram.
        """
        require_state(state, self.state_dict())
        self.counts = state["counts"].clone()
        self.zeros = int(state["zeros"])
        self.low, self.high = float(state["low"]), float(state["high"])


def require_state(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Check that a state has the names, shapes and dtypes it needs.

    Raises:
        ValueError: If it has not.
    """

    def described(tensors: Mapping[str, Tensor]) -> str:
        kinds = [f"{n} {t.dtype} {list(t.shape)}" for n, t in sorted(tensors.items())]
        return ", ".join(kinds).replace("torch.", "")

    if described(state) != described(own):
        raise ValueError(
            f"state has {described(state) or 'nothing'}; this observer has {described(own)}"
        )


def _width(largest: float) -> float:
    exponent = math.frexp(largest)[1] - HALF.bit_length() + 1
    return 2.0 ** max(exponent, -126)  # so that its inverse is a float32 too
