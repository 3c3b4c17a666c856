"""Vectors in a file: safetensors, with what they are in JSON beside them."""

import hashlib
import json
import os
from pathlib import Path

from torch import Tensor


def _replace(target: Path, content: bytes) -> None:
    """Write a file so that no reader ever sees half of it."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def save_vectors(path: Path, vectors: Tensor, *, model: str, fingerprint: str, texts: int) -> None:
    """Write vectors to ``path`` and a description to the same name with ``.json``.

    Args:
        path: The safetensors file; its tensor is called ``vectors``.
        vectors: ``(texts, dim)``.
        model: What made them.
        fingerprint: :attr:`torsh_text.Encoder.fingerprint` of the model.
        texts: How many texts they stand for.
    """
    from safetensors.torch import save

    content = save({"vectors": vectors.cpu().contiguous()})
    description = {
        "format": "torsh-text-vectors",
        "version": 1,
        "model": model,
        "fingerprint": fingerprint,
        "texts": texts,
        "dim": vectors.shape[1],
        "blake2b": hashlib.blake2b(content, digest_size=16).hexdigest(),
    }
    _replace(path, content)
    text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    _replace(path.with_suffix(".json"), text.encode())
