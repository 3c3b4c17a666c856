"""The options that all optimizers have in common, and what is wrong with a group of them."""

import difflib
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Group = dict[str, Any]

# Options that others keep in parameter groups: schedulers, torch.optim.swa_utils, timm.
_FOREIGN = {
    *("initial_lr", "max_lr", "min_lr", "base_lr", "swa_lr", "max_momentum", "base_momentum"),
    *("name", "param_names", "params", "lr_scale"),
}
# One value for the whole optimizer, although each group carries it.
_SHARED_OPTIONS = ("max_grad_norm", "skip_nonfinite", "adaptive_lr")
_NUMBERS = (
    *("lr", "weight_decay", "eps", "momentum", "dampening"),
    *("max_grad_norm", "ema_decay", "trust_clip"),
)
# Options by which the states of other algorithms are known.
_ALGORITHM_OPTIONS = {
    *("betas", "eps", "amsgrad", "momentum", "dampening", "nesterov", "alpha", "centered", "rho"),
    *("momentum_decay", "bias_correction", "grad_averaging", "trust_clip", "always_adapt"),
    *("lambd", "t0", "etas", "step_sizes", "lr_decay", "ns_steps", "num_samples"),
}
# What a loaded state can switch off; torch lets the saved options win, too, but has none of these.
_FEATURES = ("max_grad_norm", "warmup_steps", "ema_decay", "cautious", "adaptive_lr")
_NOT_SUPPORTED = (
    ("foreach", "leave it out: one launch needs no lists"),
    ("capturable", "a step cannot be captured in a CUDA graph yet"),
    ("differentiable", "use torch.optim to differentiate through a step"),
)


def check_common(name: str, group: Group) -> None:
    """Raise TypeError or ValueError for common options of a wrong kind or out of range.

    Args:
        name: Of the optimizer, for messages.
        group: All options of a group.
    """
    for key in _NUMBERS:
        if isinstance(group.get(key), str | bool):
            raise TypeError(f"{key}={group[key]!r} is a {type(group[key]).__name__}, not a number")
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}; it must be at least 0")
    if not group["weight_decay"] >= 0.0:
        raise ValueError(
            f"Invalid weight_decay value: {group['weight_decay']}; it must be at least 0"
        )
    warmup = group["warmup_steps"]
    if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
        raise ValueError(f"warmup_steps={warmup!r} must be an integer of at least 0")
    max_norm = group["max_grad_norm"]
    if max_norm is not None and not max_norm > 0.0:
        raise ValueError(
            f"max_grad_norm={max_norm} must be above 0; math.inf measures without clipping, "
            "None does neither"
        )
    if group.get("foreach") and group["fused"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    for option, instead in _NOT_SUPPORTED:
        if group.get(option):
            raise ValueError(f"{option}=True is not supported by {name}; {instead}")


def check_known(name: str, defaults: Mapping[str, Any], group: Group) -> None:
    """Raise ValueError for an option that an optimizer does not have."""
    known = {*defaults, *_FOREIGN}
    for key in group:
        if key not in known and not key.startswith("_"):
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"unknown option {key!r} in a parameter group of {name}; "
                f"{hint}Options are {', '.join(sorted(defaults))}; "
                "notes of your own may be called 'name' or start with an underscore"
            )


def check_joins(group: Group, groups: list[Group]) -> None:
    """Raise ValueError if a new group has another value of what holds for the whole optimizer."""
    for key in _SHARED_OPTIONS:
        if key in group and any(other[key] != group[key] for other in groups):
            raise ValueError(
                f"{key}={group[key]!r} in a parameter group, {groups[0][key]!r} in others; it "
                "holds for the whole optimizer: set it there"
            )


def check_shared(groups: list[Group]) -> None:
    """Raise ValueError if groups differ in what holds for the whole optimizer."""
    for key in _SHARED_OPTIONS:
        values = [group[key] for group in groups if key in group]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"{key} differs between parameter groups: {values}; it holds for the whole "
                "optimizer: set it in all of them"
            )


def check_algorithm(name: str, defaults: Mapping[str, Any], saved: Group) -> None:
    """Raise ValueError if a saved group has options of another algorithm."""
    foreign = sorted(_ALGORITHM_OPTIONS & saved.keys() - defaults.keys())
    if foreign:
        raise ValueError(
            f"the loaded state has the option {foreign[0]!r}, which {name} does not know: it was "
            "saved by another kind of optimizer; load it there, or convert it with "
            "state_from(..., target=optimizer)"
        )


def say_what_goes_off(own: Group, saved: Group) -> None:
    """Warn of what a saved group switches off; its options win, as in torch."""
    off = [key for key in _FEATURES if own.get(key) and key in saved and not saved[key]]
    if off:
        warnings.warn(
            f"the loaded state switches {off[0]} off: {own[off[0]]!r} here, {saved[off[0]]!r} "
            "there; set it in param_groups after loading to keep it",
            stacklevel=4,
        )


def ramp(group: Group, step: float) -> float:
    """Factor of the learning rate while it warms up: 1 / n, 2 / n, ... 1."""
    warmup: int = group["warmup_steps"]
    return step / warmup if step < warmup else 1.0


def sign(group: Group) -> float:
    """Factor of the gradient: -1 to go up."""
    return -1.0 if group["maximize"] else 1.0


def can_change(value: Any) -> bool:
    """Whether an option can change and remain the same object."""
    if isinstance(value, tuple):
        return any(isinstance(part, Tensor) for part in value)
    return isinstance(value, Tensor) or type(value) is list
