"""How a batch travels from a worker to the process that asked for it.

A tensor is handed over in shared memory, whose set-up costs as much as copying 100 kB, and a list
of bytes is pickled one by one into a pipe of 64 kB. So small tensors travel by value, and a list of
bytes, or of tensors `(length,)`, travels as one piece, in shared memory if it is long.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from typing_extensions import Buffer

_SMALL = 64 * 1024
_LONG = 1024 * 1024

Ends: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Joined:
    """A list of bytes as one, with the places where the items end."""

    content: bytes | torch.Tensor
    ends: Ends


@dataclass(frozen=True)
class _Rows:
    """A list of tensors `(length,)` as one, packed in its turn."""

    content: Any
    lengths: list[int]


@dataclass(frozen=True)
class Parcel:
    """A packed batch."""

    items: dict[Any, Any]


def pack(batch: dict[Any, Any]) -> Parcel:
    """Pack a batch whose values may be anything that can be pickled."""
    return Parcel({name: _pack_value(value) for name, value in batch.items()})


def unpack(parcel: Parcel) -> dict[Any, Any]:
    """The batch that was packed."""
    return {name: _unpack_value(value) for name, value in parcel.items.items()}


def _pack_value(value: Any) -> Any:
    if type(value) is torch.Tensor and value.nbytes <= _SMALL and _has_numpy(value):
        return value.numpy()
    if isinstance(value, list) and value and all(type(item) is bytes for item in value):
        content = b"".join(value)
        ends = np.cumsum([len(item) for item in value], dtype=np.int64)
        if len(content) > _LONG:
            return _Joined(torch.frombuffer(bytearray(content), dtype=torch.uint8), ends)
        return _Joined(content, ends)
    if isinstance(value, list) and _are_rows(value):
        return _Rows(_pack_value(torch.cat(value)), [len(item) for item in value])
    return value


def _are_rows(value: list[Any]) -> bool:
    if not all(type(item) is torch.Tensor and item.ndim == 1 for item in value):
        return False
    return len({item.dtype for item in value}) == 1 and all(map(_has_numpy, value))


def _has_numpy(tensor: torch.Tensor) -> bool:
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return plain and tensor.dtype != torch.bfloat16 and not tensor.requires_grad


def _unpack_value(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, _Rows):
        return list(torch.split(_unpack_value(value.content), value.lengths))
    if isinstance(value, _Joined):
        places = pairwise([0, *value.ends.tolist()])
        if isinstance(value.content, bytes):
            return [value.content[begin:end] for begin, end in places]
        view = memoryview(cast("Buffer", value.content.numpy()))
        return [bytes(view[begin:end]) for begin, end in places]
    return value
