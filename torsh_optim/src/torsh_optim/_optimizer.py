"""The engine under the optimizers: options, state, choice of implementation, the step."""

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from torsh_optim._checkpoint import (
    FORMAT,
    align_groups,
    fitted_state,
    match_params,
    migrated,
    with_own_scalars,
)
from torsh_optim._control import D0, Control, Scaler
from torsh_optim._options import (
    can_change,
    check_algorithm,
    check_common,
    check_joins,
    check_known,
    check_shared,
    ramp,
    say_what_goes_off,
)
from torsh_optim._overlap import check_apart
from torsh_optim._plan import Batch, Bucket, Group, GroupBucket, Hypers, Members, Plan
from torsh_optim._shards import Axes, Spread, is_flat, is_spread, local

ParamsT = (
    Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]  # as torch.optim's
)
Implementation = Literal["cpu-fused", "cpu-chunked", "triton", "reference"]

# How to compute, not what: an optimizer keeps its own when it loads a state.
_OWN_OPTIONS = ("foreach", "capturable", "differentiable", "fused")
# Options that a step does not compare with those of the last one: read anew, or without effect.
_UNREAD = {"lr", "foreach", "capturable", "differentiable"}
_FLOATS = {torch.float32, torch.bfloat16, torch.float16}
_grad = attrgetter("grad")
_params = itemgetter("params")
_lr = itemgetter("lr")


