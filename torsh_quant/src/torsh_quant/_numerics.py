"""The arithmetic of quantization in plain torch: what every kernel must reproduce.

Weights are matrices ``(out_features, in_features)``; a convolution's kernel is flattened into the
second dimension. Integers are int8, two 4-bit ones to a byte where ``packed``; scales are float32
``(out_features, groups)``; a zero point is int8 of the same shape, or None.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from torsh_quant._spec import IntSpec

TINY = torch.finfo(torch.float32).tiny


def weight_qparams(weight: Tensor, spec: IntSpec, group_size: int) -> tuple[Tensor, Tensor | None]:
    """Choose scales and zero points by the extremes of each group (round to nearest).

    Args:
        weight: ``(out_features, in_features)``, finite.
        spec: Integer format. With ``group="tensor"`` all groups get the same scale.
        group_size: Divides ``in_features``.

    Returns:
        Scale ``(out_features, groups)`` float32, and the zero point or None.

    Example:
        >>> weight = torch.tensor([[-1.0, 0.5, 127.0, 0.0]])
        >>> weight_qparams(weight, IntSpec(8), group_size=4)
        (tensor([[1.]]), None)
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    low, high = groups.amin(2), groups.amax(2)
    if spec.group == "tensor":
        low, high = low.amin().expand_as(low), high.amax().expand_as(high)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if spec.symmetric:
        extreme = torch.maximum(-low, high)
        scale = torch.where(extreme > 0, (extreme / spec.qmax).clamp(min=TINY), 1.0)
        return scale.contiguous(), None
    span = high / (spec.qmax - spec.qmin) - low / (spec.qmax - spec.qmin)
    scale = torch.where(span > 0, span.clamp(min=TINY), 1.0)
    zero_point = (spec.qmin - torch.round(low / scale)).clamp(spec.qmin, spec.qmax)
    return scale.contiguous(), zero_point.to(torch.int8).contiguous()


def quantize_weight(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, spec: IntSpec
) -> Tensor:
    """Round a float weight to int8 of its own shape, half to even.

    Example:
        >>> quantize_weight(torch.tensor([[1.0, 2.5, -9.0]]), torch.ones(1, 1), None, IntSpec(4))
        tensor([[ 1,  2, -7]], dtype=torch.int8)
    """
    groups = weight.float().unflatten(1, (scale.shape[1], -1))
    q = torch.round(groups / scale[..., None])
    if zero_point is not None:
        q += zero_point[..., None]
    return q.clamp_(spec.qmin, spec.qmax).to(torch.int8).flatten(1)


