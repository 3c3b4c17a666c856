"""Which layer's output goes where, seen in one forward pass of any model.

Folding a normalisation into a convolution, or moving a factor from one layer to the next, is right
only where nothing else uses the tensor between them. Names of modules do not tell, and tracers give
up on much real code. So the model runs once on real input while every torch function notes the
tensors that go in and come out.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.hooks import RemovableHandle

from torsh_quant._batches import first_tensor, run_model

Key = tuple[int, int]  # a tensor, and how often it was changed in place


@dataclass(frozen=True)
class Use:
    """One call of a torch function.

    Args:
        function: Its last name: ``"batch_norm"``.
        module: Name of the innermost module that was running.
        inputs: The tensors that went in, in order.
        output: The first tensor that came out.
    """

    function: str
    module: str
    inputs: tuple[Key, ...]
    output: Key


class Flow:
    """What one forward pass did with its tensors.

    Args:
        uses: All calls, in order.
        outputs: For each module, the first tensor that it returned at each call.
        results: All tensors that the model itself returned.
    """

    def __init__(
        self, uses: Sequence[Use], outputs: Mapping[str, Sequence[Key]], results: Sequence[Key]
    ) -> None:
        self.uses = tuple(uses)
        self.outputs = {name: tuple(keys) for name, keys in outputs.items()}
        self._users: dict[Key, list[Use]] = defaultdict(list)
        for use in uses:
            for key in dict.fromkeys(use.inputs):
                self._users[key].append(use)
        self._results = frozenset(results)

    def output(self, module: str) -> Key | None:
        """Return what a module returned, if it was called exactly once."""
        keys = self.outputs.get(module, ())
        return keys[0] if len(keys) == 1 else None

    def users(self, key: Key) -> list[Use]:
        """Return the calls that a tensor went into."""
        return self._users.get(key, [])

    def input_of(self, module: str, function: str) -> Key | None:
        """Return the first tensor of a module's only call of a function."""
        found = [use for use in self.uses if (use.module, use.function) == (module, function)]
        return found[0].inputs[0] if len(found) == 1 and found[0].inputs else None

    def sole_use(self, key: Key | None) -> Use | None:
        """Return the one call that a tensor goes into; None if it goes elsewhere too."""
        if key is None or key in self._results:
            return None
        users = self.users(key)
        return users[0] if len(users) == 1 else None

    def only_user(self, module: str) -> Use | None:
        """Return the one call that a module's output goes into; None if it goes elsewhere too."""
        return self.sole_use(self.output(module))

    def producers(self, key: Key) -> list[str]:
        """Return the modules that returned a tensor, the innermost first."""
        return [name for name, keys in self.outputs.items() if keys == (key,)]


def record_flow(model: nn.Module, batch: Any) -> Flow:
    """Run a model once and note where its tensors go.

    All tensors of the pass are kept until it ends: use a small batch.

    Args:
        model: In evaluation mode.
        batch: One batch, as for :func:`quantize`.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
        >>> flow = record_flow(net, torch.ones(1, 2))
        >>> flow.only_user("0").function, flow.only_user("1").module
        ('relu', '2')
    """
    recorder = _Recorder()
    with torch.no_grad(), _module_names(model, recorder), recorder, every_layer_called():
        run_model(model, batch)
    return Flow(recorder.uses, recorder.outputs, recorder.results)


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self.outputs: dict[str, list[Key]] = {}
        self.results: list[Key] = []
        self.running = [""]
        self._kept: list[Tensor] = []  # an id is free for another tensor once its own is gone

    def key(self, tensor: Tensor) -> Key:
        self._kept.append(tensor)
        return id(tensor), tensor._version

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            inputs = tuple(self.key(tensor) for tensor in _tensors((*args, *kwargs.values())))
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            output = next(_tensors((result,)), None)
            if output is not None and inputs:
                name = (resolve_name(func) or getattr(func, "__name__", "")).rpartition(".")[2]
                self.uses.append(Use(name, self.running[-1], inputs, self.key(output)))
        return result


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(list(value.values()))
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


@contextmanager
def _module_names(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():

        def enter(_: nn.Module, __: Any, name: str = name) -> None:
            recorder.running.append(name)

        def leave(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            recorder.running.pop()
            with torch._C.DisableTorchFunction():
                found = [recorder.key(tensor) for tensor in _tensors((output,))]
            recorder.outputs.setdefault(name, []).extend(found[:1])
            if not name:
                recorder.results = found

        handles += [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def every_layer_called() -> Iterator[None]:
    """Keep torch's encoder layers from skipping their linear layers.

    In evaluation they hand the weights to one fused float kernel instead of calling the layers.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def same_output(model: nn.Module, batch: Any, expected: Tensor) -> bool:
    """Whether a model still gives what it gave, up to the rounding of its arithmetic."""
    with torch.no_grad():
        found = first_tensor(run_model(model, batch)).double()
    tolerance = max(1e-4, 16 * torch.finfo(expected.dtype).eps)
    change = (found - expected.double()).norm()
    return bool(change <= tolerance * expected.double().norm())
