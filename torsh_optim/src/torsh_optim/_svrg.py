"""SVRG."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer

from torsh_optim._checkpoint import match_params
from torsh_optim._eager import run_eagerly
from torsh_optim._wrapper import OptimizerWrapper

AlphaSchedule = Literal["constant", "linear"]

_KEYS = ("snapshot", "full_gradient")
_OPTIONS = (
    "svrg_alpha",
    "svrg_alpha_schedule",
    "svrg_total_steps",
    "svrg_snapshot_every",
    "svrg_step",
    "svrg_snapshot_step",
)


class SVRG(OptimizerWrapper):
    """Take out of each gradient the noise that the same batch showed at a snapshot.

    A step gives the wrapped optimizer ``g - alpha * (g_snapshot - full_gradient)``: the batch's
    gradient at the weights and at the snapshot, and the gradient of all data at the snapshot. Each
    step so costs two evaluations, and each snapshot a pass over the data.

    ``alpha=1`` is SVRG, which is made for convex problems and is known to fail on deep networks.
    For those, ``alpha_schedule="linear"`` lets alpha fall to 0 at ``total_steps`` (alpha-SVRG, with
    0.5 to 1 to begin with).

    Both evaluations of a step draw the same random numbers from torch's generators, so dropout
    masks are equal; the generators go on as after one evaluation. Buffers, such as the statistics
    of batch normalization, keep what the evaluation at the weights left in them: neither the second
    evaluation nor :meth:`snapshot` changes them. To see which there are, both run compiled models
    uncompiled.

    The wrapper is an optimizer itself, with the groups and state of ``base_optimizer``: schedulers,
    hooks and checkpoints take it in its place. The options are in the groups as ``svrg_*``; saved
    states hold the snapshot and its gradient, as ``snapshot`` and ``full_gradient``.

    Args:
        optimizer: Any optimizer that steps without a closure.
        alpha: Strength of the correction, in [0, 1].
        alpha_schedule: ``constant``, or ``linear``: ``alpha * (1 - step / total_steps)``.
        total_steps: When a linear alpha arrives at 0; then a step costs one evaluation.
        snapshot_every: Steps after which a snapshot is too old: :attr:`snapshot_due` says so, and
            a step refuses it. None leaves it to you.

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``.
        ValueError: An option is out of range, or the optimizer needs a closure or is an SVRG.

    Example:
        Losses 0.5 (w - 1)^2 and 0.5 (w - 4)^2: with the snapshot at 0 each sample alone gives the
        gradient of both, -2.5.

        >>> w = torch.nn.Parameter(torch.zeros(()))
        >>> svrg = SVRG(torch.optim.SGD([w], lr=1.0))
        >>> _ = svrg.snapshot(lambda: 0.5 * ((w - 1) ** 2 + (w - 4) ** 2) / 2)
        >>> _ = svrg.step(lambda: 0.5 * (w - 1) ** 2)
        >>> w.item()
        2.5

    Reference:
        Rie Johnson, Tong Zhang: Accelerating Stochastic Gradient Descent using Predictive Variance
        Reduction, 2013.
        Yida Yin, Zhiqiu Xu, Zhiyuan Li, Trevor Darrell, Zhuang Liu: A Coefficient Makes SVRG
        Effective, 2025, arXiv 2311.05589. Here a linear alpha falls with every step.
        Aaron Defazio, Leon Bottou: On the Ineffectiveness of Variance Reduced Optimization for Deep
        Learning, 2019, arXiv 1812.04529.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        alpha: float = 1.0,
        alpha_schedule: AlphaSchedule = "constant",
        total_steps: int | None = None,
        snapshot_every: int | None = None,
    ) -> None:
        super().__init__(optimizer)
        if isinstance(optimizer, SVRG):
            raise ValueError("optimizer is an SVRG already; wrap its base_optimizer")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("LBFGS evaluates a closure itself; SVRG needs an optimizer that steps")
        values = (alpha, alpha_schedule, total_steps, snapshot_every, 0, None)
        options = dict(zip(_OPTIONS, values, strict=True))
        _check(options, "")
        self._anchors = {}
        self._options = options
        self._set_options()

    _anchors: dict[Tensor, dict[str, Tensor]]
    _options: dict[str, Any]

    def _set_options(self) -> None:
        groups = self.base_optimizer.param_groups
        for group in groups:
            for key, value in self._options.items():
                group.setdefault(key, groups[0].get(key, value))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_anchors": self._anchors, "_options": self._options}

    def _params(self) -> list[Tensor]:
        return list(chain.from_iterable(group["params"] for group in self.param_groups))

    # --- the snapshot ---

    @property
    def alpha(self) -> float:
        """The strength of the correction in the next step."""
        group = self.param_groups[0]
        alpha: float = group["svrg_alpha"]
        if group["svrg_alpha_schedule"] == "linear":
            alpha *= max(0.0, 1.0 - group["svrg_step"] / group["svrg_total_steps"])
        return alpha

    @property
    def snapshot_due(self) -> bool:
        """Whether the next step needs a new snapshot; it does after a group was added."""
        return self.alpha > 0 and self._missing() is not None

    def _missing(self) -> str | None:
        group = self.param_groups[0]
        if group["svrg_snapshot_step"] is None:
            return "there is no snapshot"
        if any(param not in self._anchors for param in self._params()):
            return "parameters were added after the snapshot"
        age, limit = group["svrg_step"] - group["svrg_snapshot_step"], group["svrg_snapshot_every"]
        if limit is not None and age >= limit:
            return f"the snapshot is {age} steps old (svrg_snapshot_every={limit})"
        return None

    @torch.no_grad()
    def snapshot(self, full_grad_closure: Callable[[], Any]) -> Any:
        """Note the weights and the gradient of all data there.

        Clears the gradients afterwards. The closure runs the model as it is, in training or
        evaluation mode; buffers are put back.

        Args:
            full_grad_closure: Returns the mean loss of all data; or calls ``backward`` so that the
                gradients of all batches add up to that of the mean loss.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: The closure left no gradient.
        """
        params = self._params()
        with _kept_buffers():
            result = _evaluate(full_grad_closure, params)
        if all(param.grad is None for param in params):
            raise RuntimeError("full_grad_closure left no gradient; return the loss of all data")
        self._anchors = {
            param: {
                "snapshot": param.detach().clone(),
                "full_gradient": torch.zeros_like(param)
                if param.grad is None
                else param.grad.detach().clone(),
            }
            for param in params
        }
        self.zero_grad()
        for group in self.param_groups:
            group["svrg_snapshot_step"] = group["svrg_step"]
        return result

    # --- the step ---

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Evaluate the batch at the weights and at the snapshot, and let the optimizer step.

        Without a closure only a step with learning rate 0 is taken, and not counted:
        ``torch.distributed.checkpoint`` takes such a step to create the state it then loads.

        Args:
            closure: Evaluates the model on one batch and returns its mean loss; it may call
                ``zero_grad`` and ``backward`` itself. It is called twice and must use the same
                batch both times.

        Returns:
            What the closure returned at the weights.

        Raises:
            RuntimeError: A snapshot is missing or too old.
            ValueError: The closure is missing.
        """
        if closure is None:
            if all(float(group.get("lr", 1.0)) == 0 for group in self.param_groups):
                self.base_optimizer.step()
                return None
            raise ValueError(
                "SVRG.step needs a closure: it evaluates the batch at the snapshot as well"
            )
        alpha, params = self.alpha, self._params()
        if alpha > 0:
            missing = self._missing()
            if missing is not None:
                raise RuntimeError(f"{missing}; call snapshot(full_grad_closure) before the step")
            loss = self._corrected(closure, params, alpha)
        else:
            loss = _evaluate(closure, params)
        self.base_optimizer.step()
        for group in self.param_groups:
            group["svrg_step"] += 1
        return loss

    def _corrected(self, closure: Callable[[], Any], params: list[Tensor], alpha: float) -> Any:
        """Evaluate twice; leave the corrected gradients."""
        before = _random_states(params)
        loss = _evaluate(closure, params)
        after = _random_states(params)
        grads = [param.grad for param in params]
        weights = [param.detach().clone() for param in params]
        anchors = [self._anchor(param) for param in params]
        try:
            _set_random_states(before)
            torch._foreach_copy_(params, [anchor["snapshot"] for anchor in anchors])
            with _kept_buffers():
                _evaluate(closure, params)
        finally:
            torch._foreach_copy_(params, weights)
            _set_random_states(after)
        for param, grad, anchor in zip(params, grads, anchors, strict=True):
            noise = anchor["full_gradient"].neg()
            if param.grad is not None:
                noise += param.grad
            if grad is None and param.requires_grad and anchor["full_gradient"].any():
                grad = torch.zeros_like(param)  # not in this batch, but in others
            param.grad = None if grad is None else grad.sub_(noise, alpha=alpha)
        return loss

    def _anchor(self, param: Tensor) -> dict[str, Tensor]:
        anchor = self._anchors[param]
        for key, value in anchor.items():
            if value.device != param.device or value.dtype != param.dtype:  # the model was moved
                anchor[key] = value.to(param.device, param.dtype)
        return anchor

    # --- state dictionaries ---

    def _own_state(self) -> dict[Tensor, dict[str, Tensor]]:
        return self._anchors

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of an SVRG, with its snapshot, or of the wrapped optimizer alone.

        With the latter a snapshot is due before the next step.

        Args:
            state_dict: What ``state_dict`` returned; not changed.

        Raises:
            ValueError: The wrapped optimizer refuses it, an option is out of range, or a snapshot
                is missing or does not fit its parameter.
        """
        state_dict, anchors = self._begin_load(state_dict, _KEYS)
        groups = self._aligned(state_dict["param_groups"])
        targets = match_params(self.param_groups, groups)
        for group in groups:
            _check(group, "loaded ")
        taken = any(group.get("svrg_snapshot_step") is not None for group in groups)
        loaded: dict[Tensor, dict[str, Tensor]] = {}
        for number, (param, _, name) in targets.items():
            if not taken:
                break
            loaded[param] = {}
            for key in _KEYS:
                value = anchors.get(number, {}).get(key)
                if not isinstance(value, Tensor) or value.shape != param.shape:
                    found = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
                    raise ValueError(
                        f"{key!r} of {name} in the loaded state is {found}, but the parameter has "
                        f"shape {tuple(param.shape)}; load a state saved for this model"
                    )
                fitted = torch.empty_like(param, dtype=value.dtype).copy_(value).detach()
                loaded[param][key] = fitted

        self.base_optimizer.load_state_dict(state_dict)
        self._anchors = loaded
        self._end_load()


