"""Observers: what range of a layer's input to quantize, learned from batches one after another.

An observer sees batches of any shape, keeps a fixed amount of state and gives a range for any
number of bits at the end. Ranges are float32 scalars on the CPU that hold zero and do not reach
beyond the data. A batch without elements changes nothing; before the first value the range is
``(0, 0)``. But for the moving average, neither the order of the batches nor where they were split
changes a bit of the result.
"""

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from torsh_quant._clipping import entropy_range, least_squares_range, percentile_range
from torsh_quant._histogram import Histogram, require_state


class Observer(Protocol):
    """What every observer does."""

    def observe(self, x: Tensor) -> None:
        """Take in the values of one batch.

        Args:
            x: Any shape, real dtype and device; may be empty.

        Raises:
            ValueError: If a value is NaN, infinite or beyond float32.
        """
        ...

    def range(self, bits: int) -> tuple[Tensor, Tensor]:
        """Return the lower and upper end to quantize to ``bits`` bits: float32 ``()``."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return all there is to go on with, as plain tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state_dict`, to the same bits.

        Raises:
            ValueError: If the state is another observer's.
        """
        ...


class MinMax:
    """The smallest and the largest value.

    Example:
        >>> observer = MinMax()
        >>> observer.observe(torch.tensor([1.0, 3.0]))
        >>> observer.range(bits=8)
        (tensor(0.), tensor(3.))
    """

    def __init__(self) -> None:
        self.low = self.high = 0.0

    def observe(self, x: Tensor) -> None:
        low, high = _extremes(x)
        self.low, self.high = min(self.low, low), max(self.high, high)

    def range(self, bits: int) -> tuple[Tensor, Tensor]:
        return _scalar(self.low), _scalar(self.high)

    def state_dict(self) -> dict[str, Tensor]:
        return {"low": _scalar(self.low), "high": _scalar(self.high)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        require_state(state, self.state_dict())
        self.low, self.high = float(state["low"]), float(state["high"])


class MovingAverage:
    """Exponential moving averages of the batches' smallest and largest values.

    The first batch sets them; each later one moves them by ``constant`` times the difference.

    Args:
        constant: Share of the newest batch, above 0 and up to 1.

    Raises:
        ValueError: If ``constant`` is out of range.

    Example:
        >>> observer = MovingAverage(constant=0.5)
        >>> for largest in (4.0, 8.0):
        ...     observer.observe(torch.tensor([-1.0, largest]))
        >>> observer.range(bits=8)
        (tensor(-1.), tensor(6.))
    """

    def __init__(self, constant: float = 0.01) -> None:
        if not 0 < constant <= 1:
            raise ValueError(f"constant={constant} is not a share; use above 0, up to 1")
        self.constant = constant
        self._ends: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        low, high = _extremes(x)
        if not x.numel():
            return
        ends = torch.tensor([low, high], dtype=torch.float64)
        if self._ends is not None:
            ends = self._ends.double().lerp(ends, self.constant)
        self._ends = ends.float()

    def range(self, bits: int) -> tuple[Tensor, Tensor]:
        if self._ends is None:
            return _scalar(0.0), _scalar(0.0)
        return self._ends[0].clamp(max=0), self._ends[1].clamp(min=0)

    def state_dict(self) -> dict[str, Tensor]:
        ends = torch.zeros(2) if self._ends is None else self._ends.clone()
        return {"ends": ends, "begun": torch.tensor(self._ends is not None)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        require_state(state, self.state_dict())
        self._ends = state["ends"].cpu().clone() if state["begun"] else None


class _Counting:
    """Observers that count values in a histogram."""

    def __init__(self) -> None:
        self.histogram = Histogram()

    def observe(self, x: Tensor) -> None:
        low, high = _extremes(x)
        if x.numel():
            self.histogram.add(x, low, high)

    def state_dict(self) -> dict[str, Tensor]:
        return self.histogram.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.histogram.load_state_dict(state)


class Percentile(_Counting):
    """Leaves out the same share of the values at either end.

    Args:
        percentile: How much stays inside, in per cent: above 0 and up to 100.

    Raises:
        ValueError: If ``percentile`` is out of range.

    Example:
        >>> observer = Percentile(98.0)
        >>> observer.observe(torch.linspace(-1, 1, 10001))
        >>> [round(end.item(), 3) for end in observer.range(bits=8)]
        [-0.98, 0.98]
    """

    def __init__(self, percentile: float = 99.99) -> None:
        if not 0 < percentile <= 100:
            raise ValueError(f"percentile={percentile} is not one; use above 0, up to 100")
        super().__init__()
        self.percentile = percentile

    def range(self, bits: int) -> tuple[Tensor, Tensor]:
        return percentile_range(self.histogram, self.percentile)


class Entropy(_Counting):
    """Keeps most of the distribution, by the Kullback-Leibler divergence.

    See :func:`torsh_quant._clipping.entropy_range` for where it differs from TensorRT's.

    Example:
        >>> observer = Entropy()
        >>> observer.observe(torch.tensor([0.0, 1.0, 1.0]))
        >>> observer.range(bits=8)
        (tensor(0.), tensor(1.))
    """

    def range(self, bits: int) -> tuple[Tensor, Tensor]:
        return entropy_range(self.histogram, bits)


class LeastSquares(_Counting):
    """The range whose quantizer has the least squared error, both ends searched.

    Example:
        >>> from torsh_quant._numerics import range_qparams
        >>> observer = LeastSquares()
        >>> observer.observe(torch.tensor([-1.0, 0.0, 1.0] * 1000 + [8.0]))
        >>> scale, zero_point = range_qparams(*observer.range(bits=2), bits=2)
        >>> round(scale.item(), 2)  # least 2000 * (s - 1)**2 + (8 - 2 * s)**2
        1.01
    """

    def range(self, bits: int) -> tuple[Tensor, Tensor]:
        return least_squares_range(self.histogram, bits)


_KINDS = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "entropy": Entropy,
    "mse": LeastSquares,
}


def make_observer(kind: str) -> Observer:
    """Make an observer by its name.

    Args:
        kind: ``"minmax"``, ``"moving_average"`` (constant 0.01), ``"percentile"`` (99.99 %),
            ``"entropy"`` or ``"mse"``.

    Raises:
        ValueError: If there is no such observer.

    Example:
        >>> observer = make_observer("minmax")
        >>> observer.observe(torch.tensor([-2.0, 1.0]))
        >>> observer.range(bits=8)
        (tensor(-2.), tensor(1.))
    """
    if kind not in _KINDS:
        *most, last = map(repr, _KINDS)
        raise ValueError(f"observer={kind!r} is not known; use {', '.join(most)} or {last}")
    return _KINDS[kind]()


def _extremes(x: Tensor) -> tuple[float, float]:
    """The smallest and the largest value in float32."""
    if x.is_complex():
        raise ValueError(f"values are {x.dtype}; give real ones")
    if not x.numel():
        return 0.0, 0.0
    real = x.detach()
    if not x.is_floating_point() or x.itemsize < 2:
        real = real.float()
    low, high = torch.stack(torch.aminmax(real)).float().tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        what = "NaN" if math.isnan(low) or math.isnan(high) else "infinity"
        raise ValueError(f"values have {what} (or lie beyond float32)")
    return low, high


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)
