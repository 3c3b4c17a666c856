"""From a float model to a quantized one and back."""

import copy
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from torsh_quant._layers import (
    embedding_layers,
    matches,
    model_bytes,
    quantizable_layers,
    quantized_layers,
    replace_modules,
    require_matches,
)
from torsh_quant._methods import Method, parse_methods
from torsh_quant._pipeline import Job, calibrate_model
from torsh_quant._report import LayerReport, QuantReport
from torsh_quant._spec import Scheme

DEFAULT_SKIP = ("lm_head",)


def quantize(
    model: nn.Module,
    scheme: str | Scheme = "w8a8",
    *,
    data: Iterable[Any] | None = None,
    method: str | Method | Sequence[str | Method] = "rtn",
    skip: Sequence[str] = DEFAULT_SKIP,
    overrides: Mapping[str, str | Scheme | None] | None = None,
    observer: str = "mse",
    max_batches: int = 128,
    resume: str | os.PathLike[str] | None = None,
    inplace: bool = False,
    strict: bool = False,
    progress: bool | None = None,
) -> nn.Module:
    """Replace the linear layers and convolutions of any model by quantized ones.

    Without data, weights are rounded to nearest and activations get their scales at run time. The
    result is the same kind of module with plain integer buffers in its ``state_dict()``; what was
    done is in its attribute ``quant_report``. Layers that share a weight share the quantized one; a
    layer whose weight is also used elsewhere (an embedding) stays float with a warning.

    With data, batch normalisations are folded into the layers before them, and layers are quantized
    in the order of their calls, block by block where a model is built of blocks: each sees what the
    quantized ones before it give. Padding (``attention_mask``) does not count.

    Patterns in ``skip`` and ``overrides`` are shell-style and match a layer's whole name, its last
    part (unless that is a number), or the name of a module it is in.

    Args:
        model: Any module in evaluation mode, with real finite weights.
        scheme: ``"w8a8"`` runs on integer kernels; ``"w8a8-static"`` too, with scales of
            activations from data; ``"w4a16"`` and ``"w8a16"`` save memory and leave activations
            alone; ``"w4a8"`` stores 4 bits and runs on the 8-bit kernels. See :class:`Scheme`.
        data: Batches for calibration: a tensor, a tuple or list whose first item is the input, or a
            dictionary of keyword arguments (``labels`` is left out). Some hundred samples do.
        method: How to choose integers: ``"rtn"``, ``"hqq"`` without data, ``"gptq"``,
            ``"adaround"``; before that ``"equalize"`` and ``"smoothquant"``, after it
            ``"bias_correction"``. One, several, or objects with options, such as
            ``[SmoothQuant(0.8), GPTQ(damp=0.05)]``.
        skip: Layers that stay float.
        overrides: Schemes of single layers by pattern; None keeps a layer float. A layer's own name
            counts most, then the last match. An ``nn.Embedding`` is quantized only where a pattern
            names it.
        observer: How static schemes choose the range of activations: ``"minmax"``,
            ``"moving_average"``, ``"percentile"``, ``"entropy"`` or ``"mse"``.
        max_batches: Take so many batches from ``data``, at most; they are kept in memory.
        resume: A folder. Finished work is kept in it, and a run that was killed goes on there, to
            the same bits.
        inplace: Change ``model`` instead of a copy. No layer is replaced before all are quantized,
            so an error leaves the model as it was, and until then the float and the quantized
            weights are in memory together.
        strict: Raise where a layer would run on a slow path (see :func:`explain`).
        progress: Whether to show a bar for what takes longer than two seconds; None if rich is
            installed.

    Returns:
        The quantized model.

    Raises:
        ValueError: If a scheme does not fit a layer, a pattern names no layer, a weight or an input
            is not finite, data is missing or does not reach a layer, or ``resume`` holds other
            work.
        RuntimeError: If the model is in training mode, on the meta device, quantized already, or
            has nothing to quantize; with ``strict``, if a layer would run slowly.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
        >>> small = quantize(net, "w8a8", overrides={"2": None})
        >>> small[0].weight.dtype, type(small[2]).__name__
        (torch.int8, 'Linear')
        >>> small.quant_report.bytes_before, small.quant_report.bytes_after
        (19240, 7208)
        >>> tiny = quantize(net, "w4a16", data=[torch.randn(32, 64)], method="gptq")
        >>> tiny.quant_report.bytes_after
        2960
    """
    _require_ready(model)
    chain = parse_methods(method)
    overrides = overrides or {}
    chosen = _choose(model, Scheme.parse(scheme), skip, overrides)
    wanted = {name: one for name, one in chosen.items() if one is not None}
    static = sorted(name for name, one in wanted.items() if one.is_static)
    if data is None and (static or chain.needs_data):
        raise ValueError(
            f"data is missing: {f'{wanted[static[0]]} of {static[0]!r}' if static else 'method'} "
            "needs calibration data; give data= some batches of real input"
        )
    if resume is not None and data is None:
        raise ValueError("resume keeps the work of calibration, which needs data=")
    before = model_bytes(model)
    work = model if inplace and data is None else copy.deepcopy(model)
    notes = _left_alone(work, chosen)
    tables = dict(embedding_layers(work))
    layers = [*quantizable_layers(work), *tables.items()]
    sizes = {name: sum(t.nbytes for t in layer.parameters()) for name, layer in layers}
    job = Job(
        work,
        {name: one for name, one in wanted.items() if name not in notes},
        chain,
        strict=strict,
    )
    if data is None:
        job.convert(list(job.schemes), {})
    else:
        batches = [_moved(batch, work) for batch in islice(data, max_batches)]
        bar = find_spec("rich") is not None if progress is None else progress
        calibrate_model(job, batches, observer, resume, bar=bar)
    work = job.finish()
    leave_fused_paths(work)
    rows = [
        job.reports.get(name)
        or LayerReport(
            name, "float", sizes[name], sizes[name], 0.0, 0.0, notes.get(name, "skipped")
        )
        for name in chosen
        if name in job.reports or name not in tables
    ]
    report = QuantReport(tuple(rows), before, model_bytes(work))
    if inplace and work is not model and type(work) is type(model):
        model.__dict__.update(work.__dict__)
        work = model
    object.__setattr__(work, "quant_report", report)
    return work


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