def dequantize_weight(q: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Return the float32 weight that the integers stand for.

    Example:
        >>> dequantize_weight(torch.tensor([[3, -4]], dtype=torch.int8), torch.tensor([[0.5]]))
        tensor([[ 1.5000, -2.0000]])
    """
    groups = q.to(torch.float32).unflatten(1, (scale.shape[1], -1))
    if zero_point is not None:
        groups -= zero_point[..., None]
    return groups.mul_(scale[..., None]).flatten(1)


def packed_width(in_features: int, group_size: int) -> int:
    """Return how many bytes hold one row of 4-bit integers."""
    return in_features // group_size * ((group_size + 1) // 2)


def pack_int4(q: Tensor, group_size: int) -> Tensor:
    """Store integers from -8 to 7 two to a byte.

    Within a group of ``g`` the byte ``i`` holds element ``i`` in its low half and element
    ``i + ceil(g / 2)`` in its high half, so that unpacking writes two contiguous runs and a
    group never shares a byte with another. An odd group ends with an unused half byte of zero.

    Args:
        q: int8 ``(out_features, in_features)``.
        group_size: Divides ``in_features``.

    Returns:
        uint8 ``(out_features, groups * ceil(group_size / 2))``.

    Example:
        >>> q = torch.tensor([[1, 2, 3, -1]], dtype=torch.int8)
        >>> [hex(byte) for byte in pack_int4(q, group_size=4)[0].tolist()]
        ['0x31', '0xf2']
    """
    groups = q.view(torch.uint8).unflatten(1, (-1, group_size))
    if group_size % 2:
        groups = F.pad(groups, (0, 1))
    low, high = groups.chunk(2, dim=2)
    return ((low & 15) | (high << 4)).flatten(1).contiguous()


def unpack_int4(packed: Tensor, in_features: int, group_size: int) -> Tensor:
    """Undo :func:`pack_int4`.

    Example:
        >>> unpack_int4(torch.tensor([[0x31, 0xF2]], dtype=torch.uint8), 4, 4)
        tensor([[ 1,  2,  3, -1]], dtype=torch.int8)
    """
    half = (group_size + 1) // 2
    pairs = packed.view(torch.int8).unflatten(1, (in_features // group_size, half))
    out = torch.empty(
        (packed.shape[0], in_features // group_size, group_size),
        dtype=torch.int8,
        device=packed.device,
    )
    out[..., :half] = (pairs << 4) >> 4  # the second shift is arithmetic and brings the sign back
    out[..., half:] = (pairs >> 4)[..., : group_size - half]
    return out.flatten(1)


def stored_integers(weight: Tensor, in_features: int, groups: int) -> Tensor:
    """Return the int8 matrix behind a weight buffer, packed (uint8) or not (int8)."""
    if weight.dtype == torch.uint8:
        return unpack_int4(weight, in_features, in_features // groups)
    return weight


def fold_groups(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Rewrite group scales as 8-bit integers under one scale per channel.

    Integer kernels sum over the whole of ``in_features``, so a scale cannot change on the way.
    Each group is multiplied by its share of the channel's largest scale and rounded anew; with
    one group nothing changes. The extra error is below half a step of 8 bits.

    Args:
        q: int8 ``(out_features, in_features)``, symmetric.
        scale: ``(out_features, groups)``.

    Returns:
        int8 weight of the same shape, and float32 scale ``(out_features,)``.

    Example:
        >>> q = torch.tensor([[7, -7, 7, 1]], dtype=torch.int8)
        >>> fold_groups(q, torch.tensor([[2.0, 1.0]]))[0]
        tensor([[ 127, -127,   64,    9]], dtype=torch.int8)
    """
    if scale.shape[1] == 1:
        return q, scale[:, 0].contiguous()
    real = q.float().unflatten(1, (scale.shape[1], -1)) * scale[..., None]
    extreme = real.abs().amax((1, 2), keepdim=True)
    step = torch.where(extreme > 0, (extreme / 127).clamp(min=TINY), 1.0)
    folded = torch.round(real / step).clamp_(-127, 127).to(torch.int8)
    return folded.flatten(1), step[:, 0, 0].contiguous()


def activation_scale(extreme: Tensor, bits: int) -> Tensor:
    """Return the scale that maps ``extreme`` to the largest integer; never zero.

    Example:
        >>> activation_scale(torch.tensor([254.0, 0.0]), bits=8)
        tensor([2.0000e+00, 1.1755e-38])
    """
    return (extreme / (2 ** (bits - 1) - 1)).clamp_(min=TINY)


def quantize_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round each row to integers, half to even, with its own symmetric scale.

    Returns:
        Integer-valued float32 of the shape of ``x``, and the scale ``(rows, 1, ...)``. A row with
        NaN or infinity gets a scale that is not finite, so its outputs are NaN and no others.

    Example:
        >>> quantize_rows(torch.tensor([[-2.0, 1.0, 0.4]]), bits=3)
        (tensor([[-3.,  2.,  1.]]), tensor([[0.6667]]))
    """
    dims = tuple(range(1, x.ndim))
    x = x.float()
    if x.numel():
        extreme = torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True))
    else:
        extreme = x.new_zeros((x.shape[0],) + (1,) * len(dims))
    scale = activation_scale(extreme, bits)
    return (x / scale).round_(), scale


def exact_linear(q: Tensor, weight: Tensor) -> Tensor:
    """Multiply integer matrices exactly: ``q @ weight.T``.

    Through float64, which holds every sum of up to 2**39 such products exactly and has fast
    kernels everywhere; a rounding to integers takes care of kernels that are not exact.

    Example:
        >>> exact_linear(torch.tensor([[127.0, -127.0]]), torch.tensor([[127, -128]]))
        tensor([[32385.]], dtype=torch.float64)
    """
    return torch.round(q.double() @ weight.double().T)


def exact_conv2d(
    q: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Convolve integers exactly, through float64 as :func:`exact_linear` does."""
    out = F.conv2d(q.double(), weight.double(), None, stride, padding, dilation, groups)
    return torch.round(out)
