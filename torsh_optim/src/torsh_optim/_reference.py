"""The update rules as plain torch loops: the definition, the oracle of the tests, the fallback."""

import math

import torch
from torch import Tensor


@torch.no_grad()
def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    *,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
) -> None:
    """Apply one AdamW step to one tensor, in place.

    16-bit tensors are computed in float32 and rounded once when stored; all others in their own
    precision. Complex tensors are treated as pairs of real numbers.

    Args:
        param: The parameter, any shape and memory layout.
        grad: Its gradient, same shape; not changed.
        exp_avg: First moment.
        exp_avg_sq: Second moment.
        max_exp_avg_sq: Largest second moment so far, or None without AMSGrad.
        step: Number of this step, from 1.
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay; the parameter shrinks by ``lr * weight_decay``.
        maximize: Go up the gradient instead of down.

    Reference:
        Loshchilov, Hutter: Decoupled Weight Decay Regularization, 2019, arXiv 1711.05101.
    """
    stored = [t for t in (param, exp_avg, exp_avg_sq, max_exp_avg_sq) if t is not None]
    if param.is_complex():
        stored = [torch.view_as_real(t) for t in stored]
        grad = torch.view_as_real(grad)
    dtype = torch.promote_types(stored[0].dtype, torch.float32)
    work = [t.to(dtype) for t in stored]
    p, m, v = work[:3]
    g = grad.to(dtype)
    if maximize:
        g = -g

    p.mul_(1 - lr * weight_decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    if max_exp_avg_sq is not None:
        v = torch.maximum(work[3], v, out=work[3])
    denominator = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    p.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))

    for kept, computed in zip(stored, work, strict=True):
        if kept is not computed:
            kept.copy_(computed)
