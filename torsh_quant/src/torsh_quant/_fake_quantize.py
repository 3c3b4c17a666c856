"""Rounding to integers and back with a gradient, on the arithmetic of the integer kernels.

Every function here gives the floats that the integers of :mod:`torsh_quant._numerics` stand for, so
what is trained on them is what runs after conversion. Backward, rounding counts as the identity
(straight through), clamped values pass nothing, and scales get the gradient of LSQ.

Reference:
    S. K. Esser et al., Learned step size quantization, 2020, arXiv:1902.08153.
"""

from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torsh_quant._numerics import (
    dequantize_weight,
    quantize_rows,
    quantize_static,
    quantize_weight,
    range_qparams,
)
from torsh_quant._spec import IntSpec

SMALLEST_FACTOR = 2.0**-10  # a learned scale keeps its sign and this share of where it began


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, weight: Tensor, scale: Tensor, zero_point: Tensor | None, spec: IntSpec
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, zero_point)
        ctx.limits = spec.qmin, spec.qmax
        q = quantize_weight(weight, scale, zero_point, spec)
        return dequantize_weight(q, scale, zero_point).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        weight, scale, zero_point = ctx.saved_tensors
        low, high = ctx.limits
        exact = weight.float().unflatten(1, (scale.shape[1], -1)) / scale[..., None]
        shift = 0.0 if zero_point is None else zero_point[..., None].float()
        rounded = torch.round(exact)
        clamped = (rounded + shift).clamp_(low, high) - shift
        inside = clamped == rounded
        groups = grad.float().unflatten(1, (scale.shape[1], -1))
        of_weight = torch.where(inside, groups, 0.0).flatten(1).to(weight.dtype)
        of_scale = None
        if ctx.needs_input_grad[1]:
            of_scale = (groups * torch.where(inside, rounded - exact, clamped)).sum(2)
        return of_weight, of_scale, None, None


class _Static(torch.autograd.Function):
    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.limit = 2 ** (bits - 1)
        q = quantize_static(x, scale, zero_point, bits)
        return q.add_(zero_point).mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, scale, zero_point = ctx.saved_tensors
        exact = (x.float() / scale).sub_(zero_point)
        clamped = exact.clamp(-ctx.limit, ctx.limit - 1)
        inside = clamped == exact
        of_scale = None
        if ctx.needs_input_grad[1]:
            error = torch.where(inside, torch.round(exact) - exact, clamped + zero_point)
            of_scale = (grad.float() * error).sum()
        return torch.where(inside, grad, 0.0).to(x.dtype), of_scale, None, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, x: Tensor, bits: int
    ) -> Tensor:
        q, scale, zero_point = quantize_rows(x, bits)
        return q.add_(zero_point).mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        return grad, None


class _LearnedScale(torch.autograd.Function):
    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, factor: Tensor, unit: Tensor, balance: float
    ) -> Tensor:
        ctx.save_for_backward(unit)
        ctx.balance = balance
        return unit * factor.float().clamp(min=SMALLEST_FACTOR)

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        (unit,) = ctx.saved_tensors
        return grad * torch.sign(unit) * (ctx.balance / unit.abs().amax()), None, None


def fake_quantize_weight(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, spec: IntSpec
) -> Tensor:
    """Round a weight matrix to integers and back, with a gradient for it and its scales.

    Args:
        weight: ``(out_features, in_features)``.
        scale: ``(out_features, groups)`` float32, of either sign.
        zero_point: int8 of that shape, or None.
        spec: Integer format.

    Example:
        >>> weight = torch.tensor([[0.4, 1.75, 9.0]], requires_grad=True)
        >>> scale = torch.ones(1, 1, requires_grad=True)
        >>> floats = fake_quantize_weight(weight, scale, None, IntSpec(4))
        >>> floats.sum().backward()
        >>> floats.tolist(), weight.grad.tolist(), round(scale.grad.item(), 4)
        ([[0.0, 2.0, 7.0]], [[1.0, 1.0, 0.0]], 6.85)
    """
    return _apply(_Weight, weight, scale, zero_point, spec)


def fake_quantize_static(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Round activations with one scale for all to integers and back.

    Args:
        x: Any shape.
        scale: float32 ``()``, positive.
        zero_point: float32 ``()``, a whole number.
        bits: 2 to 8.

    Example:
        >>> fake_quantize_static(torch.tensor([0.2, 9.0]), torch.tensor(1.0), torch.tensor(3.0), 3)
        tensor([0., 6.])
    """
    return _apply(_Static, x, scale, zero_point, bits)


def fake_quantize_rows(x: Tensor, bits: int) -> Tensor:
    """Round each row of activations to integers with its own scale, and back.

    Nothing is clamped, so the gradient passes as it is.

    Example:
        >>> fake_quantize_rows(torch.tensor([[0.0, 2.9, 6.0]]), bits=3)
        tensor([[0., 3., 6.]])
    """
    return _apply(_Rows, x, bits)


def learned_scale(factor: Tensor, unit: Tensor, count: int, largest: int) -> Tensor:
    """Return ``unit * factor``, with the gradient of a learned scale for the factor.

    The paper learns the scale itself. Optimizers like Adam make steps as large as the learning
    rate, whatever the gradient: that is little for a weight of 0.1, and several times a scale of
    0.0005. So here a parameter near 1 is learned, in units of the scale at the start. Its gradient
    is that of the scale, times the paper's ``1 / sqrt(count * largest)``, over the largest unit: a
    step of SGD changes a single scale exactly as the paper's does, and one of Adam changes any
    scale by about the learning rate, as a share.

    Args:
        factor: The parameter, of the shape of ``unit``.
        unit: Scale at the start, float32.
        count: Values that share a scale.
        largest: Largest integer.

    Example:
        >>> factor = torch.ones(1, requires_grad=True)
        >>> learned_scale(factor, torch.tensor([0.5]), count=4, largest=4).sum().backward()
        >>> factor.grad
        tensor([0.5000])
    """
    return _apply(_LearnedScale, factor, unit, 1 / sqrt(max(count, 1) * largest))


def _apply(function: Any, *arguments: object) -> Tensor:
    return function.apply(*arguments)


def search_range(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Choose the range of activations that leaves the least squared error after rounding.

    The extremes shrunk by steps of 5 % down to a quarter, both by the same share.

    Returns:
        Scale and zero point, float32 ``()``.

    Example:
        >>> search_range(torch.tensor([0.0, 1.0, 2.0, 6.0]), bits=3)
        (tensor(1.), tensor(3.))
    """
    x = x.detach().float().flatten()
    low, high = torch.aminmax(x)
    best, least = range_qparams(low, high, bits), torch.full_like(low, torch.inf)
    for step in range(16):
        share = 1 - step / 20
        scale, zero_point = range_qparams(low * share, high * share, bits)
        q = quantize_static(x, scale, zero_point, bits)
        error = q.add_(zero_point).mul_(scale).sub_(x).square_().sum()
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, scale, best[0]), torch.where(better, zero_point, best[1])
    return best
