"""Fitting a saved optimizer state to parameters, with every element type kept."""

import copy
import warnings
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

FORMAT = 1  # `torsh_version` in the parameter groups of a state

Target = tuple[Tensor, dict[str, Any], str]


def match_params(
    groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]
) -> dict[int, Target]:
    """Find the parameter, its group and a name for messages for each saved parameter number.

    Args:
        groups: Parameter groups of the optimizer.
        saved_groups: Those of the state, ``params`` being numbers.

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
            own.append((param, group, f"parameter {names[i] if names else len(own)!r}"))
    numbers: list[int] = list(chain.from_iterable(saved["params"] for saved in saved_groups))

    if all("param_names" in group for group in (*groups, *saved_groups)):
        names = list(chain.from_iterable(group["param_names"] for group in groups))
        saved_names = list(chain.from_iterable(group["param_names"] for group in saved_groups))
        if names != saved_names:
            if set(names) == set(saved_names):
                by_name = dict(zip(names, own, strict=True))
                own = [by_name[name] for name in saved_names]
            else:
                missing = sorted(set(names) - set(saved_names))
                unexpected = sorted(set(saved_names) - set(names))
                warnings.warn(
                    "the loaded state names other parameters, so they are matched by position; "
                    f"without state: {missing[:3]}, unknown: {unexpected[:3]}",
                    stacklevel=3,
                )
    return dict(zip(numbers, own, strict=True))


def fitted_state(
    param: Tensor, values: Mapping[str, Any], slots: tuple[str, ...], name: str
) -> dict[str, Any]:
    """Copy the state of one parameter to its device and memory layout.

    Args:
        param: The parameter.
        values: Its saved state.
        slots: Names of the tensors that must have the parameter's shape.
        name: How to call the parameter in messages.

    Raises:
        ValueError: A tensor is missing or has a wrong shape.
    """
    if not values:
        return {}
    state: dict[str, Any] = {}
    for key, value in values.items():
        if key == "step":
            state[key] = torch.tensor(float(value), dtype=torch.float32, device="cpu")
        elif key in slots:
            if not isinstance(value, Tensor) or value.shape != param.shape:
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{key!r} of {name} in the loaded state is {found}, but the parameter has "
                    f"shape {tuple(param.shape)}; load a state saved for this model"
                )
            state[key] = torch.empty_like(param, dtype=value.dtype).copy_(value).detach()
        elif isinstance(value, Tensor):
            state[key] = value.detach().to(param.device, copy=True)
        else:
            state[key] = copy.deepcopy(value)
    # max_exp_avg_sq may be new: AMSGrad can be switched on for a state saved without it
    for key in ("step", *slots):
        if key not in state and key != "max_exp_avg_sq":
            raise ValueError(
                f"{key!r} of {name} is missing in the loaded state, which has {sorted(values)}; "
                "it was saved by another kind of optimizer"
            )
    return state
