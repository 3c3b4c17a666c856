"""Find the choices of a model and tell them what to run."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from torsh_nas._cell import Cell, Edge
from torsh_nas._choice import Choice
from torsh_nas._measure import evaluating

Call = tuple[tuple[object, ...], dict[str, object]]
"""Positional and keyword arguments of one call."""


def find_cells(model: nn.Module) -> list[tuple[str, Cell]]:
    """Return all cells with their labels, in the order of the model."""
    return [
        (module.label or name or "cell", module)
        for name, module in model.named_modules()
        if isinstance(module, Cell)
    ]


def find_choices(model: nn.Module) -> dict[str, list[Choice]]:
    """Return the choices of a model by label, edges of cells included.

    Raises:
        ValueError: No choice at all, a choice inside an option of another, or one label over
            different options.
    """
    found: dict[str, list[Choice]] = {}
    edge_labels: dict[int, str] = {}
    for label, cell in find_cells(model):
        for key, edge in cell.edges.items():
            edge_labels[id(edge)] = f"{label}/{key.replace('_', '->')}"
    for name, choice in model.named_modules():
        if not isinstance(choice, Choice):
            continue
        for inner in choice.modules():
            if inner is not choice and isinstance(inner, Choice | Cell):
                raise ValueError(
                    f"{name or 'the model'!r} has a {type(inner).__name__} inside one of its "
                    "options; nested choices are not supported: list the combinations as options"
                )
        label = edge_labels.get(id(choice)) or choice.label or name or "choice"
        others = found.setdefault(label, [])
        if others and others[0].options != choice.options:
            raise ValueError(
                f"label {label!r} stands for options {others[0].options} and, at {name!r}, for "
                f"{choice.options}; choices that share a label need the same options"
            )
        if others and isinstance(others[0], Edge) != isinstance(choice, Edge):
            raise ValueError(
                f"label {label!r} names both an edge of a cell and the Choice {name!r}"
            )
        others.append(choice)
    if not found:
        raise ValueError(f"{type(model).__name__} has no Choice and no Cell: nothing to search")
    return found


@contextmanager
def mixed(found: Mapping[str, list[Choice]], weights: Mapping[str, Tensor]) -> Generator[None]:
    """Run the choices as weighted sums: ``weights[label]`` has shape ``(options,)``."""
    try:
        for label, choices in found.items():
            # Taken apart once: indexing w[k] in each choice costs a full-size backward kernel
            # per use.
            scalars = weights[label].unbind()
            for choice in choices:
                choice._weights = scalars
        yield
    finally:
        for choices in found.values():
            for choice in choices:
                choice._weights = None


@contextmanager
def activated(found: Mapping[str, list[Choice]], arch: Mapping[str, str]) -> Generator[None]:
    """Run the option ``arch[label]`` in the choices of each label."""
    try:
        for label, choices in found.items():
            for choice in choices:
                choice._active = arch[label]
        yield
    finally:
        for choices in found.values():
            for choice in choices:
                choice._active = None


def capture_inputs(
    model: nn.Module, found: Mapping[str, list[Choice]], inputs: tuple[object, ...]
) -> dict[int, list[Call]]:
    """Run every option once and return what each choice was called with, by its ``id``.

    Raises:
        ValueError: Options whose outputs differ in shape or that change their input in place, or a
            choice the forward never reaches.
    """
    calls: dict[int, list[Call]] = {}
    handles = []
    for choices in found.values():
        for choice in choices:
            seen = calls.setdefault(id(choice), [])

            def record(
                _: nn.Module,
                args: tuple[object, ...],
                kwargs: dict[str, object],
                seen: list[Call] = seen,
            ) -> None:
                seen.append((args, kwargs))

            first = next(iter(choice.ops.values()))
            handles.append(first.register_forward_pre_hook(record, with_kwargs=True))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    uniform = {
        label: torch.full((len(c[0].options),), 1 / len(c[0].options), device=device)
        for label, c in found.items()
    }
    try:
        # Inference mode keeps no write counters, by which a choice finds in-place options.
        with (
            evaluating(model),
            torch.inference_mode(False),
            torch.no_grad(),
            mixed(found, uniform),
        ):
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    for label, choices in found.items():
        if not all(calls[id(choice)] for choice in choices):
            raise ValueError(f"the forward pass never reaches a choice labelled {label!r}")
    return calls
