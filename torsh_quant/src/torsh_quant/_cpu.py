"""Integer products on CPUs: which of torch's kernels is exact here, and how to call it.

torch has two sets of int8 kernels for x86. Without VNNI both multiply through an instruction that
adds two products in 16 bits and silently clips the sum. Whether that happens depends on the CPU
and on what the environment lets each library use, so a kernel is not trusted by the CPU's name:
it multiplies the largest integers once, and is used as wide as that product came out right.
"""

import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from typing import Any, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from torsh_quant._numerics import (
    ConvShape,
    exact_convolution,
    exact_linear,
    fold_groups,
    stored_integers,
)

Packed = Any  # a ScriptObject of torch's own, or a Tensor in oneDNN's layout
Unary = tuple[str, list[float]]  # an activation as oneDNN names it, and its figures
Output = tuple[float, int, torch.dtype]  # scale and zero point where bytes come out
Sum = tuple[Tensor, float, int]  # what is added (and written over), its scale and zero point
_NO_UNARY: Unary = ("none", [])
_FLOATS: Output = (1.0, 0, torch.float32)
_KEPT_SIZES = 2  # of inputs of a convolution, for each of which its weight is packed


@dataclass(frozen=True)
class IntegerKernel:
    """One way to multiply integers on this CPU.

    Args:
        name: What :func:`explain` calls it.
        act_bits: Widest symmetric activations for which its sums are exact here.
        fast: Whether it is an integer kernel rather than exact float64 arithmetic.
    """

    name: str
    act_bits: int
    fast: bool = True


FLOAT64 = IntegerKernel("float64, exact but slow", 8, fast=False)

_prepacking = threading.Lock()
_packs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class _Entry:
    state: tuple[int, ...]
    scale: ReferenceType[Tensor]
    packed: Packed


