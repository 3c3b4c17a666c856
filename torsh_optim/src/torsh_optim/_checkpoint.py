"""Fitting a saved optimizer state to parameters, with every element type kept."""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from torsh_optim._shards import spread_like

FORMAT = 2  # `torsh_version` in the parameter groups of a state; 0 is a state of torch.optim

_SCALARS = ("step", "d", "d_numerator")

Target = tuple[Tensor, dict[str, Any], str]


def align_groups(
    groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]], *, warn: bool = True
) -> list[dict[str, Any]]:
    """Put saved groups and the parameters in them into the order of the optimizer's, by name.

    Without names on both sides the order is kept; so it is, with a warning, when all names differ,
    as those of a wrapped model do.

    Args:
        groups: Parameter groups of the optimizer.
        saved_groups: Those of the state, ``params`` being numbers; not changed.
        warn: Whether to warn.

    Raises:
        ValueError: Some names are missing or unexpected, or the same names are divided into other
            groups.
    """
    names, saved_names = _names(groups), _names(saved_groups)
    if names is None or saved_names is None or len(groups) != len(saved_groups):
        return saved_groups
    if names == saved_names:
        return saved_groups
    flat, saved_flat = list(chain(*names)), list(chain(*saved_names))
    if sorted(flat) != sorted(saved_flat) or len(set(flat)) < len(flat):
        missing = sorted(set(flat) - set(saved_flat))
        unexpected = sorted(set(saved_flat) - set(flat))
        if (missing or unexpected) and set(flat) & set(saved_flat):
            raise ValueError(
                f"the loaded state is of another model: {_some(missing)} missing in it, "
                f"{_some(unexpected)} unexpected; rename or remove parameters of the state, or "
                "remove its param_names to go by position"
            )
        if warn and list(map(len, names)) == list(map(len, saved_names)):
            warnings.warn(
                "the loaded state names other parameters, so they are matched by position: "
                f"{_some(saved_flat)} there, {_some(flat)} here",
                stacklevel=3,
            )
        return saved_groups

    saved_group_of = {name: j for j, group in enumerate(saved_names) for name in group}
    without_members = [j for j, group in enumerate(saved_names) if not group]
    aligned: list[dict[str, Any]] = []
    for i, members in enumerate(names):
        if members:
            j = saved_group_of[members[0]]
            apart = sorted(set(members) ^ set(saved_names[j]))
        else:
            j = without_members.pop(0) if without_members else 0
            apart = sorted(saved_names[j])
        if apart:
            here = {name: k for k, group in enumerate(names) for name in group}
            raise ValueError(
                f"the loaded state groups the parameters in another way: {apart[0]!r} is in group "
                f"{here[apart[0]]} here and in group {saved_group_of[apart[0]]} there, with other "
                f"members (seen from group {i}); give the optimizer the groups of the saved one"
            )
        number_of = dict(zip(saved_names[j], saved_groups[j]["params"], strict=True))
        numbers = [number_of[name] for name in members]
        aligned.append({**saved_groups[j], "params": numbers})
        if members:
            aligned[-1]["param_names"] = list(members)
    return aligned


def _some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(map(repr, names[:3])) or "nothing"
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _names(groups: list[dict[str, Any]]) -> list[list[str]] | None:
    """Names of the parameters of each group, if all have one."""
    if any(group["params"] and "param_names" not in group for group in groups):
        return None
    return [list(group.get("param_names", ())) for group in groups]


def match_params(
    groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]
) -> dict[int, Target]:
    """Find the parameter, its group and a name for messages for each saved parameter number.

    Args:
        groups: Parameter groups of the optimizer.
        saved_groups: Those of the state in the same order, ``params`` being numbers.

    Raises:
        ValueError: The numbers of groups or of their parameters differ.
    """
    if len(groups) != len(saved_groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(saved_groups)}, not {len(groups)}"
        )
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of "
                f"optimizer's group: group {i} has {len(saved['params'])} parameters, "
                f"not {len(group['params'])}"
            )
    own: list[Target] = []
    for group in groups:
        names = group.get("param_names")
        for i, param in enumerate(group["params"]):
            own.append((param, group, f"parameter {(names[i] if names else len(own))!r}"))
    numbers: list[int] = list(chain.from_iterable(saved["params"] for saved in saved_groups))
    return dict(zip(numbers, own, strict=True))


