"""Optimizer states of DeepSpeed: flat partitions of ZeRO stages 1 and 2 put together again."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_Pieces = dict[str, list[Tensor]]


def unpartitioned(shards: Sequence[Mapping[str, Any]], target: Optimizer | None) -> dict[str, Any]:
    """Return the state of the wrapped optimizer with the state of each parameter in its shape.

    Args:
        shards: States of all ranks in their order, or one state that is not partitioned.
        target: Gives the shapes, by name.

    Raises:
        ValueError: A part is missing or does not fit; the message names the key.
    """
    if not shards:
        raise ValueError("source is an empty list; pass the states of all ranks")
    inner = [_unwrapped(shard) for shard in shards]
    first = inner[0]
    if "fp32_flat_groups" in first or first.get("zero_stage") == 3:
        raise ValueError(
            "'fp32_flat_groups' and zero_stage=3 mean that each parameter is cut over the ranks; "
            "save with ZeRO stage 2 or less, or put the state together with DeepSpeed "
            "(ds_to_universal)"
        )
    if "fp32_groups_flat" in first:
        return _unflattened(first, _targets(target, "fp32_groups_flat"))
    if "base_optimizer_state" in first:
        return _merged(inner, target)
    if len(inner) > 1:
        raise ValueError(
            f"source has {len(inner)} states, but the first is not partitioned: it has no "
            "'base_optimizer_state'; pass that one alone"
        )
    if "fp32_groups" in first:
        if target is not None:
            params = [param for group in target.param_groups for param in group["params"]]
            masters = [master for group in first["fp32_groups"] for master in group]
            _compare_masters(dict(zip(params, masters, strict=False)))
        return dict(first["optimizer_state_dict"])
    return dict(first)


def _unwrapped(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take the state out of what DeepSpeed writes to a file."""
    for key in ("optimizer", "optimizer_state_dict"):
        inner = state.get(key)
        if isinstance(inner, Mapping) and not {"fp32_groups", "fp32_groups_flat"} & state.keys():
            return _unwrapped(inner)
    return state


def _targets(target: Optimizer | None, key: str) -> list[dict[str, Any]]:
    if target is None:
        raise ValueError(
            f"{key!r} holds flat tensors without the shapes of the parameters; pass "
            "target=optimizer, the optimizer that is going to load the state"
        )
    return target.param_groups


