"""What a tagger's folder holds beside the model of transformers."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ._backbone import quiet_loading
from ._crf import CRF
from ._spans import Scheme, TagScheme
from ._writing import staged_folder, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SETTINGS = "torsh_tagger.json"
_WEIGHTS = "crf.safetensors"
_FORMAT = "torsh_text tagger"
_VERSION = 1


@dataclass(frozen=True)
class TaggerSettings:
    """What was saved of a tagger beside its model."""

    scheme: Scheme
    max_length: int
    crf: dict[str, Tensor] | None


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def write_tagger(
    folder: Path,
    *,
    model: "PreTrainedModel",
    tokenizer: Any,
    scheme: TagScheme,
    max_length: int,
    crf: CRF | None,
) -> None:
    """Write beside the final place, then move each file in, the settings last."""
    from safetensors.torch import save

    # last the settings: until then the old ones refuse a CRF that is not theirs
    with staged_folder(folder, last=_SETTINGS) as staging, quiet_loading():
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        settings: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "scheme": scheme.name}
        settings["labels"] = list(scheme.labels)
        settings["max_length"] = max_length
        settings["crf"] = None
        if crf is not None:
            state = {key: x.detach().cpu().contiguous() for key, x in crf.state_dict().items()}
            content = save(state)
            (staging / _WEIGHTS).write_bytes(content)
            settings["crf"] = {"file": _WEIGHTS, "blake2b": _checksum(content)}
        write_json(staging / _SETTINGS, settings)
    if crf is None:
        (folder / _WEIGHTS).unlink(missing_ok=True)


def read_settings(folder: Path) -> TaggerSettings | None:
    """Read what :func:`write_tagger` wrote; None in a folder of transformers alone.

    Raises:
        ValueError: If it is damaged or of a later version.
    """
    from safetensors.torch import load

    path = folder / _SETTINGS
    if not path.exists():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        known = settings["format"] == _FORMAT and settings["version"] == _VERSION
        found = settings["crf"]
        scheme = TagScheme.from_labels(settings["labels"], settings["scheme"])
        max_length = settings["max_length"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not known:
        raise ValueError(
            f"{path} is {settings['format']!r} version {settings['version']!r}, this package reads"
            f" {_FORMAT!r} version {_VERSION}"
        )
    if found is None:
        return TaggerSettings(scheme.name, max_length, None)
    weights = folder / _WEIGHTS
    content = weights.read_bytes() if weights.exists() else b""
    if _checksum(content) != found.get("blake2b"):
        raise ValueError(f"{weights} is missing, damaged or not of this tagger; save it again")
    return TaggerSettings(scheme.name, max_length, load(content))
