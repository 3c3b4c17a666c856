"""How long each layer takes under each scheme, on real input and on this device."""

import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torsh_quant._batches import run_model
from torsh_quant._flow import every_layer_called
from torsh_quant._layers import quantizable_layers, quantized_layer
from torsh_quant._spec import Scheme


def measure_latency(
    model: nn.Module,
    data: Iterable[Any],
    schemes: Sequence[str | Scheme],
    *,
    repeats: int = 15,
) -> dict[tuple[str, str], float]:
    """Time every layer alone under every scheme and as float, for :func:`allocate`.

    Each layer gets the input that the first batch brings it. Layers are timed in turn, so that what
    else the machine does falls on all of them; the median of the turns counts. A layer that is
    called several times counts as often.

    Args:
        model: A float model in evaluation mode, on the device to measure.
        data: Batches as for :func:`quantize`; the first one is used.
        schemes: Schemes or their short names; of static ones the dynamic form is timed.
        repeats: Turns.

    Returns:
        Seconds for each layer and scheme, ``"float"`` among them.

    Raises:
        ValueError: If there is no batch, or it reaches no layer.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8)).eval()
        >>> found = measure_latency(net, [torch.rand(4, 8)], ["w8a8"])
        >>> sorted(found), min(found.values()) > 0
        ([('0', 'float'), ('0', 'w8a8')], True)
    """
    batch = next(iter(data), None)
    if batch is None:
        raise ValueError("data is empty; give one batch")
    inputs: dict[str, list[Tensor]] = {}
    layers = dict(quantizable_layers(model))
    hooks = []
    for name, layer in layers.items():

        def look(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            inputs.setdefault(name, []).append(args[0].detach())

        hooks.append(layer.register_forward_pre_hook(look))
    try:
        with torch.no_grad(), every_layer_called():
            run_model(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not inputs:
        raise ValueError("data reaches no layer that can be quantized")
    timed: dict[tuple[str, str], nn.Module] = {}
    for name in inputs:
        timed[name, "float"] = layers[name]
        for scheme in schemes:
            one = Scheme.parse(scheme)
            dynamic = Scheme.parse(str(one).replace("-static", ""))
            timed[name, str(one)] = quantized_layer(name, layers[name], dynamic)
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in timed}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for key, layer in timed.items():
                _wait(layer)
                begin = time.perf_counter()
                for x in inputs[key[0]]:
                    layer(x)
                _wait(layer)
                if turn:  # the first one packs weights
                    taken[key].append(time.perf_counter() - begin)
    return {key: statistics.median(times) for key, times in taken.items()}


def _wait(layer: nn.Module) -> None:
    device = next(tensor for tensor in layer.state_dict().values()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
