"""Where to clip a histogram's values before they are quantized."""

import torch
from torch import Tensor

from torsh_quant._histogram import CENTRE, HALF, SIZE, Histogram
from torsh_quant._numerics import range_qparams

Range = tuple[Tensor, Tensor]
FEWEST = 128  # bins inside a threshold, on either side; with a few, the divergence means nothing


def percentile_range(histogram: Histogram, percentile: float) -> Range:
    """Leave out the same share of the values, zeros included, at either end.

    Args:
        histogram: The values.
        percentile: How much of them stays inside, in per cent; ``(100 - percentile) / 2`` goes at
            either end.

    Returns:
        Lower and upper end, float32 ``()``, no bin's width from the exact ones.

    Example:
        >>> histogram = Histogram()
        >>> histogram.add(torch.arange(-100.0, 101.0), -100.0, 100.0)
        >>> low, high = percentile_range(histogram, 90.0)
        >>> round(low.item()), round(high.item())
        (-90, 90)
    """
    counts = histogram.counts.cpu().double()
    counts[CENTRE] += histogram.zeros
    edges, below = histogram.edges(), counts.cumsum(0)
    outside = float(below[-1]) * (100 - percentile) / 200

    def end(rank: float) -> Tensor:
        place = int(torch.searchsorted(below, torch.tensor(rank).double()).clamp(max=SIZE - 1))
        share = 1 - (below[place] - rank) / counts[place].clamp(min=1)
        return torch.lerp(edges[place], edges[place + 1], share).float()

    if outside == 0:
        return _scalar(histogram.low), _scalar(histogram.high)
    low, high = end(outside), end(float(below[-1]) - outside)
    return low.clamp(max=0), high.clamp(min=0)


def least_squares_range(histogram: Histogram, bits: int) -> Range:
    """Find the range whose quantizer has the least squared error.

    The quantizer is that of :func:`torsh_quant._numerics.range_qparams`, to the integer where it
    clips. Both ends are searched: first in steps of a fifth down to a 1,024th of the data, then
    ever finer around the four best. Within a bin values count as evenly spread, and the
    error is exact for that however a step of the quantizer and a bin lie.

    Args:
        histogram: The values.
        bits: 2 to 8.

    Returns:
        Lower and upper end, float32 ``()``.
    """
    widest = _scalar(histogram.low), _scalar(histogram.high)
    if not histogram.counts.any():
        return widest
    area = _AreaBelow(histogram)
    ratios = 2.0 ** (-torch.arange(41.0) / 4)
    low, high = _grid(*(end * ratios if end else end[None] for end in widest))
    best_low, best_high = _least(area, low, high, bits, 4)
    fine = torch.arange(-3.0, 4.0)
    for step in (0.06, 0.02, 0.007, 0.0025, 0.0008):
        factors = (1 + step * fine).expand(len(best_low), -1)
        low = (best_low[:, None] * factors).clamp(min=widest[0])
        high = (best_high[:, None] * factors).clamp(max=widest[1])
        low, high = low[:, :, None].expand(-1, -1, 7), high[:, None].expand(-1, 7, -1)
        low = torch.cat((best_low, low.flatten()))
        high = torch.cat((best_high, high.flatten()))
        best_low, best_high = _least(area, low, high, bits, 4)
    return best_low[0], best_high[0]


def entropy_range(histogram: Histogram, bits: int) -> Range:
    """Find the range that keeps most of the distribution, by the Kullback-Leibler divergence.

    For each threshold, the bins inside, with what is outside added to the outermost occupied ones,
    are compared with what is left of them when all bins that round to one integer share their
    counts. Against the published method:

    - a step of the quantizer is a step of the real one, zero point included, and the range is
      the threshold cut to the data's own ends, so that one-sided data gets all integers;
    - zeros are left out: they are exact with every range, and with ReLU they would be all that
      counts;
    - an occupied bin never meets an empty one, so that nothing needs smoothing;
    - thresholds are steps of 0.5 %, down to 128 bins or where an integer stands for a single bin;
    - values that are no more than there are integers keep their whole range: each may have an
      integer of its own, so the divergence is 0 wherever the rest is cut.

    Args:
        histogram: The values.
        bits: 2 to 8.

    Returns:
        Lower and upper end, float32 ``()``.

    Reference:
        Szymon Migacz, "8-bit Inference with TensorRT", GPU Technology Conference 2017.
    """
    widest = _scalar(histogram.low), _scalar(histogram.high)
    if int(histogram.counts.count_nonzero()) < 2**bits:
        return widest
    width = histogram.width
    most = int(histogram.largest / width) + 1
    reach = torch.unique((most * 0.995 ** torch.arange(1600.0).double()).ceil().long()).flip(0)
    low = torch.maximum(-reach * width, widest[0].double()).float()
    high = torch.minimum(reach * width, widest[1].double()).float()
    scale = range_qparams(low, high, bits)[0]
    fits = ((reach >= FEWEST) & (scale >= width)) | (reach == most)
    reach, low, high = reach[fits], low[fits], high[fits]
    divergence = torch.cat(
        [
            _divergence(histogram, *parts, bits)
            for parts in zip(reach.split(128), low.split(128), high.split(128), strict=True)
        ]
    )
    best = divergence.argmin()
    return low[best], high[best]


