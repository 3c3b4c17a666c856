"""What a saved file says of each quantized layer, and how the layer is made of it again.

A record is what JSON can hold. It is read as if anyone had written it: every key, type and range is
checked before a layer is made, and layers are made on the meta device, where they take no memory.
"""

from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from typing import Any, cast

import torch
from torch import nn

from torsh_quant._layer import QuantizedLayer
from torsh_quant._quant_conv import CONVOLUTIONS, QuantConv
from torsh_quant._quant_embedding import QuantEmbedding
from torsh_quant._quant_linear import QuantLinear
from torsh_quant._spec import IntSpec, Scheme

Record = dict[str, Any]

_CONVOLUTIONS = {made.__name__: made for made in CONVOLUTIONS.values()}
_WINDOW = ("kernel_size", "stride", "padding", "dilation")
_FIELDS: dict[str, tuple[str, ...]] = {
    "QuantLinear": ("in_features", "out_features"),
    "QuantEmbedding": ("num_embeddings", "embedding_dim", "padding_idx"),
    **dict.fromkeys(
        _CONVOLUTIONS, ("in_channels", "out_channels", *_WINDOW, "groups", "padding_mode")
    ),
}
_OTHER = {"QuantLinear": ("bias", "input_scale"), "QuantEmbedding": ("dtype",)}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}
_LARGEST = 2**31 - 1
FloatKind = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding


def record_of(name: str, layer: QuantizedLayer) -> Record:
    """Describe a quantized layer, all but its tensors.

    Args:
        name: Used in the error message.
        layer: The layer.

    Raises:
        ValueError: If it is a subclass, about which a file can say nothing.
    """
    kind = type(layer).__name__
    known = {"QuantLinear": QuantLinear, "QuantEmbedding": QuantEmbedding, **_CONVOLUTIONS}
    if known.get(kind) is not type(layer):
        raise ValueError(
            f"{name!r} is of the class {type(layer).__module__}.{kind}, which a file cannot name; "
            f"use one of {', '.join(known)}"
        )
    record: Record = {"kind": kind, "scheme": asdict(layer.scheme)}
    record |= {field: _plain(getattr(layer, field)) for field in _FIELDS[kind]}
    if isinstance(layer, QuantEmbedding):
        return record | {"dtype": str(layer.dtype).removeprefix("torch.")}
    record["bias"] = layer.bias is not None
    if isinstance(layer, QuantConv):
        return record | {"channels_last": layer.channels_last}
    return record | {"input_scale": cast("QuantLinear", layer).input_scale is not None}


def layer_of(name: str, record: object) -> QuantizedLayer:
    """Make the layer that a record describes, on the meta device.

    Args:
        name: Used in error messages.
        record: What :func:`record_of` gave, or what somebody made of it.

    Raises:
        ValueError: If a key, a type or a number is not one that :func:`record_of` gives.
    """
    if not isinstance(record, dict):
        raise ValueError(f"the record of {name!r} is {record!r:.80}, not an object")
    kind = record.get("kind")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise ValueError(f"kind={kind!r:.80} of {name!r} is not known; use {', '.join(_FIELDS)}")
    other = _OTHER.get(kind, ("bias", "channels_last"))
    _require_keys(name, record, {"kind", "scheme", *_FIELDS[kind], *other})
    scheme = _scheme(name, record["scheme"])
    if kind == "QuantEmbedding":
        return _embedding(name, record, scheme)
    bias = _flag(name, record, "bias")
    if kind != "QuantLinear":
        return _convolution(name, record, scheme, bias)
    rows, columns = _whole(name, record, "out_features"), _whole(name, record, "in_features")
    _require_groups(name, scheme, rows, columns)
    made = QuantLinear(columns, rows, bias, scheme=scheme, device="meta")
    if _flag(name, record, "input_scale"):
        made.input_scale = torch.ones(columns, device="meta")
    return made


def require_same(name: str, made: QuantizedLayer, layer: nn.Module) -> None:
    """Raise if a layer of the model is not the one that was quantized.

    Args:
        name: Of the layer in the model.
        made: Made of the file's record.
        layer: What the model has there.

    Raises:
        ValueError: Naming what differs.
    """
    kind = type(made).__name__
    wanted = kind.removeprefix("Quant")
    if type(layer).__name__ != wanted or not isinstance(layer, FloatKind):
        hint = ""
        if isinstance(layer, QuantizedLayer):
            hint = "; pass the float model, not a quantized one"
        raise ValueError(
            f"{name!r} is a {wanted} in the file, but a {type(layer).__name__} in the model{hint}"
        )
    for field in _FIELDS[kind]:
        saved, there = _plain(getattr(made, field)), _plain(getattr(layer, field))
        if saved != there:
            raise ValueError(f"{name!r} has {field}={saved} in the file, but {there} in the model")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _require_keys(name: str, record: Mapping[str, Any], known: set[str]) -> None:
    for what, keys in (("unknown", set(record) - known), ("missing", known - set(record))):
        if keys:
            raise ValueError(f"the record of {name!r} has {what} keys: {sorted(keys)}")


