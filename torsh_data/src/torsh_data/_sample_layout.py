"""Samples as flat bytes and back.

A layout is the structure of a data set's samples: mappings, lists and tuples with leaves of a known
kind. A sample is then its leaves' numbers (values, lengths, extents) in one table of int64, and
their bytes behind it. Nothing is pickled, so nothing that is read can run.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, cast

import numpy as np
import torch

Spec: TypeAlias = list[Any]  # JSON-able: [kind, ...]
Parts: TypeAlias = list["np.ndarray[Any, Any] | bytes"]

_ALIGNMENT = 64
_BOUND = 2**63
_PLAIN: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str, "bytes": bytes}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith(("torch.q", "torch.bits"))
}


class UnfitError(ValueError):
    """A sample that has another structure than the layout, or one that no layout can hold."""


def describe(sample: Any, name: str = "sample") -> Spec:
    """The layout of a sample.

    Raises:
        UnfitError: If a value is of a kind that cannot be stored.
    """
    kind = type(sample)
    if kind is dict:
        if not all(type(key) in (str, int) for key in sample):
            raise UnfitError(f"{name} has keys that are neither str nor int")
        return ["dict", [[k, describe(v, f"{name}[{k!r}]")] for k, v in sample.items()]]
    if kind in (list, tuple):
        return [kind.__name__, [describe(v, f"{name}[{i}]") for i, v in enumerate(sample)]]
    if sample is None:
        return ["none"]
    if kind is torch.Tensor and sample.layout == torch.strided and sample.device.type == "cpu":
        return ["tensor", str(sample.dtype).removeprefix("torch."), sample.dim()]
    if kind is np.ndarray and sample.dtype.kind in "biufc":
        return ["array", sample.dtype.str, sample.ndim]
    if isinstance(sample, np.generic) and sample.dtype.kind in "biufc":
        return ["scalar", sample.dtype.str]
    for plain, its in _PLAIN.items():
        if kind is its:
            return [plain]
    raise UnfitError(
        f"{name} is a {kind.__module__}.{kind.__qualname__}; a SampleCache holds CPU tensors, "
        "NumPy arrays, numbers, str, bytes and None, in dicts, lists and tuples"
    )


class Layout:
    """Writes and reads samples of one structure.

    Args:
        spec: From `describe`.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._numbers = sum(_count(leaf) for leaf in _leaves(spec))
        self._table = struct.Struct(f"<{self._numbers}q")
        self._read = _reader(spec)

    def encode(self, sample: Any) -> tuple[bytes, Parts, int]:
        """The table of a sample, the pieces that follow it and the size of all.

        Raises:
            UnfitError: If the sample has another structure.
        """
        numbers: list[int] = []
        parts: Parts = []
        _write(self.spec, sample, numbers, parts, "sample")
        size = self._table.size
        for part in parts:
            size = aligned(size) + len(part)
        return self._table.pack(*numbers), parts, size

    def decode(self, memory: memoryview) -> Any:
        """The sample that lies in `memory`, copied out of it."""
        numbers = iter(self._table.unpack_from(memory))
        sample, _ = self._read(memory, numbers, self._table.size)
        return sample


