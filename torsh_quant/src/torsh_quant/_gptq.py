"""GPTQ: round the columns of a weight one by one, and let the rest make up for each."""

import logging
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torsh_quant._numerics import weight_qparams
from torsh_quant._rounding import Rounded, round_to_nearest
from torsh_quant._spec import IntSpec
from torsh_quant._statistics import Statistics, full_precision

_BLOCK = 128  # columns whose corrections are applied to the rest together
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GPTQ:
    """Choose integers so that the layer's outputs on the calibration data change least.

    Columns are rounded in order, and the error of each is spread over those that are still floats,
    by the inverse of the input's second moments. Scales of a group are chosen when it is reached,
    from its weights as they are then. Inputs that are always zero say nothing: their weights are
    rounded to nearest. So is each output channel that would come out worse than that, by the mean
    squared error of its output on the calibration data: no channel is ever worse.

    Args:
        damp: Added to the diagonal of the moments, as a share of its mean. More of it trusts the
            data less. Where a matrix still has no Cholesky factor, ten times as much is tried, up
            to 1, and logged.
        act_order: Round the columns with the largest inputs first. Groups keep their places; their
            scales come from the weights as they were at the start.

    Raises:
        ValueError: If ``damp`` is not above 0.

    Example:
        >>> from torch import nn
        >>> from torsh_quant import quantize
        >>> net = nn.Sequential(nn.Linear(32, 8)).eval()
        >>> x = torch.randn(256, 4) @ torch.randn(4, 32)
        >>> loss = [(quantize(net, "w3a16", data=[x], method=m)(x) - net(x)).square().mean()
        ...         for m in ("rtn", GPTQ())]
        >>> bool(loss[1] < loss[0] / 2)
        True

    Reference:
        E. Frantar et al., GPTQ: accurate post-training quantization for generative pre-trained
        transformers, 2022, arXiv:2210.17323. Keeping rounded-to-nearest channels is ours.
    """

    needs_data: ClassVar[bool] = True
    damp: float = 0.01
    act_order: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.damp < math.inf:
            raise ValueError(f"damp={self.damp!r}; use a number above 0, such as 0.01")

    def round(
        self, weight: Tensor, spec: IntSpec, group_size: int, statistics: Statistics | None
    ) -> Rounded:
        """Round a weight ``(out_features, in_features)`` with the moments of its input.

        Raises:
            ValueError: If ``statistics`` is missing.
        """
        if statistics is None:
            raise ValueError("statistics is missing: GPTQ needs the moments of the layer's input")
        matrix = weight.detach().float()
        plain = round_to_nearest(matrix, spec, group_size)
        with full_precision(matrix.device):
            found = self._round(matrix, spec, group_size, statistics.hessian, plain)
        return best_rows(matrix, statistics, plain, found)

    def _round(
        self, matrix: Tensor, spec: IntSpec, group_size: int, hessian: Tensor, plain: Rounded
    ) -> Rounded:
        # All parts of a grouped convolution at once: (parts, columns, rows), a column contiguous.
        parts, columns = hessian.shape[:2]
        rest = by_column(matrix, parts).clone()
        factor, order = _inverse_factor(hessian, self.damp, by_size=self.act_order)
        scale = by_column(plain.scale, parts).clone()
        zero_point = None
        if plain.zero_point is not None:
            zero_point = by_column(plain.zero_point, parts).clone()
        # One scale for all the weight, or an order that jumps between groups, needs them ahead.
        ahead = spec.group == "tensor" or self.act_order
        places = order[..., None].expand_as(rest)
        rest = rest.gather(1, places)
        steps = scale.repeat_interleave(group_size, 1).gather(1, places)
        shifts = torch.zeros_like(steps)
        if zero_point is not None:
            shifts += zero_point.repeat_interleave(group_size, 1).gather(1, places)
        integers = torch.empty_like(rest)
        for start in range(0, columns, _BLOCK):
            end = min(start + _BLOCK, columns)
            errors = torch.empty_like(rest[:, start:end])
            for k in range(start, end):
                if not ahead and k % group_size == 0:
                    group = rest[:, k : k + group_size].clone()
                    if k + group_size > end:  # columns beyond the block lack its corrections
                        late = factor[:, start:k, end : k + group_size].mT
                        group[:, end - k :] -= late @ errors[:, : k - start]
                    step, shift = weight_qparams(group.mT.flatten(0, 1), spec, group_size)
                    scale[:, k // group_size] = step.view(parts, -1)
                    steps[:, k : k + group_size] = step.view(parts, 1, -1)
                    if zero_point is not None and shift is not None:
                        zero_point[:, k // group_size] = shift.view(parts, -1)
                        shifts[:, k : k + group_size] = shift.view(parts, 1, -1)
                column, step, shift = rest[:, k], steps[:, k], shifts[:, k]
                q = torch.round(column / step).add_(shift).clamp_(spec.qmin, spec.qmax)
                integers[:, k] = q
                error = q.sub_(shift).mul_(-step).add_(column).div_(factor[:, k, k, None])
                errors[:, k - start] = error
                rest[:, k:end] -= factor[:, k, k:end, None] * error[:, None]
            rest[:, end:] -= factor[:, start:end, end:].mT @ errors
        q = torch.empty_like(integers).scatter_(1, places, integers).to(torch.int8)
        return Rounded(by_row(q), by_row(scale), None if zero_point is None else by_row(zero_point))


def best_rows(weight: Tensor, statistics: Statistics, plain: Rounded, other: Rounded) -> Rounded:
    """Take each output channel from where the calibration data sees the smaller error.

    Args:
        weight: ``(out_features, in_features)`` float32.
        statistics: Of its input.
        plain: Taken where both are alike.
        other: Taken where it is better.
    """
    errors = [statistics.error(one.floats() - weight) for one in (plain, other)]
    better = (errors[1] < errors[0])[:, None]
    zero_point = None
    if plain.zero_point is not None and other.zero_point is not None:
        zero_point = torch.where(better, other.zero_point, plain.zero_point)
    return Rounded(
        torch.where(better, other.q, plain.q),
        torch.where(better, other.scale, plain.scale),
        zero_point,
    )


def by_column(matrix: Tensor, parts: int) -> Tensor:
    """Turn ``(out_features, columns)`` to ``(parts, columns, out_features / parts)``."""
    return matrix.unflatten(0, (parts, -1)).mT.contiguous()


def by_row(columns: Tensor) -> Tensor:
    """Undo :func:`by_column`."""
    return columns.mT.flatten(0, 1).contiguous()


def _inverse_factor(hessian: Tensor, damp: float, *, by_size: bool) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the inverse, of matrices damped until they have one.

    Args:
        hessian: ``(parts, columns, columns)``.
        damp: Share of the mean of the diagonal.
        by_size: Put the columns with the largest diagonal first.

    Returns:
        The factors ``(parts, columns, columns)`` float32, and the order of the columns.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    order = torch.arange(diagonal.shape[1], device=hessian.device).expand_as(diagonal)
    if by_size:
        order = torch.argsort(diagonal, dim=1, descending=True, stable=True)
    factors = []
    for matrix, places in zip(hessian, order, strict=True):
        matrix = matrix.double()
        if by_size:
            matrix = matrix[places][:, places]
        diagonal = matrix.diagonal().clone()
        live = diagonal > 0
        mean = diagonal.sum() / live.sum().clamp(min=1)
        # A dead input has a row of zeros: with anything on the diagonal it stands for itself.
        diagonal[~live] = mean.clamp(min=torch.finfo().tiny)
        factors.append(_damped_factor(matrix, diagonal, mean, damp))
    return torch.stack(factors), order


def _damped_factor(matrix: Tensor, diagonal: Tensor, mean: Tensor, damp: float) -> Tensor:
    while True:
        matrix.diagonal().copy_(diagonal + damp * mean)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            upper = upper.float()
            if not failed and torch.isfinite(upper).all() and (upper.diagonal() > 0).all():
                return upper
        if damp >= 1:
            _log.warning("the input's moments have no inverse with damp=1; rounding to nearest")
            return torch.eye(len(matrix), device=matrix.device)
        larger = min(1.0, damp * 10)
        _log.warning("the input's moments have no inverse with damp=%g; trying %g", damp, larger)
        damp = larger
