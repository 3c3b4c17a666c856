"""The update rules as plain torch: the definition, the oracle of the tests, the path of the CPU.

Each function changes one tensor in place. 16-bit tensors are computed in float32 and rounded once
when stored; all others in their own precision. Complex tensors are pairs of real numbers.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**17  # elements: all tensors of an update fit into the cache


def chunks(*tensors: Tensor | None) -> Iterator[list[Any]]:
    """Cut tensors into flat pieces that stay in the cache from the first operation to the last.

    Args:
        tensors: Of one shape and memory layout, without gaps, or None.

    Yields:
        Views of the same part of each tensor; the tensors themselves if they have gaps or differ in
        layout.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    count, strides = present[0].numel(), present[0].stride()
    dense = torch.empty_like(present[0], device="meta").stride() == strides
    if count <= CHUNK or not dense or any(t.stride() != strides for t in present):
        yield list(tensors)
        return
    flat = [t if t is None else t.as_strided((count,), (1,)) for t in tensors]
    for start in range(0, count, CHUNK):
        yield [t if t is None else t[start : start + CHUNK] for t in flat]


@contextmanager
def _working(*stored: Tensor | None) -> Iterator[list[Any]]:
    """Give real copies of at least float32, and store them at the end."""
    real = [torch.view_as_real(t) if t is not None and t.is_complex() else t for t in stored]
    work = [t if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in real]
    yield work
    for kept, computed in zip(real, work, strict=True):
        if kept is not None and computed is not None and kept is not computed:
            kept.copy_(computed)


def _gradient(grad: Tensor, like: Tensor, scale: float) -> Tensor:
    real = torch.view_as_real(grad) if grad.is_complex() else grad
    return real.to(like.dtype) * scale if scale != 1.0 else real.to(like.dtype)