class _AreaBelow:
    """The integral of the number of values below t, from minus infinity; zeros left out."""

    def __init__(self, histogram: Histogram) -> None:
        self.counts = histogram.counts.cpu().double()
        edges = histogram.edges()
        self.edges, self.width = edges, histogram.width
        self.low, self.high = histogram.low, histogram.high
        below = self.counts.cumsum(0)
        self.total = below[-1]
        self.below = below - self.counts
        widths = edges.diff()
        self.half_density = torch.where(widths > 0, self.counts / (2 * widths), 0.0)
        inside = self.below * widths + self.counts * widths / 2
        self.area = inside.cumsum(0) - inside
        self.at_high = inside.sum()  # equals total * high - the sum of all values

    def __call__(self, t: Tensor) -> Tensor:
        inside = t.clamp(self.low, self.high)
        place = (inside / self.width).long().clamp_(-CENTRE, CENTRE).add_(CENTRE)
        past = inside - self.edges[place]
        inner = (self.half_density[place] * past + self.below[place]) * past + self.area[place]
        return inner + self.total * (t - self.high).clamp_(min=0)


def _least(area: _AreaBelow, low: Tensor, high: Tensor, bits: int, how_many: int) -> Range:
    errors = torch.cat(
        [
            _squared_error(area, *parts, bits)
            for parts in zip(low.split(256), high.split(256), strict=True)
        ]
    )
    best = errors.argsort(stable=True)[:how_many]
    return low[best], high[best]


def _squared_error(area: _AreaBelow, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The summed squared error for each range, less the summed squares of all values.

    For levels l_1 to l_m, s apart, that is the sum of l^2 n - 2 l x over the values nearest to
    each; summed by parts, with A the integral of the count of values below,
    ``l_m^2 n - 2 l_m x - 2 s (A(c_1) + ... + A(c_m-1))`` at the cuts c halfway between levels.
    """
    scale, cuts = _cuts(low, high, bits)
    top = cuts[:, -1] + scale / 2
    total = area.total * area.high - area.at_high
    return area.total * top**2 - 2 * top * total - 2 * scale * area(cuts).sum(1)


def _cuts(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step of the quantizer and the places halfway between its values, float64."""
    scale, zero_point = (part.double() for part in range_qparams(low, high, bits))
    first = zero_point - 2 ** (bits - 1) + 0.5
    return scale, (first[:, None] + torch.arange(2**bits - 1)) * scale[:, None]


def _divergence(
    histogram: Histogram, reach: Tensor, low: Tensor, high: Tensor, bits: int
) -> Tensor:
    counts = histogram.counts.cpu().double()
    occupied = (counts > 0).double()
    before, filled, logs = (_cumulated(v) for v in (counts, occupied, counts.xlogy(counts)))
    begin, end = HALF - reach, CENTRE + reach  # of the bins inside
    # the first and last occupied bin inside
    places = torch.arange(SIZE)
    following = torch.where(counts > 0, places, SIZE).flip(0).cummin(0).values.flip(0)
    previous = torch.where(counts > 0, places, -1).cummax(0).values
    first, last = following[begin], previous[end - 1]
    empty = first >= end
    first, last = (place.clamp(0, SIZE - 1) for place in (first, last))
    # which bins round to one integer: those whose middle does
    cuts = _cuts(low, high, bits)[1] / histogram.width
    bounds = torch.cat((begin[:, None], _bins_below(cuts), end[:, None]), 1)
    bounds = bounds.clamp(begin[:, None], end[:, None])
    mass, occupants = before[bounds].diff(), filled[bounds].diff()
    shared = (mass * (mass / occupants.clamp(min=1)).clamp(min=1e-300).log()).sum(1)

    def log_share(place: Tensor) -> Tensor:
        cell = torch.searchsorted(bounds, place[:, None], right=True) - 1
        cell = cell.clamp_(0, 2**bits - 1)
        share = mass.gather(1, cell) / occupants.gather(1, cell).clamp(min=1)
        return share.clamp(min=1e-300).log()[:, 0]

    total, inside = before[-1], before[end] - before[begin]
    left, right = before[begin], total - before[end]
    together = first == last
    left, right = torch.where(together, 0.0, left), torch.where(together, left + right, right)
    own = logs[end] - logs[begin]
    for place, more in ((first, left), (last, right)):
        there = counts[place]
        own = own + (there + more).xlogy(there + more) - there.xlogy(there)
        shared = shared + more * log_share(place)
    divergence = (own - shared) / total + (inside / total).clamp(min=1e-300).log()
    return torch.where(empty, torch.inf, divergence)


def _bins_below(cuts: Tensor) -> Tensor:
    """How many bins have their middle below a cut, given in widths: ..., -1.5, 0, 1.5, 2.5, ..."""
    above, under = (cuts - 0.5).ceil().clamp(min=1), (cuts + 0.5).ceil().clamp(max=0)
    return torch.where(cuts > 0, above, under).long() + CENTRE


def _cumulated(values: Tensor) -> Tensor:
    return torch.cat((values.new_zeros(1), values.cumsum(0)))


def _grid(low: Tensor, high: Tensor) -> Range:
    low, high = torch.broadcast_tensors(low[:, None], high)
    return low.flatten(), high.flatten()


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)
