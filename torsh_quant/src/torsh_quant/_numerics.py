"""The arithmetic of quantization in plain torch: what every kernel must reproduce.

Weights are matrices ``(out_features, in_features)``; a convolution's kernel is flattened into the
second dimension. Integers are int8, two 4-bit ones to a byte where ``packed``; scales are float32
``(out_features, groups)``; a zero point is int8 of the same shape, or None.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torsh_quant._spec import IntSpec


@dataclass(frozen=True)
class ConvShape:
    """Where a convolution's window goes: one figure for each side, and the groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


TINY = torch.finfo(torch.float32).tiny
ROUNDER = 1.5 * 2**23


def weight_qparams(weight: Tensor, spec: IntSpec, group_size: int) -> tuple[Tensor, Tensor | None]:
    """Choose scales and zero points, from the weights alone.

    Above 4 bits by the extremes of each group. At 4 bits and below, the range is searched for the
    least squared error: ends clipped or widened by steps of 5 %, and for symmetric formats with
    the extreme on either side, so that it may use the one more integer below zero. A scale is
    then negative where the extreme is positive.

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
        >>> weight_qparams(torch.tensor([[-7.0, 3.0, 8.0]]), IntSpec(4), group_size=3)
        (tensor([[-1.]]), None)
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    shape = groups.shape[:2]
    if spec.group == "tensor":
        groups = groups.reshape(1, 1, -1)
    if spec.bits > 4:
        scale, zero_point = _from_range(groups.amin(2), groups.amax(2), spec)
    else:
        scale, zero_point = _searched(groups, spec)
    scale = scale.expand(shape).contiguous()
    return scale, None if zero_point is None else zero_point.expand(shape).contiguous()


def _from_range(low: Tensor, high: Tensor, spec: IntSpec) -> tuple[Tensor, Tensor | None]:
    low, high = low.clamp(max=0), high.clamp(min=0)
    if spec.symmetric:
        extreme = torch.maximum(-low, high)
        return torch.where(extreme > 0, (extreme / spec.qmax).clamp(min=TINY), 1.0), None
    levels = spec.qmax - spec.qmin
    span = high / levels - low / levels
    scale = torch.where(span > 0, span.clamp(min=TINY), 1.0)
    zero_point = (spec.qmin - torch.round(low / scale)).clamp(spec.qmin, spec.qmax)
    return scale, zero_point.to(torch.int8)


def _searched(groups: Tensor, spec: IntSpec) -> tuple[Tensor, Tensor | None]:
    low, high = groups.amin(2), groups.amax(2)
    candidates: list[tuple[Tensor, Tensor | None]] = []
    if spec.symmetric:
        extreme = torch.where(-low > high, low, high) / spec.qmin
        for ratio in (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15):
            step = extreme * ratio
            step = torch.where(step.abs() > TINY, step, 1.0)
            candidates += [(step, None), (-step, None)]
    else:
        candidates = [
            _from_range(low * shrink, high * other, spec)
            for shrink in (1.0, 0.95, 0.9, 0.85, 0.8)
            for other in (1.0, 0.95, 0.9, 0.85, 0.8)
        ]
    least = torch.full_like(low, torch.inf)
    scale, zero_point = candidates[0]
    for step, offset in candidates:
        shift = 0.0 if offset is None else offset[..., None].float()
        q = torch.round(groups / step[..., None]).add_(shift).clamp_(spec.qmin, spec.qmax)
        error = q.sub_(shift).mul_(step[..., None]).sub_(groups).square_().sum(2)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, step, scale)
        if zero_point is not None and offset is not None:
            zero_point = torch.where(better, offset, zero_point)
    return scale, zero_point


def quantize_weight(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, spec: IntSpec
) -> Tensor:
    """Round a float weight to int8 of its own shape, half to even.

    Example:
        >>> quantize_weight(torch.tensor([[1.0, 2.5, -9.0]]), torch.ones(1, 1), None, IntSpec(4))
        tensor([[ 1,  2, -8]], dtype=torch.int8)
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


def row_qparams(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Choose a scale and a zero point for each row.

    The range from the smallest to the largest value, zero included, is ``2 * qmax`` steps long,
    with ``qmax = 2**(bits-1) - 1``. The zero point is rounded up, so that the largest value never
    rounds beyond ``qmax``; the smallest one then needs ``-qmax`` or ``-qmax - 1``, which
    ``bits`` bits hold. Zero is always met exactly, so padding with it is exact too.

    Args:
        x: ``(rows, ...)`` float32.
        bits: 2 to 8.

    Returns:
        Scale and zero point, float32 ``(rows, 1, ...)``. A row with NaN or infinity gets a scale
        that is not finite, so that its outputs are NaN and no others.

    Example:
        >>> row_qparams(torch.tensor([[0.0, 3.0, 6.0], [-2.0, 1.0, 4.0]]), bits=3)
        (tensor([[1.], [1.]]), tensor([[3.], [1.]]))
    """
    dims = tuple(range(1, x.ndim))
    return range_qparams(x.amin(dims, keepdim=True), x.amax(dims, keepdim=True), bits)


def range_qparams(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Choose scales and zero points for ranges, as :func:`row_qparams` does.

    Args:
        low: Lower ends, float32 of any shape; above 0 they count as 0.
        high: Upper ends, of the same shape; below 0 they count as 0.
        bits: 2 to 8.

    Returns:
        Scale and zero point, float32 of that shape.

    Example:
        >>> range_qparams(torch.tensor(-2.0), torch.tensor(4.0), bits=3)
        (tensor(1.), tensor(1.))
    """
    qmax = 2 ** (bits - 1) - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high / (2 * qmax) - low / (2 * qmax)).clamp_(min=TINY)
    return scale, torch.ceil(high / scale).sub_(qmax)


