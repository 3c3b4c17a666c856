"""From float layers to quantized ones, all at once or in the order in which data reaches them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torsh_quant._calibrate import Watch, watch_stage
from torsh_quant._explain import plan_for
from torsh_quant._flow import record_flow
from torsh_quant._fold import fold_batch_norm
from torsh_quant._journal import Journal, data_digest, model_digest
from torsh_quant._layer import QuantizedLayer
from torsh_quant._layers import FloatTable, quantized_layer, replace_modules
from torsh_quant._methods import Chain, Equalize
from torsh_quant._numerics import range_qparams
from torsh_quant._observers import make_observer
from torsh_quant._progress import progress_bar
from torsh_quant._quant_linear import QuantLinear
from torsh_quant._report import LayerReport, report_layer
from torsh_quant._rounding import Rounded, round_to_nearest
from torsh_quant._spec import Scheme, group_size_for
from torsh_quant._stages import Feed, Stage, count_calls, plan_stages, without_cache
from torsh_quant._statistics import Collector, Statistics


@dataclass(frozen=True)
class Fill:
    """What a quantized layer is filled with.

    Args:
        rounded: The integers of its weight.
        act: Scale and zero point of its input for static schemes.
        bias: Its bias; None takes that of the float layer.
    """

    rounded: Rounded
    act: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors."""
        found = {"q": self.rounded.q, "scale": self.rounded.scale}
        if self.rounded.zero_point is not None:
            found["zero_point"] = self.rounded.zero_point
        if self.act is not None:
            found["act_scale"], found["act_zero_point"] = self.act
        if self.bias is not None:
            found["bias"] = self.bias
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Fill":
        """Undo :meth:`tensors`."""
        rounded = Rounded(tensors["q"], tensors["scale"], tensors.get("zero_point"))
        act = None
        if "act_scale" in tensors:
            act = tensors["act_scale"], tensors["act_zero_point"]
        return cls(rounded, act, tensors.get("bias"))


@dataclass
class Job:
    """The quantization of one model.

    Args:
        model: The float model, whose layers are replaced.
        schemes: Of the layers to quantize, by name.
        chain: The methods.
        strict: Refuse slow paths.
    """

    model: nn.Module
    schemes: Mapping[str, Scheme]
    chain: Chain
    strict: bool
    reports: dict[str, LayerReport] = field(default_factory=dict)
    input_scales: dict[str, Tensor] = field(default_factory=dict)
    _new: dict[nn.Module, nn.Module] = field(default_factory=dict)
    _known: dict[tuple[int, str], tuple[Fill, QuantizedLayer]] = field(default_factory=dict)
    _kept: list[Tensor] = field(default_factory=list)

    def layer(self, name: str) -> Any:
        """Return a float layer by its name."""
        return self.model.get_submodule(name)

    def round(self, name: str, statistics: Statistics | None) -> Rounded:
        """Choose the integers of a layer's weight."""
        layer, spec = self.layer(name), self.schemes[name].weight
        matrix = layer.weight.detach().flatten(1)
        size = group_size_for(spec, matrix.shape[1], name)
        if statistics is None and self.chain.rounding.needs_data:  # a table has no input
            return round_to_nearest(matrix, spec, size)
        return self.chain.rounding.round(matrix, spec, size, statistics)

    def convert(self, names: Sequence[str], fills: Mapping[str, Fill]) -> None:
        """Make the quantized layers; :meth:`replace` or :meth:`finish` puts them in."""
        for name in names:
            layer: FloatTable = self.layer(name)
            scheme = self.schemes[name]
            key = id(layer.weight), str(scheme.weight)
            self._kept.append(layer.weight)  # so that its id is not another's
            fill, first = self._known.get(key, (None, None))
            fill = fills.get(name) or fill or Fill(self.round(name, None))
            if fill.bias is not None and not isinstance(layer, nn.Embedding):
                layer.bias = nn.Parameter(fill.bias, requires_grad=False)
            made = quantized_layer(name, layer, scheme, fill.rounded, fill.act)
            if first is not None and torch.equal(first.weight, made.weight):
                made.weight, made.scale = first.weight, first.scale
                made.zero_point = first.zero_point
            self._known.setdefault(key, (fill, made))
            if isinstance(made, QuantLinear) and name in self.input_scales:
                made.input_scale = self.input_scales[name].to(made.scale.device)
            if self.strict and (plan := plan_for(name, made)).fallback:
                raise RuntimeError(
                    f"{name!r} as {plan.scheme} would run slowly ({plan.kernel}): {plan.reason}; "
                    "choose another scheme for it in overrides=, or strict=False"
                )
            self.reports[name] = report_layer(name, layer, made)
            self._new[layer] = made

    def replace(self) -> None:
        """Put the quantized layers in that are made."""
        self.model = replace_modules(self.model, self._new)
        self._new = {}

    def finish(self) -> nn.Module:
        """Put the last layers in, and return the model."""
        self.replace()
        return self.model