def _whole(name: str, record: Mapping[str, Any], field: str, low: int = 1) -> int:
    return _number(name, field, record[field], low)


def _number(name: str, field: str, value: Any, low: int) -> int:
    if type(value) is not int or not low <= value <= _LARGEST:
        raise ValueError(
            f"{field}={value!r:.80} of {name!r} is not a whole number from {low} to {_LARGEST}"
        )
    return value


def _numbers(name: str, field: str, value: Any, count: int, low: int) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"{field}={value!r:.80} of {name!r} is not a list of {count} numbers")
    return tuple(_number(name, field, one, low) for one in value)


def _flag(name: str, record: Mapping[str, Any], field: str) -> bool:
    value = record[field]
    if type(value) is not bool:
        raise ValueError(f"{field}={value!r:.80} of {name!r} is neither true nor false")
    return value


def _choice(name: str, field: str, value: Any, valid: Mapping[str, Any] | tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in valid:
        raise ValueError(f"{field}={value!r:.80} of {name!r} is not one of {', '.join(valid)}")
    return value


def _scheme(name: str, record: Any) -> Scheme:
    if not isinstance(record, dict):
        raise ValueError(f"scheme={record!r:.80} of {name!r} is not an object")
    _require_keys(name, record, {"weight", "act"})
    weight, act = _spec(name, record["weight"]), record["act"]
    try:
        return Scheme(weight, None if act is None else _spec(name, act))
    except ValueError as error:
        raise ValueError(f"scheme of {name!r}: {error}") from None


def _spec(name: str, record: Any) -> IntSpec:
    if not isinstance(record, dict):
        raise ValueError(f"scheme of {name!r} has {record!r:.80} for an integer format")
    _require_keys(name, record, {"bits", "symmetric", "group", "dynamic"})
    group = record["group"]
    if isinstance(group, (str, type(None))):
        valid = ("tensor", "channel", "token")
        group = None if group is None else cast("Any", _choice(name, "group", group, valid))
    else:
        group = _number(name, "group", group, 1)
    bits = _number(name, "bits", record["bits"], 1)
    try:
        return IntSpec(
            bits, _flag(name, record, "symmetric"), group, _flag(name, record, "dynamic")
        )
    except ValueError as error:
        raise ValueError(f"scheme of {name!r}: {error}") from None


def _require_groups(name: str, scheme: Scheme, rows: int, columns: int) -> None:
    if rows * columns > 2**48:
        raise ValueError(f"{name!r} has {rows} times {columns} weights, more than any file holds")
    group = scheme.weight.group
    if isinstance(group, int) and columns % group:
        raise ValueError(f"group={group} of {name!r} does not divide {columns} weights")


def _embedding(name: str, record: Record, scheme: Scheme) -> QuantEmbedding:
    rows, columns = _whole(name, record, "num_embeddings"), _whole(name, record, "embedding_dim")
    _require_groups(name, scheme, rows, columns)
    index = record["padding_idx"]
    if index is not None and _number(name, "padding_idx", index, 0) >= rows:
        raise ValueError(f"padding_idx={index} of {name!r} is not below num_embeddings={rows}")
    dtype = _DTYPES[_choice(name, "dtype", record["dtype"], _DTYPES)]
    return QuantEmbedding(
        rows, columns, index, scheme=scheme, dtype=dtype, device="meta", layer=name
    )


def _convolution(name: str, record: Record, scheme: Scheme, bias: bool) -> QuantConv:
    made = _CONVOLUTIONS[record["kind"]]
    window: dict[str, Any] = {}
    for field in _WINDOW:
        value = record[field]
        if field != "padding" or value not in ("same", "valid"):
            low = 0 if field == "padding" else 1
            value = _numbers(name, field, value, made.dims, low)
        window[field] = value
    inputs, outputs = _whole(name, record, "in_channels"), _whole(name, record, "out_channels")
    groups = _whole(name, record, "groups")
    _require_groups(name, scheme, outputs, inputs // groups * prod(window["kernel_size"]))
    modes = ("zeros", "reflect", "replicate", "circular")
    mode = _choice(name, "padding_mode", record["padding_mode"], modes)
    channels_last = _flag(name, record, "channels_last")
    try:
        layer = made(
            inputs,
            outputs,
            **window,
            groups=groups,
            bias=bias,
            padding_mode=cast("Any", mode),
            scheme=scheme,
            device="meta",
        )
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name!r} is no convolution: {error}") from None
    layer.channels_last = channels_last
    return layer
