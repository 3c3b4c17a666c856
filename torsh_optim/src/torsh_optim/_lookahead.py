"""Lookahead."""

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from torsh_optim._checkpoint import match_params
from torsh_optim._shards import local, spread_like
from torsh_optim._wrapper import OptimizerWrapper

Pullback = Literal["none", "reset", "pullback"]

_OPTIONS = ("lookahead_k", "lookahead_alpha", "lookahead_pullback", "lookahead_step")
_MOMENTA = ("momentum_buffer", "exp_avg")  # first moments of torch's optimizers and of ours


class Lookahead(OptimizerWrapper):
    """Let an optimizer run ahead k steps, then go a part of the way to where it arrived.

    Every ``k`` steps the slow weights move by ``alpha`` towards the weights that the wrapped
    optimizer has reached, and the weights are set to them. The slow weights begin as the weights
    that the first step finds; those of a group added later, as its first step finds them.

    The wrapper is an optimizer itself: schedulers, hooks, ``GradScaler``, checkpoints and Lightning
    take it in place of the wrapped one. It has no groups or state of its own: ``param_groups``
    (with the options as ``lookahead_*``, to be changed there) and ``state`` are those of
    ``base_optimizer``, and saved states hold the slow weights as ``slow`` (and the first moment of
    the last synchronisation as ``slow_momentum``). Step and save through the wrapper, not through
    the wrapped optimizer.

    A step with learning rate 0 in all groups is not counted: it moves nothing, and
    ``torch.distributed.checkpoint`` takes such a step to create the state it then loads.

    Args:
        optimizer: Any optimizer, before or after its first step.
        k: Steps between synchronisations, at least 1.
        alpha: Part of the way to go, in (0, 1]; 1 changes nothing.
        pullback: What happens to the first moment (``momentum_buffer``, ``exp_avg``) when the
            weights go back: ``none`` keeps it, ``reset`` sets it to zero, ``pullback`` moves it by
            ``alpha`` from its value at the last synchronisation, as the weights.

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``, or is a SAGA.
        ValueError: An option is out of range, or the optimizer already is a Lookahead.

    Example:
        Five steps of length 1 from 0 arrive at 5; half the way is 2.5.

        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> opt = Lookahead(torch.optim.SGD([weight], lr=1.0), k=5, alpha=0.5)
        >>> for _ in range(5):
        ...     weight.grad = torch.tensor([-1.0])
        ...     opt.step()
        >>> weight.detach()
        tensor([2.5000])

    Reference:
        Michael Zhang, James Lucas, Geoffrey Hinton, Jimmy Ba: Lookahead Optimizer: k steps forward,
        1 step back, 2019, arXiv 1907.08610.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        k: int = 5,
        alpha: float = 0.5,
        *,
        pullback: Pullback = "none",
    ) -> None:
        super().__init__(optimizer)
        if isinstance(optimizer, Lookahead):
            raise ValueError("optimizer is a Lookahead already; wrap its base_optimizer")
        _check({"k": k, "alpha": alpha, "pullback": pullback})
        self._slow = {}
        self._options = (k, float(alpha), pullback, 0)
        self._set_options()

    _slow: dict[Tensor, dict[str, Tensor]]
    _options: tuple[int, float, Pullback, int]

    def _set_options(self) -> None:
        for group in self.base_optimizer.param_groups:
            for key, value in zip(_OPTIONS, self._options, strict=True):
                group.setdefault(key, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_slow": self._slow, "_options": self._options}

    # --- the step ---

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Let the wrapped optimizer take a step, and synchronise after every k-th.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What the wrapped optimizer's step returned.
        """
        groups = self.param_groups
        counted = any(_moves(group["lr"]) for group in groups if "lr" in group) or not any(
            "lr" in group for group in groups
        )
        if counted:
            for group in groups:
                self._begin(group)
        loss = self.base_optimizer.step(closure)
        if counted:
            for group in groups:
                group["lookahead_step"] += 1
                if group["lookahead_step"] % group["lookahead_k"] == 0:
                    self._synchronise(group)
        return loss

    def _begin(self, group: dict[str, Any]) -> None:
        for param in group["params"]:
            if param not in self._slow:
                self._slow[param] = {"slow": param.detach().clone()}

    @torch.no_grad()
    def _synchronise(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = group["params"]
        if not params:
            return
        slow = [self._slow_tensor(param, "slow") for param in params]
        _interpolate(slow, params, group["lookahead_alpha"])
        if group["lookahead_pullback"] == "none":
            return
        momenta = {param: self._momentum(param) for param in params if self.state.get(param)}
        if not momenta:
            return
        if group["lookahead_pullback"] == "reset":
            torch._foreach_zero_(list(map(local, momenta.values())))
            return
        for param, momentum in momenta.items():
            if "slow_momentum" not in self._slow[param]:
                self._slow[param]["slow_momentum"] = torch.zeros_like(momentum)
        saved = [self._slow_tensor(param, "slow_momentum") for param in momenta]
        _interpolate(saved, list(momenta.values()), group["lookahead_alpha"])

    def _slow_tensor(self, param: Tensor, key: str) -> Tensor:
        tensor = self._slow[param][key]
        if tensor.device != param.device or tensor.dtype != param.dtype:  # the model was moved
            tensor = self._slow[param][key] = tensor.to(param.device, param.dtype)
        return tensor

    def _has_momentum(self, param: Tensor) -> bool:
        state = self.state.get(param, {})
        return any(isinstance(state.get(key), Tensor) for key in _MOMENTA)

    def _momentum(self, param: Tensor) -> Tensor:
        state = self.state[param]
        for key in _MOMENTA:
            if isinstance(state.get(key), Tensor):
                momentum: Tensor = state[key]
                return momentum
        raise RuntimeError(
            f"lookahead_pullback needs a first moment ({' or '.join(_MOMENTA)}), but "
            f"{type(self.base_optimizer).__name__} keeps {sorted(map(str, state))}; "
            "use pullback='none'"
        )

    # --- state dictionaries ---

    def _own_state(self) -> dict[Tensor, dict[str, Tensor]]:
        # What is not there yet is saved as it begins: a loader that fills the tensors it finds, as
        # torch.distributed.checkpoint does, would pass it by.
        own = {}
        for group in self.param_groups:
            pulled = group["lookahead_pullback"] == "pullback"
            for param in group["params"]:
                slow = self._slow.get(param) or {"slow": param.detach().clone()}
                if pulled and "slow_momentum" not in slow and self._has_momentum(param):
                    slow = {**slow, "slow_momentum": torch.zeros_like(self._momentum(param))}
                own[param] = slow
        return own

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of a Lookahead, or of the wrapped optimizer alone.

        With the latter the slow weights begin as the weights that the next step finds, and the
        count at 0.

        Args:
            state_dict: What ``state_dict`` returned; not changed.

        Raises:
            ValueError: The wrapped optimizer refuses it, an option is out of range, or a slow
                weight is missing or does not fit its parameter.
        """
        state_dict, slow = self._begin_load(state_dict, ("slow", "slow_momentum"))
        groups = self._aligned(state_dict["param_groups"])
        targets = match_params(self.param_groups, groups)
        for group in groups:
            _check(group, "lookahead_")
            for number in group["params"]:
                param, _, name = targets[number]
                taken = slow.get(number, {})
                if group.get("lookahead_step", 0) > 0 and "slow" not in taken:
                    raise ValueError(
                        f"'slow' of {name} is missing in the loaded state, although its group has "
                        f"lookahead_step={group['lookahead_step']}; remove the lookahead_* options "
                        "from the group to begin with the weights as they are"
                    )
                for key, value in taken.items():
                    _check_slow(key, value, param, name)

        self.base_optimizer.load_state_dict(state_dict)
        self._slow = {
            param: {
                key: spread_like(param, value, f"{key!r} of {name} in the loaded state")
                for key, value in slow[number].items()
            }
            for number, (param, _, name) in targets.items()
            if number in slow
        }
        self._end_load()


def _check(options: dict[str, Any], prefix: str = "") -> None:
    """Raise ValueError for options out of range; those that are missing are passed by."""
    k, alpha = options.get(f"{prefix}k", 1), options.get(f"{prefix}alpha", 1.0)
    pullback, step = options.get(f"{prefix}pullback", "none"), options.get(f"{prefix}step", 0)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"{prefix}k={k!r} must be an integer of at least 1")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0.0 < alpha <= 1.0:
        raise ValueError(f"{prefix}alpha={alpha!r} must be in (0, 1]")
    if pullback not in ("none", "reset", "pullback"):
        raise ValueError(f"{prefix}pullback={pullback!r} must be 'none', 'reset' or 'pullback'")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"{prefix}step={step!r} must be an integer of at least 0")


def _check_slow(key: str, value: Any, param: Tensor, name: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{key!r} of {name} in the loaded state is a {type(value).__name__}, not a tensor; "
            "load a state saved by Lookahead"
        )
    if value.shape != param.shape:
        raise ValueError(
            f"{key!r} of {name} in the loaded state has shape {tuple(value.shape)}, the parameter "
            f"{tuple(param.shape)}; load a state saved for this model"
        )
    if value.is_complex() != param.is_complex() or not (
        value.is_complex() or value.is_floating_point()
    ):
        raise ValueError(
            f"{key!r} of {name} in the loaded state is {value.dtype}, the parameter {param.dtype}; "
            "load a state saved for this model"
        )


def _moves(lr: float | Tensor) -> bool:
    """Whether a learning rate moves anything; one on a device counts: reading it would wait."""
    if isinstance(lr, Tensor) and not lr.is_cpu:
        return True
    return bool(lr != 0)


def _interpolate(slow: list[Tensor], fast: list[Tensor], alpha: float) -> None:
    """Move ``slow`` by ``alpha`` towards ``fast``, then ``fast`` to ``slow``."""
    # of DTensors the local parts: torch has no _foreach_copy_ for them
    slow, parts = list(map(local, slow)), list(map(local, fast))
    torch._foreach_lerp_(slow, parts, alpha)
    torch._foreach_copy_(parts, slow)
    increment_version(fast)