def calibrate_model(
    job: Job,
    batches: Sequence[Any],
    observer: str,
    resume: str | os.PathLike[str] | None,
    *,
    fold: bool = True,
    bar: bool = False,
) -> None:
    """Quantize a model with data.

    Args:
        job: The model and its schemes.
        batches: Calibration data on the model's device.
        observer: For static schemes.
        resume: Folder of finished work.
        fold: Whether to fold batch normalisations.
        bar: Whether to show progress.

    Raises:
        ValueError: If there is no data, or it does not reach a layer.
    """
    if not batches:
        raise ValueError("data is empty; give at least one batch")
    make_observer(observer)
    journal = None
    if resume is not None:
        journal = Journal(resume, _fingerprint(job, batches, observer))
    with without_cache(job.model):
        layers = {name: one for name, one in job.schemes.items() if _is_called(job.layer(name))}
        calls = {n: k for n, k in count_calls(job.model, batches[0]).items() if n in layers}
        missing = [name for name in layers if name not in calls]
        if missing:
            raise ValueError(
                f"data does not reach {', '.join(map(repr, missing[:8]))}"
                f"{' and others' * (len(missing) > 8)}; give data that does, or leave them out "
                "with skip="
            )
        job.convert([name for name in job.schemes if name not in layers], {})  # tables
        if fold:
            fold_batch_norm(job.model, batches[0], inplace=True)
        for method in job.chain.before:
            if isinstance(method, Equalize):
                method.apply(job.model, batches[0])
            else:
                job.input_scales |= method.apply(job.model, batches, dict(layers))
        needs_weights = job.chain.rounding.needs_data or job.chain.after is not None
        stages: list[Stage] = []
        if needs_weights or any(one.is_static for one in layers.values()):
            stages = plan_stages(job.model, batches[0], calls, layerwise=needs_weights)
        else:
            job.convert(list(calls), {})
        job.replace()
        feed = Feed(job.model, batches)
        total = len(stages) * len(batches)
        with progress_bar(bar, total) as advance:
            for number, stage in enumerate(stages):
                part = f"stage-{number:04}"
                fills = _read(journal, part)
                if fills is None:
                    watches = _watches(job, stage, batches[0], needs_weights, observer)
                    watch_stage(feed, stage, watches, journal, part, advance)
                    fills = {name: _fill(job, name, watches[name]) for name in stage.layers}
                    _write(journal, part, fills)
                else:
                    advance(len(batches))
                job.convert(stage.layers, fills)
                job.replace()
                feed.model = job.model
                feed.hand_on(stage, stages[number + 1] if number + 1 < len(stages) else None)


def _is_called(layer: nn.Module) -> bool:
    return not isinstance(layer, nn.Embedding)


def _watches(
    job: Job, stage: Stage, batch: Any, needs_weights: bool, observer: str
) -> dict[str, Watch]:
    """What to gather of each layer; linear layers with the same input share it."""
    inputs: dict[Any, Watch] = {}
    flow = record_flow(job.model, batch) if len(stage.layers) > 1 else None
    watches: dict[str, Watch] = {}
    for name in stage.layers:
        layer, static = job.layer(name), job.schemes[name].is_static
        made = Watch(
            Collector(layer) if needs_weights else None,
            make_observer(observer) if static else None,
        )
        key = None
        if flow is not None and isinstance(layer, nn.Linear):
            key = flow.input_of(name, "linear")
        watches[name] = made if key is None else inputs.setdefault((key, static), made)
    return watches


def _fill(job: Job, name: str, watch: Watch) -> Fill:
    statistics = None if watch.collector is None else watch.collector.statistics()
    rounded = job.round(name, statistics)
    act = bias = None
    scheme, layer = job.schemes[name], job.layer(name)
    if watch.observer is not None and scheme.act is not None:
        low, high = watch.observer.range(scheme.act.bits)
        act = range_qparams(low, high, scheme.act.bits)
    if job.chain.after is not None and statistics is not None:
        change = layer.weight.detach().flatten(1).float() - rounded.floats()
        groups = len(statistics.mean)
        moved = (change.unflatten(0, (groups, -1)) * statistics.mean[:, None]).sum(2).flatten()
        bias = moved if layer.bias is None else layer.bias.detach().float() + moved
    return Fill(rounded, act, bias)


def _fingerprint(job: Job, batches: Sequence[Any], observer: str) -> dict[str, str]:
    from torsh_quant import __version__

    return {
        "model": model_digest(job.model),
        "data": data_digest(batches),
        "schemes": repr({name: str(one) for name, one in job.schemes.items()}),
        "method": repr(job.chain),
        "observer": observer,
        "torch": torch.__version__,
        "torsh_quant": __version__,
        "device": str(next(job.model.parameters()).device),
        "threads": str(torch.get_num_threads()),
    }


def _read(journal: Journal | None, part: str) -> dict[str, Fill] | None:
    tensors = None if journal is None else journal.read(part)
    if tensors is None:
        return None
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, name = key.rpartition(" ")
        by_layer.setdefault(layer, {})[name] = tensor
    return {layer: Fill.of(held) for layer, held in by_layer.items()}


def _write(journal: Journal | None, part: str, fills: Mapping[str, Fill]) -> None:
    if journal is None:
        return
    journal.write(
        part,
        {
            f"{layer} {name}": tensor
            for layer, fill in fills.items()
            for name, tensor in fill.tensors().items()
        },
    )
    journal.drop(f"{part}-begun")
