"""fastText models in one safetensors file, so that trained weights can be kept."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ._fasttext_file import FastTextModel
from ._writing import write_bytes

_FORMAT = "torsh-text-language"
_VERSION = "1"


def _checksum(arrays: Mapping[str, np.ndarray], settings: str) -> str:
    total = hashlib.blake2b(settings.encode(), digest_size=16)
    for name in sorted(arrays):
        total.update(name.encode())
        total.update(np.ascontiguousarray(arrays[name]).data)
    return total.hexdigest()


def save_fasttext(path: Path, model: FastTextModel, languages: Sequence[str] | None) -> None:
    """Write a model to one file, in one step.

    Args:
        path: The safetensors file; it is replaced.
        model: What to write.
        languages: Codes chosen among the model's; None for all.
    """
    from safetensors.numpy import save

    arrays = {
        "weight": model.weight,
        "output": model.output,
        "counts": np.array(model.counts, dtype=np.int64),
        "words": np.frombuffer(b"".join(model.words), dtype=np.uint8),
        "word_ends": np.cumsum([len(word) for word in model.words], dtype=np.int64),
    }
    if model.pruned is not None:
        arrays["pruned"] = model.pruned
    settings = json.dumps(
        {
            "labels": model.labels,
            "languages": languages,
            "num_buckets": model.num_buckets,
            "min_n": model.min_n,
            "max_n": model.max_n,
            "word_ngrams": model.word_ngrams,
            "loss": model.loss,
        }
    )
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "settings": settings,
        "blake2b": _checksum(arrays, settings),
    }
    content = save(arrays, metadata=metadata)
    write_bytes(path, content)


def load_fasttext(path: Path) -> tuple[FastTextModel, list[str] | None]:
    """Read what :func:`save_fasttext` wrote: the model and the languages chosen.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is of another kind, of a later version, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(
                    f"{path}: format is {metadata.get('format')!r} instead of {_FORMAT!r}; read"
                    " .ftz and .bin files with from_fasttext"
                )
            if metadata.get("version") != _VERSION:
                raise ValueError(
                    f"{path}: version is {metadata.get('version')!r}; this torsh_text reads"
                    f" {_VERSION!r}, a later one may read it"
                )
            names: list[str] = list(file.keys())
            arrays: dict[str, np.ndarray] = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}; the file is damaged or no safetensors file") from error
    settings = metadata.get("settings", "")
    if _checksum(arrays, settings) != metadata.get("blake2b"):
        raise ValueError(f"{path}: blake2b does not match; the file is damaged")
    values: dict[str, Any] = json.loads(settings)
    languages = values.pop("languages")
    words = arrays["words"].tobytes()
    ends = arrays["word_ends"].tolist()
    model = FastTextModel(
        words=tuple(words[a:b] for a, b in zip([0, *ends], ends, strict=False)),
        labels=tuple(values.pop("labels")),
        counts=tuple(arrays["counts"].tolist()),
        weight=arrays["weight"],
        output=arrays["output"],
        pruned=arrays.get("pruned"),
        **values,
    )
    return model, languages
