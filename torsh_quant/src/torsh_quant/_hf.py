"""Models in folders as the transformers package of Hugging Face writes them."""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_BESIDE = (".json", ".txt", ".model", ".jinja")  # configuration and tokenizer, never weights


def empty_model(folder: Path) -> nn.Module:
    """Make the model that ``config.json`` names, on the meta device.

    Raises:
        ValueError: If the class is not one of transformers; code in the folder is not run.
    """
    config = _config(folder)
    with torch.device("meta"):
        model = _class_of(folder, config)(config)
    if (folder / "generation_config.json").exists() and model.can_generate():
        model.generation_config = _transformers().GenerationConfig.from_pretrained(str(folder))
    return model.eval()


def float_model(folder: Path) -> nn.Module:
    """Read a float model, with the dtype it was saved in.

    Raises:
        ValueError: If the class is not one of transformers, or the folder has no weights in
            safetensors.
    """
    config = _config(folder)
    made = _class_of(folder, config)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{str(folder)!r} has no weights in safetensors; convert them first")
    if not sys.stderr.isatty():
        _transformers().utils.logging.disable_progress_bar()
    model = made.from_pretrained(str(folder), dtype="auto", use_safetensors=True)
    return model.eval()


def copy_beside(source: Path, target: Path) -> list[str]:
    """Copy configuration and tokenizer files; returns their names."""
    names = sorted(
        path.name
        for path in source.iterdir()
        if path.suffix in _BESIDE and not path.name.endswith(".index.json")
    )
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def text_batches(folder: Path, text: Path, batch_size: int, length: int) -> list[dict[str, Tensor]]:
    """Tokenize the lines of a file for a model.

    With a tokenizer that can pad, each line is a sample; otherwise all lines are one row of tokens
    that is cut into samples of ``length``, the last one left out if it is shorter.

    Args:
        folder: With the tokenizer.
        text: UTF-8; empty lines do not count.
        batch_size: Samples of a batch.
        length: Most tokens of a sample.

    Raises:
        ValueError: If there is no text, or too little for one sample.
    """
    tokenizer = _transformers().AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{str(text)!r} has no text")
    if tokenizer.pad_token is not None:
        return [
            dict(
                tokenizer(
                    lines[i : i + batch_size],
                    padding=True,
                    truncation=True,
                    max_length=length,
                    return_tensors="pt",
                )
            )
            for i in range(0, len(lines), batch_size)
        ]
    tokens = [token for line in lines for token in tokenizer(line)["input_ids"]]
    length = min(length, len(tokens))
    blocks = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part)}
        for part in blocks.split(batch_size)
    ]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "folders of Hugging Face models need transformers: pip install transformers"
        ) from error
    return transformers


def _config(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} has no config.json, which says what model it is")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from None
    if not isinstance(found, Mapping) or "model_type" not in found:
        raise ValueError(f"{str(path)!r} names no model_type of transformers")
    return _transformers().AutoConfig.from_pretrained(str(folder), trust_remote_code=False)


def _class_of(folder: Path, config: Any) -> Any:
    transformers = _transformers()
    names = getattr(config, "architectures", None) or []
    made = getattr(transformers, names[0], None) if len(names) == 1 else None
    if not (isinstance(made, type) and issubclass(made, transformers.PreTrainedModel)):
        raise ValueError(
            f"{str(folder / 'config.json')!r} names the architectures {names}; it must be one "
            "class of transformers (code that comes with a model is not run)"
        )
    return made
