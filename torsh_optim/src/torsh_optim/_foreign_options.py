"""Options of optimizers of other packages, translated to those here and back."""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torsh_optim._checkpoint import FORMAT

PACKAGES = {
    "torch": "torch.optim",
    "apex": "apex",
    "te": "TransformerEngine",
    "bnb": "bitsandbytes",
    "deepspeed": "DeepSpeed",
}
# What gets lost, in the order of finding it
Lost = dict[str, None]

_ADAM = ("lr", "betas", "eps", "weight_decay")
_SGD = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
_OPTIONS = {
    "adam": (*_ADAM, "amsgrad", "maximize", "decoupled_weight_decay"),
    "lamb": (*_ADAM, "bias_correction", "grad_averaging", "max_grad_norm", "always_adapt"),
    "lion": ("lr", "betas", "weight_decay"),
    "sgd": _SGD,
}
_TORCH = {"foreach": None, "differentiable": False, "fused": None}
_BNB_ADAM = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
# Of each package what can go there: options that carry over, and what else its groups hold
FORMS: dict[str, dict[str, tuple[tuple[str, ...], dict[str, Any]]]] = {
    "torch": {
        "adam": (_OPTIONS["adam"], {"maximize": False, "capturable": False, **_TORCH}),
        "sgd": (_SGD, _TORCH),
    },
    "apex": {
        "adam": (_ADAM, {"bias_correction": True}),
        "lamb": (
            (*_ADAM, "bias_correction", "grad_averaging", "max_grad_norm"),
            {"bias_correction": True, "grad_averaging": True, "max_grad_norm": math.inf},
        ),
    },
    "te": {"adam": (_ADAM, {"bias_correction": True})},
    "bnb": {
        "adam": (_ADAM, _BNB_ADAM),
        "lamb": (_ADAM, _BNB_ADAM),
        "lion": (("lr", "betas", "weight_decay"), {"eps": 0.0}),
        "sgd": (("lr", "momentum", "weight_decay"), {"eps": 0.0}),
    },
    "deepspeed": {
        "adam": (_ADAM, {"bias_correction": True}),
        "lion": (("lr", "betas", "weight_decay"), {}),
    },
}
_ANOTHER_ALGORITHM = ("amsgrad", "maximize", "nesterov", "dampening")
# Arguments of constructors, no options of groups
_BY_CONSTRUCTOR = {
    "decoupled_weight_decay": (False, "adam_w_mode=False"),
    "always_adapt": (True, "use_nvlamb=True"),
}

# How an update is computed, and bookkeeping
_WITHOUT_EFFECT = {"foreach", "fused", "capturable", "differentiable", "params", "torsh_version"}
# Values with which an option changes nothing, where it is not None, False or 0
_NEUTRAL: dict[str, Any] = {
    "bias_correction": True,
    "decoupled_weight_decay": True,
    "grad_averaging": True,
    "skip_nonfinite": True,
    "decay": "lr",
}
# Schedulers, torch.optim.swa_utils and timm keep these in groups
_NOTES = {
    *("initial_lr", "max_lr", "min_lr", "base_lr", "swa_lr", "max_momentum", "base_momentum"),
    *("name", "param_names", "lr_scale"),
}


def constructor_options(source: Any, algorithm: str, lost: Lost) -> dict[str, Any]:
    """Read options that an optimizer of another package keeps outside of its groups.

    Args:
        source: The optimizer; a state dict has none of them.
        algorithm: ``adam``, ``lamb``, ``lion`` or ``sgd``.
        lost: Takes what has no counterpart.
    """
    optimizer = getattr(source, "optimizer", source)  # inside of DeepSpeed's wrappers
    options: dict[str, Any] = {}
    decoupled = getattr(optimizer, "adam_w_mode", None)
    if decoupled is not None and algorithm == "adam":
        options["decoupled_weight_decay"] = bool(decoupled)
    elif decoupled is not None and not decoupled:
        lost["adam_w_mode=False"] = None
    if algorithm == "lamb" and hasattr(optimizer, "use_nvlamb"):
        options["always_adapt"] = bool(optimizer.use_nvlamb)
    args = getattr(optimizer, "args", None)
    for key, neutral in (("percentile_clipping", 100), ("max_unorm", 0.0), ("skip_zeros", False)):
        if getattr(args, key, neutral) != neutral:
            lost[key] = None
    return options


