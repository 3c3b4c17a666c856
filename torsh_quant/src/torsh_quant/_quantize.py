"""From a float model to a quantized one and back."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from torsh_quant._explain import plan_for
from torsh_quant._layer import QuantizedLayer
from torsh_quant._layers import (
    FloatLayer,
    matches,
    model_bytes,
    quantizable_layers,
    quantized_layer,
    quantized_layers,
    replace_modules,
    require_matches,
)
from torsh_quant._spec import Scheme
from torsh_quant._table import text_table

DEFAULT_SKIP = ("lm_head",)


@dataclass(frozen=True)
class LayerReport:
    """What quantization did to one layer.

    Args:
        layer: Name in the model.
        scheme: Short name of its scheme, or ``"float"``.
        bytes_before: Weight and bias as they were.
        bytes_after: Integers, scales, zero points and bias.
        max_error: Largest change of a weight.
        mean_error: Root mean square change over the root mean square weight.
        note: Why it stayed float; empty otherwise.
    """

    layer: str
    scheme: str
    bytes_before: int
    bytes_after: int
    max_error: float
    mean_error: float
    note: str = ""


@dataclass(frozen=True)
class QuantReport:
    """What :func:`quantize` did, layer by layer; ``str()`` is a table.

    Args:
        rows: One for each layer that can be quantized.
        bytes_before: Bytes of the whole model before.
        bytes_after: Bytes of the whole model now.
    """

    rows: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        head = ["layer", "scheme", "bytes before", "after", "max error", "mean error", "note"]
        rows = [
            [
                row.layer or "(model)",
                row.scheme,
                f"{row.bytes_before:,}",
                f"{row.bytes_after:,}",
                f"{row.max_error:.2e}",
                f"{row.mean_error:.2%}",
                row.note,
            ]
            for row in self.rows
        ]
        total = ["model", "", f"{self.bytes_before:,}", f"{self.bytes_after:,}", "-", "-", ""]
        return text_table(head, [*rows, total])


def quantize(
    model: nn.Module,
    scheme: str | Scheme = "w8a8",
    *,
    skip: Sequence[str] = DEFAULT_SKIP,
    overrides: Mapping[str, str | Scheme | None] | None = None,
    inplace: bool = False,
    strict: bool = False,
) -> nn.Module:
    """Replace the linear and 2-d convolution layers of any model by quantized ones.

    Rounds to nearest and needs no data. The result is the same kind of module with plain integer
    buffers in its ``state_dict()``; what was done is in its attribute ``quant_report``. Layers that
    share a weight share the quantized one; a layer whose weight is also used elsewhere (an
    embedding) stays float with a warning.

    Patterns in ``skip`` and ``overrides`` are shell-style and match a layer's whole name, its last
    part (unless that is a number), or the name of a module it is in.

    Args:
        model: Any module in evaluation mode, with real finite weights.
        scheme: ``"w8a8"`` runs on integer kernels; ``"w4a16"`` and ``"w8a16"`` save memory and
            leave activations alone; ``"w4a8"`` stores 4 bits and runs on the 8-bit kernels. See
            :class:`Scheme` for all.
        skip: Layers that stay float.
        overrides: Schemes of single layers by pattern; None keeps a layer float. The last match
            counts.
        inplace: Change ``model`` instead of a copy. No layer is replaced before all are quantized,
            so an error leaves the model as it was, and until then the float and the quantized
            weights are in memory together.
        strict: Raise where a layer would run on a slow path (see :func:`explain`).

    Returns:
        The quantized model.

    Raises:
        ValueError: If a scheme does not fit a layer, a pattern names no layer, or a weight is not
            finite.
        RuntimeError: If the model is in training mode, on the meta device, quantized already, or
            has nothing to quantize; with ``strict``, if a layer would run slowly.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
        >>> small = quantize(net, "w8a8", overrides={"2": None})
        >>> small[0].weight.dtype, type(small[2]).__name__
        (torch.int8, 'Linear')
        >>> small.quant_report.bytes_before, small.quant_report.bytes_after
        (19240, 7208)
    """
    _require_ready(model)
    overrides = overrides or {}
    names = [name for name, _ in quantizable_layers(model)]
    if not names:
        raise RuntimeError(f"{type(model).__name__} has no nn.Linear or nn.Conv2d to quantize")
    require_matches("overrides", list(overrides), names)
    if tuple(skip) != DEFAULT_SKIP:
        require_matches("skip", list(skip), names)
    chosen = {name: _scheme_for(name, Scheme.parse(scheme), skip, overrides) for name in names}
    for name, layer in quantizable_layers(model):
        if chosen[name] is not None and not torch.isfinite(layer.weight).all():
            raise ValueError(
                f"the weight of {name!r} has NaN or infinity; quantize a model that works, or "
                f"leave the layer out with skip=({name!r},)"
            )
    before = model_bytes(model)
    model = model if inplace else copy.deepcopy(model)
    notes = _left_alone(model, chosen)
    rows: list[LayerReport] = []
    new: dict[nn.Module, nn.Module] = {}
    by_weight: dict[int, QuantizedLayer] = {}
    for name, layer in list(quantizable_layers(model)):
        chosen_scheme = chosen[name]
        size = sum(tensor.nbytes for tensor in layer.parameters())
        if chosen_scheme is None or name in notes:
            note = notes.get(name, "skipped")
            rows.append(LayerReport(name, "float", size, size, 0.0, 0.0, note))
            continue
        made = quantized_layer(name, layer, chosen_scheme)
        first = by_weight.setdefault(id(layer.weight), made)
        if first is not made and first.scheme == made.scheme and type(first) is type(made):
            made.weight, made.scale, made.zero_point = first.weight, first.scale, first.zero_point
        if strict and (plan := plan_for(name, made)).fallback:
            raise RuntimeError(
                f"{name!r} as {plan.scheme} would run slowly ({plan.kernel}): {plan.reason}; "
                "choose another scheme for it in overrides=, or strict=False"
            )
        rows.append(_report(name, layer, made, size))
        new[layer] = made
    model = replace_modules(model, new)
    _leave_fused_paths(model)
    report = QuantReport(tuple(rows), before, model_bytes(model))
    object.__setattr__(model, "quant_report", report)
    return model


def dequantize(
    model: nn.Module, *, dtype: torch.dtype = torch.float32, inplace: bool = False
) -> nn.Module:
    """Turn quantized layers back into ``nn.Linear`` and ``nn.Conv2d``.

    The float weights are those the integers stand for, not those before quantization.

    Args:
        model: A model from :func:`quantize`.
        dtype: Of the new float weights.
        inplace: Change ``model`` instead of a copy.

    Returns:
        The float model.

    Raises:
        RuntimeError: If no layer is quantized.

    Example:
        >>> dequantize(quantize(nn.Sequential(nn.Linear(4, 2)).eval()))[0]
        Linear(in_features=4, out_features=2, bias=True)
    """
    if next(quantized_layers(model), None) is None:
        raise RuntimeError(f"{type(model).__name__} has no quantized layer")
    model = model if inplace else copy.deepcopy(model)
    new: dict[nn.Module, nn.Module] = {}
    for _, layer in quantized_layers(model):
        new[layer] = layer.to_float(dtype)
    model = replace_modules(model, new)
    model.__dict__.pop("quant_report", None)
    return model


def _require_ready(model: nn.Module) -> None:
    if (found := next(quantized_layers(model), None)) is not None:
        raise RuntimeError(
            f"{found[0] or type(model).__name__!r} is quantized already; start from the float "
            "model, or call dequantize first"
        )
    if model.training:
        raise RuntimeError("the model is in training mode; call model.eval() before quantize")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise RuntimeError(f"{name!r} is on the meta device; load the weights before quantize")


def _scheme_for(
    name: str,
    scheme: Scheme,
    skip: Sequence[str],
    overrides: Mapping[str, str | Scheme | None],
) -> Scheme | None:
    chosen = None if any(matches(name, pattern) for pattern in skip) else scheme
    for pattern, other in overrides.items():
        if matches(name, pattern):
            chosen = None if other is None else Scheme.parse(other)
    return chosen


def _left_alone(model: nn.Module, chosen: Mapping[str, Scheme | None]) -> dict[str, str]:
    """Return why layers stay float though a scheme was chosen, with one warning each."""
    owners: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(module)
    replaced = {layer for name, layer in quantizable_layers(model) if chosen[name] is not None}
    notes = {}
    for name, layer in quantizable_layers(model):
        if layer not in replaced:
            continue
        others = owners[id(layer.weight)] - replaced
        if others:
            kinds = ", ".join(sorted(type(other).__name__ for other in others))
            notes[name] = f"its weight is tied to a float layer ({kinds})"
        elif layer._forward_hooks or layer._forward_pre_hooks:
            notes[name] = "it has hooks, which a new layer would lose"
    for name, note in notes.items():
        warnings.warn(f"{name!r} stays float: {note}", stacklevel=3)
    return notes


def _report(name: str, layer: FloatLayer, made: QuantizedLayer, size: int) -> LayerReport:
    weight = layer.weight.detach().float().flatten(1)
    change = made.dequantized_weight() - weight
    power = weight.square().mean().sqrt().item()
    mean_error = change.square().mean().sqrt().item() / power if power else 0.0
    now = sum(tensor.nbytes for tensor in made._buffers.values() if tensor is not None)
    worst = change.abs().max().item() if change.numel() else 0.0
    return LayerReport(name, str(made.scheme), size, now, worst, mean_error)


def _leave_fused_paths(model: nn.Module) -> None:
    # In evaluation torch's encoder layers hand their linear layers' weights to one fused float
    # kernel instead of calling the layers.
    for module in model.modules():
        if next(quantized_layers(module), None) is None:
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = module.use_nested_tensor = False