class FusedOptimizer(Optimizer):
    """Optimizer whose step is one call for all tensors that can share it.

    A subclass defines an algorithm: its states, its hyper-parameters, and the same update as a rule
    of the Triton kernel (``_rule``, ``_constants``, ``_factors``, ``_exponents``), as a plain loop
    (``_update_reference``), which defines the result, and perhaps as torch's own fused CPU kernel
    (``_update_cpu``).

    All options live in ``param_groups`` and all state in ``state``; attributes with a leading
    underscore are caches, rebuilt when missing.
    """

    # In order of preference. Under TRITON_INTERPRET=1 and without the first two, the Triton kernels
    # also take CPU tensors: that is how they are tested where there is no GPU.
    _implementations: ClassVar[tuple[Implementation, ...]] = (
        *("cpu-fused", "cpu-chunked", "triton", "reference"),
    )
    # what `_update_cpu` takes; torch's kernels want it to be the same for all tensors
    _cpu_types: ClassVar[frozenset[torch.dtype]] = frozenset({*_FLOATS, torch.float64})
    _slot_names: ClassVar[tuple[str, ...]]
    _late_slots: ClassVar[frozenset[str]] = frozenset()  # an option may ask for them at any time
    _rule: ClassVar[str]
    _factors_of: ClassVar[tuple[str, ...]] = ("warmup_steps",)
    _factors_kind: ClassVar[str] = "none"

    _plan: Plan | None = None
    _control: Control | None  # no default here: Lightning's wrapper would find it before ours
    _options: list[tuple[Any, ...]] | None = None
    _options_of: Callable[[Group], tuple[Any, ...]] | None = None
    _kinds: list[Any] | None = None
    _options_can_change: bool = False
    _warned: frozenset[str] = frozenset()

    # --- what an algorithm defines ---

    def _check(self, group: Group) -> None:
        """Raise TypeError or ValueError for hyper-parameters of a wrong kind or out of range."""
        check_common(type(self).__name__, group)

    def _slots(self, group: Group) -> tuple[str, ...]:
        """Names of the state tensors that have the shape of the parameter."""
        return self._slot_names

    def _initial(self, slot: str, param: Tensor) -> Tensor:
        """First value of a state tensor."""
        return torch.zeros_like(param, memory_format=torch.preserve_format)

    @staticmethod
    def _constants(group: Group) -> tuple[float, ...]:
        """Learning rate 0, sign of the gradient, decoupled and coupled decay, and eight more."""
        raise NotImplementedError

    @staticmethod
    def _factors(group: Group, step: float) -> tuple[float, ...]:
        """Warm-up and three numbers that depend on ``_factors_of`` and the step."""
        return (ramp(group, step), 0.0, 0.0, 0.0)

    @staticmethod
    def _exponents(group: Group) -> tuple[float, ...]:
        """What the device needs to make the factors itself, warm-up first."""
        return (group["warmup_steps"],)

    def _update_cpu(self, batch: Batch) -> Tensor | None:
        """Update tensors with torch's fused CPU kernel."""
        raise NotImplementedError

    def _has_update_cpu(self, group: Group) -> bool:
        """Whether ``_update_cpu`` knows the options of a group."""
        return False

    def _update_reference(self, batch: Batch) -> Tensor | None:
        """Update tensors one after the other; give the sums for ``Control.finish``, if any."""
        raise NotImplementedError

    def _wants_sums(self, group: Group) -> bool:
        """Whether the update of a tensor needs sums over all of it, which may be elsewhere."""
        return False

    def _measure_cpu(self, batch: Batch) -> Tensor:
        """Take those sums for ``_update_cpu``."""
        raise NotImplementedError

    def _measure(self, batch: Batch) -> Tensor:
        """Give these sums over the tensors as they are here: ``(tensors, 2)``, float64."""
        raise NotImplementedError

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        if isinstance(params, torch.nn.Module):
            raise TypeError(
                f"params is a {type(params).__name__}; pass its parameters: "
                f"{type(self).__name__}(model.parameters(), ...)"
            )
        defaults = {k: tuple(v) if isinstance(v, list) else v for k, v in defaults.items()}
        self._control = None
        self._check(defaults)
        super().__init__(params, defaults)

    # --- parameter groups ---

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group.

        Args:
            param_group: ``params`` (tensors or name and tensor pairs) and options of this group.

        Raises:
            ValueError: An option is unknown or out of range.
        """
        if isinstance(param_group, dict):
            check_known(type(self).__name__, self.defaults, param_group)
            for key, value in param_group.items():
                if isinstance(value, list) and key not in ("params", "param_names"):
                    param_group[key] = tuple(value)  # a list could be changed without our notice
            full = {**self.defaults, **param_group}
            self._check(full)
            check_joins(full, self.param_groups)
        super().add_param_group(param_group)
        _drop_duplicates(self.param_groups[-1])
        self._plan = None

    # --- state ---

    def __getstate__(self) -> dict[str, Any]:
        state = self.state.__class__(dict)
        state.update(with_own_scalars(self.state))
        return {**super().__getstate__(), "state": state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = dict(state.get("defaults") or self.defaults)
        super().__setstate__(state)
        self.defaults = own  # torch has added options of its optimizers
        self._plan = None
        self.__dict__.setdefault("_control", None)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return state and groups as ``torch.optim`` does, with copies of the step counters."""
        state_dict = super().state_dict()
        return {**state_dict, "state": with_own_scalars(state_dict["state"])}

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by this optimizer or by its namesake in ``torch.optim``.

        Unlike torch's, this keeps the element type of every state tensor, copies them all, checks
        their shapes, and, where both sides name their parameters and the names are the same in
        another order, goes by the names, for state and group options alike. The options that say
        how to compute (``fused``, ``foreach``, ``capturable``, ``differentiable``) stay those of
        this optimizer.

        Args:
            state_dict: What ``state_dict`` returned; not changed.

        Raises:
            ValueError: Groups, shapes, keys or format do not fit; the message names the key.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"an optimizer state is a dictionary, got {type(state_dict).__name__}; "
                "load a file with torch.load(path, weights_only=True) first"
            )
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            if result is not None:
                state_dict = result

        saved_state, saved_groups = migrated(state_dict)
        saved_groups = align_groups(self.param_groups, saved_groups)
        targets = match_params(self.param_groups, saved_groups)

        groups: list[Group] = []
        for own, saved in zip(self.param_groups, saved_groups, strict=True):
            kept = {key: own[key] for key in ("params", "param_names", *_OWN_OPTIONS) if key in own}
            # torch.distributed.checkpoint and JSON give lists back
            fixed = {
                key: tuple(value)
                for key, value in saved.items()
                if isinstance(value, list) and isinstance(own.get(key), tuple)
            }
            saved = {**saved, **fixed}
            check_algorithm(type(self).__name__, self.defaults, saved)
            say_what_goes_off(own, saved)
            groups.append({**self.defaults, **own, **saved, **kept, "torsh_version": FORMAT})
            self._check(groups[-1])
        loaded_of = {
            id(param): group for group in groups for param in group["params"]
        }  # the options that will hold decide which states are wanted

        state: dict[Any, Any] = {}
        for key, values in saved_state.items():
            if key in targets:
                param, _, name = targets[key]
                slots = self._slots(loaded_of[id(param)])
                state[param] = fitted_state(param, values, slots, self._late_slots, name)
            elif isinstance(key, int):
                raise ValueError(
                    f"the loaded state has an entry {key}, but no parameter of that number; "
                    "load a state saved for this model"
                )
            else:
                state[key] = values
        self._check_shared(groups)
        restored = self.state.__class__(dict)
        restored.update(state)
        self.__setstate__({"state": restored, "param_groups": groups})

        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    # --- the step ---

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            The loss, if there is a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._update_uncompiled()
        else:
            self._update()
        return loss

    @torch._disable_dynamo
    def _update_uncompiled(self) -> None:
        self._update()

    def _update(self) -> None:
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a step of {type(self).__name__} cannot be captured in a CUDA graph: it sends "
                "hyper-parameters from the host; step outside of the graph, or use "
                f"an optimizer of torch.optim with capturable=True"
            )
        groups = self.param_groups
        params: list[Tensor] = list(chain.from_iterable(map(_params, groups)))
        grads: list[Tensor | None] = list(map(_grad, params))
        sizes = list(map(len, map(_params, groups)))
        if self._options_of is None:
            self._options_of = itemgetter(*(key for key in self.defaults if key not in _UNREAD))
        options = list(map(self._options_of, groups))
        changed = options != self._options
        if changed or (groups and groups[0].get("adaptive_lr")):
            self._check_shared(groups)
        if changed and self._plan is not None and self._kinds_of(groups) != self._kinds:
            self._plan = None
        hypers = Hypers(groups, changed or self._options_can_change, list(map(_lr, groups)))
        scaler = Scaler(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        if self._plan is not None and not self._plan.matches(params, grads, self.state, sizes):
            self._plan = None
        # once, whatever happens to the plan of this process: it may have to communicate
        spread = Spread(params) if self._plan is None else self._plan.spread
        grads = spread.local_grads(grads)
        if self._plan is None or not self._plan.run(hypers, grads, scaler):
            self._kinds = self._kinds_of(groups)
            self._plan = self._make_plan(params, grads, sizes, spread)
            hypers = Hypers(groups, True, hypers.rates)
            if not self._plan.run(hypers, grads, scaler):
                raise AssertionError("a new plan does not fit its own tensors")
        if changed:
            self._options = options
            self._options_can_change = any(map(can_change, chain.from_iterable(options)))

    def _check_shared(self, groups: list[Group]) -> None:
        check_shared(groups)

    def _kinds_of(self, groups: list[Group]) -> list[Any]:
        """What of the options decides between buckets and between kernels."""
        return [
            (
                self._slots(group),
                group["fused"],
                group["max_grad_norm"] is None,
                self._has_update_cpu(group),
                self._constants(group)[3] != 0.0,
                group.get("cautious"),
            )
            for group in groups
        ]

    def _make_plan(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        sizes: list[int],
        spread: Spread,
    ) -> Plan:
        lead = self.param_groups[0] if self.param_groups else {}
        check_apart([local(param) for param in params])
        controls = lead.get("max_grad_norm") is not None or bool(lead.get("adaptive_lr"))
        shares = any(map(self._wants_sums, self.param_groups))
        if (controls or shares) and any(map(is_flat, params)):
            raise RuntimeError(
                f"{type(self).__name__} needs norms of whole gradients or tensors here, which the "
                "flat parameters of FullyShardedDataParallel hide; use "
                "torch.distributed.fsdp.fully_shard, or max_grad_norm=None and an optimizer "
                "without norms, with clip_grad_norm_() of the FSDP module"
            )
        members: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
        axes_of: dict[tuple[Any, ...], Axes | None] = {}
        group_of = [i for i, group in enumerate(self.param_groups) for _ in group["params"]]
        for index, (param, grad, number) in enumerate(zip(params, grads, group_of, strict=True)):
            if grad is None and not self.state.get(param):
                continue
            group = self.param_groups[number]
            self._initialize(param, grad, group)
            grad_dtype = param.dtype if grad is None else grad.dtype
            implementation, reason = self._choose(param, grad_dtype, group)
            self._say(implementation, reason, param, group)
            owner = () if implementation == "triton" else (number,)
            axes = spread.axes.get(index) if controls or shares else None
            dtypes = [
                self.state[param][slot].dtype if slot in self.state[param] else param.dtype
                for slot in self._slot_names
            ]
            device = local(param).device
            key = (implementation, device, param.dtype, grad_dtype, *dtypes, axes, *owner)
            members.setdefault(key, []).append((index, number))
            axes_of[key] = axes

        self._control = (self._control or Control()) if controls else None
        kinds = [
            (key[0], self._members(key, entries, params, axes_of[key]))
            for key, entries in members.items()
        ]
        if self._control is not None:
            self._control.prepare([(local(m.params[0]).device, k == "triton") for k, m in kinds])
            self._control.adopt([self.state[param] for param in params if param in self.state])
        buckets = [self._bucket(implementation, found) for implementation, found in kinds]
        return Plan(params, buckets, self.state, sizes, self._control, spread, shares=shares)

    def _members(
        self,
        key: tuple[Any, ...],
        entries: list[tuple[int, int]],
        params: list[Tensor],
        axes: Axes | None,
    ) -> Members:
        mine = [params[index] for index, _ in entries]
        # a state that an option has left behind is kept, but not touched while it is off
        wanted = [self._slots(self.param_groups[number]) for _, number in entries]
        return Members(
            [index for index, _ in entries],
            mine,
            {
                slot: [
                    self.state[param][slot] if slot in slots else None
                    for param, slots in zip(mine, wanted, strict=True)
                ]
                for slot in self._slot_names
            },
            [self.state[param]["step"] for param in mine],
            [number for _, number in entries],
            key[3],
            axes,
        )

    def _bucket(self, implementation: Implementation, members: Members) -> Bucket:
        if implementation == "triton":
            from torsh_optim._launch import LaunchBucket

            return LaunchBucket(members, type(self), self.param_groups, self._control)
        wants_sums = self._wants_sums(self.param_groups[members.group_of[0]])
        if implementation == "cpu-fused":
            measure = self._measure_cpu if wants_sums else None
            return GroupBucket(members, self._update_cpu, measure, any_layout=False)
        any_layout = implementation == "reference"
        measure = self._measure if wants_sums else None
        return GroupBucket(members, self._update_reference, measure, any_layout=any_layout)

    def _initialize(self, param: Tensor, grad: Tensor | None, group: Group) -> None:
        """Create the state tensors that are missing."""
        name = type(self).__name__
        if grad is not None and is_spread(grad):
            raise RuntimeError(
                f"the gradient of a parameter of shape {tuple(param.shape)} is a DTensor, the "
                "parameter a plain tensor; make the optimizer after the model is distributed, or "
                "set the gradient's full_tensor()"
            )
        if grad is not None and grad.layout is not torch.strided:
            raise RuntimeError(
                f"{name} does not support sparse gradients (got {grad.layout}); "
                "use torch.optim.SparseAdam, or sparse=False in the embedding"
            )
        if not (param.is_floating_point() or param.is_complex()):
            raise RuntimeError(
                f"{name} updates floating-point and complex tensors, got {param.dtype}"
            )
        shape = local(param).shape
        if grad is not None and grad.shape != shape:
            raise RuntimeError(
                f"a gradient has shape {tuple(grad.shape)}, its parameter {tuple(shape)}; "
                "clear the gradient of a parameter that you resize"
            )
        state = self.state[param]
        if not isinstance(state.get("step"), Tensor):
            step = float(state.get("step", 0.0))
            state["step"] = torch.tensor(step, dtype=torch.float32, device="cpu")
        if group.get("adaptive_lr"):
            if param.dtype.itemsize == 2:
                raise RuntimeError(
                    f"adaptive_lr=True takes float32 parameters, got {param.dtype}: the first "
                    "steps, of size 1e-6, would round to nothing, and the estimate never grow; "
                    "keep the weights in float32 and train under torch.autocast"
                )
            for key, value in (("d", D0), ("d_numerator", 0.0)):
                if key not in state:
                    state[key] = torch.tensor(value, dtype=torch.float32, device="cpu")
        for slot in self._slots(group):
            if slot not in state:
                state[slot] = self._initial(slot, param)
            elif local(state[slot]).device != local(param).device:
                raise RuntimeError(
                    f"state {slot!r} is on {local(state[slot]).device}, its parameter on "
                    f"{local(param).device}; move the model before the first step, or load the "
                    "optimizer's state_dict() again after moving it"
                )
            elif state[slot].shape != param.shape:
                raise RuntimeError(
                    f"state {slot!r} has shape {tuple(state[slot].shape)}, its parameter "
                    f"{tuple(param.shape)}; delete the state of a parameter that you resize"
                )

    def _choose(
        self, param: Tensor, grad_dtype: torch.dtype, group: Group
    ) -> tuple[Implementation, str | None]:
        """Pick the implementation for a parameter; say why if it is the slow one."""
        if group["fused"] is False:
            return "reference", None
        state = self.state.get(param, {})  # one that is made later is like its parameter
        states = [local(state[slot]) for slot in self._slots(group) if slot in state]
        param = local(param)
        if type(param) not in (Tensor, torch.nn.Parameter):
            return "reference", f"it is a {type(param).__name__}"
        if param.numel() and torch.empty_like(param, device="meta").stride() != param.stride():
            return "reference", "it does not fill a block of memory"
        if any(tensor.stride() != param.stride() for tensor in states):
            return "reference", "its state has another memory layout"
        everything = {param.dtype, grad_dtype, *(tensor.dtype for tensor in states)}
        for candidate in self._implementations:
            if candidate == "cpu-fused" and param.is_cpu:
                same = len(everything) == 1 and everything <= self._cpu_types
                if same and self._has_update_cpu(group):
                    return candidate, None
            elif candidate == "cpu-chunked" and param.is_cpu:
                if everything <= {*_FLOATS, torch.float64}:
                    return candidate, None
            elif candidate == "triton" and (param.is_cuda or (param.is_cpu and _interpreting())):
                if importlib.util.find_spec("triton") is None:
                    return "reference", "Triton is not installed: pip install triton"
                if everything <= _FLOATS:
                    return candidate, None
        kinds = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in everything))
        return "reference", f"no fused kernel takes {kinds} on {param.device.type}"

    def _say(self, implementation: str, reason: str | None, param: Tensor, group: Group) -> None:
        if implementation != "reference" or reason is None:
            return
        what = f"parameter of shape {tuple(param.shape)}"
        if group["fused"]:
            raise RuntimeError(
                f"fused=True, but a {what} cannot be updated by a fused kernel: {reason}; "
                "leave fused=None to update such parameters one by one"
            )
        if reason not in self._warned:
            self._warned |= {reason}
            warnings.warn(
                f"{type(self).__name__} updates a {what} one by one, which is slow: {reason}; "
                "fused=False accepts this for all parameters",
                stacklevel=7,
            )

    # --- what happened ---

    @property
    def implementation(self) -> str:
        """What updates the parameters: ``triton``, ``cpu-fused``, ``cpu-chunked``, ``reference``.

        Several are joined by ``+`` when parameters differ.
        """
        found: set[str] = set()
        for group in self.param_groups:
            for param in group["params"]:
                grad_dtype = param.dtype if param.grad is None else param.grad.dtype
                found.add(self._choose(param, grad_dtype, group)[0])
        return "+".join(sorted(found))

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients in the last step, before clipping: a 0-d float32 tensor.

        It lies on the parameters' device and changes with each step; reading it as a number waits
        for the device. None before the first step and without ``max_grad_norm``.
        """
        if self._control is None or not self.param_groups[0]["max_grad_norm"]:
            return None
        return self._control.lead[2]

    @property
    def skipped_steps(self) -> Tensor:
        """Steps left out because a gradient was not finite: 0-d, on the parameters' device."""
        return torch.zeros((), device="cpu") if self._control is None else self._control.lead[3]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # True makes GradScaler leave unscaling and skipping to the step, which then looks at all
        # gradients anyway; it also makes Lightning refuse to clip, so only where the step clips.
        return any(group["max_grad_norm"] is not None for group in self.param_groups)

    def last_lr(self) -> list[float]:
        """Learning rate of each group in the last step, after warm-up and adaptation.

        Waits for the device if the steps are counted there. A group whose parameters have not been
        updated yet is as at its first step.
        """
        rates = []
        for group in self.param_groups:
            states = [self.state[param] for param in group["params"] if self.state.get(param)]
            step = max((float(state["step"]) for state in states), default=1.0)
            rate = float(group["lr"]) * ramp(group, max(step, 1.0))
            if group.get("adaptive_lr"):
                rate *= float(states[0]["d"]) if states else D0
            rates.append(rate)
        return rates


def _interpreting() -> bool:
    """Whether Triton kernels run on CPU tensors, in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def _drop_duplicates(group: Mapping[str, Any]) -> None:
    """Keep a parameter once: torch has warned already, and one launch must not write it twice."""
    params: list[Tensor] = group["params"]
    first = {param: i for i, param in reversed(list(enumerate(params)))}
    if len(first) < len(params):
        keep = sorted(first.values())
        for key in ("params", "param_names"):
            if key in group:
                group[key][:] = [group[key][i] for i in keep]