def native_group(
    group: Mapping[str, Any],
    added: Mapping[str, Any],
    algorithm: str,
    kind: str,
    target: Optimizer | None,
    lost: Lost,
) -> dict[str, Any]:
    """Translate a parameter group of another package.

    Args:
        group: The group.
        added: More options.
        algorithm: ``adam``, ``lamb``, ``lion`` or ``sgd``.
        kind: The package.
        target: Has the options that are wanted; None takes all.
        lost: Takes what has no counterpart and changes the result.
    """
    options = {key: value for key, value in group.items() if key != "step"}
    if kind == "bnb":
        if algorithm == "adam":
            options["decoupled_weight_decay"] = True  # so in its Adam as in its AdamW
        elif algorithm == "sgd":
            options["momentum"] = options.pop("betas")[0]  # it does not use the second, dampening
            options |= {"dampening": 0.0, "nesterov": False}
    options |= added
    known = [key for key in _OPTIONS[algorithm] if target is None or key in target.defaults]
    result: dict[str, Any] = {}
    for key, value in options.items():
        if key in known:
            result[key] = _copied(value, as_number=kind != "torch")
        elif key in _NOTES or key.startswith("_"):
            result[key] = copy.deepcopy(value)
        elif not _changes_nothing(key, value):
            lost[f"{key}={value!r}"] = None
    return {**result, "params": list(group["params"]), "torsh_version": FORMAT}


def foreign_group(
    group: Mapping[str, Any], algorithm: str, kind: str, i: int, lost: Lost
) -> dict[str, Any]:
    """Translate a parameter group for another package.

    Args:
        group: The group.
        algorithm: ``adam``, ``lamb``, ``lion`` or ``sgd``.
        kind: The package.
        i: Number of the group, for messages.
        lost: Takes what has no counterpart and changes the result.

    Raises:
        ValueError: It would become another algorithm.
    """
    carried, extra = FORMS[kind][algorithm]
    for key in _ANOTHER_ALGORITHM:
        if group.get(key) and key not in carried:
            raise ValueError(
                f"{key}={group[key]!r} in group {i} has no counterpart in {PACKAGES[kind]}, which "
                "would go on with another algorithm"
            )
    if kind == "bnb" and group.get("decoupled_weight_decay") is False and group["weight_decay"]:
        raise ValueError(
            f"decoupled_weight_decay=False in group {i}: bitsandbytes multiplies the weights by "
            "1 - lr * weight_decay in its Adam as in its AdamW; there is no coupled decay"
        )
    if kind == "bnb" and algorithm == "sgd" and not group["momentum"]:
        raise ValueError(f"momentum=0 in group {i}; SGD of bitsandbytes has no such mode")
    result: dict[str, Any] = dict(extra)
    for key, value in group.items():
        if key in carried:
            if value is not None or key not in extra:
                result[key] = _copied(value, as_number=kind != "torch")
        elif key in _NOTES:
            result[key] = copy.deepcopy(value)
        elif key in _BY_CONSTRUCTOR and kind != "bnb":
            needed, argument = _BY_CONSTRUCTOR[key]
            if value is needed and (key != "decoupled_weight_decay" or group["weight_decay"]):
                lost[f"{key}={value} (construct the other optimizer with {argument})"] = None
        elif not (_changes_nothing(key, value) or key.startswith("_")):
            lost[f"{key}={value!r}"] = None
    if "max_grad_norm" in extra and result["max_grad_norm"] != 1.0:
        needed = f"max_grad_norm={result['max_grad_norm']}"
        lost[f"{needed} (construct the other optimizer with it: its groups do not decide)"] = None
    if kind == "bnb" and algorithm == "sgd":
        result["betas"] = (result.pop("momentum"), 0.0)
    return {**result, "params": list(group["params"])}


def _changes_nothing(key: str, value: Any) -> bool:
    if key in _WITHOUT_EFFECT:
        return True
    if key in _NEUTRAL:
        return bool(value == _NEUTRAL[key])
    return value is None or (isinstance(value, int | float) and value == 0)


def _copied(value: Any, *, as_number: bool) -> Any:
    if isinstance(value, Tensor):
        return float(value) if as_number else value.detach().clone()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_copied(item, as_number=as_number) for item in value)
    return copy.deepcopy(value)


def warn_lost(lost: Lost, what: str) -> None:
    """Warn the caller's caller of what is left out, if anything."""
    if lost:
        warnings.warn(f"{what}, which are left out: {', '.join(lost)}", stacklevel=3)
