"""State tensors of optimizers of other packages, translated to those here and back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torsh_optim._blockwise import BLOCK, block_decoded, block_encoded, dynamic_map
from torsh_optim._foreign_options import PACKAGES, Lost

MOMENTS = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "lamb": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    "sgd": ("momentum_buffer",),
}
_QUANTIZED = "__bnb_optimizer_quant_state__"
_MIN_8BIT_SIZE = 4096  # smaller tensors stay float32 in bitsandbytes


def unnested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Bring up what newer versions of bitsandbytes hide in a nested dictionary."""
    inner = values.get(_QUANTIZED, {})
    return {**{key: value for key, value in values.items() if key != _QUANTIZED}, **inner}


def decoded(values: Mapping[str, Any], where: str, algorithm: str, lost: Lost) -> dict[str, Any]:
    """Give the moments of bitsandbytes their names here, as float32.

    Args:
        values: State of one parameter.
        where: The parameter, for messages.
        algorithm: ``adam``, ``lamb``, ``lion`` or ``sgd``.
        lost: Takes what has no counterpart.

    Raises:
        ValueError: What belongs to the codes is missing or does not fit.
    """
    flat = unnested(values)
    entry = {"step": flat["step"]} if "step" in flat else {}
    for i, name in enumerate(MOMENTS[algorithm], 1):
        key = f"state{i}"
        if key not in flat:
            raise ValueError(f"{key!r} of {where} is missing in the state, which has {_keys(flat)}")
        codes = flat[key]
        if not codes.is_contiguous():
            raise ValueError(
                f"{key!r} of {where} has strides {codes.stride()}: kernels of bitsandbytes take it "
                "in memory order, its CPU code in logical order; save with contiguous parameters"
            )
        if codes.dtype != torch.uint8:
            entry[name] = codes
            continue
        for part, size in ((f"qmap{i}", 256), (f"absmax{i}", -(-codes.numel() // BLOCK))):
            if part not in flat:
                raise ValueError(
                    f"{part!r} of {where} is missing beside the 8-bit {key!r}; only blockwise "
                    "states can be decoded"
                )
            if flat[part].shape != (size,):
                raise ValueError(
                    f"{part!r} of {where} has shape {tuple(flat[part].shape)}, not {(size,)} as "
                    f"the {codes.numel()} elements of {key!r} ask for; the state is damaged"
                )
            _check_finite(flat[part], part, where)
        entry[name] = block_decoded(codes, flat[f"absmax{i}"].float(), flat[f"qmap{i}"].float())
    for key, option in (("unorm_vec", "max_unorm"), ("gnorm_vec", "percentile_clipping")):
        if key in flat:
            lost[option] = None
    return entry


def native_entry(
    values: Mapping[str, Any], algorithm: str, kind: str, where: str, lost: Lost
) -> dict[str, Any]:
    """Check the state of one parameter under the names of torch, and copy it.

    Args:
        values: The state.
        algorithm: ``adam``, ``lamb``, ``lion`` or ``sgd``.
        kind: Where it comes from; ``native`` is this package.
        where: The parameter, for messages.
        lost: Takes what has no counterpart.

    Raises:
        ValueError: Something is missing, damaged, or of another algorithm.
    """
    moments = MOMENTS[algorithm]
    for key in ("step", *moments):
        if values.get(key) is None:
            raise ValueError(
                f"{key!r} of {where} is missing in the state, which has {_keys(values)}"
            )
    step = float(values["step"])
    if not step.is_integer() or step < 0:
        raise ValueError(f"'step' of {where} is {step}; it must be a whole number, at least 0")
    entry = {"step": torch.tensor(step, dtype=torch.float32)}
    for key, value in values.items():
        if key in moments or (key == "max_exp_avg_sq" and "exp_avg_sq" in moments):
            if kind == "te" and value.dtype == torch.float16:
                raise ValueError(
                    f"{key!r} of {where} is float16 without its scale, which the optimizer of "
                    "TransformerEngine keeps apart; pass what its state_dict() returns"
                )
            if not (value.is_floating_point() or value.is_complex()):
                raise ValueError(f"{key!r} of {where} is {value.dtype}, not a floating-point type")
            if value.shape != values[moments[0]].shape:
                raise ValueError(
                    f"{key!r} of {where} has shape {tuple(value.shape)}, but {moments[0]!r} "
                    f"{tuple(values[moments[0]].shape)}; the state is damaged"
                )
            _check_finite(value, key, where)
            if key.endswith("_sq") and not value.is_complex() and bool((value < 0).any()):
                raise ValueError(f"{key!r} of {where} has negative elements, but holds squares")
            entry[key] = value.detach().clone()
        elif key != "step" and value is not None:
            if kind != "native":
                raise ValueError(
                    f"{key!r} of {where} is no part of {algorithm}; the state was saved by another "
                    "optimizer"
                )
            lost[key] = None
    return entry


def without_master(values: Mapping[str, Any], weight: Tensor | None, lost: Lost) -> dict[str, Any]:
    """Take out the master weight of TransformerEngine, float32 or the low 16 bits of it.

    Args:
        values: State of one parameter.
        weight: The parameter that is going to use the state, if known.
        lost: Takes the master weight unless the parameter is equal to it.
    """
    master = values.get("master_param")
    if master is not None and not (
        weight is not None
        and weight.dtype == master.dtype
        and torch.equal(weight.detach(), master.to(weight.device))
    ):
        lost["master_param (exact weights of 16-bit parameters; load them into the model)"] = None
    return {key: value for key, value in values.items() if key != "master_param"}


def foreign_entry(
    entry: dict[str, Any], algorithm: str, kind: str, bits: int, where: str
) -> dict[str, Any]:
    """Give the state of one parameter the names that another package has for it.

    Args:
        entry: What ``native_entry`` returned.
        algorithm: ``adam``, ``lamb``, ``lion`` or ``sgd``.
        kind: The package.
        bits: 8 encodes large tensors for bitsandbytes.
        where: The parameter, for messages.
    """
    step = entry["step"]
    moments = {key: value for key, value in entry.items() if key != "step"}
    if kind == "torch":
        return moments if algorithm == "sgd" else entry
    if "max_exp_avg_sq" in moments:
        raise ValueError(
            f"'max_exp_avg_sq' of {where} has no place in {PACKAGES[kind]}, which has no AMSGrad"
        )
    if kind in ("apex", "te"):
        return moments
    if kind == "deepspeed":
        return {"step": int(step), **moments}
    result: dict[str, Any] = {"step": int(step)}
    for i, key in enumerate(MOMENTS[algorithm], 1):
        value = moments[key].float().contiguous()
        if bits == 8 and value.numel() >= _MIN_8BIT_SIZE:
            levels = dynamic_map(signed=i == 1).to(value.device)
            codes, absmax = block_encoded(value, levels)
            result |= {f"state{i}": codes, f"qmap{i}": levels, f"absmax{i}": absmax}
        else:
            result[f"state{i}"] = value
    return result


def _check_finite(value: Tensor, key: str, where: str) -> None:
    if not value.isfinite().all():
        bad = int((~value.isfinite()).sum())
        raise ValueError(
            f"{key!r} of {where} has {bad} elements that are not finite; convert an older state"
        )


def _keys(values: Mapping[str, Any]) -> list[str]:
    return sorted(map(str, values))
