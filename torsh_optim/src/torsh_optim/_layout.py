"""Whether tensors still are laid out as they were."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    # One C call for all tensors, about 50 ns each; the loop below takes several times as long.
    from torch._C._dynamo import guards as _guards

    _TensorGuards: Any = _guards.TensorGuards
except (ImportError, AttributeError):  # not a public name
    _TensorGuards = None


class Layout:
    """Type, element type, device, shape and strides of some tensors.

    Args:
        tensors: The tensors; they are not kept.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._known = list(map(_describe, tensors))
        self._guards: Any = None
        if _TensorGuards is not None and tensors:
            self._guards = _TensorGuards(
                *tensors,
                dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
                dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
            )

    def matches(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether these tensors are laid out in the same way; None is not."""
        if self._guards is not None and self._guards.check(*tensors):
            return True
        # also asked where the guards say no, for they look at more: requires_grad, autocast
        return len(tensors) == len(self._known) and all(
            tensor is not None and _describe(tensor) == known
            for tensor, known in zip(tensors, self._known, strict=True)
        )


def _describe(tensor: Tensor) -> tuple[Any, ...]:
    strided = tensor.layout is torch.strided
    return (
        type(tensor),
        tensor.dtype,
        tensor.device,
        tensor.shape,
        tensor.stride() if strided else None,
        tensor.is_neg(),
        tensor.is_conj(),
    )