@torch.no_grad()
def adam_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    ema: Tensor | None = None,
    *,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float = 0.0,
    l2: float = 0.0,
    scale: float = 1.0,
    agreeing: float | None = None,
    ema_weight: float = 0.0,
) -> None:
    """Apply one step of Adam with coupled or decoupled weight decay.

    Args:
        param: The parameter, any shape and memory layout.
        grad: Its gradient, same shape; not changed.
        exp_avg: First moment.
        exp_avg_sq: Second moment.
        max_exp_avg_sq: Largest second moment so far, or None without AMSGrad.
        ema: Average of the parameter over the steps, or None.
        step: Number of this step, from 1.
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the denominator.
        decay: Decoupled weight decay; the parameter shrinks by ``lr * decay``.
        l2: Coupled weight decay; added to the gradient as ``l2 * param``.
        scale: Factor of the gradient, negative to go up.
        agreeing: Mean of the mask of a cautious update, or None for a whole update.
        ema_weight: Weight of the new parameter in the average.

    Reference:
        Diederik Kingma, Jimmy Ba: Adam, 2015, arXiv 1412.6980.
        Ilya Loshchilov, Frank Hutter: Decoupled Weight Decay Regularization, 2019,
        arXiv 1711.05101.
        Kaizhao Liang, Lizhang Chen, Bo Liu, Qiang Liu: Cautious Optimizers, 2024, arXiv 2411.16085.
    """
    with _working(param, exp_avg, exp_avg_sq, max_exp_avg_sq, ema) as (p, m, v, x, e):
        g = _gradient(grad, p, scale)
        if l2 != 0.0:
            g = g.add(p, alpha=l2)
        p.mul_(1 - lr * decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        if x is not None:
            v = torch.maximum(x, v, out=x)
        root = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
        if agreeing is None:
            p.addcdiv_(m, root, value=-lr / (1 - beta1**step))
        else:
            root.mul_(agreeing)
            p.addcdiv_(m * (m * g > 0), root, value=-lr / (1 - beta1**step))
        if e is not None:
            e.lerp_(p, ema_weight)


@torch.no_grad()
def agreement(
    param: Tensor, grad: Tensor, exp_avg: Tensor, *, beta1: float, l2: float, scale: float
) -> Tensor:
    """Count the elements whose new first moment points the way of the gradient.

    Args:
        param: As in ``adam_``, and so on.
        grad: Its gradient.
        exp_avg: First moment before the step.
        beta1: Its decay.
        l2: Coupled weight decay.
        scale: Factor of the gradient.

    Returns:
        Their number and the number of all: ``(2,)``, float64.
    """
    with _working(param, exp_avg) as (p, m):
        g = _gradient(grad, m, scale)
        if l2 != 0.0:
            g = g.add(p, alpha=l2)
        agree = torch.count_nonzero(torch.lerp(m, g, 1 - beta1).mul_(g) > 0)
    return torch.stack([agree, torch.full_like(agree, g.numel())]).double()


@torch.no_grad()
def prodigy_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    ema: Tensor | None,
    s: Tensor,
    p0: Tensor,
    *,
    d: float,
    d0: float,
    lr: float,
    weight: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    l2: float,
    scale: float,
    ema_weight: float = 0.0,
) -> Tensor:
    """Apply one step of Prodigy's Adam with the step size estimate as it is.

    Args:
        param: As in ``adam_``, and so on.
        grad: Its gradient.
        exp_avg: First moment, of the gradients times the estimate.
        exp_avg_sq: Second moment, of the same.
        max_exp_avg_sq: Largest second moment so far, or None.
        ema: Average of the parameter, or None.
        s: Accumulated gradients.
        p0: The parameter before the first step.
        d: Estimate of the distance to the solution.
        d0: First estimate; only scales ``s``.
        lr: Learning rate, a factor of the estimate.
        weight: Weight of the gradient in ``s``: ``lr``, or 1 with warm-up.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment; ``s`` decays by its root.
        eps: Added to the denominator, times ``d``.
        decay: Decoupled weight decay.
        l2: Coupled weight decay.
        scale: Factor of the gradient.
        ema_weight: Weight of the new parameter in the average.

    Returns:
        ``lr`` times <gradient, p0 - param>, and the sum of the absolute values of ``s``: ``(2,)``,
        float64.

    Reference:
        Konstantin Mishchenko, Aaron Defazio: Prodigy: An Expeditiously Adaptive Parameter-Free
        Learner, 2023, arXiv 2306.06101, with the scaling of ``s`` of the authors' program.
    """
    with _working(param, exp_avg, exp_avg_sq, max_exp_avg_sq, ema, s, p0) as work:
        p, m, v, x, e, total, start = work
        g = _gradient(grad, p, scale)
        if l2 != 0.0:
            g = g.add(p, alpha=l2)
        way = torch.dot(g.flatten(), (start - p).flatten()).double() * lr
        if lr != 0.0:  # a frozen group has no part in the estimate
            total.mul_(math.sqrt(beta2)).add_(g, alpha=weight * d * d / d0)
        p.mul_(1 - lr * d * decay)
        m.mul_(beta1).add_(g, alpha=(1 - beta1) * d)
        v.mul_(beta2).addcmul_(g, g, value=(1 - beta2) * d * d)
        if x is not None:
            v = torch.maximum(x, v, out=x)
        p.addcdiv_(m, v.sqrt().add_(eps * d), value=-lr * d)
        if e is not None:
            e.lerp_(p, ema_weight)
        size = torch.linalg.vector_norm(total, 1).double() * (lr != 0.0)
    return torch.stack([way, size])


@torch.no_grad()
def lion_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    decay: float = 0.0,
    scale: float = 1.0,
) -> None:
    """Apply one step of Lion.

    Args:
        param: The parameter, any shape and memory layout.
        grad: Its gradient, same shape; not changed.
        exp_avg: Momentum.
        lr: Learning rate, the size of the step of each element.
        beta1: Weight of the momentum in the direction.
        beta2: Decay of the momentum.
        decay: Decoupled weight decay.
        scale: Factor of the gradient, negative to go up.

    Reference:
        Xiangning Chen et al.: Symbolic Discovery of Optimization Algorithms, 2023,
        arXiv 2302.06675.
    """
    with _working(param, exp_avg) as (p, m):
        g = _gradient(grad, p, scale)
        c = torch.lerp(m, g, 1 - beta1)
        direction = c.sign().masked_fill_(c.isnan(), math.nan)  # torch's sign of NaN is 0
        p.mul_(1 - lr * decay).add_(direction, alpha=-lr)
        m.lerp_(g, 1 - beta2)


