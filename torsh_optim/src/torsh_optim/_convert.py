"""Optimizer states from and to torch, apex, TransformerEngine, bitsandbytes and DeepSpeed."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch.optim import Optimizer

from torsh_optim._foreign_moments import (
    decoded,
    foreign_entry,
    native_entry,
    unnested,
    without_master,
)
from torsh_optim._foreign_options import (
    FORMS,
    PACKAGES,
    Lost,
    constructor_options,
    foreign_group,
    native_group,
    warn_lost,
)
from torsh_optim._zero import unpartitioned

Kind = Literal["torch", "apex", "te", "bnb", "deepspeed"]


def state_from(
    source: Optimizer | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    kind: Kind,
    target: Optimizer | None = None,
) -> dict[str, Any]:
    """Convert the state of another package's optimizer to one that the optimizers here load.

    Adam, AdamW and SGD come from torch; FusedAdam and FusedLAMB from apex; FusedAdam from
    TransformerEngine; Adam, AdamW, LAMB, Lion and SGD, with 32-bit or blockwise 8-bit states, from
    bitsandbytes; Adam, LAMB, Lion and what torch has from DeepSpeed without ZeRO or with its stages
    1 and 2. Options that have no counterpart are left out; a warning lists those that change the
    result. apex, TransformerEngine and DeepSpeed keep ``adam_w_mode`` outside of the state: give
    the optimizer itself, or load the state into ``AdamW`` or ``Adam``, whichever it was.

    float32 weights of 16-bit parameters (``master_param``, ``single_partition_of_fp32_groups``) are
    no part of the result: load them into the model.

    Args:
        source: The other optimizer or its state dict. For DeepSpeed also a list of the states of
            all ranks, in their order. Files are yours to read, with ``weights_only=True``.
        kind: Where it comes from; ``te`` is TransformerEngine, ``bnb`` is bitsandbytes.
        target: The optimizer that is going to load the state; it is only looked at. It gives the
            names and shapes that DeepSpeed's flat partitions lack, and tells Lion from SGD where a
            bitsandbytes state does not. Options that it does not know are left out.

    Returns:
        A state dict for ``load_state_dict``, which shares no memory with the source. Moments keep
        their element type; 8-bit codes become float32.

    Raises:
        TypeError: ``source`` is no optimizer, state dict or list of state dicts.
        ValueError: The state is of a kind that has no counterpart here, is incomplete, or is
            damaged; the message names the key.

    Example:
        >>> import torch
        >>> from torsh_optim import AdamW, state_from
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> old = torch.optim.AdamW([weight], lr=0.1)
        >>> weight.grad = torch.tensor([4.0, -1.0])
        >>> old.step()
        >>> new = AdamW([weight])
        >>> new.load_state_dict(state_from(old, kind="torch"))
        >>> new.param_groups[0]["lr"], new.state[weight]["exp_avg"]  # 0.1 times the gradient
        (0.1, tensor([ 0.4000, -0.1000]))
    """
    _check_kind(kind)
    if kind == "deepspeed":
        many = isinstance(source, Sequence) and not isinstance(source, str | bytes)
        found = unpartitioned([_state_dict(s) for s in (source if many else [source])], target)
    else:
        found = _state_dict(source)
    _check_layout(found)
    algorithm = _algorithm(found, kind, source, target)
    lost: Lost = {}
    added = constructor_options(source, algorithm, lost)
    weights = dict(zip(_members(found), _members(target), strict=False)) if target else {}

    groups: list[dict[str, Any]] = []
    state: dict[Any, dict[str, Any]] = {}
    for group in found["param_groups"]:
        entries = {n: found["state"][n] for n in group["params"] if found["state"].get(n)}
        shared_step = _shared_step(group, list(entries.values()), kind)
        for number, values in entries.items():
            where = f"parameter {number!r}"
            if "momentum_buffer" in values and values["momentum_buffer"] is None:
                continue  # torch's SGD before its first step with this parameter
            if kind == "bnb":
                entry = decoded(values, where, algorithm, lost)
            elif kind == "te":
                entry = without_master(values, weights.get(number), lost)
            else:
                entry = dict(values)
            if shared_step is not None:
                entry["step"] = shared_step
            elif algorithm == "sgd":
                entry.setdefault("step", 1)  # torch's SGD does not count: it has begun
            state[number] = native_entry(entry, algorithm, kind, where, lost)
        groups.append(native_group(group, added, algorithm, kind, target, lost))
    warn_lost(lost, f"torsh_optim has no counterpart of these parts of a {PACKAGES[kind]} state")
    return {"state": state, "param_groups": groups}


def state_to(
    state_dict: Optimizer | Mapping[str, Any], *, kind: Kind, bits: Literal[32, 8] = 32
) -> dict[str, Any]:
    """Convert a state of an optimizer here to one that another package's optimizer loads.

    torch takes Adam, AdamW, AdvancedAdam and SGD; apex these Adams and LAMB; TransformerEngine the
    Adams; bitsandbytes the Adams, LAMB, Lion and SGD; DeepSpeed without ZeRO the Adams and Lion.
    Options that have no counterpart are left out; a warning lists those that change the result, and
    what would be another algorithm is refused.

    Args:
        state_dict: The optimizer or its state dict; not changed.
        kind: Where it goes; ``te`` is TransformerEngine, ``bnb`` is bitsandbytes.
        bits: 8 encodes moments of at least 4096 elements for bitsandbytes, which goes on with
            the element type that it finds.

    Returns:
        A state dict for the other optimizer's ``load_state_dict``, which shares no memory with this
        one.

    Raises:
        TypeError: ``state_dict`` is no optimizer and no state dict.
        ValueError: The other package has no such algorithm or cannot hold the state.

    Example:
        >>> import torch
        >>> from torsh_optim import AdamW, state_to
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = AdamW([weight], lr=0.1)
        >>> weight.grad = torch.tensor([4.0, -1.0])
        >>> opt.step()
        >>> state = state_to(opt, kind="bnb")
        >>> state["state"][0]["step"], state["state"][0]["state1"]  # 0.1 times the gradient
        (1, tensor([ 0.4000, -0.1000]))
    """
    _check_kind(kind)
    if bits not in (32, 8) or (bits == 8 and kind != "bnb"):
        raise ValueError(f"bits={bits} for kind={kind!r}; 32, or 8 for 'bnb'")
    found = _state_dict(state_dict)
    _check_layout(found)
    algorithm = _native_algorithm(found["param_groups"])
    if algorithm not in FORMS[kind]:
        raise ValueError(
            f"{PACKAGES[kind]} has nothing that continues {algorithm} exactly; "
            f"kind={kind!r} takes {' and '.join(FORMS[kind])}"
        )
    lost: Lost = {}
    groups: list[dict[str, Any]] = []
    state: dict[Any, dict[str, Any]] = {}
    for i, group in enumerate(found["param_groups"]):
        new_group = foreign_group(group, algorithm, kind, i, lost)
        steps: set[int] = set()
        for number in group["params"]:
            if not found["state"].get(number):
                continue
            where = f"parameter {number!r}"
            values = found["state"][number]
            if algorithm == "sgd" and not (values.get("step") and "momentum_buffer" in values):
                continue  # the others know an empty buffer by its absence
            entry = native_entry(values, algorithm, "native", where, lost)
            state[number] = foreign_entry(entry, algorithm, kind, bits, where)
            steps.add(int(entry["step"]))
        if kind in ("apex", "te", "deepspeed"):
            if len(steps) > 1:
                raise ValueError(
                    f"{PACKAGES[kind]} counts the steps of a group, but parameters of group {i} "
                    f"have 'step' {sorted(steps)}; put them into groups of their own"
                )
            if steps and kind != "deepspeed":
                new_group["step"] = steps.pop()
        groups.append(new_group)
    warn_lost(lost, f"{PACKAGES[kind]} has no counterpart of these parts of the state")
    return {"state": state, "param_groups": groups}


def _check_kind(kind: str) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r} is unknown; it is one of {', '.join(get_args(Kind))}")


def _state_dict(source: Any) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    if callable(getattr(source, "state_dict", None)):
        return dict(source.state_dict())
    raise TypeError(
        f"expected an optimizer or its state dict, got {type(source).__name__}; "
        "read a file yourself, with torch.load(path, weights_only=True)"
    )


def _check_layout(found: Mapping[str, Any]) -> None:
    for key in ("state", "param_groups"):
        if key not in found:
            raise ValueError(
                f"{key!r} is missing in the state dict, which has {sorted(map(str, found))}; pass "
                "what the optimizer's state_dict() returned"
            )
    for i, group in enumerate(found["param_groups"]):
        if "params" not in group:
            raise ValueError(f"'params' is missing in parameter group {i}")
    known = set(_members(found))
    for number in found["state"]:
        if number not in known:
            raise ValueError(
                f"'state' has an entry {number!r} that is in no parameter group; states that are "
                "spread over ranks have to be gathered by the package that saved them"
            )


def _members(found: Any) -> list[Any]:
    groups = found.param_groups if isinstance(found, Optimizer) else found["param_groups"]
    return [member for group in groups for member in group["params"]]


def _algorithm(found: dict[str, Any], kind: str, source: Any, target: Optimizer | None) -> str:
    candidates = _candidates(found, kind, source)
    if target is not None:
        wanted = _native_algorithm([target.defaults])
        if wanted not in candidates:
            raise ValueError(
                f"source is a state of {' or '.join(candidates)}, but target is a "
                f"{type(target).__name__}"
            )
        return wanted
    if "sgd" in candidates and len(candidates) > 1:
        raise ValueError(
            "the state does not say whether it is Lion's, SGD's or RMSprop's; pass the optimizer "
            "itself, or target=optimizer, the one that is going to load the state"
        )
    return candidates[0]


def _candidates(found: dict[str, Any], kind: str, source: Any) -> tuple[str, ...]:
    """Name the algorithms that a state can belong to."""
    options: set[str] = set().union(*found["param_groups"])
    kept = set().union(*map(unnested, found["state"].values()))
    if kind == "bnb":
        names = {"adam": "adam", "lamb": "lamb", "lion": "lion", "momentum": "sgd"}
        name = getattr(source, "optimizer_name", None)
        if any(len(group.get("betas", ())) > 2 for group in found["param_groups"]):
            name = "ademamix"
        if name is not None and name not in names:
            raise ValueError(f"no optimizer here continues {name!r} of bitsandbytes")
        for key in ("lr", "betas"):
            if key not in options:
                raise ValueError(f"{key!r} is missing in the parameter groups")
        if name is not None:
            return (names[name],)
        return ("adam", "lamb") if "alpha" in options or "state2" in kept else ("lion", "sgd")
    if {"betas", "eps"} <= options:
        # Others with these: torch's NAdam, RAdam and Adamax, apex's NovoGrad
        if kind == "torch" and "amsgrad" in options:
            return ("adam",)
        if kind != "torch" and "norm_type" not in options:
            return ("lamb",) if options & {"grad_averaging", "max_coeff"} else ("adam",)
    elif kind == "deepspeed" and "betas" in options:
        return ("lion",)
    elif kind in ("torch", "deepspeed") and {"momentum", "dampening", "nesterov"} <= options:
        return ("sgd",)
    elif kind == "deepspeed" and options <= {"params", "param_names"}:
        # elastic states of ZeRO have no options
        return ("adam",) if "exp_avg_sq" in kept else ("lion",)
    raise ValueError(
        f"no optimizer here continues one of {PACKAGES[kind]} with the options "
        f"{sorted(options - {'params'})} and the state {sorted(kept)}"
    )


def _native_algorithm(groups: Sequence[Mapping[str, Any]]) -> str:
    options: set[str] = set().union(*groups)
    if "momentum" in options:
        return "sgd"
    if options & {"trust_clip", "always_adapt"}:
        return "lamb"
    if "betas" in options:
        return "adam" if "eps" in options else "lion"
    raise ValueError(
        f"no Adam, LAMB, Lion or SGD of this package has the options {sorted(options - {'params'})}"
    )


def _shared_step(group: Mapping[str, Any], entries: list[dict[str, Any]], kind: str) -> Any:
    """Return the step that a group of apex, TransformerEngine or DeepSpeed counts for all."""
    if "step" in group:
        return group["step"]
    # DeepSpeed's FusedAdam counts in the last parameter of a group alone; its CPUAdam, whose groups
    # know amsgrad, and FusedLamb, whose groups know max_coeff, in each
    if (
        kind == "deepspeed"
        and "bias_correction" in group
        and not {"amsgrad", "max_coeff"} & {*group}
    ):
        steps = [float(entry["step"]) for entry in entries if "step" in entry]
        return max(steps, default=None)
    return None
