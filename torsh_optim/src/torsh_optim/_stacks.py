"""Which parts of a model are blocks, and which are stacks of blocks."""

import re
from collections.abc import Iterator
from enum import IntEnum

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_CHAINS = (nn.Sequential, nn.ModuleList)
_NORM = re.compile(r"(layer|batch|group|instance|rms|response)_?norm|norm$", re.IGNORECASE)
_NUMBERED = re.compile(r"\D*\d+")


class Kind(IntEnum):
    """What a module is to the depth; the order matters."""

    LAYER = 0  # at most one weight, with its norms
    PARTS = 1  # a chain of layers
    BLOCK = 2
    STAGE = 3  # a module that is little else than a chain of blocks


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization layer, by class or by the name of its class."""
    known = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    return isinstance(module, known) or (
        not parametrised(module) and _NORM.search(type(module).__name__) is not None
    )


def parametrised(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children that have parameters."""
    return [
        (n, child) for n, child in module.named_children() if any(True for _ in child.parameters())
    ]


def is_chain(module: nn.Module) -> bool:
    """Whether the children follow each other: a list, or numbered modules of one class alone."""
    if isinstance(module, _CHAINS):
        return True
    children = parametrised(module)
    return len({type(child) for _, child in children}) == 1 and all(
        _NUMBERED.fullmatch(name) and not isinstance(child, _CHAINS) and _weights(child) > 1
        for name, child in children
    )


def _weights(module: nn.Module) -> int:
    """How many modules below hold weights of their own, norms left out."""
    return sum(
        any(True for _ in part.parameters(recurse=False)) and not is_norm(part)
        for part in module.modules()
    )


def kind_of(module: nn.Module) -> Kind:
    if is_chain(module):
        elements = parametrised(module)
        kinds = [kind_of(child) for _, child in elements]
        if not kinds or max(kinds) < Kind.BLOCK:
            return Kind.LAYER if _weights(module) <= 1 else Kind.PARTS
        alike = len({type(child) for _, child in elements})
        homogeneous = alike == 1 or alike < len(elements)
        return Kind.STAGE if min(kinds) >= Kind.BLOCK and homogeneous else Kind.BLOCK
    if _weights(module) <= 1:
        return Kind.LAYER
    # A Swin stage is blocks and a downsampling; a block with experts has much beside its chain.
    total = sum(1 for _ in module.parameters())
    inside = sum(sum(1 for _ in stack.parameters()) for stack in _stages(module))
    return Kind.STAGE if total - inside < 0.5 * inside else Kind.BLOCK


def _stages(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost chains of blocks below a module."""
    for name, child in parametrised(module):
        if "expert" in name:
            continue
        if is_chain(child) and kind_of(child) is Kind.STAGE:
            yield child
        else:
            yield from _stages(child)


def holds_stack(module: nn.Module) -> bool:
    """Whether a chain of blocks, maybe with single layers among them, is anywhere in a module."""
    children = parametrised(module)
    if is_chain(module):
        blocks = sum(kind_of(child) >= Kind.BLOCK for _, child in children)
        if blocks > 1 or (blocks and kind_of(module) is Kind.STAGE):
            return True
    return any(holds_stack(child) for name, child in children if "expert" not in name)
