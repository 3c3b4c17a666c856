"""What a rounding method gives back, and the plainest of them."""

from dataclasses import dataclass

from torch import Tensor

from torsh_quant._numerics import dequantize_weight, quantize_weight, weight_qparams
from torsh_quant._spec import IntSpec


@dataclass(frozen=True)
class Rounded:
    """The integers of a weight, with what makes floats of them again.

    Args:
        q: int8 ``(out_features, in_features)``.
        scale: float32 ``(out_features, groups)``.
        zero_point: int8 of the shape of ``scale``; None for symmetric formats.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None = None

    def floats(self) -> Tensor:
        """Return the float32 weight that the integers stand for."""
        return dequantize_weight(self.q, self.scale, self.zero_point)


def round_to_nearest(weight: Tensor, spec: IntSpec, group_size: int) -> Rounded:
    """Round each weight by itself, with the scales of :func:`weight_qparams`.

    Args:
        weight: ``(out_features, in_features)``, finite.
        spec: Integer format.
        group_size: Divides ``in_features``.

    Example:
        >>> import torch
        >>> round_to_nearest(torch.tensor([[-1.0, 0.6, 127.0]]), IntSpec(8), group_size=3).q
        tensor([[ -1,   1, 127]], dtype=torch.int8)
    """
    matrix = weight.detach()
    scale, zero_point = weight_qparams(matrix, spec, group_size)
    return Rounded(quantize_weight(matrix, scale, zero_point, spec), scale, zero_point)
