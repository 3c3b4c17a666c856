"""How deep in a model each parameter lies, told from its modules."""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from torch import nn

from torsh_optim._stacks import Kind, holds_stack, is_chain, is_norm, kind_of, parametrised

_STEM = re.compile(r"embed|stem", re.IGNORECASE)
_FOLLOWS = re.compile(r"decoder|language")
_JOINS_PREVIOUS = 99999  # timm: a matcher ending in this adds to the layer before


def parameter_depths(model: nn.Module, head: Collection[str] = ()) -> dict[str, int]:
    """Number the layers of a model from its input to its head.

    A timm model says it by ``group_matcher``. Elsewhere the blocks are the elements of the model's
    ``Sequential`` and ``ModuleList`` stacks in the order of registration. Embeddings and what comes
    before the first block are layer 0. A norm goes with what is before it, all else between blocks
    (downsampling, projectors) with the block after. What follows the last block, other than a
    norm, is at the head's depth. Neighbours that each embed an input of their own (CLIP's two
    encoders) are side by side and end at the same depth; other stacks, such as an encoder and a
    decoder, follow each other. In a model without stacks each layer with a weight counts.

    Frozen parameters count, so freezing does not renumber the others. A tied parameter lies where
    it is first registered.

    Args:
        model: Any model.
        head: Names of the modules of the head.

    Returns:
        Depth of each of ``model.named_parameters()``, without gaps from 0.
    """
    walk = _Walk(model, head)
    depths = {name: walk.placed[id(p)] for name, p in model.named_parameters()}
    rank = {depth: i for i, depth in enumerate(sorted(set(depths.values())))}
    return {name: rank[depth] for name, depth in depths.items()}


def unwrapped(model: nn.Module) -> tuple[str, nn.Module]:
    """The model inside wrappers that hold nothing else, and its name with a final dot.

    Classes are asked, not objects: compiled and LoRA wrappers pass on attributes of what they hold.
    """
    prefix, inner = "", model
    while not (hasattr(type(inner), "group_matcher") or hasattr(type(inner), "base_model_prefix")):
        children = parametrised(inner)
        if len(children) != 1 or any(True for _ in inner.parameters(recurse=False)):
            break
        if not parametrised(children[0][1]):
            break
        prefix, inner = f"{prefix}{children[0][0]}.", children[0][1]
    return prefix, inner


