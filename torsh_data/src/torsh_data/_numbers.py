"""Numbers in Arrow as NumPy sees them, and columns whose values are lists of numbers.

Rows of different lengths, such as the tokens of texts, are Arrow lists. They come back as tensors
`(length,)`, each a copy of its slice of the mapped file.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

Array: TypeAlias = npt.NDArray[Any]


def is_plain_number(kind: pa.DataType) -> bool:
    """Whether NumPy has numbers of this type, too."""
    return (pa.types.is_integer(kind) or pa.types.is_floating(kind)) and kind != pa.float16()


def is_number_list(kind: pa.DataType) -> bool:
    """Whether values are lists of any length of numbers."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return is_list and is_plain_number(kind.value_type)


def as_numpy(array: pa.Array) -> Array:
    """Numbers without nulls, where they lie. `to_numpy` would import pandas, for a second."""
    data = array.buffers()[1]
    dtype = np.dtype(array.type.to_pandas_dtype())
    if data is None:
        return np.empty(0, dtype)
    return np.frombuffer(data, dtype, len(array), array.offset * dtype.itemsize)


def number_list_getter(array: pa.Array) -> Callable[[int], Any]:
    """A function row -> tensor; a row with nulls inside comes as a list, which can hold them."""
    wide = pa.types.is_large_list(array.type)
    offsets = memoryview(array.buffers()[1]).cast("B").cast("q" if wide else "i")[array.offset :]
    values = array.values
    # nulls have no defined number under them, but a place
    numbers = as_numpy(values)

    def get(row: int) -> torch.Tensor:
        # a copy: the mapping is read-only, and writing into it would end the process
        return torch.from_numpy(numbers[offsets[row] : offsets[row + 1]].copy())

    if not array.null_count and not values.null_count:
        return get

    def get_or_none(row: int) -> Any:
        value = array[row].as_py()
        return value if value is None or None in value else get(row)

    return get_or_none


def encode_number_lists(field: pa.Field, values: Sequence[Any], first: int) -> pa.Array:
    """One block of a column of lists; Arrow by itself would cut 0.5 to 0 without a word."""
    kind = field.type.value_type
    rows = [_as_row(field, value, first + k) for k, value in enumerate(values)]
    full = [row for row in rows if row.size]
    kinds = {row.dtype for row in full}
    if len(kinds) == 1 and np.dtype(object) not in kinds:
        content = pa.array(np.concatenate(full), kind)
    else:  # NumPy would make floats of int64 beside uint64
        content = pa.array([item for row in full for item in row.tolist()], kind)
    ends = np.cumsum([0, *map(len, rows)])
    wide = pa.types.is_large_list(field.type)
    absent = [value is None for value in values]
    return (pa.LargeListArray if wide else pa.ListArray).from_arrays(
        pa.array(ends, pa.int64() if wide else pa.int32()),
        content,
        type=field.type,
        mask=pa.array(absent) if any(absent) else None,
    )


def _as_row(field: pa.Field, value: Any, number: int) -> Array:
    fits = (int, np.integer)
    if pa.types.is_floating(field.type.value_type):
        fits = (int, float, np.integer, np.floating)
    if value is None and field.nullable:
        return np.empty(0, object)
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        value = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    if isinstance(value, np.ndarray):
        if value.ndim == 1 and issubclass(value.dtype.type, fits):
            return value
        held = f"{value.dtype} of shape {value.shape}"
    elif isinstance(value, (list, tuple)):
        kinds = set(map(type, value))
        others = {k for k in kinds if k is bool or not issubclass(k, fits)}
        if field.type.value_field.nullable:
            others.discard(type(None))
        if not others:
            row = np.asarray(value, object if type(None) in kinds else None)
            # NumPy makes floats of whole numbers beyond its own
            is_cut = fits[-1] is np.integer and row.dtype.kind == "f"
            return np.asarray(value, object) if is_cut else row
        held = "lists of " + " and ".join(sorted(kind.__name__ for kind in kinds))
    else:
        held = type(value).__name__
    raise TypeError(
        f"sample {number}: column {field.name!r} holds {held}, but the column is {field.type}; "
        "give every sample a list or a tensor (length,) of such numbers, or a schema"
    )
