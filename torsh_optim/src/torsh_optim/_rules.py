"""Rules that give options to parameters by name or by class of module."""

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

Selector = str | re.Pattern[str] | type[nn.Module]
Rule = tuple[Selector | Sequence[Selector], Mapping[str, Any]]

_OWN = ("params", "param_names", "name")


@dataclass(frozen=True)
class NamedParameter:
    """A trainable tensor under all its names, and the modules that own it, innermost first."""

    name: str
    tensor: Tensor
    aliases: tuple[str, ...]
    owners: tuple[nn.Module, ...]
    path: tuple[nn.Module, ...]


def trainable(model: nn.Module) -> list[NamedParameter]:
    names: dict[Tensor, list[str]] = {}
    owners: dict[Tensor, list[nn.Module]] = {}
    paths: dict[Tensor, list[nn.Module]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if not tensor.requires_grad:
            continue
        if isinstance(tensor, UninitializedParameter):
            raise ValueError(
                f"{name!r} has no shape yet; pass a batch through the model first, so that its "
                "lazy modules know their sizes"
            )
        names.setdefault(tensor, []).append(name)
        owner = name.rpartition(".")[0]
        owners.setdefault(tensor, []).append(modules[owner])
        while owner:
            paths.setdefault(tensor, []).append(modules[owner])
            owner = owner.rpartition(".")[0]
        paths.setdefault(tensor, []).append(model)
    if not names:
        raise ValueError(
            f"model has no trainable parameters ({sum(1 for _ in model.parameters())} frozen); "
            "set requires_grad_(True) on those to train"
        )
    return [
        NamedParameter(aliases[0], t, tuple(aliases), tuple(owners[t]), tuple(paths[t]))
        for t, aliases in names.items()
    ]


def selected(
    rules: Sequence[Rule], model: nn.Module, params: Sequence[NamedParameter]
) -> dict[str, list[int]]:
    """For each parameter the numbers of the rules that select it."""
    found: dict[str, list[int]] = {}
    for number, rule in enumerate(rules):
        where = f"rules[{number}]"
        if not (isinstance(rule, (tuple, list)) and len(rule) == 2):
            raise TypeError(f"{where} must be a pair of a selector and options, got {rule!r}")
        check_options(where, rule[1])
        selectors: Sequence[Any] = rule[0] if isinstance(rule[0], (tuple, list)) else (rule[0],)
        tests = [_selector(where, selector) for selector in selectors]
        for selector, selects in zip(selectors, tests, strict=True):
            if not any(map(selects, params)):
                raise ValueError(_nothing(where, selector, model))
        for param in params:
            if any(selects(param) for selects in tests):
                found.setdefault(param.name, []).append(number)
    return found


def check_options(where: str, options: Mapping[str, Any]) -> None:
    if not isinstance(options, Mapping) or not options:
        raise TypeError(f"{where} must have options such as {{'lr': 1e-4}}, got {options!r}")
    for key in options:
        if key in _OWN:
            raise ValueError(f"{where} sets {key!r}, which groups get from the model; remove it")


def _selector(where: str, selector: object) -> Callable[[NamedParameter], bool]:
    if isinstance(selector, type) and issubclass(selector, nn.Module):
        return lambda param: any(isinstance(module, selector) for module in param.path)
    if not isinstance(selector, (str, re.Pattern)):
        raise TypeError(
            f"{where} selects by {selector!r}; it must be a regular expression, a class of module, "
            "or a list of those"
        )
    try:
        pattern = re.compile(selector)
    except re.error as error:
        raise ValueError(
            f"{where} is not a regular expression: {selector!r} ({error}); re.escape() takes a "
            "name as it is"
        ) from None
    return lambda param: any(pattern.search(alias) for alias in param.aliases)


def _nothing(where: str, selector: Selector, model: nn.Module) -> str:
    modules = {name: module for name, module in model.named_modules() if name}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if isinstance(selector, type):
        frozen = any(
            isinstance(module, selector) and any(True for _ in module.parameters())
            for module in model.modules()
        )
        known = {type(module).__name__ for module in modules.values()}
        text, wanted = selector.__name__, selector.__name__
    else:
        pattern = re.compile(selector)
        frozen = any(pattern.search(name) for name in names)
        known = {*names, *modules, *(name.rpartition(".")[2] for name in modules)}
        text, wanted = repr(pattern.pattern), re.sub(r"\\(.)|[\^$]", r"\1", pattern.pattern)
    if frozen:
        return f"{where} ({text}) selects frozen parameters only; remove it, or train them"
    return (
        f"{where} ({text}) selects no parameter; "
        f"{near(wanted, known) or 'the modules are ' + top(model)}"
    )


def near(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(repr(match) for match in close)}?" if close else ""


def top(model: nn.Module) -> str:
    return ", ".join(repr(name) for name, _ in model.named_children()) or "none"
