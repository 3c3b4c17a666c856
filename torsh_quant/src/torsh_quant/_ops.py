"""The operators behind quantized layers: one for linear maps, one for convolutions.

Registered with torch, so that ``torch.compile`` and ``torch.export`` see one node with plain
tensors going in. ``act_bits=0`` means float activations: the weight is turned back to floats.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torsh_quant._conv import output_format, output_size, quantized_conv2d
from torsh_quant._cpu import ConvShape
from torsh_quant._linear import quantized_linear
from torsh_quant._numerics import dequantize_weight, stored_integers

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
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _conv2d_shape(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    act_bits: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    shape = ConvShape(tuple(stride), tuple(padding), tuple(dilation), groups)
    return torch.empty(
        output_size(x, weight.shape[0], kernel_size, shape),
        dtype=x.dtype,
        device=x.device,
        memory_format=output_format(x, channels_last),
    )


def _remember_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, zero_point, _, _ = inputs
    ctx.save_for_backward(weight, scale, zero_point)
    ctx.in_features = x.shape[-1]


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale, zero_point = ctx.saved_tensors
    floats = dequantize_weight(
        stored_integers(weight, ctx.in_features, scale.shape[1]), scale, zero_point
    )
    return (grad @ floats.to(grad.dtype), None, None, None, None, None)


def _remember_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, zero_point, _, _, kernel, *window, _ = inputs
    ctx.save_for_backward(weight, scale, zero_point)
    ctx.size, ctx.kernel, ctx.window = x.shape, kernel, window


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale, zero_point = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.window
    channels = ctx.size[1] // groups
    height, width = ctx.kernel
    q = stored_integers(weight, channels * height * width, scale.shape[1])
    floats = dequantize_weight(q, scale, zero_point).view(-1, channels, height, width)
    back = torch.nn.grad.conv2d_input(
        ctx.size, floats.to(grad.dtype), grad, stride, padding, dilation, groups
    )
    return (back, *(None,) * 11)


def _register(
    schema: str,
    kernel: Callable[..., Tensor],
    shape: Callable[..., Tensor],
    remember: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    _LIBRARY.define(schema, tags=[torch.Tag.pt2_compliant_tag])
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    full = f"torsh_quant::{name}"
    torch.library.register_fake(full, shape, lib=_LIBRARY)
    # The gradient of the input passes rounding as if it were not there (straight through).
    torch.library.register_autograd(full, backward, setup_context=remember, lib=_LIBRARY)


_register(
    "linear(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, "
    "int act_bits) -> Tensor",
    quantized_linear,
    _linear_shape,
    _remember_linear,
    _linear_backward,
)
_register(
    "conv2d(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, "
    "int act_bits, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    "int groups, bool channels_last) -> Tensor",
    quantized_conv2d,
    _conv2d_shape,
    _remember_conv2d,
    _conv2d_backward,
)
