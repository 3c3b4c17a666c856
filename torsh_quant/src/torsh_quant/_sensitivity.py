"""How much each layer's quantization changes the model's output."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from torsh_quant._layer import QuantizedLayer
from torsh_quant._layers import (
    FloatLayer,
    quantizable_layers,
    quantized_layer,
    quantized_layers,
    replace_modules,
)
from torsh_quant._spec import Scheme
from torsh_quant._table import text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Score = Literal["kl", "mse", "grad"]
FORMAT = "torsh-quant-sensitivity"


@dataclass(frozen=True)
class LayerScore:
    """The score of one layer under one scheme.

    Args:
        layer: Name in the model.
        scheme: Short name of the scheme.
        value: The score; 0 is no change.
        nbytes: Bytes of the layer under the scheme.
    """

    layer: str
    scheme: str
    value: float
    nbytes: int


@dataclass(frozen=True)
class Sensitivity:
    """Scores of all layers under all schemes, in the order of the model.

    Args:
        score: What was measured: ``"kl"``, ``"mse"`` or ``"grad"``.
        samples: Number of samples measured on.
        rows: One for each layer and scheme.
    """

    score: Score
    samples: int
    rows: tuple[LayerScore, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in the order of the model."""
        return tuple(dict.fromkeys(row.layer for row in self.rows))

    @property
    def schemes(self) -> tuple[str, ...]:
        """Short names of the schemes, as they were given."""
        return tuple(dict.fromkeys(row.scheme for row in self.rows))

    def value(self, layer: str, scheme: str) -> float:
        """Return the score of one layer under one scheme.

        Raises:
            KeyError: If it was not measured.
        """
        for row in self.rows:
            if (row.layer, row.scheme) == (layer, scheme):
                return row.value
        raise KeyError(f"layer={layer!r} with scheme={scheme!r} was not measured")

    def table(self) -> str:
        """Return a text table: a layer a line, a scheme a column, the most sensitive first."""
        worst = {
            layer: max(self.value(layer, scheme) for scheme in self.schemes)
            for layer in self.layers
        }
        rows = [
            [layer or "(model)", *(f"{self.value(layer, scheme):.2e}" for scheme in self.schemes)]
            for layer in sorted(self.layers, key=lambda layer: -worst[layer])
        ]
        return text_table([f"layer ({self.score})", *self.schemes], rows)

    def to_json(self) -> str:
        """Return everything as JSON, with the format's name and version."""
        return json.dumps({"format": FORMAT, "version": 1, **asdict(self)}, indent=1)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw one line of points per scheme over the layers, on a logarithmic scale.

        Args:
            ax: Where to draw; by default the current axes of matplotlib.

        Returns:
            The axes.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot as plt
        except ImportError as error:
            message = "Sensitivity.plot needs matplotlib: pip install 'torsh-quant[plot]'"
            raise ImportError(message) from error
        axes: Axes = plt.gca() if ax is None else ax
        places = range(len(self.layers))
        floor = min((row.value for row in self.rows if row.value > 0), default=1.0)
        for scheme in self.schemes:
            values = [max(self.value(layer, scheme), floor) for layer in self.layers]
            axes.plot(places, values, marker="o", linewidth=1, label=scheme)
        axes.set_yscale("log")
        axes.set_xticks(list(places), [layer or "(model)" for layer in self.layers], rotation=90)
        label = {"kl": "KL divergence of the output", "mse": "relative squared error of the output"}
        axes.set_ylabel(label.get(self.score, "estimated relative squared error of the output"))
        axes.legend()
        return axes

    def __str__(self) -> str:
        return self.table()


def sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    schemes: Sequence[str | Scheme],
    *,
    score: Score = "kl",
    seed: int = 0,
) -> Sensitivity:
    """Measure what quantizing each layer alone does to the model's output.

    ``"mse"`` and ``"kl"`` run the model once per layer and scheme and compare its output with that
    of the float model: the squared error over the squared output, or the mean KL divergence of the
    softmax over the last dimension, in nats. ``"grad"`` estimates ``"mse"`` from one forward and
    backward for all layers and schemes: the gradient of a random signed sum of the outputs, times
    the change of each layer's own output, squared and averaged over samples. Its expectation is
    the first-order squared error; its relative spread falls with one over the root of the number
    of samples.

    Activations count where the scheme quantizes them. The model's weights, gradients and mode are
    left as they were.

    Args:
        model: A float model in evaluation mode.
        data: Batches: a tensor, a tuple or list whose first item is the input, or a dictionary of
            keyword arguments (``labels`` is left out). Kept in memory while it runs; some
            hundred samples do.
        schemes: Schemes or their short names.
        score: What to measure.
        seed: Of the random signs of ``"grad"``.

    Returns:
        A :class:`Sensitivity`; print it, ``plot()`` it, or read its ``rows``.

    Raises:
        ValueError: If there is no data, no scheme, no layer, or ``score`` is not known.
        RuntimeError: If the model is in training mode or quantized already.

    Example:
        >>> net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        >>> found = sensitivity(net, [torch.randn(64, 16)], ["w8a8", "w2a16"], score="mse")
        >>> found.layers, found.schemes
        (('0', '2'), ('w8a8', 'w2a16'))
        >>> found.value("0", "w8a8") < 0.01 < found.value("0", "w2a16")
        True

    Reference:
        The gradient score is the Hutchinson estimate of a Jacobian norm (M. F. Hutchinson, 1990),
        per sample as in the empirical Fisher information (F. Kunstner et al., 2019,
        arXiv:1905.12558), with random signs in place of labels.
    """
    if score not in ("kl", "mse", "grad"):
        raise ValueError(f"score={score!r} is not known; use 'kl', 'mse' or 'grad'")
    if model.training:
        raise RuntimeError("the model is in training mode; call model.eval() before sensitivity")
    if (found := next(quantized_layers(model), None)) is not None:
        raise RuntimeError(f"{found[0]!r} is quantized already; measure the float model")
    layers = dict(quantizable_layers(model))
    parsed = [Scheme.parse(scheme) for scheme in schemes]
    batches = list(data)
    if not (layers and parsed and batches):
        raise ValueError(
            f"nothing to measure: {len(layers)} layers, {len(parsed)} schemes, "
            f"{len(batches)} batches; each must be at least one"
        )
    values: dict[tuple[str, str], float]
    with _every_layer_called():
        if score == "grad":
            values, samples = _by_gradient(model, layers, batches, parsed, seed)
        else:
            values, samples = _by_swapping(model, layers, batches, parsed, score)
    rows = [
        LayerScore(
            name,
            str(scheme),
            values[name, str(scheme)],
            _nbytes(quantized_layer(name, layer, scheme)),
        )
        for name, layer in layers.items()
        for scheme in parsed
    ]
    return Sensitivity(score, samples, tuple(rows))


