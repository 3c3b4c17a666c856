"""The operators behind quantized layers: linear maps, convolutions and embeddings.

Registered with torch, so that ``torch.compile`` and ``torch.export`` see one node with plain
tensors going in. ``act_bits=0`` means float activations: the weight is turned back to floats.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from torsh_quant._bytes import byte_convolution, byte_linear, max_pool, to_bytes
from torsh_quant._conv import output_format, output_size, quantized_convolution
from torsh_quant._embedding import quantized_embedding
from torsh_quant._linear import quantized_linear
from torsh_quant._numerics import ConvShape, dequantize_weight, stored_integers

# Not torch.library.custom_op, whose first call imports the compiler: seconds that a forward pass
# would have to wait.
_LIBRARY = torch.library.Library("torsh_quant", "DEF")


def _linear_shape(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    act_bits: int,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _embedding_shape(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    return scale.new_empty((*x.shape, embedding_dim), dtype=dtype)


def _convolution_shape(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    act_bits: int,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    shape = ConvShape(tuple(stride), tuple(padding), tuple(dilation), groups)
    layout = torch.contiguous_format if x.ndim == 3 else output_format(x, channels_last)
    return torch.empty(
        output_size(x, weight.shape[0], kernel_size, shape),
        dtype=x.dtype,
        device=x.device,
        memory_format=layout,
    )


def _bytes_shape(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    return _images(x, x.shape, torch.uint8)


def _images(x: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}
    layout = last.get(len(size), torch.contiguous_format)
    return torch.empty(size, dtype=dtype, device=x.device, memory_format=layout)


def _pooled_shape(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    shape = ConvShape(tuple(stride), tuple(padding), (1,) * len(stride), 1)
    size = [*x.shape[:2], *output_size(x, 1, kernel_size, shape)[2:]]
    return _images(x, size, torch.uint8)


def _byte_linear_shape(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    out_scale = rest[-2]
    dtype = torch.float32 if out_scale is None else torch.uint8
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _byte_convolution_shape(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    kernel_size, stride, padding, dilation, groups = rest[5:10]
    shape = ConvShape(tuple(stride), tuple(padding), tuple(dilation), groups)
    size = output_size(x, weight.shape[0], kernel_size, shape)
    return _images(x, size, torch.float32 if rest[-2] is None else torch.uint8)


_INPUT_GRADIENTS = (
    torch.nn.grad.conv1d_input,
    torch.nn.grad.conv2d_input,
    torch.nn.grad.conv3d_input,
)


def _remember_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, zero_point, *_ = inputs
    ctx.save_for_backward(weight, scale, zero_point)
    ctx.in_features = x.shape[-1]


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale, zero_point = ctx.saved_tensors
    floats = dequantize_weight(
        stored_integers(weight, ctx.in_features, scale.shape[1]), scale, zero_point
    )
    return (grad @ floats.to(grad.dtype), *(None,) * 7)


def _remember_convolution(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, zero_point, _, _, _, _, kernel, *window, _ = inputs
    ctx.save_for_backward(weight, scale, zero_point)
    ctx.size, ctx.kernel, ctx.window = x.shape, kernel, window


def _convolution_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale, zero_point = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.window
    channels = ctx.size[1] // groups
    q = stored_integers(weight, channels * prod(ctx.kernel), scale.shape[1])
    floats = dequantize_weight(q, scale, zero_point).view(-1, channels, *ctx.kernel)
    back = _INPUT_GRADIENTS[len(ctx.kernel) - 1](
        ctx.size, floats.to(grad.dtype), grad, stride, padding, dilation, groups
    )
    return (back, *(None,) * 13)


def _register(
    schema: str,
    kernel: Callable[..., Tensor],
    shape: Callable[..., Tensor],
    remember: Callable[..., None] | None = None,
    backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
) -> None:
    _LIBRARY.define(schema, tags=[torch.Tag.pt2_compliant_tag])
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    full = f"torsh_quant::{name}"
    torch.library.register_fake(full, shape, lib=_LIBRARY)
    if backward is None:
        return
    # The gradient of the input passes rounding as if it were not there (straight through).
    torch.library.register_autograd(full, backward, setup_context=remember, lib=_LIBRARY)


_register(
    "linear(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, "
    "int act_bits, Tensor? act_scale, Tensor? act_zero_point) -> Tensor",
    quantized_linear,
    _linear_shape,
    _remember_linear,
    _linear_backward,
)
_register(
    "convolution(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, "
    "int act_bits, Tensor? act_scale, Tensor? act_zero_point, int[] kernel_size, int[] stride, "
    "int[] padding, int[] dilation, int groups, bool channels_last) -> Tensor",
    quantized_convolution,
    _convolution_shape,
    _remember_convolution,
    _convolution_backward,
)
_register(
    "embedding(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, int embedding_dim, "
    "ScalarType dtype) -> Tensor",
    quantized_embedding,
    _embedding_shape,
)
_register(
    "to_bytes(Tensor x, Tensor scale, Tensor zero_point, int bits) -> Tensor",
    to_bytes,
    _bytes_shape,
)
_register(
    "max_pool(Tensor x, int[] kernel_size, int[] stride, int[] padding) -> Tensor",
    max_pool,
    _pooled_shape,
)
_ENDS = (
    "float? low, float? high, int out_bits, Tensor? out_scale, Tensor? out_zero_point) -> Tensor"
)
_INPUT = (
    "Tensor x, Tensor weight, Tensor scale, Tensor? bias, int act_bits, Tensor act_scale, "
    "Tensor act_zero_point, "
)
_register(f"byte_linear({_INPUT}{_ENDS}", byte_linear, _byte_linear_shape)
_register(
    f"byte_convolution({_INPUT}int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    "int groups, Tensor? other, int other_bits, Tensor? other_scale, Tensor? other_zero_point, "
    f"{_ENDS}",
    byte_convolution,
    _byte_convolution_shape,
)
