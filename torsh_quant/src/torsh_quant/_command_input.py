"""The model and the data that a command is given, by name."""

import importlib
import inspect
import os
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from torsh_quant._file import FILE_NAME, load
from torsh_quant._hf import float_model, text_batches


class UsageError(ValueError):
    """What is wrong with an argument of a command."""


def named_model(name: str, device: str = "cpu") -> tuple[nn.Module, Path | None]:
    """Return a model in evaluation mode, and its folder if it is one of Hugging Face's.

    Args:
        name: ``package.module:factory``, a callable that returns the model with its weights, or a
            folder with ``config.json`` and weights.
        device: Where it goes.

    Raises:
        UsageError: If there is no such model.
    """
    folder = Path(name)
    if folder.is_dir():
        quantized = (folder / FILE_NAME).exists()
        model = load(folder) if quantized else float_model(folder)
        return model.to(device), folder
    module, colon, factory = name.partition(":")
    if not (colon and module and factory):
        raise UsageError(
            f"MODEL={name!r} is neither a folder nor of the form package.module:factory"
        )
    made = _attribute(module, factory)()
    if not isinstance(made, nn.Module):
        raise UsageError(f"MODEL={name!r} returned {type(made).__name__}, not an nn.Module")
    return made.eval().to(device), None


def named_data(
    path: Path, model: nn.Module, folder: Path | None, batch_size: int, length: int
) -> list[Any]:
    """Return batches of what a file holds.

    Args:
        path: ``.safetensors`` or ``.pt`` with tensors by argument name, or with one tensor; for a
            model of Hugging Face's, any other file is text.
        model: Whose arguments they are.
        folder: Of the model, with its tokenizer.
        batch_size: Samples of a batch.
        length: Most tokens of a sample of text.

    Raises:
        UsageError: If the file does not hold that.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {str(path)!r}; --data names one")
    for option, value in (("batch-size", batch_size), ("length", length)):
        if value < 1:
            raise UsageError(f"--{option}={value}; use 1 or more")
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        if folder is None:
            raise UsageError(
                f"--data={str(path)!r} is neither .safetensors nor .pt; text needs a model with a "
                "tokenizer, from a folder"
            )
        batches: list[Any] = list(text_batches(folder, path, batch_size, length))
        return batches
    held = _held(path)
    if isinstance(held, Tensor):
        return list(held.split(batch_size))
    _require_arguments(path, held, model)
    parts = {name: tensor.split(batch_size) for name, tensor in held.items()}
    count = len(next(iter(parts.values())))
    return [{name: one[i] for name, one in parts.items()} for i in range(count)]


def _attribute(module: str, factory: str) -> Any:
    if os.getcwd() not in sys.path:  # noqa: PTH109  # as `python -m` has it
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise
        raise UsageError(f"there is no module {error.name!r}, which MODEL names") from None
    for part in factory.split("."):
        if not hasattr(found, part):
            raise UsageError(f"module {module!r} has no {factory!r}, which MODEL names")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"{module}:{factory} is no callable; name one that returns the model")
    return found


def _held(path: Path) -> Tensor | dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, weights_only=True, map_location="cpu")
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        why = str(error).partition("\n")[0].partition(". ")[0]
        raise UsageError(f"--data={str(path)!r} holds no plain tensors: {why}") from None
    if isinstance(found, Tensor):
        found = {"": found}
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and isinstance(one, Tensor) and one.ndim
        for name, one in found.items()
    ):
        raise UsageError(f"--data={str(path)!r} must hold tensors by name, batch dimension first")
    lengths = {name: len(one) for name, one in found.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise UsageError(
            f"--data={str(path)!r} must hold tensors of one length, at least 1; found {lengths}"
        )
    return found[""] if "" in found else dict(found)


def _require_arguments(path: Path, held: Mapping[str, Tensor], model: nn.Module) -> None:
    parameters = inspect.signature(model.forward).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return
    if unknown := sorted(set(held) - set(parameters) - {"labels"}):
        raise UsageError(
            f"--data={str(path)!r} has {', '.join(unknown)}, but {type(model).__name__} takes "
            f"{', '.join(parameters)}: name the tensors by arguments"
        )
