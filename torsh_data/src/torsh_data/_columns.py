"""Columns: how a sample's values lie in Arrow, and how they come back out of the mapped file.

A tensor of fixed shape is Arrow's canonical `fixed_shape_tensor`, so other Arrow programs read it,
too. Arrow has no bfloat16 and packs booleans into bits; tensors of these are stored as integers of
the same width with the true dtype in the field's metadata.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

Array: TypeAlias = npt.NDArray[Any]
Value: TypeAlias = Any  # what a column holds: int, float, bool, str, bytes, Tensor
Getter: TypeAlias = Callable[[int], Value]

_DTYPE = b"torsh.dtype"
_STORED_AS = {torch.bfloat16: (torch.uint16, b"bfloat16"), torch.bool: (torch.uint8, b"bool")}
HOLDS_TENSORS = {b"torsh.holds": b"tensors"}  # a field whose bytes are decoded to tensors
_RESTORED = {name: dtype for dtype, (_, name) in _STORED_AS.items()}


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
    value = value.item() if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) else value
    for types, kind in (
        (bool, pa.bool_()),
        (int, pa.int64()),
        (float, pa.float64()),
        (str, pa.string()),
        ((bytes, bytearray, memoryview), pa.binary()),
    ):
        if isinstance(value, types):
            return pa.field(name, kind, nullable=False)
    raise TypeError(
        f"column {name!r} holds {type(value).__name__}; a column holds tensors of one shape, int, "
        "float, bool, str or bytes"
    )


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
        if not (value is None and field.nullable) and not _fits(field.type, value):
            raise TypeError(
                f"sample {first + k}: column {field.name!r} holds {type(value).__name__}, but the "
                f"column is {field.type}; give every sample the type of the first, or a schema"
            )
    held = (np.generic, np.ndarray, torch.Tensor)
    plain = [value.item() if isinstance(value, held) else value for value in values]
    try:
        return pa.array(plain, field.type)
    except (pa.ArrowInvalid, OverflowError) as error:
        raise ValueError(f"column {field.name!r}, samples from {first} on: {error}") from error


def _fits(kind: pa.DataType, value: Value) -> bool:
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
            )
        block[k] = tensor.view(stored)
    flat = pa.array(block.numpy().reshape(-1), field.type.value_type)
    return pa.ExtensionArray.from_storage(
        field.type, pa.FixedSizeListArray.from_arrays(flat, type=field.type.storage_type)
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
    if array.null_count:
        return (lambda row: array[row].as_py()), None
    if _is_plain_number(kind):
        return _number_getter(array), None
    wide = pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)
    if wide or pa.types.is_string(kind) or pa.types.is_binary(kind):
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        return _bytes_getter(array, "q" if wide else "i", is_text), None
    return (lambda row: array[row].as_py()), None


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
    return torch.Tensor if is_row and _is_plain_number(kind.value_type) else None


def _is_plain_number(kind: pa.DataType) -> bool:
    return (pa.types.is_integer(kind) or pa.types.is_floating(kind)) and kind != pa.float16()


def _number_getter(array: pa.Array) -> Getter:
    return _as_numpy(array).data.__getitem__


def _as_numpy(array: pa.Array) -> Array:
    """Numbers without nulls, where they lie. `to_numpy` would import pandas, for a second."""
    data = array.buffers()[1]
    dtype = np.dtype(array.type.to_pandas_dtype())
    if data is None:
        return np.empty(0, dtype)
    return np.frombuffer(data, dtype, len(array), array.offset * dtype.itemsize)


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
    rows = _as_numpy(storage.flatten()).reshape(len(storage), *shape)
    view = None if dtype is None or dtype not in _STORED_AS else dtype

    def get(row: int) -> torch.Tensor:
        # a copy: the mapping is read-only, and writing into it would end the process
        tensor = torch.from_numpy(rows[row].copy())
        return tensor if view is None else tensor.view(view)

    return get, rows if view is None else None
