"""The weighted sum of what the options computed: the one arithmetic step of a mixed forward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def mix_reference(outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Sum ``weights[k] * outputs[k]`` as autograd would do it; the oracle of :func:`mix`."""
    total = outputs[0] * weights[0]
    for output, weight in zip(outputs[1:], weights[1:], strict=True):
        total = total + output * weight
    return total


def mix(outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Sum ``weights[k] * outputs[k]`` in one pass, with one dot product per weight backwards.

    The plain form writes a product and a running sum per option and, in the backward pass, a
    full-size product per weight before reducing it. This one keeps a single accumulator and gets
    the gradient of each weight as ``dot(grad, output)``. Twice differentiable.

    Args:
        outputs: Tensors of one shape; the result has their promoted dtype.
        weights: As many scalars, each of shape ``()``.
    """
    return _Mix.apply(len(weights), *weights, *outputs)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, count: int, *tensors: Tensor
    ) -> Tensor:
        weights, outputs = tensors[:count], tensors[count:]
        ctx.save_for_backward(*tensors)
        ctx.count = count
        # Under autocast a convolution gives bfloat16 and a pooling float32.
        dtype = outputs[0].dtype
        for output in outputs[1:]:
            dtype = torch.promote_types(dtype, output.dtype)
        total = outputs[0].to(dtype) * weights[0].to(dtype)
        for weight, output in zip(weights[1:], outputs[1:], strict=True):
            total.addcmul_(output.to(dtype), weight.to(dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        count: int = ctx.count
        weights, outputs = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        needed = ctx.needs_input_grad[1:]
        flat = grad.reshape(-1) if any(needed[:count]) else grad
        to_weights = [
            torch.dot(flat, output.to(grad.dtype).reshape(-1)).to(weight.dtype) if wanted else None
            for weight, output, wanted in zip(weights, outputs, needed[:count], strict=True)
        ]
        to_outputs = [
            (grad * weight.to(grad.dtype)).to(output.dtype) if wanted else None
            for weight, output, wanted in zip(weights, outputs, needed[count:], strict=True)
        ]
        return None, *to_weights, *to_outputs