class _Walk:
    """Goes through a model in the order of registration and places each parameter once."""

    def __init__(self, model: nn.Module, head: Collection[str]) -> None:
        self.position = 0  # blocks so far
        self.latest = 0  # depth of what came last, for the norm after it
        self.placed: dict[int, int] = {}
        in_head = {id(p) for name in head for p in model.get_submodule(name).parameters()}
        self.head = in_head - {id(p) for p in _outside(model, head)}
        inner = unwrapped(model)[1]
        self.by_layer = not holds_stack(inner)
        self.visit(inner)
        last = self.position + 1
        for param in model.parameters():  # the head, and scalars such as CLIP's logit_scale
            self.placed.setdefault(id(param), last)

    def place(self, params: Iterable[nn.Parameter], depth: int) -> None:
        for param in params:
            if id(param) not in self.head:
                self.placed.setdefault(id(param), depth)

    def visit(self, module: nn.Module) -> None:
        if hasattr(type(module), "group_matcher"):
            self.match(module)
            return
        direct = [p for p in module.parameters(recurse=False) if p.ndim > 0]
        self.place(direct, self.between())
        children = parametrised(module)
        towers = [] if is_chain(module) else self.towers(children)
        classes = Counter(type(child) for _, child in children)
        for name, child in children:
            if child in towers:
                if child is towers[0]:
                    self.side_by_side(towers)
            elif any(id(p) not in self.head for p in child.parameters()):
                alone = not is_chain(module) or classes[type(child)] == 1
                self.step(name, child, in_chain=is_chain(module), alone=alone)

    def step(self, name: str, child: nn.Module, *, in_chain: bool, alone: bool) -> None:
        """Place the parameters of a child, at the next position if it is a block."""
        kind, holds = kind_of(child), holds_stack(child)
        holds |= hasattr(type(child), "group_matcher")
        embeds = isinstance(child, nn.Embedding | nn.EmbeddingBag)
        if embeds or (_STEM.search(name) and not holds):
            self.place(child.parameters(), 0)
        elif is_norm(child):
            self.place(child.parameters(), self.latest)
        elif (
            (holds and alone)
            or (in_chain and kind is Kind.STAGE)
            or (self.by_layer and is_chain(child))
        ):
            self.visit(child)
        else:
            block = self.by_layer or (in_chain and kind is Kind.BLOCK)
            self.position += block
            self.latest = self.position if block else self.between()
            self.place(child.parameters(), self.latest)

    def towers(self, children: Sequence[tuple[str, nn.Module]]) -> list[nn.Module]:
        """The neighbours that each embed an input and have blocks, as the encoders of CLIP."""
        numbers = [i for i, (_, child) in enumerate(children) if self.is_tower(child)]
        adjacent = len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1
        if not adjacent or any(_FOLLOWS.search(children[i][0]) for i in numbers):
            return []
        return [children[i][1] for i in numbers]

    def is_tower(self, module: nn.Module) -> bool:
        return holds_stack(module) and any(
            (isinstance(part, nn.Embedding) or "embed" in name.rpartition(".")[2])
            and any(id(p) not in self.placed for p in part.parameters())
            for name, part in module.named_modules()
        )

    def side_by_side(self, towers: Sequence[nn.Module]) -> None:
        """Let towers begin together, then move the shorter ones so that they end together."""
        start = self.position
        ends: list[int] = []
        members: list[set[int]] = []
        for tower in towers:
            before = set(self.placed)
            self.position = self.latest = start
            self.visit(tower)
            ends.append(self.position)
            members.append(self.placed.keys() - before)
        self.position = self.latest = max(ends)
        for end, ids in zip(ends, members, strict=True):
            for key in ids:
                self.placed[key] += self.position - end

    def between(self) -> int:
        return self.position + 1 if self.position else 0

    def match(self, module: nn.Module) -> None:
        """Place the parameters of a timm model as its ``group_matcher`` says."""
        order = _timm_order(module)
        layers: dict[tuple[float, ...], list[nn.Parameter]] = {}
        for name, param in module.named_parameters():
            layers.setdefault(order(name), []).append(param)
        start = depth = self.position
        for i, key in enumerate(sorted(layers)):
            if key == (math.inf,):
                self.place(layers[key], depth + 1)
                continue
            depth += i > 0 and key[-1] != _JOINS_PREVIOUS
            depth += i == 0 and start > 0
            self.place(layers[key], depth)
            self.position = self.latest = depth


def _timm_order(module: nn.Module) -> Callable[[str], tuple[float, ...]]:
    """The sort key of parameter names that a timm model's ``group_matcher`` describes."""
    matcher = module.group_matcher(coarse=False)  # pyrefly: ignore[not-callable]
    if callable(matcher):

        def by_function(name: str) -> tuple[float, ...]:
            order = matcher(name)
            return tuple(order) if isinstance(order, (tuple, list)) else (float(order),)

        return by_function
    patterns: list[tuple[re.Pattern[str], int, tuple[float, ...]]] = []
    for i, given in enumerate(matcher.values()):
        entries = [(given, None)] if isinstance(given, str) else given or ()
        patterns += [(re.compile(pattern), i, suffix or ()) for pattern, suffix in entries]

    def by_pattern(name: str) -> tuple[float, ...]:
        for pattern, i, suffix in patterns:
            if found := pattern.match(name):
                numbers = (float(number) for number in found.groups() if number is not None)
                return (float(i), *numbers, *suffix)
        return (math.inf,)

    return by_pattern


def _outside(model: nn.Module, modules: Collection[str]) -> Iterator[nn.Parameter]:
    """The parameters that are used outside of the named modules, whether inside too or not."""
    starts = tuple(f"{name}." for name in modules)
    for name, param in model.named_parameters(remove_duplicate=False):
        if not name.startswith(starts):
            yield param
