"""The command that shows the parameter groups of a model."""

import difflib
import importlib
import inspect
import json as json_format
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torsh_optim._explain import GroupTable, explain_groups
from torsh_optim._groups import param_groups


def groups(
    model: str,
    /,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    layer_decay: float | None = None,
    json: bool = False,
) -> None:
    """Show the parameter groups that param_groups makes of a model.

    The model is built without weights where it allows that, so its size does not matter.

    Args:
        model: ``package.module:function`` of a function that returns the model, ``timm:NAME``,
            ``torchvision:NAME``, or ``hf:NAME`` with a name or folder of Hugging Face.
        lr: Learning rate.
        weight_decay: Weight decay of what is neither norm nor bias nor one-dimensional.
        layer_decay: Factor on the learning rate from one layer to the one before it.
        json: Print JSON, with the names of the parameters, instead of a table.
    """
    built = _build(model)
    try:
        made = param_groups(built, lr, weight_decay, layer_decay=layer_decay)
    except ValueError as error:
        raise SystemExit(f"{model}: {error}") from None
    table = explain_groups(made)
    if json:
        rows = [asdict(row) for row in table.rows]
        sys.stdout.write(json_format.dumps({"model": model, "groups": rows}) + "\n")
    else:
        _show(model, table)


def _show(title: str, table: GroupTable) -> None:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        raise SystemExit(
            "torsh-optim groups needs its command-line extra: pip install 'torsh-optim[cli]'"
        ) from None
    header, lines = table.cells()
    shown = Table(title=title, box=box.SIMPLE)
    for i, name in enumerate(header):
        shown.add_column(name, justify="right" if i else "left", no_wrap=i < 4)
    for i, line in enumerate(lines):
        shown.add_row(*line, style="bold" if i == len(lines) - 1 else None)
    Console().print(shown)


def _build(source: str) -> nn.Module:
    kind, colon, name = source.partition(":")
    if not (kind and colon and name):
        raise SystemExit(
            f"model {source!r} is not understood; give package.module:function, timm:NAME, "
            "torchvision:NAME or hf:NAME"
        )
    makers = {"timm": _timm, "torchvision": _torchvision, "hf": _hugging_face}
    make = makers.get(kind, _own)(*((name,) if kind in makers else (kind, name)))
    try:
        try:
            with torch.device("meta"):
                built = make()
        except (NotImplementedError, RuntimeError):  # it computes with values: build it for real
            built = make()
    except Exception as error:
        raise SystemExit(_cause(source, error)) from None
    if not isinstance(built, nn.Module):
        raise SystemExit(f"{source} made a {type(built).__name__}, not a torch.nn.Module")
    return built


def _cause(source: str, error: Exception) -> str:
    """Say in one line what went wrong in code that is not ours, and where."""
    what = " ".join(f"{type(error).__name__}: {error}".split())
    frames = traceback.extract_tb(error.__traceback__)
    return f"{source} failed with {what} ({frames[-1].filename}:{frames[-1].lineno})"


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(f"{error}; install it: pip install {name}") from None


def _near(name: str, known: list[str]) -> str:
    return f"near: {', '.join(difflib.get_close_matches(name, known, n=5)) or 'none'}"


def _timm(name: str) -> Callable[[], object]:
    timm = _package("timm")
    if not timm.is_model(name):
        raise SystemExit(f"timm has no model {name!r}; {_near(name, timm.list_models())}")
    return lambda: timm.create_model(name)


def _torchvision(name: str) -> Callable[[], object]:
    models = _package("torchvision").models
    if name not in models.list_models():
        raise SystemExit(f"torchvision has no model {name!r}; {_near(name, models.list_models())}")
    options: dict[str, Any] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # theirs takes a minute
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None  # else it downloads them
    return lambda: models.get_model(name, **options)


def _hugging_face(name: str) -> Callable[[], object]:
    transformers = _package("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise SystemExit(f"hf:{name}: {error}") from None
    architecture = (getattr(config, "architectures", None) or [None])[0]
    if architecture is not None and hasattr(transformers, architecture):
        return lambda: getattr(transformers, architecture)(config)
    return lambda: transformers.AutoModel.from_config(config)


def _own(module: str, name: str) -> Callable[[], object]:
    found: Any = None
    here = str(Path.cwd())  # `python -m` looks here, a console script does not
    sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except ImportError as error:
        raise SystemExit(f"{module}:{name}: {error}") from None
    except AttributeError as error:
        if found is None:  # raised while the module was run
            raise SystemExit(_cause(module, error)) from None
        public = ", ".join(key for key in vars(found) if not key.startswith("_"))
        raise SystemExit(f"{module} has no {name!r}; it has {public}") from None
    except Exception as error:
        raise SystemExit(_cause(module, error)) from None
    finally:
        sys.path.remove(here)
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        raise SystemExit(f"{module}:{name} is a {type(found).__name__}, not a function")
    needed = _required(found)
    if needed:
        raise SystemExit(
            f"{module}:{name} needs the arguments {', '.join(needed)}; give a function without, "
            f"which calls it with values for them"
        )
    return lambda: found()


def _required(function: Callable[..., object]) -> list[str]:
    """Names of the arguments that a function has to be given."""
    try:
        params = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in params if p.default is p.empty and p.kind not in optional]
