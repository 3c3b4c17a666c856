"""What runs where, and what it is worth: the table behind ``explain``."""

from dataclasses import dataclass

import torch
from torch import nn

from torsh_quant._cpu import conv_kernels, linear_kernels
from torsh_quant._layer import QuantizedLayer
from torsh_quant._layers import quantizable_layers, quantized_layers
from torsh_quant._linear import int_mm_takes
from torsh_quant._quant_conv import QuantConv
from torsh_quant._quant_embedding import QuantEmbedding
from torsh_quant._table import text_table


@dataclass(frozen=True)
class LayerPlan:
    """How one layer runs on the device it is on.

    Args:
        layer: Name in the model.
        scheme: Short name of its scheme, or ``"float"``.
        kernel: What multiplies.
        act_bits: Bits of the activations' integers as they are used here; None for floats.
        bytes_float: Weight and bias in 32-bit floats.
        bytes_now: Its state: integers, scales, zero points, bias.
        bytes_packed: The kernel's own copy of the weight, made at the first call.
        gain: What to expect against 32-bit floats on the same device.
        reason: Why it is not faster or wider, and what would help; empty where nothing would.
        fallback: Whether a slow path runs where the scheme has a fast one in mind.
    """

    layer: str
    scheme: str
    kernel: str
    act_bits: int | None
    bytes_float: int
    bytes_now: int
    bytes_packed: int
    gain: str
    reason: str
    fallback: bool


@dataclass(frozen=True)
class Explanation:
    """One :class:`LayerPlan` for each layer; ``str()`` is a table."""

    rows: tuple[LayerPlan, ...]

    @property
    def fallbacks(self) -> tuple[LayerPlan, ...]:
        """The layers that run on a slow path."""
        return tuple(row for row in self.rows if row.fallback)

    def __str__(self) -> str:
        head = [
            "layer",
            "scheme",
            "kernel",
            "act bits",
            "bytes fp32",
            "now",
            "packed",
            "gain",
            "why",
        ]
        rows = [
            [
                row.layer or "(model)",
                row.scheme,
                row.kernel,
                "-" if row.act_bits is None else str(row.act_bits),
                f"{row.bytes_float:,}",
                f"{row.bytes_now:,}",
                f"{row.bytes_packed:,}",
                row.gain,
                row.reason,
            ]
            for row in self.rows
        ]
        return text_table(head, rows)


def explain(model: nn.Module) -> Explanation:
    """Say which kernel each layer runs on, on the device it is on, and what to expect of it.

    The first call on a CPU runs the kernels once on the largest integers: one whose sums are
    clipped there is used with 7-bit activations, which cannot clip, or not at all.

    Args:
        model: A model from :func:`quantize`; its float layers are listed too.

    Returns:
        A table object; print it.

    Example:
        >>> from torsh_quant import quantize
        >>> plan = explain(quantize(nn.Sequential(nn.Linear(64, 32)).eval(), "w4a16")).rows[0]
        >>> plan.kernel, plan.bytes_float, plan.bytes_now
        ('dequantize, float product', 8320, 1280)
    """
    plans = {name: plan_for(name, layer) for name, layer in quantized_layers(model)}
    for name, layer in quantizable_layers(model):
        size = sum(4 * tensor.numel() for tensor in layer.parameters())
        plans[name] = LayerPlan(
            name, "float", "torch", None, size, size, 0, "1x", "not quantized", False
        )
    return Explanation(tuple(plans[name] for name, _ in model.named_modules() if name in plans))


def plan_for(name: str, layer: QuantizedLayer) -> LayerPlan:
    """Return the row of one quantized layer."""
    device = layer.weight.device
    rows, columns = layer.scale.shape[0], layer.columns
    biases = 0 if layer.bias is None else rows
    kernel, act_bits, gain, reason, fallback = _choice(layer, device)
    kept = [tensor for tensor in layer._buffers.values() if tensor is not None]
    return LayerPlan(
        layer=name,
        scheme=str(layer.scheme),
        kernel=kernel,
        act_bits=act_bits,
        bytes_float=4 * (rows * columns + biases),
        bytes_now=sum(tensor.nbytes for tensor in kept),
        bytes_packed=rows * (columns + 4) if act_bits is not None else 0,
        gain=gain,
        reason=reason,
        fallback=fallback,
    )


_Choice = tuple[str, int | None, str, str, bool]


def _choice(layer: QuantizedLayer, device: torch.device) -> _Choice:
    if isinstance(layer, QuantEmbedding):
        return "dequantize the rows asked for", None, "about 1x", "", False
    if not layer.act_bits:
        return _float_choice(layer, device)
    if device.type == "cpu":
        return _cpu_choice(layer)
    rows = layer.scale.shape[0]
    if device.type == "cuda" and not isinstance(layer, QuantConv):
        if int_mm_takes((rows, layer.columns)):
            reason = "scales and rounding of activations run as separate launches"
            return "cuBLAS int8", layer.act_bits, "about 1x; more for large batches", reason, False
        reason = "cuBLAS int8 wants both sizes in multiples of 8"
    else:
        reason = f"no integer kernel for this layer on {device.type} yet"
    return "float64, exact but slow", layer.act_bits, "below 1x", reason, True


def _float_choice(layer: QuantizedLayer, device: torch.device) -> _Choice:
    kernel = "dequantize, float product"
    if isinstance(layer, QuantConv):
        return kernel, None, "about 1x", "the weight is converted at every call", True
    reason = "the weight is converted at every call"
    if device.type == "cpu" and layer.scheme.weight.symmetric:
        reason += f"; 'w{layer.scheme.weight.bits}a8' runs on integers"
    return kernel, None, "0.4x (batch 1) to 0.9x (128)", reason, True


def _cpu_choice(layer: QuantizedLayer) -> _Choice:
    conv = isinstance(layer, QuantConv)
    kernel = (conv_kernels(max(2, layer.dims)) if conv else linear_kernels())[0]
    act_bits = min(layer.act_bits, kernel.act_bits)
    if not kernel.fast:
        reason = "no int8 kernel of this build of torch is exact on this CPU"
        return kernel.name, act_bits, "below 1x", reason, True
    wide = kernel.act_bits == 8
    reasons = []
    if act_bits < layer.act_bits:
        reasons.append("8-bit sums are clipped on this CPU (no VNNI): activations use 7 bits")
    if conv and layer.columns < 64:
        gain = "below 1x"
        reasons.append(f"only {layer.columns} products per output: keep it float with overrides=")
    elif conv:
        gain = "1.1 to 1.8x" if layer.channels_last else "0.5 to 1.1x"
        if not layer.channels_last:
            reasons.append("use .to(memory_format=torch.channels_last) before quantize")
    elif layer.columns * layer.scale.shape[0] < 2**16:
        gain = "about 1x"
        reasons.append("a small layer: the call costs more than the product")
    else:
        gain = "3 to 8x" if wide else "2 to 4x"
    return kernel.name, act_bits, gain, "; ".join(reasons), False
