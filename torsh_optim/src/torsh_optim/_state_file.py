"""Checkpoints in files: read without unpickling, written whole or not at all."""

import ctypes
import json
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

SUFFIX = ".safetensors"
FORMAT = "torsh-optim-state"
VERSION = "1"
_EXTRA = "safetensors is missing: pip install 'torsh-optim[cli]'"


def read_checkpoint(path: Path) -> Any:
    """Read what ``torch.save`` or ``write_checkpoint`` wrote; no code in the file is run.

    Args:
        path: The file; one named ``*.safetensors`` is read as such.

    Returns:
        Its content, with the tensors on the CPU.

    Raises:
        ValueError: The file is of another kind, damaged, or holds more than tensors and numbers.
        ImportError: safetensors is missing.
    """
    if path.suffix == SUFFIX:
        return _read_safetensors(path)
    with path.open("rb") as file:
        if not file.read(1):
            raise ValueError(f"{path} is empty")
    try:
        # the old format cannot be mapped
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(path, error)) from None
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or is no file of torch.save") from error


def write_checkpoint(
    path: Path, content: Any, *, progress: Callable[[int], None] | None = None
) -> None:
    """Write a file that appears, or replaces another, only when it is complete and on disk.

    Args:
        path: The file. One named ``*.safetensors`` gets the tensors under the way to them, such as
            ``state.0.exp_avg``, and everything else as JSON, under ``content`` in its metadata.
        content: Tensors and numbers, in dictionaries, lists and tuples.
        progress: Called with the number of bytes after each part that was written.

    Raises:
        ValueError: The content cannot be written to a file of this kind.
        ImportError: safetensors is missing.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("xb") as file:
            if path.suffix == SUFFIX:
                # of safetensors' writers, this one leaves the file, its name and its mode to us
                data = _safetensors_bytes(content)
                file.write(data)
                if progress is not None:
                    progress(len(data))
            else:
                counted = file if progress is None else _Counted(file, progress)
                torch.save(content, cast("IO[bytes]", counted))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the new name last
    finally:
        os.close(folder)


class _Counted:
    """A file that tells how much was written to it."""

    def __init__(self, file: IO[bytes], progress: Callable[[int], None]) -> None:
        self._file = file
        self._progress = progress

    def write(self, data: bytes) -> int:
        written = self._file.write(data)
        self._progress(written)
        return written

    def flush(self) -> None:
        self._file.flush()


def _refusal(path: Path, error: pickle.UnpicklingError) -> str:
    """Say what is in a file that cannot be read without running code."""
    names: list[str] = []
    if zipfile.is_zipfile(path):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    names = names or [name.rstrip(".") for name in re.findall(r"GLOBAL ([\w.]+)", str(error))]
    if not names:
        return f"{path} is damaged, or is no file of torch.save"
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"{path} holds objects of {shown}, and making them can run any code; where you trust the "
        "file, open it yourself and save the optimizer's state alone: "
        f"torch.save(torch.load(path, weights_only=False)['optimizer'], new_path)"
    )


def _safetensors_bytes(content: Any) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError:
        raise ImportError(_EXTRA) from None
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_packed(content, "", tensors))
    checks = json.dumps({name: _crc(tensor) for name, tensor in tensors.items()})
    return save(
        tensors,
        {
            "format": FORMAT,
            "version": VERSION,
            "content": tree,
            "crc32": str(zlib.crc32(tree.encode() + checks.encode())),
            "crc32_of_tensors": checks,
        },
    )


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(_EXTRA) from None
    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, str] = file.metadata() or {}
            if facts.get("format") != FORMAT:
                raise ValueError(
                    f"{path} holds no {FORMAT}: optimizers have no common layout in safetensors; "
                    "give what torch.save wrote, or what this command wrote"
                )
            if facts.get("version") != VERSION:
                raise ValueError(
                    f"{path} has version {facts.get('version')!r}, this torsh-optim reads "
                    f"{VERSION}; update it"
                )
            tree, checks = facts.get("content", ""), facts.get("crc32_of_tensors", "")
            if facts.get("crc32") != str(zlib.crc32(tree.encode() + checks.encode())):
                raise ValueError(f"{path}: the metadata is damaged (CRC); use an older copy")
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or is no safetensors file: {error}") from None
    for name, expected in json.loads(checks).items():
        if name not in tensors or _crc(tensors[name]) != expected:
            raise ValueError(f"{path}: {name!r} is damaged (CRC) or missing; use an older copy")
    return _unpacked(json.loads(tree), tensors)


def _packed(value: Any, way: str, tensors: dict[str, Tensor]) -> Any:
    """Turn a value into JSON, with the names of its tensors in place of them."""
    if isinstance(value, Tensor):
        # a copy of its own: a view would bring what it is a view of
        tensors[way] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": way}
    dot = f"{way}." if way else ""
    if isinstance(value, Mapping):
        items = [[key, _packed(part, f"{dot}{key}", tensors)] for key, part in value.items()]
        for key, _ in items:
            if not isinstance(key, str | int):
                raise ValueError(f"{way or 'the content'} has a key {key!r}; keep it in a .pt file")
        return {"mapping": items}
    if isinstance(value, (list, tuple)):
        parts = [_packed(part, f"{dot}{i}", tensors) for i, part in enumerate(value)]
        return parts if isinstance(value, list) else {"tuple": parts}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{way!r} is a {type(value).__name__}, which only a .pt file can hold")


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_unpacked(part, tensors) for part in value["tuple"])
    return {key: _unpacked(part, tensors) for key, part in value["mapping"]}


def _crc(tensor: Tensor) -> int:
    flat = tensor.contiguous()
    return (
        zlib.crc32((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr()))
        if flat.nbytes
        else 0
    )