def _check(options: dict[str, Any], what: str) -> None:
    """Raise ValueError for options out of range; those that are missing are passed by."""
    alpha, schedule = options.get("svrg_alpha", 1.0), options.get("svrg_alpha_schedule", "constant")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0.0 <= alpha <= 1.0:
        raise ValueError(f"{what}alpha={alpha!r} must be in [0, 1]")
    if schedule not in ("constant", "linear"):
        raise ValueError(f"{what}alpha_schedule={schedule!r} must be 'constant' or 'linear'")
    for key in ("total_steps", "snapshot_every"):
        value = options.get(f"svrg_{key}")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{what}{key}={value!r} must be an integer or None")
        if value is not None and value < 1:
            raise ValueError(f"{what}{key}={value!r} must be at least 1")
    total_steps = options.get("svrg_total_steps")
    if schedule == "linear" and total_steps is None:
        raise ValueError(
            f"{what}alpha_schedule='linear' needs total_steps, the steps until alpha is 0"
        )
    if schedule == "constant" and total_steps is not None:
        raise ValueError(
            f"{what}total_steps={total_steps!r} is for alpha_schedule='linear'; leave it out"
        )
    for key in ("svrg_step", "svrg_snapshot_step"):
        value = options.get(key)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 0
        ):
            raise ValueError(f"{what}{key}={value!r} must be an integer of at least 0")


