"""What calibration data shows of the inputs of a stage's layers."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from torsh_quant._batches import real_tokens, token_mask
from torsh_quant._journal import Journal
from torsh_quant._observers import Observer
from torsh_quant._stages import Feed, Stage
from torsh_quant._statistics import Collector

SAVE_S = 20.0  # seconds of calibration that a crash may cost


@dataclass(frozen=True, eq=False)
class Watch:
    """What is gathered of one layer's input.

    Args:
        collector: Its statistics, for methods that need them.
        observer: Its range, for static schemes.
    """

    collector: Collector | None
    observer: Observer | None

    def parts(self) -> dict[str, Collector | Observer]:
        """What there is, by name."""
        both = {"collector": self.collector, "observer": self.observer}
        return {name: part for name, part in both.items() if part is not None}


def watch_stage(
    feed: Feed,
    stage: Stage,
    watches: Mapping[str, Watch],
    journal: Journal | None,
    part: str,
    advance: Callable[[int], None],
) -> None:
    """Send all data through a stage and let its watches see the inputs.

    Args:
        feed: Sends the data.
        stage: The stage.
        watches: What is gathered, by layer; layers with the same input share one.
        journal: Where the work is kept, so that a killed run goes on with the same result.
        part: The stage's name in the journal.
        advance: Told of each batch.

    Raises:
        ValueError: If an input is not finite.
    """
    watches = {name: watch for watch, name in _first_of_each(watches).items()}
    begin = 0
    if journal is not None and (begun := journal.read(f"{part}-begun")) is not None:
        begin = int(begun.pop("batches").item())
        for name, tensors in _by_watch(begun).items():
            layer, _, kind = name.rpartition(" ")
            watches[layer].parts()[kind].load_state_dict(tensors)
    look = _Look(watches)
    handles = [
        feed.model.get_submodule(name).register_forward_pre_hook(partial(look, name))
        for name in watches
    ]
    saved = time.monotonic()
    advance(begin)
    try:
        for number in range(begin, len(feed.batches)):
            look.start(number, token_mask(feed.batches[number]))
            feed.run(stage, number)
            advance(1)
            if journal is not None and time.monotonic() - saved > SAVE_S:
                journal.write(f"{part}-begun", _state(watches, number + 1))
                saved = time.monotonic()
    finally:
        for handle in handles:
            handle.remove()


def _first_of_each(watches: Mapping[str, Watch]) -> dict[Watch, str]:
    first: dict[Watch, str] = {}
    for name, watch in watches.items():
        first.setdefault(watch, name)
    return first


class _Look:
    """Hands the inputs of layers to their watches."""

    def __init__(self, watches: Mapping[str, Watch]) -> None:
        self.watches = watches
        self.number, self.mask = 0, cast("Tensor | None", None)

    def start(self, number: int, mask: Tensor | None) -> None:
        self.number, self.mask = number, mask

    def __call__(self, name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        x = cast("Tensor", args[0]).detach()
        watch = self.watches[name]
        try:
            if watch.observer is not None:
                watch.observer.observe(real_tokens(x, self.mask))
            if watch.collector is not None:
                watch.collector.observe(x, self.mask)
        except ValueError as error:
            raise ValueError(f"the input of {name!r} in batch {self.number}: {error}") from error


def _state(watches: Mapping[str, Watch], batches: int) -> dict[str, Tensor]:
    tensors = {"batches": torch.tensor(batches)}
    for layer, watch in watches.items():
        for kind, held in watch.parts().items():
            for name, tensor in held.state_dict().items():
                tensors[f"{layer} {kind} {name}"] = tensor
    return tensors


def _by_watch(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        watch, _, name = key.rpartition(" ")
        found[watch][name] = tensor
    return found
