"""AdaRound: learn for each weight whether to round it up or down."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torsh_quant._gptq import best_rows, by_column, by_row
from torsh_quant._rounding import Rounded, round_to_nearest
from torsh_quant._spec import IntSpec
from torsh_quant._statistics import Statistics, full_precision

_LOW, _HIGH = -0.1, 1.1  # the sigmoid is stretched over the ends, so that it can reach them
_WARM = 0.2  # share of the steps before choices are made hard
_MEMORY = 0.9, 0.99  # Adam's; a step late in the annealing must not be sized by the first ones
_SWEEPS = 10  # after the training
_DAMP = 0.1  # then, as a share of the mean of the diagonal: weights of small inputs do not go far
_BLOCK = 128  # columns whose moves are applied to the rest together
_LOOK = 20  # steps from one look at whether all choices are made to the next


@dataclass(frozen=True)
class AdaRound:
    """Learn the direction of rounding so that the layer's outputs change least.

    Scales are those of rounding to nearest. A soft choice between the two integers around each
    weight is trained with Adam, first freely, then pushed to one side ever harder; training ends
    early once all are there. Then each integer in turn moves to where it is best given all others.
    Output channels that come out worse than rounded to nearest, by the mean squared error of their
    outputs on the calibration data, are rounded to nearest: no channel is ever worse.

    Args:
        steps: Steps of Adam, at most.
        lr: Its learning rate.
        push: Factor of the term that makes choices hard. The errors it is weighed against are those
            of each output channel over that of rounding to nearest, so one figure suits all layers.
        beta: Exponent of that term at first and at last: from acting near the ends alone to acting
            everywhere.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> from torch import nn
        >>> from torsh_quant import quantize
        >>> net = nn.Sequential(nn.Linear(32, 8)).eval()
        >>> x = torch.randn(256, 4) @ torch.randn(4, 32)
        >>> loss = [(quantize(net, "w3a16", data=[x], method=m)(x) - net(x)).square().mean()
        ...         for m in ("rtn", AdaRound(steps=300))]
        >>> bool(loss[1] < loss[0])
        True

    Reference:
        M. Nagel et al., Up or down? Adaptive rounding for post-training quantization, 2020,
        arXiv:2004.10568. There the error is measured on samples of the data, behind the activation
        function. Here it is ``d H d^T`` for the second moments ``H`` of all of it: exactly the mean
        squared error of the layer's output, before the activation function, and no data is kept.
        The moves afterwards are as in P. Nair and A. Suggala, CDQuant: greedy coordinate descent,
        2024, arXiv:2406.17542, with the columns in turn.
    """

    needs_data: ClassVar[bool] = True
    steps: int = 1000
    lr: float = 0.1
    push: float = 30.0
    beta: tuple[float, float] = (20.0, 2.0)

    def __post_init__(self) -> None:
        if not (self.steps >= 1 and self.lr > 0 and self.push > 0 and min(self.beta) > 1):
            raise ValueError(
                f"{self} is out of range; use steps >= 1, lr > 0, push > 0 and beta above 1"
            )

    def round(
        self, weight: Tensor, spec: IntSpec, group_size: int, statistics: Statistics | None
    ) -> Rounded:
        """Round a weight ``(out_features, in_features)`` with the moments of its input.

        Raises:
            ValueError: If ``statistics`` is missing.
        """
        if statistics is None:
            raise ValueError(
                "statistics is missing: AdaRound needs the moments of the layer's input"
            )
        matrix = weight.detach().float()
        plain = round_to_nearest(matrix, spec, group_size)
        with full_precision(matrix.device):
            q = self._learn(matrix, spec, plain, statistics)
            found = Rounded(q, plain.scale, plain.zero_point)
            found = _settle(matrix, found, spec, statistics.hessian)
        return best_rows(matrix, statistics, plain, found)

    def _learn(
        self, matrix: Tensor, spec: IntSpec, plain: Rounded, statistics: Statistics
    ) -> Tensor:
        size = matrix.shape[1] // plain.scale.shape[1]
        step = plain.scale.repeat_interleave(size, 1)
        shift = torch.zeros_like(step)
        if plain.zero_point is not None:
            shift += plain.zero_point.repeat_interleave(size, 1)
        real = matrix / step + shift
        floor = torch.floor(real)
        low, high = floor.clamp(spec.qmin, spec.qmax), (floor + 1).clamp(spec.qmin, spec.qmax)
        free = high > low  # beyond the ends of the format there is no choice
        hidden = torch.logit(((real - floor) - _LOW) / (_HIGH - _LOW))
        fixed = (low - shift) * step - matrix
        # Rows are problems of their own: each in units of what rounding to nearest does to it.
        before = statistics.error(plain.floats() - matrix).clamp(min=1e-30)[:, None]
        unit = (matrix.shape[1] / before).float()
        parts = len(statistics.hessian)
        span = (high - low) * step
        pull = 2 * unit * span
        first, second = torch.zeros_like(hidden), torch.zeros_like(hidden)
        warm = int(_WARM * self.steps)
        for number in range(self.steps):
            soft = torch.sigmoid(hidden)
            up = soft.mul(_HIGH - _LOW).add_(_LOW).clamp_(0, 1)
            change = torch.addcmul(fixed, up, span).unflatten(0, (parts, -1))
            slope = (change @ statistics.hessian).flatten(0, 1).mul_(pull)
            open_ = (up > 0) & (up < 1) & free
            if number >= warm:
                if (number - warm) % _LOOK == 0 and not open_.any():
                    break
                done = (number - warm) / max(1, self.steps - warm)
                beta = self.beta[1] + (self.beta[0] - self.beta[1]) * (1 - done)
                side = up.mul(2).sub_(1)
                slope -= side.abs().pow_(beta - 1).mul_(side.sign_()).mul_(2 * beta * self.push)
            slope.mul_(soft.mul_(1 - soft)).mul_(open_)
            # Adam, as in torch.optim
            first.lerp_(slope, 1 - _MEMORY[0])
            second.mul_(_MEMORY[1]).addcmul_(slope, slope, value=1 - _MEMORY[1])
            root = second.sqrt().div_((1 - _MEMORY[1] ** (number + 1)) ** 0.5).add_(1e-8)
            hidden.addcdiv_(first, root, value=-self.lr / (1 - _MEMORY[0] ** (number + 1)))
        return torch.where(hidden >= 0, high, low).to(torch.int8)


def _settle(weight: Tensor, rounded: Rounded, spec: IntSpec, hessian: Tensor) -> Rounded:
    """Move each integer to where it is best given all others, column by column; scales stay.

    Args:
        weight: ``(out_features, in_features)`` float32.
        rounded: Where to start.
        spec: Its format.
        hessian: Second moments of the input.
    """
    parts, columns = hessian.shape[:2]
    size = rounded.q.shape[1] // rounded.scale.shape[1]
    step = by_column(rounded.scale, parts).repeat_interleave(size, 1)
    change = by_column(rounded.floats() - weight, parts)
    shift = torch.zeros_like(step)
    if rounded.zero_point is not None:
        shift += by_column(rounded.zero_point, parts).repeat_interleave(size, 1)
    integers = by_column(rounded.q, parts).float()
    hessian = hessian.clone()
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    diagonal += _DAMP * diagonal.mean(1, keepdim=True)
    power = torch.where(diagonal > 0, diagonal, 1.0)[..., None]
    for _ in range(_SWEEPS):
        moved = torch.zeros((), dtype=torch.bool, device=weight.device)
        slope = hessian @ change
        for start in range(0, columns, _BLOCK):
            end = min(start + _BLOCK, columns)
            near = slope[:, start:end].clone()
            moves = torch.empty_like(near)
            for k in range(start, end):
                old = integers[:, k]
                new = torch.round(old - near[:, k - start] / (power[:, k] * step[:, k]))
                new = new.clamp_(spec.qmin, spec.qmax)
                moved |= (new != old).any()
                move = (new - old) * step[:, k]
                near += hessian[:, k, start:end, None] * move[:, None]
                moves[:, k - start] = move
                integers[:, k] = new
            slope += hessian[:, :, start:end] @ moves
        if not moved:
            break
        change = (integers - shift) * step - by_column(weight, parts)
    return Rounded(by_row(integers).to(torch.int8), rounded.scale, rounded.zero_point)
