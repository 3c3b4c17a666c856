"""How much each layer's quantization changes the model's output."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn

from torsh_quant._batches import first_tensor, run_model
from torsh_quant._flow import every_layer_called
from torsh_quant._journal import Journal, data_digest, model_digest
from torsh_quant._layer import QuantizedLayer
from torsh_quant._layers import (
    FloatLayer,
    quantizable_layers,
    quantized_layer,
    quantized_layers,
    replace_modules,
)
from torsh_quant._progress import progress_bar
from torsh_quant._scores import LayerScore, Score, Sensitivity
from torsh_quant._spec import Scheme

SAVE_S = 1.0  # seconds of work that a crash may cost


def sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    schemes: Sequence[str | Scheme],
    *,
    score: Score = "kl",
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
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
        resume: A folder. What is measured is kept in it, and a run that was killed goes on there,
            to the same numbers.
        progress: Whether to show a bar for what takes longer than two seconds; None if rich is
            installed.

    Returns:
        A :class:`Sensitivity`; print it, ``plot()`` it, or read its ``rows``.

    Raises:
        ValueError: If there is no data, no scheme, no layer, ``score`` is not known, a scheme is
            static, or ``resume`` holds other work.
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
    static = [str(one) for one in parsed if one.is_static]
    if static:
        raise ValueError(
            f"schemes has {static[0]!r}, whose scales come from calibration; measure "
            f"{static[0].replace('-static', '')!r} in its place"
        )
    journal = None
    if resume is not None:
        found_work = {
            "model": model_digest(model),
            "data": data_digest(batches),
            "schemes": repr([str(one) for one in parsed]),
            "score": f"{score} {seed}",
            "torch": torch.__version__,
            "threads": str(torch.get_num_threads()),
        }
        journal = Journal(resume, found_work)
    shown = find_spec("rich") is not None if progress is None else progress
    pairs = [(name, one) for name in layers for one in parsed]
    total = len(batches) if score == "grad" else len(pairs)
    with (
        every_layer_called(),
        _kept(journal) as kept,
        progress_bar(shown, total, doing="Measuring", unit="steps") as advance,
    ):
        if score == "grad":
            values, samples = _by_gradient(model, layers, batches, parsed, seed, kept, advance)
        else:
            values, samples = _by_swapping(model, layers, batches, parsed, score, kept, advance)
    rows = [_row(name, layers[name], one, values[name, str(one)]) for name, one in pairs]
    return Sensitivity(score, samples, tuple(rows))


class _Kept:
    """Numbers of a run by name, written to a journal now and then."""

    def __init__(self, journal: Journal | None) -> None:
        self.journal = journal
        self.numbers: dict[str, Tensor] = {}
        if journal is not None:
            self.numbers = journal.read("scores") or {}
        self._saved = time.monotonic()

    def save(self, *, now: bool = False) -> None:
        if self.journal is None or (not now and time.monotonic() - self._saved < SAVE_S):
            return
        self.journal.write("scores", self.numbers)
        self._saved = time.monotonic()


@contextmanager
def _kept(journal: Journal | None) -> Iterator[_Kept]:
    kept = _Kept(journal)
    try:
        yield kept
    finally:
        if kept.numbers:
            kept.save(now=True)


def _row(name: str, layer: FloatLayer, scheme: Scheme, value: float) -> LayerScore:
    made = quantized_layer(name, layer, scheme)
    return LayerScore(
        name,
        str(scheme),
        value,
        _nbytes(made),
        0 if made.bias is None else made.bias.nbytes,
        sum(parameter.nbytes for parameter in layer.parameters()),
        layer.weight.numel(),
    )


def _nbytes(layer: QuantizedLayer) -> int:
    return sum(tensor.nbytes for tensor in layer._buffers.values() if tensor is not None)


def _run(model: nn.Module, batch: Any) -> Tensor:
    return first_tensor(run_model(model, batch))


def _by_swapping(
    model: nn.Module,
    layers: Mapping[str, FloatLayer],
    batches: Sequence[Any],
    schemes: Sequence[Scheme],
    score: Score,
    kept: _Kept,
    advance: Callable[[int], None],
) -> tuple[dict[tuple[str, str], float], int]:
    values: dict[tuple[str, str], float] = {}
    with torch.no_grad():
        expected = [_run(model, batch).float() for batch in batches]
        for name, layer in layers.items():
            for scheme in schemes:
                key = f"{name} {scheme}"
                if key not in kept.numbers:
                    made = quantized_layer(name, layer, scheme)
                    swapped = replace_modules(model, {layer: made})
                    try:
                        found = [_run(swapped, batch).float() for batch in batches]
                    finally:
                        replace_modules(model, {made: layer})
                    value = _distance(expected, found, score)
                    kept.numbers[key] = torch.tensor(value, dtype=torch.float64)
                    kept.save()
                values[name, str(scheme)] = kept.numbers[key].item()
                advance(1)
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
    kept: _Kept,
    advance: Callable[[int], None],
) -> tuple[dict[tuple[str, str], float], int]:
    generator = torch.Generator().manual_seed(seed)
    made = {
        (name, scheme): quantized_layer(name, layer, scheme)
        for name, layer in layers.items()
        for scheme in schemes
    }
    zero = torch.zeros(len(made) + 2, dtype=torch.float64)
    sums = kept.numbers.setdefault("sums", zero)  # of the pairs, of the outputs, and the samples
    done = int(kept.numbers.setdefault("batches", torch.tensor(0)).item())
    if "generator" in kept.numbers:
        generator.set_state(kept.numbers["generator"])
    advance(done)
    for number in range(done, len(batches)):
        batch = batches[number]
        sums = sums.clone()  # what is kept stays that of whole batches
        calls: list[tuple[str, Tensor, Tensor]] = []
        out = _recorded(model, layers, batch, calls)
        signs = torch.randint(0, 2, out.shape, generator=generator).mul_(2).sub_(1).to(out)
        outputs = [output for _, _, output in calls]
        gradients = torch.autograd.grad(out, outputs, signs, allow_unused=True)
        sums[-2] += out.detach().double().square().sum().item()
        sums[-1] += len(out)
        with torch.no_grad():
            for place, (name, scheme) in enumerate(made):
                # A layer called more than once changes the output by the sum over its calls.
                change = torch.zeros(len(out), dtype=torch.float64, device=out.device)
                for (called, x, output), gradient in zip(calls, gradients, strict=True):
                    if called == name and gradient is not None:
                        step = (made[name, scheme](x) - output.detach()).double() * gradient
                        rows = len(out) if step.shape[0] % len(out) == 0 else 1
                        change[:rows] += step.reshape(rows, -1).sum(1)
                sums[place] += change.square().sum().item()
        state = {"batches": torch.tensor(number + 1), "generator": generator.get_state()}
        kept.numbers |= {**state, "sums": sums}
        kept.save()
        advance(1)
    power = sums[-2].item()
    values = {
        (name, str(scheme)): sums[place].item() / power if power else 0.0
        for place, (name, scheme) in enumerate(made)
    }
    return values, int(sums[-1].item())


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
