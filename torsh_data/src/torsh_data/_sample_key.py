"""A name for the contents of a data set's samples, its transform included."""

import dis
import functools
import logging
import re
import sys
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from torsh_data._fingerprint import identify

_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, Enum)
_BY_NAME = (types.BuiltinFunctionType, types.MethodDescriptorType, np.ufunc, types.ModuleType)


def sample_key(dataset: Any, key: str | None, *, must_be_certain: bool) -> str:
    """A hexadecimal name that changes with the samples.

    Args:
        dataset: The data set.
        key: The user's own name for what the transform does; None looks at the transform's code
            and at what that names.
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
            digest.update("\n".join(_code(getattr(part, "transform", None), {})).encode())
        except (TypeError, RecursionError) as error:
            what = error if isinstance(error, TypeError) else "objects in objects, too deep to see"
            raise ValueError(
                f"transform holds {what}, whose meaning cannot be told from its code; give key=, "
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


def _code(value: Any, seen: dict[int, Any]) -> Iterator[str]:
    """What a value does, line by line: names, constants, bytecode, and what that names."""
    if isinstance(value, _ATOMS):
        yield f"{type(value).__name__} {value!r}"
        return
    if id(value) in seen:
        yield "again"
        return
    seen[id(value)] = value  # kept, because another value could get its id
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
        if _is_own(value.__module__):
            for name, found in _named(value.__code__, value.__globals__):
                yield name
                yield from _code(found, seen)
        else:
            yield _version(value.__module__)
    elif isinstance(value, types.CodeType):
        yield f"{sys.version_info[:2]} {value.co_code.hex()} {value.co_names}"
        yield from _code(value.co_consts, seen)
    elif isinstance(value, types.MethodType):
        yield from _code((value.__func__, value.__self__), seen)
    elif isinstance(value, (staticmethod, classmethod)):
        yield from _code(value.__func__, seen)
    elif isinstance(value, (property, functools.cached_property)):
        yield from _code(value.fget if isinstance(value, property) else value.func, seen)
    elif isinstance(value, functools.partial):
        yield "partial"
        yield from _code((value.func, value.args, value.keywords), seen)
    elif isinstance(value, type):
        yield from _class_code(value, seen)
    elif isinstance(value, _BY_NAME):
        module = getattr(value, "__module__", None) or value.__name__
        yield f"{module}.{getattr(value, '__qualname__', '')} {_version(module)}"
    elif isinstance(value, re.Pattern):
        yield f"pattern {value.pattern!r} {value.flags}"
    elif isinstance(value, logging.Logger):
        yield "logger"
    elif hasattr(value, "__dict__"):
        yield from _class_code(type(value), seen)
        yield from _code(vars(value), seen)
    else:
        raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__}")


def _class_code(kind: type, seen: dict[int, Any]) -> Iterator[str]:
    for base in kind.__mro__:
        yield f"{base.__module__}.{base.__qualname__}"
        if not _is_own(base.__module__):
            yield _version(base.__module__)
            continue
        for name, member in vars(base).items():
            is_code = isinstance(member, (types.FunctionType, staticmethod, classmethod))
            is_value = not name.startswith(("__", "_abc_")) and not hasattr(member, "__objclass__")
            if is_code or is_value:
                yield name
                yield from _code(member, seen)


def _named(code: types.CodeType, scope: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The global values that a function names, and those that it may mean in modules it names."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") and instruction.argval in scope:
            found = scope[instruction.argval]
            yield instruction.argval, found
            if isinstance(found, types.ModuleType) and _is_own(found.__name__):
                inner = vars(found)
                yield from ((name, inner[name]) for name in code.co_names if name in inner)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):  # functions and comprehensions inside
            yield from _named(constant, scope)


def _is_own(module: str | None) -> bool:
    """Whether a module's code may change without another version: it is not installed."""
    package = (module or "").partition(".")[0]
    if package in (*sys.stdlib_module_names, __name__.partition(".")[0]):
        return False
    if package == "__main__":  # of a notebook, too, whose file is that of an installed package
        return True
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return not {"site-packages", "dist-packages"} & set(Path(file).parts)


def _version(module: str | None) -> str:
    package = sys.modules.get((module or "").partition(".")[0])
    return str(getattr(package, "__version__", None))
