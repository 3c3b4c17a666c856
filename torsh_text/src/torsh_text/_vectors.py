"""Vectors in one safetensors file, with what they are in its metadata."""

import hashlib
from pathlib import Path

from torch import Tensor

from ._writing import write_bytes

_FORMAT = "torsh-text-vectors"


def _holds_vectors(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == _FORMAT
    except (SafetensorError, OSError):
        return False


def check_target(target: Path, source: Path) -> None:
    """Refuse to write vectors where something else would be lost.

    Args:
        target: Where vectors shall go; an earlier file of vectors there may be replaced.
        source: The file that holds the texts; ``-`` for the standard input.

    Raises:
        FileNotFoundError: If its folder is not there.
        ValueError: If ``target`` is the source or another file that holds no vectors, or its name
            does not end in ``.safetensors``.
    """
    if target.suffix != ".safetensors":
        raise ValueError(
            f"out={str(target)!r}: vectors are written as safetensors; end the name in .safetensors"
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"out={str(target)!r}: there is no folder {str(target.parent)!r}; make it first"
        )
    if not target.exists():
        return
    if source != Path("-") and target.samefile(source):
        raise ValueError(f"out={str(target)!r} is the file of the texts; name another with --out")
    if not _holds_vectors(target):
        raise ValueError(
            f"out={str(target)!r} exists and is no file of vectors; remove it or name another with"
            " --out"
        )


def save_vectors(path: Path, vectors: Tensor, *, model: str, fingerprint: str) -> None:
    """Write vectors and their description to ``path``, in one step.

    The metadata holds the format's name and version, the model, its fingerprint and the BLAKE2b
    sum of the tensor's bytes.

    Args:
        path: The safetensors file; its tensor is called ``vectors``.
        vectors: ``(texts, dim)``.
        model: What made them.
        fingerprint: :attr:`torsh_text.Encoder.fingerprint` of the model.
    """
    from safetensors.torch import save

    vectors = vectors.cpu().contiguous()
    description = {
        "format": _FORMAT,
        "version": "1",
        "model": model,
        "fingerprint": fingerprint,
        "blake2b": hashlib.blake2b(vectors.numpy().data, digest_size=16).hexdigest(),
    }
    write_bytes(path, save({"vectors": vectors}, metadata=description))
