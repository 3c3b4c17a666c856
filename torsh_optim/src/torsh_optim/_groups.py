"""Parameter groups from a model: weight decay, layer-wise learning rates, head, rules."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from torsh_optim._depth import parameter_depths
from torsh_optim._head import find_head
from torsh_optim._rules import NamedParameter, Rule, check_options, near, selected, top, trainable
from torsh_optim._stacks import is_norm

_KINDS = ("norm", "bias", "1d", "embedding")


@dataclass
class _Group:
    options: dict[str, Any]
    depth: int
    places: list[str]
    label: str
    params: list[tuple[str, Tensor]]


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.01,
    *,
    layer_decay: float | None = None,
    no_decay: str = "norm_bias_1d",
    head: Mapping[str, Any] | None = None,
    head_modules: str | Sequence[str] | None = None,
    rules: Sequence[Rule] = (),
    depth: Callable[[str], int] | None = None,
) -> list[dict[str, Any]]:
    """Sort the trainable parameters of a model into named groups for any torch optimizer.

    A group holds all parameters with the same options, under their names, so that the optimizer's
    state can be matched by name. A tied parameter is there once, under its first name. The order is
    that of depth, with decay before without, and depends on the model and the arguments alone.

    With ``layer_decay`` the learning rate falls from the head, which has ``lr``, to the input by
    that factor a layer. Layers are counted by modules: what comes before the blocks is layer 0, the
    blocks of a stack follow in order, the head is last. A timm model's own ``group_matcher``
    decides where there is one. An encoder and a decoder follow each other, the encoders of CLIP are
    side by side. Where the count is wrong, give ``depth``; ``explain_groups`` shows the result.

    Args:
        model: Any module; call it before FSDP or with FSDP2, whose parameters keep their shape.
        lr: Learning rate, above 0.
        weight_decay: Weight decay of parameters that have any, at least 0.
        layer_decay: Factor from one layer to the one before it, in (0, 1]; usual are 0.65 to 0.9.
        no_decay: What has no weight decay: ``norm`` (all of a normalization layer), ``bias``,
            ``1d`` (tensors of at most one dimension), ``embedding`` (also position embeddings and
            tokens), joined by ``_``, or ``none``. Unless ``none``, what the model lists in
            ``no_weight_decay()`` has none either.
        head: Options of the head, such as ``{"lr": 1e-3}``. Its norms and biases keep their weight
            decay of 0.
        head_modules: Names of the head's modules, if not those found by timm's
            ``get_classifier``, by what Hugging Face adds to the base model, by the usual names
            (``head``, ``fc``, ``classifier``, ...), or as the last layer.
        rules: Pairs of what to select and options to set, in order; later ones win, over all of the
            above too. A regular expression is searched in the parameter's names, a module class
            stands for all parameters in such modules, a sequence for any of its entries.
        depth: Depth of a parameter by its name, at least 0, in place of the one counted.

    Returns:
        Groups with ``name``, ``params`` (name and tensor pairs), ``lr``, ``weight_decay`` and the
        options of head and rules. The optimizer checks the options when it is built.

    Raises:
        TypeError: The model is no module, ``no_decay`` no string, or a rule no pair.
        ValueError: A number is out of range, nothing is trainable, the head is not found, or a rule
            selects nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> groups = param_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5)
        >>> for group in groups:
        ...     names = [name for name, _ in group["params"]]
        ...     print(group["name"], group["lr"], group["weight_decay"], *names)
        layer_0.decay 0.5 0.1 0.weight
        layer_0.no_decay 0.5 0.0 0.bias
        head.decay 1.0 0.1 1.weight
        head.no_decay 1.0 0.0 1.bias

    Reference:
        Jeremy Howard, Sebastian Ruder: Universal Language Model Fine-tuning for Text
        Classification, 2018, arXiv 1801.06146, for one rate per layer. Hangbo Bao, Li Dong, Furu
        Wei: BEiT, 2021, arXiv 2106.08254, for the factor on vision transformers, counted here as
        there: embeddings 0, blocks from 1, final norm with the last block, head after it.
    """
    exempt = _check(model, lr, weight_decay, layer_decay, no_decay)
    if depth is not None and layer_decay is None:
        raise ValueError("depth is used by layer_decay only; set layer_decay, or leave depth out")
    if head_modules is not None and head is None and layer_decay is None:
        raise ValueError("head_modules has no effect without head or layer_decay; set one of them")
    params = trainable(model)
    heads = _heads(model, head_modules)
    in_head = {
        param.name
        for param in params
        if all(alias.startswith(tuple(f"{name}." for name in heads)) for alias in param.aliases)
    }
    if head is not None:
        check_options("head", head)
        if not in_head:
            raise ValueError(_no_head(model, heads))
    depths = _depths(model, heads, depth) if layer_decay is not None else {}
    last = max(depths.values(), default=0)
    listed = _listed(model) if exempt else ()
    ruled = selected(rules, model, params)

    def layer_of(param: NamedParameter) -> int:
        if head is not None and param.name in in_head:
            return last + 1
        return depths.get(param.name, 0)

    groups: list[_Group] = []
    for param in sorted(params, key=layer_of):
        options: dict[str, Any] = {"lr": float(lr), "weight_decay": float(weight_decay)}
        layer, place = layer_of(param), ""
        if layer_decay is not None:
            options["lr"] *= layer_decay ** (last - layer)
            place = "head" if in_head and head is None and layer == last else f"layer_{layer}"
        if head is not None:
            place = place or "backbone"
            if param.name in in_head:
                options.update(head)
                place = "head"
        if _is_exempt(param, exempt, listed):
            options["weight_decay"] = 0.0
        numbers = ruled.get(param.name, [])
        for number in numbers:
            options.update(rules[number][1])
        label = "decay" if options["weight_decay"] else "no_decay"
        label += "".join(f".rule_{number}" for number in numbers)
        _insert(groups, options, layer, place, label, (param.name, param.tensor))
    groups.sort(key=lambda group: (group.depth, group.label))
    return [{"name": _name(group), "params": group.params, **group.options} for group in groups]


def _check(
    model: nn.Module, lr: float, weight_decay: float, layer_decay: float | None, no_decay: str
) -> frozenset[str]:
    """Check the arguments; return the parsed ``no_decay``."""
    if not isinstance(model, nn.Module):
        hint = "; pass the model itself, not its parameters" if isinstance(model, Iterable) else ""
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{hint}")
    if not isinstance(no_decay, str):
        raise TypeError(
            f"no_decay={no_decay!r} must be a string, 'none' or some of {', '.join(_KINDS)} joined "
            "by '_', such as 'norm_bias_1d'; to select parameters by name use rules, as in "
            "rules=[(r'\\.scale$', {'weight_decay': 0.0})]"
        )
    numbers = {"lr": lr, "weight_decay": weight_decay}
    if layer_decay is not None:
        numbers["layer_decay"] = layer_decay
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(number).__name__}")
    if not 0.0 < lr < math.inf:
        raise ValueError(f"lr={lr} must be a finite number above 0")
    if not 0.0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay={weight_decay} must be a finite number of at least 0")
    if layer_decay is not None and not 0.0 < layer_decay <= 1.0:
        raise ValueError(
            f"layer_decay={layer_decay} must be in (0, 1]; it multiplies the learning rate once "
            "for each layer below the head, so 0.75 is usual and 1 changes nothing"
        )
    kinds = frozenset() if no_decay == "none" else frozenset(no_decay.split("_"))
    if not kinds <= set(_KINDS):
        raise ValueError(
            f"no_decay={no_decay!r} must be 'none' or some of {', '.join(_KINDS)} joined by '_', "
            "for example 'norm_bias_1d_embedding'"
        )
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"{name or 'model'!r} is wrapped in FullyShardedDataParallel, whose parameters are "
                "flat, so norms and biases cannot be told apart; use "
                "torch.distributed.fsdp.fully_shard"
            )
    return kinds


def _heads(model: nn.Module, given: str | Sequence[str] | None) -> tuple[str, ...]:
    if given is None:
        return find_head(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    heads = (given,) if isinstance(given, str) else tuple(given)
    for name in heads:
        if name not in modules or not name:
            raise ValueError(
                f"head_modules names {name!r}, which is no module of the model; "
                f"{near(name, modules) or 'its modules are ' + top(model)}"
            )
    return heads


def _no_head(model: nn.Module, heads: Collection[str]) -> str:
    if heads:
        return (
            f"head is set, but {', '.join(heads)} has no trainable parameters of its own (frozen, "
            "or tied to the backbone); name others in head_modules, or leave head out"
        )
    return (
        "head is set, but no head was found; name its modules in head_modules, "
        f"for example one of {top(model)}"
    )


def _depths(
    model: nn.Module, heads: Collection[str], depth: Callable[[str], int] | None
) -> dict[str, int]:
    if depth is None:
        return parameter_depths(model, heads)
    depths = {name: depth(name) for name, _ in model.named_parameters()}
    for name, value in depths.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"depth({name!r}) returned {value!r}; it must be an integer from 0")
    return depths


def _listed(model: nn.Module) -> tuple[str, ...]:
    """Patterns of parameter names that modules list in ``no_weight_decay``, as timm's do."""
    patterns: list[str] = []
    for prefix, module in model.named_modules():
        if hasattr(type(module), "no_weight_decay"):
            names = module.no_weight_decay()  # pyrefly: ignore[not-callable]
            patterns += [f"{prefix}.{name}" if prefix else name for name in names or ()]
    return tuple(patterns)


