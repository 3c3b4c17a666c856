"""Finished parts of long work, kept in a folder so that a killed run goes on where it was."""

import ctypes
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

FORMAT = "torsh-quant-journal"
_VERSION = 1


class Journal:
    """A folder of finished parts, each a file of tensors that is whole or not there.

    Args:
        folder: Made if it is not there.
        fingerprint: What the parts depend on, by name. A folder made with another one is refused.

    Raises:
        ValueError: If the folder holds the parts of other work; it says what differs.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Mapping[str, str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / "journal.json"
        own = {"format": FORMAT, "version": _VERSION, **fingerprint}
        if place.exists():
            found = json.loads(place.read_text())
            differ = [name for name in {**own, **found} if own.get(name) != found.get(name)]
            if differ:
                raise ValueError(
                    f"resume={str(folder)!r} holds the work of another run: {', '.join(differ)} "
                    "differ; use another folder, or delete it to start anew"
                )
        else:
            if any(self.folder.iterdir()):
                raise ValueError(
                    f"resume={str(folder)!r} holds files, but no journal; use an empty folder"
                )
            write_whole(place, json.dumps(own, indent=1).encode())

    def read(self, part: str) -> dict[str, Tensor] | None:
        """Return the tensors of a part, None if it is not finished.

        Raises:
            ValueError: If its file is damaged.
        """
        path = self.folder / f"{part}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                if (file.metadata() or {}).get("digest") == digest_of(sorted(tensors.items())):
                    return tensors
        except SafetensorError:
            pass
        raise ValueError(f"{path} is damaged; delete it, and its part is done again")

    def write(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a finished part."""
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"format": FORMAT, "digest": digest_of(sorted(held.items()))}
        write_whole(self.folder / f"{part}.safetensors", save(held, metadata))

    def drop(self, part: str) -> None:
        """Remove a part that is there."""
        (self.folder / f"{part}.safetensors").unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, whenever the process dies."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def model_digest(model: nn.Module) -> str:
    """A hash of the names, types and values of all parameters and buffers."""
    return digest_of(
        (name, tensor)
        for group in (model.named_parameters(), model.named_buffers())
        for name, tensor in group
    )


def data_digest(batches: Iterable[Any]) -> str:
    """A hash of all tensors in batches, and of what else they hold."""
    return digest_of(
        (f"{number}.{name}", value)
        for number, batch in enumerate(batches)
        for name, value in _items(batch)
    )


def _items(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _items(item, f"{name}.{key}")
    elif isinstance(value, (tuple, list)):
        for number, item in enumerate(value):
            yield from _items(item, f"{name}.{number}")
    else:
        yield name, value


def digest_of(items: Iterable[tuple[str, Any]]) -> str:
    """A hash of named tensors and other values."""
    state = hashlib.blake2b(digest_size=16)
    for name, value in items:
        if isinstance(value, Tensor):
            state.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            state.update(_bytes(flat))
        else:
            state.update(f"{name} {value!r}\n".encode())
    return state.hexdigest()


def _bytes(flat: Tensor) -> Any:
    # a tensor is no buffer by itself, and numpy no dependency
    return (ctypes.c_char * flat.numel()).from_address(flat.data_ptr()) if flat.numel() else b""
