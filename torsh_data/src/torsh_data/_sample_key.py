"""A name for the contents of a data set's samples, its transform included."""

import functools
import sys
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
import xxhash

from torsh_data._fingerprint import identify

_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, Enum)


def sample_key(dataset: Any, key: str | None, *, must_be_certain: bool) -> str:
    """A hexadecimal name that changes with the samples.

    Args:
        dataset: The data set.
        key: The user's own name for what the transform does; None looks at the transform's code.
        must_be_certain: Whether samples of another process will go by that name.

    Raises:
        ValueError: If `must_be_certain`, there is no key, and the contents cannot be known.
    """
    digest = xxhash.xxh3_128(identify(dataset).encode())
    if key is not None:
        digest.update(f"key={key}".encode())
    for part in leaves(dataset):
        digest.update(repr(getattr(part, "columns", None)).encode())
        if key is not None or not must_be_certain:
            continue
        if not isinstance(getattr(part, "fingerprint", getattr(part, "_fingerprint", None)), str):
            raise ValueError(
                f"a {type(part).__name__} has no fingerprint, so old samples could pass for new "
                "ones; give key=, a text that changes with the files and with what is done to them"
            )
        try:
            digest.update("\n".join(_code(getattr(part, "transform", None), set())).encode())
        except TypeError as error:
            raise ValueError(
                f"transform holds {error}, whose meaning cannot be told from its code; give key=, "
                "a text that changes with what the transform does"
            ) from None
    return digest.hexdigest()


def leaves(dataset: Any) -> Iterator[Any]:
    """The data sets that a `Subset`, a `ConcatDataset` or another wrapper takes samples from."""
    parts = getattr(dataset, "datasets", None)
    if isinstance(parts, Mapping):
        parts = list(parts.values())
    if parts is None:
        parts = [dataset.dataset] if hasattr(dataset, "dataset") else None
    if not isinstance(parts, (list, tuple)):
        yield dataset
        return
    for part in parts:
        yield from leaves(part)


def _code(value: Any, seen: set[int]) -> Iterator[str]:
    """What a value does, line by line: names, constants and bytecode."""
    if isinstance(value, _ATOMS):
        yield f"{type(value).__name__} {value!r}"
        return
    if id(value) in seen:
        yield "again"
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    if isinstance(value, np.ndarray) and value.dtype.kind != "O":
        yield f"{value.dtype} {value.shape} {xxhash.xxh3_128_hexdigest(value.tobytes())}"
    elif isinstance(value, Mapping):
        yield type(value).__qualname__
        for name, item in value.items():
            yield from _code(name, seen)
            yield from _code(item, seen)
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield f"{type(value).__qualname__} {len(value)}"
        ordered = value if isinstance(value, (list, tuple)) else sorted(value, key=repr)
        for item in ordered:
            yield from _code(item, seen)
    elif isinstance(value, types.FunctionType):
        yield f"{value.__module__}.{value.__qualname__}"
        yield from _code(value.__code__, seen)
        yield from _code(value.__defaults__, seen)
        yield from _code(value.__kwdefaults__, seen)
        for cell in value.__closure__ or ():
            yield from _code(cell.cell_contents, seen)
    elif isinstance(value, types.CodeType):
        yield f"{sys.version_info[:2]} {value.co_code.hex()} {value.co_names}"
        yield from _code(value.co_consts, seen)
    elif isinstance(value, types.MethodType):
        yield from _code(value.__func__, seen)
        yield from _code(value.__self__, seen)
    elif isinstance(value, functools.partial):
        yield "partial"
        yield from _code((value.func, value.args, value.keywords), seen)
    elif isinstance(value, (type, types.BuiltinFunctionType, types.ModuleType)):
        yield f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
    elif hasattr(value, "__dict__"):
        yield from _object_code(value, seen)
    else:
        raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__}")


def _object_code(value: Any, seen: set[int]) -> Iterator[str]:
    kind = type(value)
    yield f"{kind.__module__}.{kind.__qualname__}"
    library = sys.modules.get(kind.__module__.partition(".")[0])
    yield str(getattr(library, "__version__", None))
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] not in ("builtins", "torch", "torchvision"):
            for name, member in vars(base).items():
                if isinstance(member, types.FunctionType):
                    yield name
                    yield from _code(member, seen)
    yield from _code(vars(value), seen)
