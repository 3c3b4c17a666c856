"""Where the head of a model is."""

import re
from collections import Counter

from torch import nn

from torsh_optim._depth import unwrapped
from torsh_optim._stacks import Kind, is_chain, is_norm, kind_of, parametrised

_HEAD = re.compile(
    r"(^|_)(heads?|fc|classifier|logits)(_|$)|^aux|^(score|cls|qa_outputs|last_linear)$",
    re.IGNORECASE,
)


def find_head(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules of the head: timm's, Hugging Face's or the usual names, or the last.

    Args:
        model: Any model.

    Returns:
        Names of modules with parameters, none if there seems to be no head.
    """
    outer, inner = unwrapped(model)
    children = dict(parametrised(inner))
    if hasattr(type(inner), "get_classifier"):  # timm
        found = inner.get_classifier()  # pyrefly: ignore[not-callable]
        heads = found if isinstance(found, (tuple, list)) else (found,)
        names = _names(inner, [head for head in heads if isinstance(head, nn.Module)])
        return tuple(outer + name for name in names)
    prefix = getattr(type(inner), "base_model_prefix", None)
    if isinstance(prefix, str):  # Hugging Face
        if prefix in children:
            return tuple(outer + name for name in children if name != prefix)
        embeddings = getattr(inner, "get_output_embeddings", None)
        output = embeddings() if callable(embeddings) else None
        if isinstance(output, nn.Module):
            return tuple(outer + name for name in _names(inner, [output]))
    named = [name for name in children if _HEAD.search(name)]
    if named and len(named) < len(children):
        return tuple(outer + name for name in named)
    if isinstance(prefix, str) or len(children) < 2:
        return ()
    name, last = list(children.items())[-1]
    kinds = Counter(type(child) for child in children.values())
    single = not parametrised(last) or (is_chain(inner) and kinds[type(last)] == 1)
    return (outer + name,) if single and not is_norm(last) and kind_of(last) < Kind.BLOCK else ()


def _names(model: nn.Module, wanted: list[nn.Module]) -> list[str]:
    """Names in a model of those modules that have parameters."""
    return [
        name
        for name, module in model.named_modules()
        if any(module is one for one in wanted) and any(True for _ in module.parameters())
    ]