@contextmanager
def _every_layer_called() -> Iterator[None]:
    # In evaluation torch's encoder layers hand their linear layers' weights to one fused float
    # kernel instead of calling the layers.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _nbytes(layer: QuantizedLayer) -> int:
    return sum(tensor.nbytes for tensor in layer._buffers.values() if tensor is not None)


def _run(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        out = model(**{key: value for key, value in batch.items() if key != "labels"})
    elif isinstance(batch, (tuple, list)):
        out = model(batch[0])
    else:
        out = model(batch)
    return _first_tensor(out)


def _first_tensor(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    if isinstance(out, Mapping):
        out = list(out.values()) if out.get("logits") is None else out["logits"]
        return _first_tensor(out)
    if isinstance(out, (tuple, list)) and out:
        return _first_tensor(out[0])
    raise TypeError(f"the model returned {type(out).__name__}; it must return or contain a tensor")


def _by_swapping(
    model: nn.Module,
    layers: Mapping[str, FloatLayer],
    batches: Sequence[Any],
    schemes: Sequence[Scheme],
    score: Score,
) -> tuple[dict[tuple[str, str], float], int]:
    values = {}
    with torch.no_grad():
        expected = [_run(model, batch).float() for batch in batches]
        for name, layer in layers.items():
            for scheme in schemes:
                made = quantized_layer(name, layer, scheme)
                swapped = replace_modules(model, {layer: made})
                try:
                    found = [_run(swapped, batch).float() for batch in batches]
                finally:
                    replace_modules(model, {made: layer})
                values[name, str(scheme)] = _distance(expected, found, score)
    return values, sum(len(batch) for batch in expected)


def _distance(expected: Sequence[Tensor], found: Sequence[Tensor], score: Score) -> float:
    pairs = list(zip(expected, found, strict=True))
    if score == "mse":
        change = sum((b - a).double().square().sum().item() for a, b in pairs)
        power = sum(a.double().square().sum().item() for a in expected)
        return change / power if power else 0.0
    total, count = 0.0, 0
    for a, b in pairs:
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        divergence = (p.exp() * (p - q)).sum(-1)
        total += divergence.sum().item()
        count += divergence.numel()
    return max(total / count, 0.0) if count else 0.0


def _by_gradient(
    model: nn.Module,
    layers: Mapping[str, FloatLayer],
    batches: Sequence[Any],
    schemes: Sequence[Scheme],
    seed: int,
) -> tuple[dict[tuple[str, str], float], int]:
    generator = torch.Generator().manual_seed(seed)
    made = {
        (name, scheme): quantized_layer(name, layer, scheme)
        for name, layer in layers.items()
        for scheme in schemes
    }
    sums = {(name, str(scheme)): 0.0 for name, scheme in made}
    power, samples = 0.0, 0
    for batch in batches:
        calls: list[tuple[str, Tensor, Tensor]] = []
        out = _recorded(model, layers, batch, calls)
        signs = torch.randint(0, 2, out.shape, generator=generator).mul_(2).sub_(1).to(out)
        outputs = [output for _, _, output in calls]
        gradients = torch.autograd.grad(out, outputs, signs, allow_unused=True)
        power += out.detach().double().square().sum().item()
        samples += len(out)
        with torch.no_grad():
            for name, scheme in made:
                # A layer called more than once changes the output by the sum over its calls.
                change = torch.zeros(len(out), dtype=torch.float64, device=out.device)
                for (called, x, output), gradient in zip(calls, gradients, strict=True):
                    if called == name and gradient is not None:
                        step = (made[name, scheme](x) - output.detach()).double() * gradient
                        rows = len(out) if step.shape[0] % len(out) == 0 else 1
                        change[:rows] += step.reshape(rows, -1).sum(1)
                sums[name, str(scheme)] += change.square().sum().item()
    return {key: value / power if power else 0.0 for key, value in sums.items()}, samples


def _recorded(
    model: nn.Module,
    layers: Mapping[str, FloatLayer],
    batch: Any,
    calls: list[tuple[str, Tensor, Tensor]],
) -> Tensor:
    """Run the model and note each call: layer, input, and output as a point of the graph."""
    names = {layer: name for name, layer in layers.items()}

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:
            output.requires_grad_()
        calls.append((names[cast("FloatLayer", module)], inputs[0].detach(), output))
        return output.clone()  # what follows may work in place

    handles = [layer.register_forward_hook(note) for layer in layers.values()]
    try:
        with torch.enable_grad():
            return _run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