def _evaluate(closure: Callable[[], Any], params: list[Tensor]) -> Any:
    """Run a closure from no gradients, and ``backward`` if it has not done so."""
    for param in params:
        param.grad = None
    with torch.enable_grad():
        loss = closure()
        if (
            isinstance(loss, Tensor)
            and loss.requires_grad
            and all(param.grad is None for param in params)
        ):
            loss.backward()
    return loss


def _random_states(params: list[Tensor]) -> dict[torch.device, Tensor]:
    """Return the states of torch's generators for the CPU and the devices of the parameters."""
    devices = {param.device for param in params if param.is_cuda}
    states = {device: torch.cuda.get_rng_state(device) for device in devices}
    return {**states, torch.device("cpu"): torch.get_rng_state()}


def _set_random_states(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)


@contextmanager
def _kept_buffers() -> Iterator[None]:
    """Put back the buffers of all modules that are called meanwhile.

    A hook on all modules sees them before their first call, so nobody has to hand over the model.
    """
    saved: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}

    def save(called: nn.Module, _: Any) -> None:
        for module in called.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and (module, name) not in saved:
                    saved[module, name] = (buffer, buffer.detach().clone())

    handle = register_module_forward_pre_hook(save)
    try:
        with run_eagerly():
            yield
    finally:
        handle.remove()
        for (module, name), (buffer, value) in saved.items():
            buffer.detach().copy_(value)
            module._buffers[name] = buffer  # a module may have put another tensor there