def _unflattened(state: Mapping[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Cut the flat groups of a 16-bit run without ZeRO, which lie in the order of the group."""
    inner = state["optimizer_state_dict"]
    if len(groups) != len(inner["param_groups"]):
        raise ValueError(
            f"the DeepSpeed state has {len(inner['param_groups'])} parameter groups, target "
            f"{len(groups)}; give target the groups of the saved run"
        )
    result: dict[str, Any] = {"state": {}, "param_groups": []}
    masters: dict[Tensor, Tensor] = {}
    for group, saved, flat_master in zip(
        groups, inner["param_groups"], state["fp32_groups_flat"], strict=True
    ):
        params: list[Tensor] = group["params"]
        sizes = [param.numel() for param in params]
        start = len(result["state"])
        for i, (param, master) in enumerate(
            zip(params, _cut(flat_master, sizes, "fp32_groups_flat"), strict=True)
        ):
            masters[param] = master.view(param.shape)
            result["state"][start + i] = {}
        for key, value in inner["state"].get(saved["params"][0], {}).items():
            whole = not isinstance(value, Tensor) or value.dim() == 0
            pieces = [value] * len(params) if whole else _cut(value, sizes, key)
            for i, (param, piece) in enumerate(zip(params, pieces, strict=True)):
                result["state"][start + i][key] = piece if whole else piece.view(param.shape)
        numbers = list(range(start, start + len(params)))
        names = {"param_names": list(group["param_names"])} if "param_names" in group else {}
        result["param_groups"].append({**saved, "params": numbers, **names})
    _compare_masters(masters)
    return result


def _cut(flat: Tensor, sizes: list[int], key: str) -> list[Tensor]:
    if flat.numel() != sum(sizes):
        raise ValueError(
            f"{key!r} has {flat.numel()} elements in a group whose parameters in target have "
            f"{sum(sizes)}; give target the groups of the saved run"
        )
    return list(flat.detach().split(sizes))


def _merged(shards: list[Mapping[str, Any]], target: Optimizer | None) -> dict[str, Any]:
    for rank, shard in enumerate(shards):
        for key in ("base_optimizer_state", "param_slice_mappings", "partition_count"):
            if key not in shard:
                raise ValueError(
                    f"{key!r} is missing in the DeepSpeed state of rank {rank}, which has "
                    f"{sorted(shard)}; pass the optimizer states of all ranks, saved by "
                    "DeepSpeed 0.7 or newer"
                )
    counts = shards[0]["partition_count"]
    count = max(counts) if isinstance(counts, Sequence) else int(counts)
    if count != len(shards):
        raise ValueError(
            f"partition_count={count}, but source has {len(shards)} states; pass a list of the "
            "states of all ranks, in the order of the ranks"
        )
    groups = _targets(target, "base_optimizer_state")
    if any(group["params"] and "param_names" not in group for group in groups):
        raise ValueError(
            "target has parameters without names, and DeepSpeed's slices go by name; build it "
            "from model.named_parameters()"
        )
    shapes = {
        name: param
        for group in groups
        for name, param in zip(group.get("param_names", ()), group["params"], strict=True)
    }
    result: dict[str, Any] = {"state": {}, "param_groups": []}
    masters: dict[Tensor, Tensor] = {}
    for g in range(len(shards[0]["param_slice_mappings"])):
        saved = _saved_group(shards[0]["base_optimizer_state"], g)
        if saved.get("moe"):
            raise ValueError(
                f"group {g} has moe=True: experts are spread over the ranks; put the state "
                "together with DeepSpeed (ds_to_universal)"
            )
        slices = [shard["param_slice_mappings"][g] for shard in shards]
        names = list(dict.fromkeys(name for mapping in slices for name in mapping))
        unknown = [name for name in names if name not in shapes]
        if unknown:
            raise ValueError(
                f"the DeepSpeed state has parameter {unknown[0]!r}, target has {sorted(shapes)}; "
                "give target the named parameters of the saved model"
            )
        flats = [_flat_state(shard["base_optimizer_state"], g, shard) for shard in shards]
        start = len(result["state"])
        for i, name in enumerate(names):
            result["state"][start + i] = {}
            param = shapes[name]
            for key in dict.fromkeys(key for flat in flats for key in flat):
                parts = [flat.get(key) for flat in flats]
                if any(isinstance(part, Tensor) and part.dim() for part in parts):
                    joined = _joined(parts, slices, name, key, param)
                    result["state"][start + i][key] = joined
                else:
                    result["state"][start + i][key] = next(p for p in parts if p is not None)
            key = "single_partition_of_fp32_groups"
            if all(key in shard for shard in shards):
                flat_masters = [shard[key][g] for shard in shards]
                masters[param] = _joined(flat_masters, slices, name, key, param)
        numbers = list(range(start, start + len(names)))
        result["param_groups"].append({**saved, "params": numbers, "param_names": names})
    _compare_masters(masters)
    return result


def _saved_group(base: Any, g: int) -> Mapping[str, Any]:
    """Options of a group: elastic states have none."""
    return base["param_groups"][g] if isinstance(base, Mapping) else {}


def _flat_state(base: Any, g: int, shard: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(base, Mapping):
        return dict(base["state"].get(base["param_groups"][g]["params"][0], {}))
    state = dict(base[g])
    if state and "step" not in state and "base_optimizer_state_step" in shard:
        state["step"] = shard["base_optimizer_state_step"]
    return state


def _joined(
    flats: list[Any], slices: list[Mapping[str, Any]], name: str, key: str, param: Tensor
) -> Tensor:
    """Put the slices of one parameter together."""
    parts: list[Tensor] = []
    for rank, (flat, mapping) in enumerate(zip(flats, slices, strict=True)):
        if name not in mapping:
            continue
        start, size = mapping[name].start, mapping[name].numel
        if flat is None:
            raise ValueError(f"{key!r} of {name!r} is missing in the state of rank {rank}")
        if not 0 <= start <= start + size <= flat.numel():
            raise ValueError(
                f"'param_slice_mappings' puts {name!r} at {start}:{start + size} of {key!r}, which "
                f"has {flat.numel()} elements on rank {rank}; the state is damaged"
            )
        parts.append(flat.detach().reshape(-1)[start : start + size])
    whole = torch.cat([part.to(parts[0].device) for part in parts])
    if whole.numel() != param.numel():
        raise ValueError(
            f"the slices of {key!r} of {name!r} have {whole.numel()} elements together, but "
            f"the parameter in target has shape {tuple(param.shape)}"
        )
    return whole.view(param.shape)


def _compare_masters(masters: dict[Tensor, Tensor]) -> None:
    """Warn if the float32 weights that DeepSpeed trained are not those of the target."""
    apart = sum(
        not torch.equal(param.detach().to("cpu", torch.float32), master.to("cpu", torch.float32))
        for param, master in masters.items()
    )
    if apart:
        warnings.warn(
            f"{apart} of {len(masters)} parameters of target differ from the float32 weights that "
            "lie in the DeepSpeed state and are left out; load those into the model to go on from "
            "them (DeepSpeed's zero_to_fp32 extracts them)",
            stacklevel=5,
        )
