"""Topic models in one safetensors file, with a checksum."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._writing import write_bytes

_FORMAT = "torsh-text-topics"
_VERSION = "1"


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def write_topics(path: Path, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
    """Write tensors and a note in one step.

    The note is JSON in a tensor of bytes, since safetensors limits its own metadata, which holds
    the format's name and version and the BLAKE2b sum of all tensors.

    Args:
        path: The file.
        tensors: Tensors by name.
        note: What JSON can hold.
    """
    from safetensors.torch import save

    text = json.dumps(note, ensure_ascii=False).encode("utf-8", "surrogatepass")
    content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    content["json"] = torch.from_numpy(np.frombuffer(text, np.uint8).copy())
    description = {"format": _FORMAT, "version": _VERSION, "blake2b": _checksum(content)}
    write_bytes(path, save(content, metadata=description))


def read_topics(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_topics` wrote.

    Raises:
        ValueError: If the file is of another format or version, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            description = file.metadata() or {}
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is no safetensors file or damaged: {error}") from error
    if description.get("format") != _FORMAT:
        raise ValueError(f"{str(path)!r} holds no topic model; TopicModel.save writes one")
    if description.get("version") != _VERSION:
        raise ValueError(
            f"{str(path)!r} has version {description.get('version')} of its format; this release"
            f" reads version {_VERSION}"
        )
    if description.get("blake2b") != _checksum(content):
        raise ValueError(f"{str(path)!r} is damaged: its checksum does not fit")
    note = json.loads(content.pop("json").numpy().tobytes().decode("utf-8", "surrogatepass"))
    return content, note