def aligned(size: int) -> int:
    """`size` up to the next place where a value may begin."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _leaves(spec: Spec) -> Iterator[Spec]:
    if spec[0] in ("list", "tuple"):
        for item in spec[1]:
            yield from _leaves(item)
    elif spec[0] == "dict":
        for _, item in spec[1]:
            yield from _leaves(item)
    else:
        yield spec


def _count(leaf: Spec) -> int:
    return leaf[2] if leaf[0] in ("tensor", "array") else int(leaf[0] != "none")


def _write(spec: Spec, value: Any, numbers: list[int], parts: Parts, name: str) -> None:
    kind = spec[0]
    if kind in ("dict", "list", "tuple"):
        _check_container(spec, value, name)
        for key, item in spec[1] if kind == "dict" else enumerate(spec[1]):
            _write(item, value[key], numbers, parts, f"{name}[{key!r}]")
        return
    found = describe(value, name)
    if found != spec:
        raise UnfitError(f"{name} is {_say(found)}, but the first sample has {_say(spec)} there")
    if kind == "tensor":
        numbers.extend(value.shape)
        flat = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        parts.append(flat.view(torch.uint8).numpy())
    elif kind == "array":
        numbers.extend(value.shape)
        parts.append(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    elif kind in ("str", "bytes"):
        raw = value.encode("utf-8", "surrogatepass") if kind == "str" else value
        numbers.append(len(raw))
        parts.append(raw)
    elif kind == "float":
        numbers.append(struct.unpack("<q", struct.pack("<d", value))[0])
    elif kind == "scalar":
        raw = value.tobytes()
        numbers.append(len(raw))
        parts.append(raw)
    elif kind in ("int", "bool"):
        if not -_BOUND <= value < _BOUND:
            raise UnfitError(f"{name} is {value}, beyond int64")
        numbers.append(int(value))


def _check_container(spec: Spec, value: Any, name: str) -> None:
    if type(value).__name__ != spec[0] or type(value) not in (dict, list, tuple):
        raise UnfitError(f"{name} is a {type(value).__name__}, the first sample has a {spec[0]}")
    if spec[0] == "dict" and list(value) != [key for key, _ in spec[1]]:
        raise UnfitError(
            f"{name} has the keys {list(value)}, the first sample {[key for key, _ in spec[1]]}"
        )
    if len(value) != len(spec[1]):
        raise UnfitError(f"{name} has {len(value)} items, the first sample {len(spec[1])}")


def _say(spec: Spec) -> str:
    if spec[0] in ("tensor", "array"):
        return f"a {spec[2]}-dimensional {spec[0]} of {spec[1]}"
    return {"none": "None", "scalar": f"a NumPy number {spec[-1]}"}.get(spec[0], f"a {spec[0]}")


_Read: TypeAlias = Callable[[memoryview, Iterator[int], int], tuple[Any, int]]


def _reader(spec: Spec) -> _Read:
    """A function that reads one value: its numbers from the table, its bytes from a place on."""
    kind = spec[0]
    if kind == "dict":
        keys, readers = [key for key, _ in spec[1]], [_reader(item) for _, item in spec[1]]

        def read_dict(memory: memoryview, numbers: Iterator[int], at: int) -> tuple[Any, int]:
            made = {}
            for key, read in zip(keys, readers, strict=True):
                made[key], at = read(memory, numbers, at)
            return made, at

        return read_dict
    if kind in ("list", "tuple"):
        readers = [_reader(item) for item in spec[1]]

        def read_list(memory: memoryview, numbers: Iterator[int], at: int) -> tuple[Any, int]:
            made = []
            for read in readers:
                item, at = read(memory, numbers, at)
                made.append(item)
            return (made if kind == "list" else tuple(made)), at

        return read_list
    if kind == "tensor":
        return _tensor_reader(spec)
    if kind == "array":
        return _array_reader(spec)
    if kind in ("str", "bytes", "scalar"):
        return _raw_reader(spec)
    return _number_reader(kind)


def _number_reader(kind: str) -> _Read:
    def read(_: memoryview, numbers: Iterator[int], at: int) -> tuple[Any, int]:
        if kind == "none":
            return None, at
        number = next(numbers)
        if kind == "float":
            return struct.unpack("<d", struct.pack("<q", number))[0], at
        return (bool(number) if kind == "bool" else number), at

    return read


def _tensor_reader(spec: Spec) -> _Read:
    dtype, dim = _DTYPES[spec[1]], spec[2]

    def read(memory: memoryview, numbers: Iterator[int], at: int) -> tuple[Any, int]:
        shape = [next(numbers) for _ in range(dim)]
        tensor = torch.empty(shape, dtype=dtype)
        at = aligned(at)
        end = at + tensor.nbytes
        if end > at:
            source = torch.frombuffer(memory, dtype=dtype, count=tensor.numel(), offset=at)
            tensor.copy_(source.view(shape))
        return tensor, end

    return read


def _array_reader(spec: Spec) -> _Read:
    dtype, dim = np.dtype(cast("str", spec[1])), spec[2]

    def read(memory: memoryview, numbers: Iterator[int], at: int) -> tuple[Any, int]:
        shape = [next(numbers) for _ in range(dim)]
        made = np.empty(shape, dtype)
        at = aligned(at)
        if made.nbytes:
            made[...] = np.frombuffer(memory, dtype, made.size, at).reshape(shape)
        return made, at + made.nbytes

    return read


def _raw_reader(spec: Spec) -> _Read:
    kind = spec[0]

    def read(memory: memoryview, numbers: Iterator[int], at: int) -> tuple[Any, int]:
        at = aligned(at)
        end = at + next(numbers)
        raw = bytes(memory[at:end])
        if kind == "str":
            return raw.decode("utf-8", "surrogatepass"), end
        return (np.frombuffer(raw, spec[1])[0] if kind == "scalar" else raw), end

    return read