def _is_exempt(param: NamedParameter, kinds: frozenset[str], listed: Sequence[str]) -> bool:
    leaves = [alias.rpartition(".")[2] for alias in param.aliases]
    return (
        ("1d" in kinds and param.tensor.ndim <= 1)
        or ("bias" in kinds and any(leaf.endswith("bias") for leaf in leaves))
        or ("norm" in kinds and any(is_norm(owner) for owner in param.owners))
        or (
            "embedding" in kinds
            and (
                any(isinstance(owner, nn.Embedding | nn.EmbeddingBag) for owner in param.owners)
                or any(re.search("embed|token", leaf) for leaf in leaves)
            )
        )
        or any(fnmatchcase(alias, pattern) for pattern in listed for alias in param.aliases)
    )


def _insert(
    groups: list[_Group],
    options: dict[str, Any],
    depth: int,
    place: str,
    label: str,
    param: tuple[str, Tensor],
) -> None:
    for group in groups:
        if _same(group.options, options):
            group.params.append(param)
            if place not in group.places:
                group.places.append(place)
            return
    groups.append(_Group(options, depth, [place], label, [param]))


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        value is other[key]
        or (
            not isinstance(value, Tensor)
            and not isinstance(other[key], Tensor)
            and type(value) is type(other[key])
            and value == other[key]
        )
        for key, value in one.items()
    )


def _name(group: _Group) -> str:
    place = group.places[0]
    if len(group.places) > 1:
        place = f"{place}..{group.places[-1]}"
    return f"{place}.{group.label}" if place else group.label