def migrated(state_dict: Mapping[str, Any]) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """Bring a saved state to the newest format.

    Args:
        state_dict: State of any format, also of a torch optimizer; not changed.

    Returns:
        Its state, with new dictionaries around the same tensors, and a copy of its groups.

    Raises:
        ValueError: It is no optimizer state, or of a format that is newer than this package.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(
                f"{key!r} is missing in the loaded state, "
                f"which has {sorted(map(str, state_dict))[:5]}; "
                "load what an optimizer's state_dict() returned"
            )
    state = {
        key: dict(values) if isinstance(values, Mapping) else values
        for key, values in state_dict["state"].items()
    }
    groups: list[dict[str, Any]] = copy.deepcopy(list(state_dict["param_groups"]))
    for group in groups:
        if not isinstance(group.get("params"), Sequence):
            raise ValueError("a parameter group of the loaded state has no list 'params'")
        version = group.get("torsh_version", 0)
        if isinstance(version, int) and version > FORMAT:
            raise ValueError(
                f"torsh_version={version} of the loaded state is newer than {FORMAT}, the "
                "newest this torsh-optim reads; update it to load this state"
            )
        if not isinstance(version, int) or version < 0:
            raise ValueError(f"torsh_version={version!r} of the loaded state is no version")
        for older in range(version, FORMAT):
            # 1 differs from 2 by options that it lacks, for which those of the optimizer hold
            if older in _MIGRATIONS:
                _MIGRATIONS[older](group, [state[n] for n in group["params"] if n in state])
        group["torsh_version"] = FORMAT
    return state, groups


def _from_torch(group: dict[str, Any], states: list[dict[str, Any]]) -> None:
    """torch.optim.SGD counts no steps, and may keep an empty momentum_buffer."""
    for state in states:
        if "momentum_buffer" in state:
            started = state["momentum_buffer"] is not None
            state.setdefault("step", torch.tensor(float(started), device="cpu"))
            if not started:
                del state["momentum_buffer"]


_MIGRATIONS = {0: _from_torch}


def _step(value: Any, name: str) -> float:
    step = float(value)
    if not (math.isfinite(step) and step >= 0.0 and step == int(step)):
        raise ValueError(
            f"'step' of {name} in the loaded state is {step}, not a whole number of at least 0"
        )
    return step


def fitted_state(
    param: Tensor,
    values: Mapping[str, Any],
    slots: tuple[str, ...],
    late: frozenset[str],
    name: str,
) -> dict[str, Any]:
    """Copy the state of one parameter to its device and memory layout.

    Args:
        param: The parameter.
        values: Its saved state.
        slots: Names of the tensors that must have the parameter's shape.
        late: Those that may be missing, because an option can be switched on later.
        name: How to call the parameter in messages.

    Raises:
        ValueError: A tensor is missing or has a wrong shape.
    """
    if not values:
        return {}
    state: dict[str, Any] = {}
    for key, value in values.items():
        if key == "step":
            state[key] = torch.tensor(_step(value, name), dtype=torch.float32, device="cpu")
        elif key in slots:
            if not isinstance(value, Tensor) or value.shape != param.shape:
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{key!r} of {name} in the loaded state is {found}, but the parameter has "
                    f"shape {tuple(param.shape)}; load a state saved for this model"
                )
            if value.is_complex() != param.is_complex() or not (
                value.is_floating_point() or value.is_complex()
            ):
                raise ValueError(
                    f"{key!r} of {name} in the loaded state is {value.dtype}, the parameter "
                    f"{param.dtype}; convert codes of 8 bits with state_from()"
                )
            state[key] = spread_like(param, value, f"{key!r} of {name} in the loaded state")
        elif isinstance(value, Tensor):
            state[key] = value.detach().to(param.device, copy=True)
        else:
            state[key] = copy.deepcopy(value)
    for key in ("step", *slots):
        if key not in state and key not in late:
            raise ValueError(
                f"{key!r} of {name} is missing in the loaded state, which has {sorted(values)}; "
                "it was saved by another kind of optimizer"
            )
    return state


def with_own_scalars(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Copy the 0-d tensors: pickled, each view would take the storage of all with it."""
    return {
        key: {
            name: value.clone() if name in _SCALARS and isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        if isinstance(values, dict)
        else values
        for key, values in state.items()
    }
