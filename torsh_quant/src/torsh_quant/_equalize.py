"""Cross-layer equalisation: weights of neighbouring layers brought to one range per channel."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torsh_quant._batches import first_tensor, run_model
from torsh_quant._flow import Flow, record_flow, same_output
from torsh_quant._layers import FloatLayer, quantizable_layers

# f(s x) = s f(x) for s > 0, channel by channel
_HOMOGENEOUS = frozenset(
    [
        "relu",
        "relu_",
        "leaky_relu",
        "leaky_relu_",
        "prelu",
        "dropout",
        "flatten",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "adaptive_max_pool2d",
    ]
)
_PRODUCTS = frozenset(("linear", "conv1d", "conv2d", "conv3d"))


@dataclass(frozen=True)
class Equalize:
    """Move factors between layers so that the channels of a weight have the same range.

    A layer whose output only goes through ReLU, pooling or flattening into one other layer may
    have channel ``i`` divided by ``s_i`` where the next layer's is multiplied by it. With one scale
    per tensor, the weights of small channels then get more integers. Nothing but rounding changes
    in the float model; that is checked on the first batch.

    Args:
        steps: Times that all pairs are gone through, at most; it ends when nothing moves.

    Raises:
        ValueError: If ``steps`` is below 1.

    Example:
        >>> from torsh_quant import quantize
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
        >>> quantize(net, "w8a8-tensor", data=[torch.ones(1, 2)], method=Equalize())[1]
        ReLU()

    Reference:
        M. Nagel et al., Data-free quantization through weight equalization and bias correction,
        2019, arXiv:1906.04721, section 4.1.
    """

    steps: int = 20

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}; use 1 or more")

    def apply(self, model: nn.Module, batch: Any) -> list[tuple[str, str]]:
        """Equalise a model in place; returns the pairs of layers."""
        layers = dict(quantizable_layers(model))
        pairs = equalizable_pairs(record_flow(model, batch), layers)
        if not pairs:
            return []
        with torch.no_grad():
            expected = first_tensor(run_model(model, batch))
            before = {name: dict(layer._parameters) for name, layer in layers.items()}
            for name, layer in layers.items():
                if any(name in pair for pair in pairs):
                    layer.weight = _copied(layer.weight)
                    if layer.bias is not None:
                        layer.bias = _copied(layer.bias)
            for _ in range(self.steps):
                moved = [_equalize(layers[first], layers[second]) for first, second in pairs]
                if max(moved) < 1e-3:
                    break
            if same_output(model, batch, expected):
                return pairs
            for name, layer in layers.items():
                layer._parameters |= before[name]
        return []


def equalizable_pairs(flow: Flow, layers: dict[str, FloatLayer]) -> list[tuple[str, str]]:
    """Return pairs of layers with nothing between them that a positive factor does not pass."""
    pairs = []
    for name, layer in layers.items():
        use = flow.only_user(name)
        while use is not None and use.function in _HOMOGENEOUS:
            use = flow.sole_use(use.output)
        if use is None or use.function not in _PRODUCTS or use.module not in layers:
            continue
        other = layers[use.module]
        if flow.output(use.module) is None or other is layer:
            continue
        if _grouped(other, len(layer.weight)) is not None:
            pairs.append((name, use.module))
    return pairs


def _grouped(layer: FloatLayer, channels: int) -> Tensor | None:
    """A view of a weight, ``(groups, out, in, rest)``, by the channels that go into it."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear):
        if layer.in_features % channels:
            return None
        return weight.view(1, len(weight), channels, -1)
    if layer.in_channels != channels:
        return None
    return weight.reshape(groups, len(weight) // groups, channels // groups, -1)


def _equalize(first: FloatLayer, second: FloatLayer) -> float:
    """Move one factor per channel; returns how far the largest is from 1."""
    rows = first.weight.detach().flatten(1)
    columns = _grouped(second, len(rows))
    assert columns is not None
    own, other = rows.abs().amax(1).double(), columns.abs().amax((1, 3)).flatten().double()
    alive = (own > 0) & (other > 0)
    factor = torch.where(alive, (own / other).sqrt(), 1.0)
    ones = (1,) * (first.weight.ndim - 1)
    first.weight.copy_(first.weight.double() / factor.view(-1, *ones))
    if first.bias is not None:
        first.bias.copy_(first.bias.double() / factor)
    scaled = columns.double() * factor.view(columns.shape[0], 1, columns.shape[2], 1)
    second.weight.copy_(scaled.reshape(second.weight.shape))
    return (factor - 1).abs().max().item()


def _copied(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
