"""The order in which the layers of a model are calibrated, and how data reaches each of them.

A stage is a set of layers whose inputs are looked at together, in a model whose earlier stages are
quantized already. Models built of blocks one after the other, as transformers are, hand each
block's output on to the next, so every block runs twice for each batch: once to look at its layers,
once to hand on what it gives when they are quantized. Other models run from the start, up to the
last layer of the stage.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from torsh_quant._batches import run_model
from torsh_quant._flow import every_layer_called
from torsh_quant._layers import quantizable_layers


@dataclass(frozen=True)
class Stage:
    """Layers that are calibrated together.

    Args:
        layers: Their names, in the order of their calls.
        block: Name of the block that they are in, if blocks hand on from one to the next.
        ends: Whether nothing of the stage is called after its last layer was called once.
    """

    layers: tuple[str, ...]
    block: str | None = None
    ends: bool = False


def count_calls(model: nn.Module, batch: Any) -> Counter[str]:
    """Count how often a batch reaches each layer, in the order of their first calls."""
    order: Counter[str] = Counter()
    handles = [
        layer.register_forward_pre_hook(partial(_count, order, name))
        for name, layer in quantizable_layers(model)
    ]
    try:
        with torch.no_grad(), every_layer_called():
            run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return order


def _count(order: Counter[str], name: str, _: nn.Module, __: Any) -> None:
    order[name] += 1


def plan_stages(
    model: nn.Module, batch: Any, chosen: Mapping[str, int], *, layerwise: bool
) -> list[Stage]:
    """Choose the stages.

    Args:
        model: The float model.
        batch: One batch.
        chosen: The layers to calibrate, in the order of their calls, and how often each is called.
        layerwise: Whether a layer should see what quantized ones give it; otherwise all layers are
            one stage and see the float model.
    """
    if not layerwise:
        return [Stage(tuple(chosen))]
    blocks = chained_blocks(model, batch)
    stages: list[Stage] = []
    for name in chosen:
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if block is not None and stages and stages[-1].block == block:
            stages[-1] = Stage((*stages[-1].layers, name), block)
        else:
            stages.append(Stage((name,), block, ends=chosen[name] == 1))
    return stages


def chained_blocks(model: nn.Module, batch: Any) -> list[str]:
    """Return the names of the largest list of modules that hand their output on to the next.

    Each is called once, in order, with the first output of the one before as first argument, and
    with the same other arguments as the first.
    """
    lists = sorted(
        (
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
        ),
        key=lambda pair: -sum(1 for _ in quantizable_layers(pair[1])),
    )
    for name, blocks in lists:
        prefix = f"{name}." if name else ""
        if any(next(quantizable_layers(block), None) is None for block in blocks):
            continue
        if _is_chain(model, cast("Sequence[nn.Module]", blocks), batch):
            return [f"{prefix}{child}" for child, _ in blocks.named_children()]
    return []


def _is_chain(model: nn.Module, blocks: Sequence[nn.Module], batch: Any) -> bool:
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]] = []

    def note(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((block, args, kwargs, output))

    handles = [block.register_forward_hook(note, with_kwargs=True) for block in blocks]
    try:
        with torch.no_grad(), every_layer_called():
            run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if [block for block, *_ in calls] != list(blocks):
        return False
    (_, first, kwargs, handed), *others = calls
    if not (first and isinstance(first[0], Tensor) and isinstance(_hidden(handed), Tensor)):
        return False
    for _, args, more, output in others:
        if not args or args[0] is not _hidden(handed):
            return False
        if not (_equal(args[1:], first[1:]) and _equal(more, kwargs)):
            return False
        handed = output
    return True


def _hidden(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)
    if isinstance(a, (tuple, list)) and type(a) is type(b):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a is b or (isinstance(a, (int, float, str, bool)) and a == b)


class _ReachedError(Exception):
    """Ends a forward pass where no more is needed of it."""


@dataclass
class Feed:
    """Runs a model on calibration data up to where a stage needs it.

    Args:
        model: The model; its layers are replaced as the work goes on.
        batches: The data.
    """

    model: nn.Module
    batches: Sequence[Any]
    _block: str | None = None
    _calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def run(self, stage: Stage, number: int) -> None:
        """Send one batch through the layers of a stage."""
        if stage.block is not None:
            args, kwargs = self._entered(stage.block)[number]
            with torch.no_grad(), every_layer_called():
                self.model.get_submodule(stage.block)(*args, **kwargs)
        elif stage.ends:
            self._run_until(self.model.get_submodule(stage.layers[-1]), number, after=True)
        else:
            with torch.no_grad(), every_layer_called():
                run_model(self.model, self.batches[number])

    def _run_until(
        self, module: nn.Module, number: int, *, after: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def stop(_: nn.Module, args: Any, kwargs: Any, *__: Any) -> None:
            found.append((args, kwargs))
            raise _ReachedError

        if after:
            handle = module.register_forward_hook(stop, with_kwargs=True)
        else:
            handle = module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad(), every_layer_called():
                run_model(self.model, self.batches[number])
        except _ReachedError:
            pass
        finally:
            handle.remove()
        return found[0]

    def hand_on(self, stage: Stage, following: Stage | None) -> None:
        """Replace the inputs of a finished block by its outputs, if the next one goes on there."""
        if stage.block is None or following is None or following.block is None:
            self._block = None
            self._calls.clear()
            return
        block = self.model.get_submodule(stage.block)
        handed = []
        for args, kwargs in self._entered(stage.block):
            with torch.no_grad(), every_layer_called():
                handed.append(((_hidden(block(*args, **kwargs)), *args[1:]), kwargs))
        self._block, self._calls = following.block, handed

    def _entered(self, block: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        if self._block != block:
            module, count = self.model.get_submodule(block), len(self.batches)
            self._calls = [self._run_until(module, n, after=False) for n in range(count)]
            self._block = block
        return self._calls


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Keep generative models from filling a cache, which would count tokens twice."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if not isinstance(before, bool):
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before
