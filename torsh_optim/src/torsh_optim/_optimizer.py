"""The engine under the optimizers: options, state, choice of implementation, the step."""

import copy
import difflib
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from torsh_optim._checkpoint import FORMAT, align_groups, fitted_state, match_params
from torsh_optim._plan import Bucket, Group, GroupBucket, Plan

ParamsT = (
    Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]  # as torch.optim's
)
Implementation = Literal["cpu-fused", "triton", "reference"]

# Options that others keep in parameter groups: schedulers, torch.optim.swa_utils, timm.
_FOREIGN = {
    *("initial_lr", "max_lr", "min_lr", "base_lr", "swa_lr", "max_momentum", "base_momentum"),
    *("name", "param_names", "params", "lr_scale"),
}
# How to compute, not what: an optimizer keeps its own when it loads a state.
_OWN_OPTIONS = ("foreach", "capturable", "differentiable", "fused")

_FLOATS = {torch.float32, torch.bfloat16, torch.float16}
_grad = attrgetter("grad")
_params = itemgetter("params")


class FusedOptimizer(Optimizer):
    """Optimizer whose step is one call for all tensors that can share it.

    A subclass defines an algorithm: the state tensors (``_slots``), the hyper-parameters of a step
    (``_scalars``), and the same update three times: as a Triton kernel over a launch table
    (``_launch``), as torch's own fused CPU kernel (``_update_cpu``) and as a plain loop
    (``_update_reference``), which defines the result.

    All options live in ``param_groups`` and all state in ``state``; attributes with a leading
    underscore are caches, rebuilt when missing.
    """

    # In order of preference. Without "cpu-fused" and under TRITON_INTERPRET=1 the Triton kernels
    # also take CPU tensors: that is how they are tested where there is no GPU.
    _implementations: ClassVar[tuple[Implementation, ...]] = ("cpu-fused", "triton", "reference")
    _bucket_options: ClassVar[tuple[str, ...]] = ("fused",)

    _plan: Plan | None = None
    _warned: frozenset[str] = frozenset()

    # --- what an algorithm defines ---

    def _check(self, group: Group) -> None:
        """Raise ValueError for hyper-parameters out of range."""
        raise NotImplementedError

    def _slots(self, group: Group) -> tuple[str, ...]:
        """Names of the state tensors that have the shape of the parameter."""
        raise NotImplementedError

    def _scalars(self, group: Group, step: float) -> tuple[float, ...]:
        """Eight hyper-parameters for the kernel, the learning rate first, from float64."""
        raise NotImplementedError

    def _block(self) -> int:
        """Elements that one program of the kernel updates."""
        raise NotImplementedError

    def _launch(
        self,
        programs: int,
        table: Tensor,
        scalars: Tensor,
        blocks: Tensor,
        types: list[torch.dtype],
        block: int,
    ) -> None:
        """Start the kernel once."""
        raise NotImplementedError

    def _update_cpu(
        self,
        group: Group,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[list[Tensor]],
        steps: list[Tensor],
        numbers: list[float],
    ) -> None:
        """Update tensors of one group and element type with torch's fused CPU kernel."""
        raise NotImplementedError

    def _update_reference(
        self,
        group: Group,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[list[Tensor]],
        steps: list[Tensor],
        numbers: list[float],
    ) -> None:
        """Update tensors of one group one after the other."""
        raise NotImplementedError

    # --- parameter groups ---

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group.

        Args:
            param_group: ``params`` (tensors or name and tensor pairs) and options of this group.

        Raises:
            ValueError: An option is unknown or out of range.
        """
        if isinstance(param_group, dict):
            known = {*self.defaults, *_FOREIGN}
            for key in param_group:
                if key not in known and not key.startswith("_"):
                    close = difflib.get_close_matches(key, known, n=1)
                    hint = f"did you mean {close[0]!r}? " if close else ""
                    raise ValueError(
                        f"unknown option {key!r} in a parameter group of {type(self).__name__}; "
                        f"{hint}Options are {', '.join(sorted(self.defaults))}; "
                        "notes of your own may be called 'name' or start with an underscore"
                    )
            self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        _drop_duplicates(self.param_groups[-1])
        self._plan = None

    # --- state ---

    def __getstate__(self) -> dict[str, Any]:
        state = self.state.__class__(dict)
        state.update(_with_own_steps(self.state))
        return {**super().__getstate__(), "state": state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return state and groups as ``torch.optim`` does, with copies of the step counters."""
        state_dict = super().state_dict()
        return {**state_dict, "state": _with_own_steps(state_dict["state"])}

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
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            if result is not None:
                state_dict = result

        saved_groups: list[Group] = copy.deepcopy(state_dict["param_groups"])
        for group in saved_groups:
            version = group.get("torsh_version", FORMAT)
            if version > FORMAT:
                raise ValueError(
                    f"torsh_version={version} of the loaded state is newer than {FORMAT}, the "
                    "newest this torsh-optim reads; update it to load this state"
                )
        saved_groups = align_groups(self.param_groups, saved_groups)
        targets = match_params(self.param_groups, saved_groups)

        state: dict[Any, Any] = {}
        for key, values in state_dict["state"].items():
            if key in targets:
                param, group, name = targets[key]
                state[param] = fitted_state(param, values, self._slots(group), name)
            else:
                state[key] = values

        groups: list[Group] = []
        for own, saved in zip(self.param_groups, saved_groups, strict=True):
            kept = {key: own[key] for key in ("params", "param_names", *_OWN_OPTIONS) if key in own}
            groups.append({**self.defaults, **saved, **kept, "torsh_version": FORMAT})
            self._check(groups[-1])
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
                f"torch.optim.{type(self).__name__}(capturable=True)"
            )
        params: list[Tensor] = list(chain.from_iterable(map(_params, self.param_groups)))
        grads: list[Tensor | None] = list(map(_grad, params))
        sizes = map(len, map(_params, self.param_groups))
        options = [*map(itemgetter(*self._bucket_options), self.param_groups), *sizes]
        if (
            self._plan is not None
            and self._plan.matches(params, grads, self.state, options)
            and self._plan.run(self.param_groups, grads)
        ):
            return
        self._plan = self._make_plan(params, grads, options)
        if not self._plan.run(self.param_groups, grads):
            raise AssertionError("a new plan does not fit its own tensors")

    def _make_plan(
        self, params: list[Tensor], grads: list[Tensor | None], options: list[Any]
    ) -> Plan:
        members: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
        group_of = [i for i, group in enumerate(self.param_groups) for _ in group["params"]]
        for index, (param, grad, number) in enumerate(zip(params, grads, group_of, strict=True)):
            if grad is None and not self.state.get(param):
                continue
            group = self.param_groups[number]
            slots = self._initialize(param, grad, group)
            grad_dtype = param.dtype if grad is None else grad.dtype
            tensors = [self.state[param][slot] for slot in slots]
            implementation, reason = self._choose(param, grad_dtype, tensors, group)
            self._say(implementation, reason, param, group)
            owner = () if implementation == "triton" else (number,)
            key = (implementation, param.device, param.dtype, grad_dtype, slots, *_dtypes(tensors))
            members.setdefault((*key, *owner), []).append((index, number))
        buckets = [self._bucket(key, entries, params) for key, entries in members.items()]
        return Plan(params, buckets, self.state, options)

    def _initialize(self, param: Tensor, grad: Tensor | None, group: Group) -> tuple[str, ...]:
        """Create the state tensors that are missing; return their names."""
        name = type(self).__name__
        if grad is not None and grad.layout is not torch.strided:
            raise RuntimeError(
                f"{name} does not support sparse gradients (got {grad.layout}); "
                "use torch.optim.SparseAdam, or sparse=False in the embedding"
            )
        if not (param.is_floating_point() or param.is_complex()):
            raise RuntimeError(
                f"{name} updates floating-point and complex tensors, got {param.dtype}"
            )
        if grad is not None and grad.shape != param.shape:
            raise RuntimeError(
                f"a gradient has shape {tuple(grad.shape)}, its parameter {tuple(param.shape)}; "
                "clear the gradient of a parameter that you resize"
            )
        state = self.state[param]
        slots = self._slots(group)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        for slot in slots:
            if slot not in state:
                state[slot] = torch.zeros_like(param, memory_format=torch.preserve_format)
            elif state[slot].shape != param.shape:
                raise RuntimeError(
                    f"state {slot!r} has shape {tuple(state[slot].shape)}, its parameter "
                    f"{tuple(param.shape)}; delete the state of a parameter that you resize"
                )
        return slots

    def _choose(
        self, param: Tensor, grad_dtype: torch.dtype, states: list[Tensor], group: Group
    ) -> tuple[Implementation, str | None]:
        """Pick the implementation for a parameter; say why if it is the slow one."""
        if group["fused"] is False:
            return "reference", None
        if type(param) not in (Tensor, torch.nn.Parameter):
            return "reference", f"it is a {type(param).__name__}"
        if torch.empty_like(param, device="meta").stride() != param.stride():
            return "reference", "it does not fill a block of memory"
        if any(tensor.stride() != param.stride() for tensor in states):
            return "reference", "its state has another memory layout"
        everything = {param.dtype, grad_dtype, *_dtypes(states)}
        for candidate in self._implementations:
            if candidate == "cpu-fused" and param.is_cpu:
                if len(everything) == 1 and everything <= {*_FLOATS, torch.float64}:
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

    def _bucket(
        self, key: tuple[Any, ...], entries: list[tuple[int, int]], params: list[Tensor]
    ) -> Bucket:
        implementation, grad_dtype, slots = key[0], key[3], key[4]
        indices = [index for index, _ in entries]
        group_of = [number for _, number in entries]
        mine = [params[index] for index in indices]
        states = [[self.state[param][slot] for param in mine] for slot in slots]
        common = (indices, mine, states, group_of, grad_dtype)
        if implementation == "triton":
            from torsh_optim._launch import LaunchBucket

            return LaunchBucket(*common, self._scalars, self._launch, self._block())
        if implementation == "cpu-fused":
            return GroupBucket(*common, self._update_cpu, any_layout=False)
        return GroupBucket(*common, self._update_reference, any_layout=True)

    @property
    def implementation(self) -> str:
        """What updates the parameters: ``triton``, ``cpu-fused`` or ``reference``.

        Several are joined by ``+`` when parameters differ.
        """
        found: set[str] = set()
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state.get(
                    param, {}
                )  # a state that is made later is like its parameter
                states = [state[slot] for slot in self._slots(group) if slot in state]
                grad_dtype = param.dtype if param.grad is None else param.grad.dtype
                found.add(self._choose(param, grad_dtype, states, group)[0])
        return "+".join(sorted(found))


def _dtypes(tensors: Iterable[Tensor]) -> list[torch.dtype]:
    return [tensor.dtype for tensor in tensors]


def _with_own_steps(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Copy the step counters: pickled, each view would take the storage of all with it."""
    return {
        key: {**values, "step": values["step"].clone()}
        if isinstance(values, dict) and isinstance(values.get("step"), Tensor)
        else values
        for key, values in state.items()
    }


def _interpreting() -> bool:
    """Whether Triton kernels run on CPU tensors, in Triton's interpreter."""
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
