"""Linear maps with quantized weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torsh_quant import _cpu
from torsh_quant._cpu import activation_bits, channel_sums, plain_integers
from torsh_quant._numerics import (
    dequantize_weight,
    exact_linear,
    narrowed,
    quantize_rows,
    quantize_static,
    stored_integers,
)

_BLOCK = 2**20  # weights turned to floats at a time on CPUs: what stays in the caches


def int_mm_takes(weight_shape: Sequence[int]) -> bool:
    """Whether ``torch._int_mm`` takes a weight ``(out_features, in_features)`` on CUDA."""
    return weight_shape[0] % 8 == 0 and weight_shape[1] % 8 == 0


def _integer_linear_elsewhere(q: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    integers, channel = plain_integers(weight, scale, q.shape[1])
    if q.is_cuda and int_mm_takes(integers.shape):
        rows = max(0, 32 - q.shape[0])  # it wants more than 16
        sums = torch._int_mm(F.pad(q, (0, 0, 0, rows)).to(torch.int8), integers.T)[: q.shape[0]]
    else:
        sums = exact_linear(q, integers)
    return sums.float().mul_(channel)


def _float_linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    in_features = x.shape[-1]

    def floats(rows: slice) -> Tensor:
        q = stored_integers(weight[rows], in_features, scale.shape[1])
        offset = None if zero_point is None else zero_point[rows]
        return dequantize_weight(q, scale[rows], offset).to(x.dtype)

    bias = None if bias is None else bias.to(x.dtype)
    block = max(64, _BLOCK // max(in_features, 1))
    if x.device.type != "cpu" or len(weight) <= block:
        return F.linear(x, floats(slice(None)), bias).to(x.dtype)  # autocast may have narrowed it
    out = x.new_empty((*x.shape[:-1], len(weight)))
    for start in range(0, len(weight), block):
        rows = slice(start, start + block)
        out[..., rows] = F.linear(x, floats(rows), None if bias is None else bias[rows])
    return out


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    act_bits: int,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
) -> Tensor:
    """Apply a quantized weight to ``x`` ``(..., in_features)``; see :class:`QuantLinear`."""
    if not act_bits:
        return _float_linear(x, weight, scale, zero_point, bias)
    rows = x.reshape(-1, x.shape[-1])
    shape = (*x.shape[:-1], len(weight))
    if not rows.shape[0]:
        return x.new_empty(shape)
    bits = activation_bits(act_bits, x.device, "linear")
    if act_scale is None or act_zero_point is None:
        q, row_scale, row_zero = quantize_rows(rows, bits)
    else:
        row_scale, row_zero = narrowed(act_scale, act_zero_point, act_bits, bits)
        q = quantize_static(rows, row_scale, row_zero, bits)
    if x.device.type == "cpu":
        out = _cpu.linear(q, weight, scale, bits)
    else:
        out = _integer_linear_elsewhere(q, weight, scale)
    out.addcmul_(row_zero, channel_sums(weight, scale, x.shape[-1]))
    out = out.mul_(row_scale) if bias is None else torch.addcmul(bias, out, row_scale, out=out)
    return out.view(shape).to(x.dtype)