def _state(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(figure for t in tensors for figure in (t._version, t.data_ptr()))


def remembered(
    weight: Tensor, scale: Tensor, name: Hashable, build: Callable[[], Packed]
) -> Packed:
    """Return what ``build()`` makes of these two tensors, kept until one of them changes.

    Kept beside the tensors rather than in the module: the module's state stays plain tensors, and
    copying and moving it need nothing special. A change is a new version or another storage.
    Inference tensors have no version, so nothing is kept for them; writing through ``.data``
    leaves the version as it is, and needs :func:`forget`.

    Args:
        weight: The result lives as long as it; so ``build()`` must not return it or a view of it.
        scale: The other tensor that the result depends on.
        name: Tells the results of one weight apart.
        build: Makes the result.
    """
    if weight.is_inference() or scale.is_inference():
        return build()
    entries: dict[Hashable, _Entry] = _packs.setdefault(weight, {})
    state = _state(weight, scale)
    entry = entries.get(name)
    if entry is None or entry.state != state or entry.scale() is not scale:
        entry = _Entry(state, ref(scale), build())
        entries[name] = entry
    return entry.packed


def forget(weight: Tensor) -> None:
    """Drop all that is kept for a weight."""
    _packs.pop(weight, None)


def folded(weight: Tensor, scale: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """Return the int8 weight and channel scale that the integer kernels multiply with."""
    return fold_groups(stored_integers(weight, in_features, scale.shape[1]), scale)


def plain_integers(weight: Tensor, scale: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """Return what :func:`folded` does, kept where it is not the weight itself."""
    if weight.dtype == torch.int8 and scale.shape[1] == 1:
        return folded(weight, scale, in_features)
    build = partial(folded, weight, scale, in_features)
    return cast("tuple[Tensor, Tensor]", remembered(weight, scale, "integers", build))


def channel_sums(weight: Tensor, scale: Tensor, in_features: int) -> Tensor:
    """Return each channel's sum of integers times its scale: what a zero point is worth."""

    def build() -> Tensor:
        integers, channel = folded(weight, scale, in_features)
        return integers.sum(1, dtype=torch.int32).float().mul_(channel)

    return cast("Tensor", remembered(weight, scale, "sums", build))


def _pack_fbgemm(weight: Tensor, scale: Tensor) -> Packed:
    with _prepacking, warnings.catch_warnings():
        # torch offers no other way to FBGEMM's packed form than a qint8 tensor.
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", module=__name__)
        backends = cast("Any", torch.backends.quantized)
        engine = backends.engine
        if engine not in ("fbgemm", "x86"):
            backends.engine = "fbgemm"
        try:
            zeros = torch.zeros(len(scale), dtype=torch.long)
            quantized = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
            return torch.ops.quantized.linear_prepack(quantized, None)
        finally:
            if backends.engine != engine:
                backends.engine = engine


def _linear_fbgemm(q: Tensor, zero_point: int, packed: Packed) -> Tensor:
    run = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    return cast("Tensor", run(q, 1.0, zero_point, packed))


def _pack_onednn(weight: Tensor, scale: Tensor) -> Packed:
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    return packed, scale, torch.zeros(len(scale), dtype=torch.int32)


def _linear_onednn(q: Tensor, zero_point: int, packed: Packed) -> Tensor:
    weight, scale, zeros = packed
    run = torch.ops.onednn.qlinear_pointwise
    shifted = (q + zero_point).to(torch.uint8)
    out = run(
        shifted, 1.0, zero_point, weight, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return cast("Tensor", out)


_LINEAR: dict[str, tuple[Callable[..., Packed], Callable[..., Tensor]]] = {
    "FBGEMM int8": (_pack_fbgemm, _linear_fbgemm),
    "oneDNN int8": (_pack_onednn, _linear_onednn),
}


def zero_point_for(act_bits: int) -> int:
    """Return the shift that makes symmetric integers of that many bits unsigned."""
    return 2 ** (act_bits - 1)


def _extremes(act_bits: int) -> Tensor:
    largest = float(zero_point_for(act_bits) - 1)
    rows = torch.full((3, 256), largest)
    rows[1] = -largest
    rows[2, ::2] = -largest
    return rows


def _exact_linear_bits(name: str) -> int:
    pack, run = _LINEAR[name]
    weight = torch.full((32, 256), 127, dtype=torch.int8)
    weight[::2] = -127
    try:
        packed = pack(weight, torch.ones(32))
        for act_bits in (8, 7):
            q = _extremes(act_bits)
            if torch.equal(
                run(q, zero_point_for(act_bits), packed).double(), exact_linear(q, weight)
            ):
                return act_bits
    except (RuntimeError, AttributeError, NotImplementedError):  # not in this build of torch
        pass
    return 0


@cache
def linear_kernels() -> tuple[IntegerKernel, ...]:
    """Return the linear kernels that are exact here, best first; float64 is always the last."""
    found = [IntegerKernel(name, bits) for name in _LINEAR if (bits := _exact_linear_bits(name))]
    return (*sorted(found, key=lambda kernel: -kernel.act_bits), FLOAT64)


def linear(q: Tensor, weight: Tensor, scale: Tensor, act_bits: int) -> Tensor:
    """Multiply integer rows with a stored weight and scale each column.

    Args:
        q: ``(rows, in_features)`` float32 holding integers of ``act_bits`` bits.
        weight: int8, or uint8 with two 4-bit integers a byte.
        scale: ``(out_features, groups)``.
        act_bits: At most that of the first of :func:`linear_kernels`.

    Returns:
        ``(rows, out_features)`` float32.
    """
    kernel = linear_kernels()[0]
    if not kernel.fast:
        integers, channel = plain_integers(weight, scale, q.shape[1])
        return exact_linear(q, integers).float().mul_(channel)
    pack, run = _LINEAR[kernel.name]
    packed = remembered(
        weight, scale, kernel.name, lambda: pack(*folded(weight, scale, q.shape[1]))
    )
    return run(q, zero_point_for(act_bits), packed)


@cache
def takes_bytes(bits: int) -> bool:
    """Whether :func:`run_linear` is exact with bytes of so many bits."""
    return _exact_linear_bits("oneDNN int8") >= bits


def packed_linear(weight: Tensor, scale: Tensor, in_features: int) -> Packed:
    """Return a stored weight as :func:`run_linear` takes it."""
    pack = partial(_pack_folded, weight, scale, in_features)
    return remembered(weight, scale, "oneDNN int8", pack)


def _pack_folded(weight: Tensor, scale: Tensor, in_features: int) -> Packed:
    return _pack_onednn(*folded(weight, scale, in_features))


def run_linear(
    q: Tensor, packed: Packed, x_scale: float, bias: Tensor | None, unary: Unary, output: Output
) -> Tensor:
    """Multiply bytes with a packed weight; see :func:`run_convolution`."""
    weight, scale, zeros = packed
    run = torch.ops.onednn.qlinear_pointwise.default
    return cast("Tensor", run(q, x_scale, 0, weight, scale, zeros, bias, *output, *unary, ""))


def _pack_conv(
    weight: Tensor, scale: Tensor, shape: ConvShape, sizes: Sequence[int] | None = None
) -> Packed:
    # The layout that suits a kernel of one depends on the input. Packed for another one, oneDNN
    # changes it in every call: 10 to 100x the time of the product.
    window = (shape.stride, shape.padding, shape.dilation, shape.groups)
    packed = torch.ops.onednn.qconv_prepack(weight, scale, 1.0, 0, *window, sizes)
    return packed, scale, torch.zeros(len(scale), dtype=torch.int32)


def run_convolution(
    q: Tensor,
    packed: Packed,
    shape: ConvShape,
    x_scale: float,
    bias: Tensor | None,
    unary: Unary = _NO_UNARY,
    output: Output = _FLOATS,
    added: Sum | None = None,
) -> Tensor:
    """Convolve bytes with a packed weight.

    Args:
        q: ``(batch, channels, ...)`` uint8. What ``shape`` pads is 0.
        packed: From :func:`packed_convolution`.
        shape: The figures it was packed for.
        x_scale: Multiplies the sums, as the scales of the channels do.
        bias: ``(out_channels,)``.
        unary: The activation at the end.
        output: Whether bytes come out, and on what grid.
        added: A tensor of the shape and type of the output; it is overwritten and returned.
    """
    # A zero point would make oneDNN sum the weights anew in every call: up to 3x the time.
    weight, scale, zeros = packed
    ops = torch.ops.onednn
    window = (shape.stride, shape.padding, shape.dilation, shape.groups)
    if added is None:
        run = ops.qconv_pointwise.default if q.ndim == 4 else ops.qconv3d_pointwise.default
        out = run(q, x_scale, 0, weight, scale, zeros, bias, *window, *output, *unary, "")
        return cast("Tensor", out)
    other, *grid = added
    before = (q, x_scale, 0, weight, scale, zeros, other, bias, *window)
    run = ops.qconv2d_pointwise.binary
    return cast("Tensor", run(*before, *output, *grid, "sum", 1.0, *unary, ""))


@cache
def conv_kernels(dims: int = 2) -> tuple[IntegerKernel, ...]:
    """Return the convolution kernels that are exact here, best first; float64 is the last.

    Args:
        dims: 2 or 3; what has one is an image of one row.
    """
    ones = (1,) * dims
    shape = ConvShape(ones, ones, ones, 1)
    weight = torch.full((16, 16, *(3,) * dims), 127, dtype=torch.int8)
    weight[::2] = -127
    for act_bits in (8, 7):
        q = _extremes(act_bits).view(3, 16, *(1,) * (dims - 2), 4, 4)
        q = (q + zero_point_for(act_bits)).to(torch.uint8)
        try:
            packed = _pack_conv(weight, torch.ones(16), shape)
            out = run_convolution(q, packed, shape, 1.0, None).double()
        except (RuntimeError, AttributeError, NotImplementedError):
            break
        if torch.equal(out, exact_convolution(q, weight, shape)):
            return IntegerKernel("oneDNN int8", act_bits), FLOAT64
    return (FLOAT64,)


def convolution(
    q: Tensor,
    weight: Tensor,
    scale: Tensor,
    kernel_size: tuple[int, ...],
    shape: ConvShape,
    x_scale: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Convolve bytes with a stored weight, and scale each channel.

    Args:
        q: ``(batch, channels, ...)`` uint8, of no more bits than the first of
            :func:`conv_kernels` takes. What ``shape`` pads is 0.
        weight: ``(out_channels, ...)`` int8, or uint8 with two 4-bit integers a byte.
        scale: ``(out_channels, scale groups)``.
        kernel_size: Sides of the window, 2 or 3.
        shape: The other figures of the convolution.
        x_scale: Multiplies all of it.
        bias: ``(out_channels,)``, added last.

    Returns:
        ``(batch, out_channels, ...)`` float32, in whatever memory format the kernel has.
    """
    packs = remembered(weight, scale, ("conv", shape), dict)
    packed = packed_convolution(packs, q, weight, scale, kernel_size, shape)
    return run_convolution(q, packed, shape, x_scale, bias)


def packed_convolution(
    packs: dict[torch.Size, Packed],
    q: Tensor,
    weight: Tensor,
    scale: Tensor,
    kernel_size: tuple[int, ...],
    shape: ConvShape,
) -> Packed:
    """Return a stored weight as :func:`run_convolution` takes it for an input.

    Args:
        packs: What was made of this weight for inputs of other sizes; the last few are kept.
        q: The input.
        weight: See :func:`convolution`.
        scale: See :func:`convolution`.
        kernel_size: See :func:`convolution`.
        shape: See :func:`convolution`.
    """
    found = packs.get(q.shape[2:])
    if found is None:
        channels = q.shape[1] // shape.groups
        flat, channel = folded(weight, scale, channels * prod(kernel_size))
        found = _pack_conv(flat.view(-1, channels, *kernel_size), channel, shape, q.shape)
        while len(packs) >= _KEPT_SIZES:
            packs.pop(next(iter(packs)), None)
        packs[q.shape[2:]] = found
    return found


def activation_bits(asked: int, device: torch.device, layer: str) -> int:
    """Return the width of the activations' integers: ``asked``, or what is exact on this CPU."""
    if device.type != "cpu":
        return asked
    kernels = linear_kernels() if layer == "linear" else conv_kernels(3 if layer == "conv3d" else 2)
    return min(asked, kernels[0].act_bits)
