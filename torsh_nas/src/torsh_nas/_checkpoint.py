"""Checkpoints that survive a crash at any moment."""

import hashlib
import io
import json
import os
import random
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torsh_nas._document import dump_document, parse_document, write_atomically

_KIND = "torsh_nas.checkpoint"
_VERSION = 1
_KEPT = 2


def save_checkpoint(folder: Path, state: dict[str, Any], *, epoch: int, space_id: str) -> None:
    """Write ``epoch_NNNNN.pt`` and then the ``.json`` that vouches for it; keep the last two."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    name = f"epoch_{epoch:05d}"
    write_atomically(folder / f"{name}.pt", data)
    content = {"epoch": epoch, "space_id": space_id, "sha256": hashlib.sha256(data).hexdigest()}
    write_atomically(folder / f"{name}.json", dump_document(_KIND, _VERSION, content).encode())
    for old in _epochs(folder)[:-_KEPT]:
        (folder / f"epoch_{old:05d}.json").unlink(missing_ok=True)
        (folder / f"epoch_{old:05d}.pt").unlink(missing_ok=True)


def load_checkpoint(folder: Path, *, space_id: str) -> dict[str, Any] | None:
    """Return the newest undamaged state, or ``None`` where there is none at all.

    Raises:
        ValueError: A checkpoint of another space, or only damaged ones.
    """
    epochs = _epochs(folder)
    for epoch in reversed(epochs):
        name = f"epoch_{epoch:05d}"
        try:
            text = (folder / f"{name}.json").read_text(encoding="utf-8")
            content = parse_document(text, _KIND, _VERSION)
            data = (folder / f"{name}.pt").read_bytes()
            if hashlib.sha256(data).hexdigest() != content["sha256"]:
                raise ValueError("its checksum does not match")
        except (OSError, ValueError) as error:
            warnings.warn(
                f"checkpoint {name} in {folder} is damaged ({error}); trying the one before",
                stacklevel=4,
            )
            continue
        if content["space_id"] != space_id:
            raise ValueError(
                f"the checkpoint in {folder} belongs to space {content['space_id']}, the model "
                f"has space {space_id}"
            )
        state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
        return state
    if epochs:
        raise ValueError(f"every checkpoint in {folder} is damaged")
    return None


def _epochs(folder: Path) -> list[int]:
    names = (re.fullmatch(r"epoch_(\d{5,})\.json", path.name) for path in folder.glob("*.json"))
    return sorted(int(name.group(1)) for name in names if name)


def rng_state() -> dict[str, Any]:
    """Return the state of the global generators of python, numpy and torch."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def write_log(path: Path, header: dict[str, object], rows: list[dict[str, object]]) -> None:
    """Start a log anew with the rows of the epochs that are done."""
    lines = [json.dumps(line) + "\n" for line in (header, *rows)]
    write_atomically(path, "".join(lines).encode())


def append_log(path: Path, row: dict[str, object]) -> None:
    """Add one line to a log and have it on the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