def narrowed(scale: Tensor, zero_point: Tensor, bits: int, fewer: int) -> tuple[Tensor, Tensor]:
    """Rewrite the scale and zero point of a range for fewer bits.

    Example:
        >>> narrowed(torch.tensor(1.0), torch.tensor(127.0), bits=8, fewer=7)[1]
        tensor(63.)
    """
    if bits == fewer:
        return scale, zero_point
    qmax = 2 ** (bits - 1) - 1
    return range_qparams((zero_point - qmax) * scale, (zero_point + qmax) * scale, fewer)


def quantize_static(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Round to integers with one scale for all, values out of its range to the nearest end.

    Args:
        x: Any shape.
        scale: float32 ``()``.
        zero_point: float32 ``()``, a whole number.
        bits: 2 to 8.

    Returns:
        Integer-valued float32 of the shape of ``x``: ``round(x / scale - zero_point)``, half to
        even, from ``-2**(bits-1)`` to ``2**(bits-1) - 1``.

    Example:
        >>> quantize_static(torch.tensor([-9.0, 0.0, 2.5]), torch.tensor(1.0), torch.tensor(1.0), 3)
        tensor([-4., -1.,  2.])
    """
    limit = 2 ** (bits - 1)
    q = (x.float() / scale).sub_(zero_point).clamp_(-limit, limit - 1)
    return q.add_(ROUNDER).sub_(ROUNDER)


def quantize_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round each row to integers with its own scale and zero point.

    ``q = round(x / scale - zero_point)``, half to even, from ``-2**(bits-1)`` to
    ``2**(bits-1) - 1``.

    Args:
        x: ``(rows, ...)``.
        bits: 2 to 8.

    Returns:
        Integer-valued float32 of the shape of ``x``; scale and zero point as of
        :func:`row_qparams`.

    Example:
        >>> quantize_rows(torch.tensor([[0.0, 3.0, 6.0], [-2.0, 1.0, 4.0]]), bits=3)[0]
        tensor([[-3.,  0.,  3.], [-3.,  0.,  3.]])
    """
    x = x.float()
    scale, zero_point = row_qparams(x, bits)
    return (x / scale).add_(ROUNDER - zero_point).sub_(ROUNDER), scale, zero_point


def low_bytes(
    x: Tensor, scale: Tensor, shift: Tensor, out: Tensor, bits: int | None = None
) -> None:
    """Write ``round(x / scale + shift)`` to a uint8 tensor, in three passes.

    A float32 between 2**23 and 2**24 has no bits for fractions: adding one rounds, half to even,
    and leaves the integer in the low bits, where a conversion picks up one byte.

    Args:
        x: Any shape.
        scale: Broadcasts to it.
        shift: Whole numbers; broadcasts to it.
        out: uint8 of the shape of ``x``.
        bits: Clamp to what so many bits hold; None where nothing can be beyond.

    Example:
        >>> out = torch.empty(3, dtype=torch.uint8)
        >>> low_bytes(torch.tensor([-3.0, 1.0, 5.0]), torch.tensor(2.0), torch.tensor(128.0), out)
        >>> out.tolist()
        [126, 128, 130]
    """
    sums = (x / scale).add_(shift + ROUNDER)
    if bits is not None:
        sums.clamp_(ROUNDER, ROUNDER + 2**bits - 1)
    out.copy_(sums.view(torch.int32))


def exact_linear(q: Tensor, weight: Tensor) -> Tensor:
    """Multiply integer matrices exactly: ``q @ weight.T``.

    Through float64, which holds every sum of up to 2**39 such products exactly and has fast
    kernels everywhere; a rounding to integers takes care of kernels that are not exact.

    Example:
        >>> exact_linear(torch.tensor([[127.0, -127.0]]), torch.tensor([[127, -128]]))
        tensor([[32385.]], dtype=torch.float64)
    """
    return torch.round(q.double() @ weight.double().T)


def exact_convolution(q: Tensor, weight: Tensor, shape: ConvShape) -> Tensor:
    """Convolve integers exactly, through float64 as :func:`exact_linear` does."""
    run = F.conv2d if q.ndim == 4 else F.conv3d
    window = (shape.stride, shape.padding, shape.dilation, shape.groups)
    return torch.round(run(q.double(), weight.double(), None, *window))
