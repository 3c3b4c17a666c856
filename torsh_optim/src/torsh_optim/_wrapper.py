"""What the optimizers around another optimizer share."""

from collections import defaultdict
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torsh_optim._checkpoint import align_groups
from torsh_optim._optimizer import FusedOptimizer


class OptimizerWrapper(Optimizer):
    """Optimizer with the groups, state and defaults of the one it wraps.

    A subclass defines the step, the options it puts into the groups (``_set_options``), the tensors
    it adds to saved states (``_own_state``), and how it loads them, between ``_begin_load`` and
    ``_end_load``.
    """

    base_optimizer: Optimizer

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if getattr(optimizer, "needs_index", False):
            raise TypeError(
                f"{type(optimizer).__name__} needs index=, the numbers of the samples, in each "
                f"step, and {type(self).__name__} cannot pass them on; use it alone"
            )
        # Optimizer.__init__ would make groups and state of its own; this is what unpickling uses
        # to complete an optimizer, hooks included.
        super().__setstate__({"base_optimizer": optimizer, "defaults": optimizer.defaults})

    # --- what a subclass defines ---

    def _set_options(self) -> None:
        """Put the options into the groups that lack them."""
        raise NotImplementedError

    def _own_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Tensors of each parameter to save beside the wrapped optimizer's."""
        raise NotImplementedError

    # --- one set of groups, state and defaults, the wrapped optimizer's ---

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's parameter groups."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The wrapped optimizer's state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.base_optimizer.state = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the wrapped optimizer.

        Args:
            param_group: As the wrapped optimizer takes it.
        """
        self.base_optimizer.add_param_group(param_group)
        self._set_options()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters.

        Args:
            set_to_none: Remove them instead of filling them with zeros.
        """
        self.base_optimizer.zero_grad(set_to_none)

    def __getattr__(self, name: str) -> Any:
        # what the wrapped optimizer tells of itself: grad_norm, last_lr(), implementation ...
        if name.startswith("_") or name == "base_optimizer":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base_optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        return {"base_optimizer": self.base_optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "defaults": state["base_optimizer"].defaults})
        self._set_options()

    # --- state dictionaries ---

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state with the tensors of the wrapper added."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.base_optimizer.state_dict()
        state, own = dict(state_dict["state"]), self._own_state()
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, param in zip(numbers, params, strict=True):
            if param in own:
                state[number] = {**state.get(number, {}), **own[param]}
        state_dict = {**state_dict, "state": state}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, state_dict)
            if result is not None:
                state_dict = result
        return state_dict

    def _begin_load(
        self, state_dict: dict[str, Any], keys: tuple[str, ...]
    ) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        """Run the hooks, and split a state into the wrapped optimizer's and what ``keys`` name."""
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            if result is not None:
                state_dict = result
        rest: dict[Any, Any] = {}
        own: dict[int, dict[str, Any]] = {}
        for number, values in state_dict["state"].items():
            kept = dict(values) if isinstance(values, dict) else values
            if isinstance(kept, dict):
                taken = {key: kept.pop(key) for key in keys if key in kept}
                if taken:
                    own[number] = taken
            if kept:
                rest[number] = kept
        return {**state_dict, "state": rest}, own

    def _aligned(self, saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Put saved groups into the order in which the wrapped optimizer loads them."""
        if isinstance(self.base_optimizer, FusedOptimizer):  # goes by names, torch's by position
            return align_groups(self.param_groups, saved_groups, warn=False)
        return saved_groups

    def _end_load(self) -> None:
        """Complete the groups, and run the hooks."""
        self._set_options()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)
