"""HQQ: scales and zero points that keep most weights close and let outliers be outliers."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torsh_quant._numerics import TINY, quantize_weight
from torsh_quant._rounding import Rounded, round_to_nearest
from torsh_quant._spec import IntSpec
from torsh_quant._statistics import Statistics


@dataclass(frozen=True)
class HQQ:
    """Choose scales and zero points by a norm that forgives outliers, from the weights alone.

    The sum of ``|w - w_q|**p`` of each group is made small by turns: the errors are shrunk, which
    leaves of them what only the outliers have; then zero point and scale are fitted to the weights
    without that, and the weights are rounded anew. Each group keeps the best of what it met,
    rounding to nearest among it, so in this norm no group is ever worse. In squared error one may
    be.

    Args:
        p: The norm, above 0 and at most 1.
        steps: Turns.
        beta: How much weights are held: the larger, the less of an error is left out.
        kappa: Factor of ``beta`` from turn to turn, at least 1.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> weight = torch.tensor([[2.5, 1.0, 1.0, -1.0, -1.0, 1.0, -1.0, 0.0]])
        >>> spec = IntSpec(3, group=8)
        >>> round_to_nearest(weight, spec, 8).floats().abs().unique()
        tensor([0.0000, 1.1250, 2.2500])
        >>> HQQ().round(weight, spec, 8, None).floats().abs().unique()  # gives the 2.5 up
        tensor([0.0000, 1.0144, 2.0288])

    Reference:
        H. Badri and A. Shaji, Half-quadratic quantization of large machine learning models, 2023
        (mobiusml.github.io/hqq_blog). There the zero point is a float and the scale stays as the
        extremes make it. Here a zero point is an integer, and the scale is fitted too, by least
        squares in closed form; in symmetric formats the scale alone. Errors are measured in steps
        of the scale before they are shrunk, so that the unit of the weights does not matter.
    """

    needs_data: ClassVar[bool] = False
    p: float = 0.7
    steps: int = 20
    beta: float = 10.0
    kappa: float = 1.01

    def __post_init__(self) -> None:
        if not (0 < self.p <= 1 and self.steps >= 1 and self.beta > 0 and self.kappa >= 1):
            raise ValueError(
                f"{self} is out of range; use 0 < p <= 1, steps >= 1, beta > 0 and kappa >= 1"
            )

    def round(
        self, weight: Tensor, spec: IntSpec, group_size: int, statistics: Statistics | None
    ) -> Rounded:
        """Round a weight ``(out_features, in_features)``; ``statistics`` are not looked at."""
        del statistics
        matrix = weight.detach().float()
        plain = round_to_nearest(matrix, spec, group_size)
        shape = plain.scale.shape
        groups = matrix.unflatten(1, (shape[1], -1))
        scale, zero_point = plain.scale, plain.zero_point
        if spec.group == "tensor":
            groups = groups.reshape(1, 1, -1)
            scale = scale[:1, :1]
            zero_point = None if zero_point is None else zero_point[:1, :1]
        scale, zero_point = self._fit(groups, scale, zero_point, spec)
        scale = scale.expand(shape).contiguous()
        zero_point = None if zero_point is None else zero_point.expand(shape).contiguous()
        return Rounded(quantize_weight(matrix, scale, zero_point, spec), scale, zero_point)

    def _fit(
        self, groups: Tensor, scale: Tensor, zero_point: Tensor | None, spec: IntSpec
    ) -> tuple[Tensor, Tensor | None]:
        step, shift = scale, torch.zeros_like(scale)
        if zero_point is not None:
            shift = shift + zero_point
        best_step, best_shift, least = step, shift, torch.full_like(step, torch.inf).double()
        beta = self.beta
        for turn in range(self.steps + 1):
            real = groups / step[..., None]
            q = torch.round(real).add_(shift[..., None]).clamp_(spec.qmin, spec.qmax)
            error = real - q + shift[..., None]
            loss = error.abs().pow_(self.p).sum(2, dtype=torch.float64) * step.abs() ** self.p
            better = loss < least
            least = torch.where(better, loss, least)
            best_step = torch.where(better, step, best_step)
            best_shift = torch.where(better, shift, best_shift)
            if turn == self.steps:
                break
            kept = real - _shrink(error, beta, self.p)
            if zero_point is not None:
                shift = torch.round((q - kept).mean(2)).clamp_(spec.qmin, spec.qmax)
            q -= shift[..., None]
            factor = (q * kept).sum(2) / (q * q).sum(2).clamp(min=1)
            fits = (factor > 0) & ((factor * step).abs() > TINY)
            step = torch.where(fits, factor * step, step)
            beta *= self.kappa
        return best_step, None if zero_point is None else best_shift.to(torch.int8)


def _shrink(error: Tensor, beta: float, p: float) -> Tensor:
    """What the paper takes for the minimum over e of ``|e|**p + beta / 2 * (e - error)**2``."""
    size = error.abs()
    less = size.clamp(min=TINY).pow_(p - 1).div_(beta)
    return torch.sign(error).mul_((size - less).clamp_(min=0))