@torch.no_grad()
def sgd_(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    step: float,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    l2: float = 0.0,
    nesterov: bool = False,
    scale: float = 1.0,
) -> None:
    """Apply one step of SGD as torch defines it.

    Args:
        param: The parameter, any shape and memory layout.
        grad: Its gradient, same shape; not changed.
        momentum_buffer: Momentum, zero before the first step; None without momentum.
        step: Number of this step, from 1; the first is not dampened.
        lr: Learning rate.
        momentum: Decay of the momentum.
        dampening: Part of the gradient that does not enter the momentum.
        l2: Coupled weight decay.
        nesterov: Look ahead along the momentum.
        scale: Factor of the gradient, negative to go up.

    Reference:
        Ilya Sutskever et al.: On the importance of initialization and momentum in deep learning,
        2013.
    """
    with _working(param, momentum_buffer) as (p, m):
        g = _gradient(grad, p, scale)
        if l2 != 0.0:
            g = g.add(p, alpha=l2)
        if m is not None:
            m.mul_(momentum).add_(g, alpha=1.0 if step == 1.0 else 1.0 - dampening)
            g = g.add(m, alpha=momentum) if nesterov else m
        p.add_(g, alpha=-lr)


@torch.no_grad()
def lamb_moments_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    bias1: float,
    bias2: float,
    beta1: float,
    beta2: float,
    weight: float,
    eps: float,
    decay: float,
    scale: float = 1.0,
) -> Tensor:
    """Take the first half of a step of LAMB: the moments, and the two norms.

    Args:
        param: The parameter, any shape and memory layout; not changed.
        grad: Its gradient, same shape; not changed.
        exp_avg: First moment.
        exp_avg_sq: Second moment.
        bias1: Bias correction of the first moment.
        bias2: Bias correction of the second moment.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        weight: Weight of the gradient in the first moment.
        eps: Added to the denominator.
        decay: Weight decay, a part of the update.
        scale: Factor of the gradient, negative to go up.

    Returns:
        Squared norms of the parameter and of its update before the trust ratio: ``(2,)``, float64.
    """
    with _working(exp_avg, exp_avg_sq) as (m, v):
        g = _gradient(grad, m, scale)
        m.mul_(beta1).add_(g, alpha=weight)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    with _working(param, exp_avg, exp_avg_sq) as (p, m, v):
        u = (p * decay).addcdiv_(m, _lamb_root(v, bias2, eps), value=1.0 / bias1)
        return torch.stack([square_norm(p), square_norm(u)])


def square_norm(tensor: Tensor) -> Tensor:
    """Sum of the squares of a real tensor, 0-d, in float64; elements are multiplied as they are."""
    flat = tensor.flatten()
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return torch.dot(flat, flat).double()


@torch.no_grad()
def lamb_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    bias1: float,
    bias2: float,
    lr: float,
    trust: float,
    eps: float,
    decay: float,
) -> None:
    """Take the second half of a step of LAMB.

    Args:
        param: As in ``lamb_moments_``, and so on.
        exp_avg: First moment after this step.
        exp_avg_sq: Second moment after this step.
        bias1: Bias correction of the first moment.
        bias2: Bias correction of the second moment.
        lr: Learning rate.
        trust: Ratio of the norms of the parameter and of its update.
        eps: Added to the denominator.
        decay: Weight decay, a part of the update.

    Reference:
        Yang You et al.: Large Batch Optimization for Deep Learning: Training BERT in 76 minutes,
        2020, arXiv 1904.00962.
    """
    with _working(param, exp_avg, exp_avg_sq) as (p, m, v):
        p.mul_(1.0 - lr * trust * decay)
        p.addcdiv_(m, _lamb_root(v, bias2, eps), value=-lr * trust / bias1)


def _lamb_root(v: Tensor, bias2: float, eps: float) -> Tensor:
    return v.sqrt().mul_(1.0 / math.sqrt(bias2)).add_(eps)
