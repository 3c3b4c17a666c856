"""SmoothQuant: outliers of activations moved into the weights before both are rounded."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from torsh_quant._batches import first_tensor, real_tokens, run_model, token_mask
from torsh_quant._flow import Flow, Key, every_layer_called, record_flow, same_output
from torsh_quant._layers import quantizable_layers
from torsh_quant._numerics import quantize_rows
from torsh_quant._rounding import round_to_nearest
from torsh_quant._spec import Scheme, group_size_for

_GRID = tuple(step / 10 for step in range(3, 10))
_ROWS = 512


@dataclass(frozen=True)
class SmoothQuant:
    """Divide input channels of linear layers by a factor, and multiply the weights by it.

    The factor of channel ``j`` is ``max|x_j|**alpha / max|w_j|**(1 - alpha)``. Layers with the same
    input share it. Where that input is what a normalisation returns, and nothing else uses it, the
    division goes into the normalisation's weight and costs nothing; elsewhere the quantized layer
    keeps it as ``input_scale``. That the float model stays the same is checked on the first batch.

    Args:
        alpha: From 0 (leave the activations) to 1 (make them flat); ``"auto"`` takes, for each
            input, what gives the least error of the layers' outputs on some rows.

    Raises:
        ValueError: If ``alpha`` is out of range.

    Example:
        >>> from torsh_quant import quantize
        >>> net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)).eval()
        >>> quantize(net, "w8a8", data=[torch.randn(8, 4)], method=SmoothQuant())[1].input_scale

    Reference:
        G. Xiao et al., SmoothQuant: accurate and efficient post-training quantization for large
        language models, 2022, arXiv:2211.10438. The search for alpha is ours.
    """

    alpha: float | Literal["auto"] = 0.5

    def __post_init__(self) -> None:
        if self.alpha != "auto" and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha!r}; use a number from 0 to 1, or 'auto'")

    def apply(
        self, model: nn.Module, batches: Sequence[Any], schemes: dict[str, Scheme]
    ) -> dict[str, Tensor]:
        """Smooth a model in place.

        Args:
            model: The float model.
            batches: Calibration data.
            schemes: Of the layers that will be quantized.

        Returns:
            Factors ``(in_features,)`` that the inputs of layers have to be multiplied with. Until
            the layers are replaced, hooks do that.
        """
        layers = {
            name: layer
            for name, layer in quantizable_layers(model)
            if isinstance(layer, nn.Linear) and name in schemes
        }
        flow = record_flow(model, batches[0])
        shared: dict[Key, list[str]] = defaultdict(list)
        for name in layers:
            key = flow.input_of(name, "linear")
            if key is not None:
                shared[key].append(name)
        seen = _seen_inputs(
            model, batches, {names[0]: layers[names[0]] for names in shared.values()}
        )
        left: dict[str, Tensor] = {}
        with torch.no_grad():
            expected = first_tensor(run_model(model, batches[0]))
            for key, names in shared.items():
                largest, rows = seen[names[0]]
                group = [layers[name] for name in names]
                factor = self._factor(largest, rows, group, [schemes[name] for name in names])
                for layer in group:
                    layer.weight = nn.Parameter(
                        (layer.weight.double() * factor).to(layer.weight.dtype),
                        requires_grad=layer.weight.requires_grad,
                    )
                if not _absorb(model, flow, key, names, factor, batches[0], expected):
                    inverse = (1 / factor).float()
                    for name in names:
                        left[name] = inverse
                        layers[name].register_forward_pre_hook(_Multiply(inverse))
        return left

    def _factor(
        self, largest: Tensor, rows: Tensor, layers: Sequence[nn.Linear], schemes: Sequence[Scheme]
    ) -> Tensor:
        weights = torch.stack([layer.weight.detach().abs().amax(0) for layer in layers]).amax(0)
        if self.alpha != "auto":
            return smoothing_factor(largest, weights, self.alpha)
        found = [smoothing_factor(largest, weights, alpha) for alpha in _GRID]
        errors = [
            sum(
                _error(rows, factor, layer.weight.detach(), scheme)
                for layer, scheme in zip(layers, schemes, strict=True)
            )
            for factor in found
        ]
        return found[errors.index(min(errors))]


def smoothing_factor(largest: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Return the factor of each channel, float64; 1 where a channel is never used.

    Example:
        >>> smoothing_factor(torch.tensor([4.0, 0.0]), torch.tensor([1.0, 1.0]), 0.5)
        tensor([2., 1.], dtype=torch.float64)
    """
    largest, weights = largest.double(), weights.double()
    factor = largest.pow(alpha) / weights.pow(1 - alpha)
    return torch.where((largest > 0) & (weights > 0), factor.clamp(1e-5, 1e5), 1.0)


class _Multiply:
    """Stands for a quantized layer's ``input_scale`` while the layer is float."""

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0] * self.factor.to(inputs[0].dtype), *inputs[1:])


def _absorb(
    model: nn.Module,
    flow: Flow,
    key: Key,
    names: Sequence[str],
    factor: Tensor,
    batch: Any,
    expected: Tensor,
) -> bool:
    """Divide the weight of the normalisation that made the input, if that changes nothing else."""
    users = flow.users(key)
    if any(use.function != "linear" or use.module not in names for use in users):
        return False
    modules = dict(model.named_modules())
    for producer in flow.producers(key):
        norm = modules[producer]
        weight = norm._parameters.get("weight")
        if weight is None or weight.shape != factor.shape:
            continue
        held = {name: norm._parameters.get(name) for name in ("weight", "bias")}
        for name, parameter in held.items():
            if parameter is not None:
                norm._parameters[name] = nn.Parameter(
                    (parameter.double() / factor).to(parameter.dtype),
                    requires_grad=parameter.requires_grad,
                )
        if same_output(model, batch, expected):
            return True
        norm._parameters.update(held)
    return False


def _seen_inputs(
    model: nn.Module, batches: Sequence[Any], layers: dict[str, nn.Linear]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, for each layer, the largest of each input channel and some rows of its input."""
    largest: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = defaultdict(list)
    each = -(-_ROWS // len(batches))
    mask: Tensor | None = None

    def look(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = real_tokens(cast("Tensor", inputs[0]).detach(), mask).flatten(0, -2)
            found = x.abs().amax(0)
            largest[name] = torch.maximum(largest.get(name, found), found)
            rows[name].append(x[:: max(1, len(x) // each)][:each].clone())

        return hook

    handles = [layer.register_forward_pre_hook(look(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), every_layer_called():
            for batch in batches:
                mask = token_mask(batch)
                run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (largest[name], torch.cat(rows[name])) for name in layers}


def _error(rows: Tensor, factor: Tensor, weight: Tensor, scheme: Scheme) -> float:
    """Squared error of a layer's output once both sides are rounded."""
    x, w = (rows / factor).float(), (weight * factor).float()
    size = group_size_for(scheme.weight, weight.shape[1], "the layer")
    rounded = round_to_nearest(w, scheme.weight, size).floats()
    if scheme.act is not None:
        q, scale, zero_point = quantize_rows(x, scheme.act.bits)
        x = (q + zero_point) * scale
    return (x @ rounded.T - rows.float() @ weight.float().T).double().square().sum().item()