def _choose(
    model: nn.Module,
    scheme: Scheme,
    skip: Sequence[str],
    overrides: Mapping[str, str | Scheme | None],
) -> dict[str, Scheme | None]:
    """Return the scheme of each layer, None where it stays float."""
    layers, tables = dict(quantizable_layers(model)), dict(embedding_layers(model))
    names = [name for name, _ in model.named_modules() if name in layers or name in tables]
    if not layers and not overrides:
        raise RuntimeError(
            f"{type(model).__name__} has no nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d to "
            "quantize"
        )
    require_matches("overrides", list(overrides), names)
    if tuple(skip) != DEFAULT_SKIP:
        require_matches("skip", list(skip), names)
    chosen: dict[str, Scheme | None] = {}
    for name in names:
        left = name in tables or any(matches(name, pattern) for pattern in skip)
        chosen[name] = None if left else scheme
        found = [pattern for pattern in overrides if matches(name, pattern)]
        if found:
            other = overrides[name if name in overrides else found[-1]]
            chosen[name] = None if other is None else Scheme.parse(other)
        layer = layers.get(name) or tables[name]
        if chosen[name] is not None and not torch.isfinite(layer.weight).all():
            raise ValueError(
                f"the weight of {name!r} has NaN or infinity; quantize a model that works, or "
                f"leave the layer out with skip=({name!r},)"
            )
    return chosen


def _left_alone(model: nn.Module, chosen: Mapping[str, Scheme | None]) -> dict[str, str]:
    """Return why layers stay float though a scheme was chosen, with one warning each."""
    owners: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(module)
    layers = [*quantizable_layers(model), *embedding_layers(model)]
    replaced = {layer for name, layer in layers if chosen[name] is not None}
    notes = {}
    for name, layer in layers:
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


def _left_float(name: str, nbytes: int, note: str) -> LayerReport:
    return LayerReport(name, "float", nbytes, nbytes, 0.0, 0.0, note)


def _moved(value: Any, model: nn.Module) -> Any:
    """A batch on the model's device."""
    if isinstance(value, Tensor):
        return value.to(next(model.parameters()).device)
    if isinstance(value, Mapping):
        return {name: _moved(item, model) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_moved(item, model) for item in value]
    return value


def leave_fused_paths(model: nn.Module) -> None:
    """Let torch's encoder layers call their quantized layers."""
    # In evaluation torch's encoder layers hand their linear layers' weights to one fused float
    # kernel instead of calling the layers.
    for module in model.modules():
        if next(quantized_layers(module), None) is None:
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = module.use_nested_tensor = False
