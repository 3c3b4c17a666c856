"""What goes in and out of the linear layers that own some parameters."""

from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle


@dataclass
class LinearCall:
    """One call of an ``nn.Linear``."""

    layer: nn.Linear
    input: Tensor
    fixed_input: bool  # no parameter before this layer changes it
    output_grad: Tensor | None = None

    def _record(self, grad: Tensor) -> None:
        self.output_grad = grad


class LinearCalls:
    """Records the calls of the modules that own given parameters, while it is entered.

    A hook on all modules finds the owners by themselves, so nobody has to hand over the model, and
    nothing stays attached to it.

    Args:
        params: The parameters.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._params = {id(param): param for param in params}
        self._owner: dict[int, nn.Module] = {}
        self._foreign: list[str] = []
        self.calls: list[LinearCall] = []
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> "LinearCalls":
        self._handle = register_module_forward_hook(self._see, with_kwargs=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
            # which torch's handle forgets: torch.compile warns of any entry
            module._global_forward_hooks_with_kwargs.pop(self._handle.id, None)

    def _see(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        owned = [id(p) for p in layer._parameters.values() if id(p) in self._params]
        if not owned:
            return
        name = type(layer).__name__
        for number in owned:
            if self._owner.setdefault(number, layer) is not layer:
                self._foreign.append(f"a parameter is shared by two modules, the second a {name}")
        if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
            self._foreign.append(f"a parameter belongs to a {name}, which is no nn.Linear")
        elif isinstance(output, Tensor) and output.requires_grad:
            source: Tensor = args[0] if args else kwargs["input"]
            call = LinearCall(layer, source.detach(), not source.requires_grad)
            output.register_hook(call._record)
            self.calls.append(call)

    def obstacle(self) -> str | None:
        """Why the gradients are not ``output_grad x input`` of each sample; None if they are."""
        if self._foreign:
            return self._foreign[0]
        seen: set[nn.Module] = set()
        for call in self.calls:
            if call.layer in seen:
                return f"{call.layer} is called more than once, so its calls share weights"
            if call.input.dim() != 2:
                return (
                    f"the input of {call.layer} has shape {tuple(call.input.shape)}, "
                    "not (batch, features)"
                )
            seen.add(call.layer)
        unseen = self._params.keys() - self._owner.keys()
        missing = sum(self._params[number].requires_grad for number in unseen)
        if missing:
            return f"{missing} of the parameters are not used by calling a module"
        return None
