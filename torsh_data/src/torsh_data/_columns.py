"""Columns: how a sample's values lie in Arrow, and how they come back out of the mapped file.

A tensor of fixed shape is Arrow's canonical `fixed_shape_tensor`, so other Arrow programs read it,
too. Arrow has no bfloat16 and packs booleans into bits; tensors of these are stored as integers of
the same width with the true dtype in the field's metadata.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import torch

from torsh_data._numbers import (
    Array,
    as_numpy,
    encode_number_lists,
    is_number_list,
    is_plain_number,
    number_list_getter,
)

Value: TypeAlias = Any  # what a column holds: int, float, bool, str, bytes, Tensor, list
Getter: TypeAlias = Callable[[int], Value]

_DTYPE = b"torsh.dtype"
_STORED_AS = {torch.bfloat16: (torch.uint16, b"bfloat16"), torch.bool: (torch.uint8, b"bool")}
HOLDS_TENSORS = {b"torsh.holds": b"tensors"}  # a field whose bytes are decoded to tensors
_RESTORED = {name: dtype for dtype, (_, name) in _STORED_AS.items()}
_SCALARS: tuple[tuple[type | tuple[type, ...], pa.DataType], ...] = (
    (bool, pa.bool_()),
    (int, pa.int64()),
    (float, pa.float64()),
    (str, pa.string()),
    ((bytes, bytearray, memoryview), pa.binary()),
)


def infer_schema(sample: Mapping[str, Value]) -> pa.Schema:
    """The Arrow schema of a data set, from its first sample."""
    if not sample:
        raise ValueError("samples: the first sample has no columns")
    return pa.schema([_infer_field(name, value) for name, value in sample.items()])


def _infer_field(name: str, value: Value) -> pa.Field:
    if isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim:
        tensor = _as_tensor(name, value)
        if not tensor.numel():  # Arrow divides by the size of a row
            raise ValueError(
                f"column {name!r}: tensors of shape {tuple(tensor.shape)} hold nothing"
            )
        stored, dtype = _STORED_AS.get(tensor.dtype, (tensor.dtype, None))
        try:
            numbers = pa.from_numpy_dtype(torch.empty(0, dtype=stored).numpy().dtype)
        except (TypeError, pa.ArrowNotImplementedError):
            raise TypeError(
                f"column {name!r}: tensors of {tensor.dtype} cannot be stored; convert them to "
                "integers or floats"
            ) from None
        kind = pa.fixed_shape_tensor(numbers, list(tensor.shape))
        return pa.field(name, kind, nullable=False, metadata={_DTYPE: dtype} if dtype else None)
    kind = _infer_list(name, value) if isinstance(value, (list, tuple)) else _scalar_kind(value)
    if kind is not None:
        return pa.field(name, kind, nullable=False)
    if value is None:
        raise TypeError(
            f"column {name!r} is None in the first sample, which does not say its type; give "
            f"schema=pa.schema([({name!r}, pa.int64()), ...]), whose columns may hold None"
        )
    raise TypeError(
        f"column {name!r} holds {type(value).__name__}; a column holds tensors of one shape, int, "
        "float, bool, str or bytes, or lists of one of these"
    )


def _scalar_kind(value: Value) -> pa.DataType | None:
    value = value.item() if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) else value
    return next((kind for types, kind in _SCALARS if isinstance(value, types)), None)


def _infer_list(name: str, values: Sequence[Value]) -> pa.DataType:
    if not values:
        raise ValueError(
            f"column {name!r} holds empty lists alone in the first samples, which do not say its "
            f"type; give schema=pa.schema([({name!r}, pa.list_(pa.int64())), ...])"
        )
    kinds = {_scalar_kind(value) for value in values}
    if kinds == {pa.int64(), pa.float64()}:
        kinds = {pa.float64()}
    if len(kinds) > 1 or None in kinds:
        held = " and ".join(sorted({type(value).__name__ for value in values}))
        raise TypeError(
            f"column {name!r} holds lists of {held}; a list holds int, float, bool, str or bytes, "
            "all alike, or give a schema"
        )
    return pa.list_(pa.field("item", kinds.pop(), nullable=False))


def _as_tensor(name: str, value: Array | torch.Tensor) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if not (value.flags.writeable and value.flags.c_contiguous):  # torch refuses or warns
        value = value.copy(order="C")
    try:
        return torch.from_numpy(value)
    except TypeError:
        raise TypeError(
            f"column {name!r}: arrays of {value.dtype} cannot be stored; convert them to integers, "
            "floats or booleans"
        ) from None


def encode(field: pa.Field, values: Sequence[Value], first: int) -> pa.Array:
    """One block of one column; `first` is the number of its first sample, for error messages."""
    if isinstance(field.type, pa.FixedShapeTensorType):
        return _encode_tensors(field, values, first)
    for k, value in enumerate(values):
        if value is None and not field.nullable:
            raise TypeError(
                f"sample {first + k}: column {field.name!r} is None, but the column is "
                f"{field.type} without nulls; give schema=, whose columns may hold None"
            )
        if value is not None and not _fits(field.type, value):
            raise TypeError(
                f"sample {first + k}: column {field.name!r} holds {_type_name(value)}, but the "
                f"column is {field.type}; give every sample the type of the first, or a schema"
            )
    try:
        if is_number_list(field.type):
            return encode_number_lists(field, values, first)
        held = (np.generic, np.ndarray, torch.Tensor)
        plain = [value.item() if isinstance(value, held) else value for value in values]
        if isinstance(field.type, pa.JsonType):
            plain = [None if value is None else json.dumps(value) for value in plain]
        return pa.array(plain, field.type)
    except UnicodeEncodeError as error:
        number = first + next(k for k, value in enumerate(values) if not _is_utf8(value))
        raise ValueError(
            f"sample {number}: column {field.name!r} holds text with "
            f"{error.object[error.start]!r}, half of a surrogate pair, which UTF-8 cannot hold; "
            "mend it, such as with text.encode('utf-8', 'replace').decode()"
        ) from error
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise ValueError(f"column {field.name!r}, samples from {first} on: {error}") from error


def _is_utf8(value: Value) -> bool:
    try:
        pa.array([value])
    except UnicodeEncodeError:
        return False
    return True


def _type_name(value: Value) -> str:
    if not isinstance(value, (list, tuple)):
        return type(value).__name__
    return "lists of " + " and ".join(sorted({type(item).__name__ for item in value}))


def _fits(kind: pa.DataType, value: Value) -> bool:
    if is_number_list(kind):
        return True  # its own encoder looks
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        is_list = isinstance(value, (list, tuple))
        may_be_none = kind.value_field.nullable
        return is_list and all(
            may_be_none if item is None else _fits(kind.value_type, item) for item in value
        )
    if isinstance(value, (np.ndarray, torch.Tensor)):
        if value.ndim:
            return False
        value = value.item()
    is_bool = isinstance(value, (bool, np.bool_))
    if pa.types.is_boolean(kind):
        return is_bool
    if pa.types.is_integer(kind):
        return isinstance(value, (int, np.integer)) and not is_bool
    if pa.types.is_floating(kind):
        return isinstance(value, (int, float, np.number)) and not is_bool
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return isinstance(value, str)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return isinstance(value, (bytes, bytearray, memoryview))
    return value is not None


def _encode_tensors(field: pa.Field, values: Sequence[Value], first: int) -> pa.Array:
    shape = tuple(field.type.shape)
    dtype = _tensor_dtype(field)
    stored = _STORED_AS.get(dtype, (dtype, None))[0]
    block = torch.empty(len(values), *shape, dtype=stored)
    for k, value in enumerate(values):
        is_tensor = isinstance(value, (np.ndarray, torch.Tensor))
        tensor = _as_tensor(field.name, value) if is_tensor else None
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            found = type(value).__name__ if tensor is None else _describe(tensor)
            raise ValueError(
                f"sample {first + k}: column {field.name!r} holds {found}, but the column is "
                f"{dtype} of shape {shape}; a tensor column has one dtype and shape"
                + _remedy_for_rows(field, value)
            )
        block[k] = tensor.view(stored)
    flat = pa.array(block.numpy().reshape(-1), field.type.value_type)
    return pa.ExtensionArray.from_storage(
        field.type, pa.FixedSizeListArray.from_arrays(flat, type=field.type.storage_type)
    )


def _remedy_for_rows(field: pa.Field, value: Value) -> str:
    if len(field.type.shape) != 1 or getattr(value, "ndim", 0) != 1:
        return ""
    kind = f"pa.list_(pa.{field.type.value_type}())"
    return (
        f"; for rows of any length give schema=pa.schema([({field.name!r}, {kind}), ...]), or lists"
    )


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _tensor_dtype(field: pa.Field) -> torch.dtype:
    name = (field.metadata or {}).get(_DTYPE)
    if name is not None:
        return _RESTORED[name]
    return torch.from_numpy(np.empty(0, field.type.value_type.to_pandas_dtype())).dtype


def getter(field: pa.Field, array: pa.Array) -> tuple[Getter, Array | None]:
    """A function row -> value over one block's column, and the block's tensors if it holds them.

    Slices the offset buffer by hand: `Array.take` and `as_py` cost ten times as much per row.
    """
    kind = field.type
    if collated_kind(field) is torch.Tensor:
        is_row = pa.types.is_fixed_size_list(kind)
        shape = (kind.list_size,) if is_row else tuple(kind.shape)
        dtype = None if is_row else _tensor_dtype(field)
        storage = array if is_row else array.storage
        if storage.flatten().null_count:
            raise ValueError(
                f"column {field.name!r} has nulls inside its rows, and a tensor has none; leave "
                "the column out with columns="
            )
        if array.null_count:
            return _sparse_getter(storage, shape, dtype), None
        return _tensor_getter(storage, shape, dtype)
    if is_number_list(kind):
        return number_list_getter(array), None
    if isinstance(kind, pa.JsonType):
        return (lambda row: _from_json(array[row].as_py())), None
    if array.null_count:
        return (lambda row: array[row].as_py()), None
    if is_plain_number(kind):
        return _number_getter(array), None
    wide = pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)
    if wide or pa.types.is_string(kind) or pa.types.is_binary(kind):
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        return _bytes_getter(array, "q" if wide else "i", is_text), None
    return (lambda row: array[row].as_py()), None


def _from_json(text: str | None) -> Value:
    return None if text is None else json.loads(text)


def collated_kind(field: pa.Field) -> torch.dtype | type[torch.Tensor] | None:
    """What a batch of a column is: a tensor of that dtype, stacked tensors, or None for a list."""
    kind = field.type
    if (field.metadata or {}).items() >= HOLDS_TENSORS.items():
        return torch.Tensor
    if pa.types.is_boolean(kind):
        return torch.bool
    if pa.types.is_integer(kind):
        return torch.int64
    if pa.types.is_floating(kind):
        return torch.float64
    if isinstance(kind, pa.FixedShapeTensorType):
        return torch.Tensor if kind.permutation is None else None
    is_row = pa.types.is_fixed_size_list(kind) and kind.list_size > 0
    return torch.Tensor if is_row and is_plain_number(kind.value_type) else None


def _number_getter(array: pa.Array) -> Getter:
    return as_numpy(array).data.__getitem__


def _bytes_getter(array: pa.Array, code: Literal["i", "q"], is_text: bool) -> Getter:
    _, offset_buffer, data_buffer = array.buffers()
    offsets = memoryview(offset_buffer).cast("B").cast(code)[array.offset :]
    data = memoryview(data_buffer) if data_buffer is not None else memoryview(b"")
    if is_text:
        return lambda row: str(data[offsets[row] : offsets[row + 1]], "utf-8")
    return lambda row: bytes(data[offsets[row] : offsets[row + 1]])


def _sparse_getter(storage: pa.Array, shape: tuple[int, ...], dtype: torch.dtype | None) -> Getter:
    valid = np.array(storage.is_valid().to_pylist(), dtype=bool)
    places = np.cumsum(valid) - 1  # flatten() leaves the null rows out
    get, _ = _tensor_getter(storage.drop_null(), shape, dtype)
    return lambda row: get(int(places[row])) if valid[row] else None


def _tensor_getter(
    storage: pa.Array, shape: tuple[int, ...], dtype: torch.dtype | None
) -> tuple[Getter, Array | None]:
    # flatten() honours the offset of a sliced array, `values` does not
    rows = as_numpy(storage.flatten()).reshape(len(storage), *shape)
    view = None if dtype is None or dtype not in _STORED_AS else dtype

    def get(row: int) -> torch.Tensor:
        # a copy: the mapping is read-only, and writing into it would end the process
        tensor = torch.from_numpy(rows[row].copy())
        return tensor if view is None else tensor.view(view)

    return get, rows if view is None else None
