"""Turn a model with choices and an architecture into a plain model."""

import copy
import operator
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from torsh_nas._activation import find_cells, find_choices
from torsh_nas._architecture import Architecture
from torsh_nas._cell import Cell, Edge
from torsh_nas._measure import evaluating, place_inputs
from torsh_nas._space import CellGraph, Space, single_path, space


def derive(
    model: nn.Module,
    arch: Mapping[str, str],
    *,
    weights: Literal["inherit", "reset"] = "inherit",
    example_inputs: object = None,
) -> nn.Module:
    """Copy a model with the chosen options in place of its choices.

    The copy contains torch's modules and your own classes only: a :class:`Choice` becomes the
    chosen module itself, a :class:`Cell` a ``torch.fx.GraphModule`` with the edges that carry
    something to the output (``print(cell.code)`` shows it). It can be saved by ``state_dict``,
    copied, compiled and exported like any model. ``model`` is not changed.

    In eval mode the copy with inherited weights computes exactly what ``model`` computes inside
    :func:`single_path`. Batch-norm statistics are inherited too; after a mixed search they belong
    to mixed inputs, so train the copy, or :func:`recalibrate` it, before you judge it.

    Args:
        model: A model with choices.
        arch: An :class:`Architecture` of its space, or option names by label.
        weights: ``"inherit"`` copies the trained weights, ``"reset"`` calls ``reset_parameters``
            of every module (drawing from torch's global generator, as building the model did).
        example_inputs: One input or a tuple. If given, and the weights are inherited, both models
            run on it in eval mode and must agree to the last bit.

    Raises:
        ValueError: The architecture is not of this space, or ``weights="reset"`` meets a module
            with parameters but no ``reset_parameters``.
        RuntimeError: The copy computes something else on ``example_inputs``.

    Example:
        >>> from torsh_nas import Choice, derive, space
        >>> from torch import nn
        >>> model = nn.Sequential(Choice({"lin": nn.Linear(3, 3), "skip": nn.Identity()}))
        >>> derive(model, {"0": "lin"})
        Sequential(
          (0): Linear(in_features=3, out_features=3, bias=True)
        )
    """
    if weights not in ("inherit", "reset"):
        raise ValueError(f"weights={weights!r}; use 'inherit' or 'reset'")
    its_space = space(model)
    checked = arch if isinstance(arch, Architecture) else its_space.architecture(arch)
    its_space.check(checked)
    plain = _replace(model, its_space, checked)
    if weights == "reset":
        _reset(plain)
    elif example_inputs is not None:
        _compare(model, plain, checked, example_inputs)
    return plain


def _replace(model: nn.Module, its_space: Space, arch: Architecture) -> nn.Module:
    graphs = {graph.label: graph for graph in its_space.cells}
    # deepcopy looks every object up in its memo first: what stands there for a choice lands
    # wherever the model refers to that choice, and parameters shared between parts stay shared.
    memo: dict[int, object] = {}
    for label, cell in find_cells(model):
        memo[id(cell)] = _trace_cell(cell, graphs[label], arch, memo)
    for label, choices in find_choices(model).items():
        for choice in choices:
            if not isinstance(choice, Edge):
                memo[id(choice)] = copy.deepcopy(choice.ops[arch[label]], memo)
    return copy.deepcopy(model, memo)


def _trace_cell(
    cell: Cell, graph: CellGraph, arch: Architecture, memo: dict[int, object]
) -> fx.GraphModule:
    """Write down the same additions in the same order as :meth:`Cell.forward`."""
    root = nn.Module()
    trace = fx.Graph()
    states: dict[int, fx.Node] = {i: trace.placeholder(f"input_{i}") for i in range(cell.inputs)}
    for source, target in graph.used(arch):
        name = f"edge_{source}_{target}"
        chosen = cell.edge(source, target).ops[arch[graph.edge(source, target)]]
        root.add_module(name, copy.deepcopy(chosen, memo))
        output = trace.call_module(name, (states[source],))
        if target in states:
            output = trace.call_function(operator.add, (states[target], output))
        states[target] = output
    nodes = [states.get(target) for target in graph.targets]
    present = [node for node in nodes if node is not None]
    if cell.reduce == "last":
        result = present[-1]
    elif cell.reduce == "concat":
        zeros = (
            trace.call_function(torch.zeros_like, (present[0],)) if None in nodes else present[0]
        )
        parts = [zeros if node is None else node for node in nodes]
        result = trace.call_function(torch.cat, (parts,), {"dim": 1})
    else:
        result = present[0]
        for node in present[1:]:
            result = trace.call_function(operator.add, (result, node))
    trace.output(result)
    plain = fx.GraphModule(root, trace, class_name="Cell")
    plain.training = cell.training
    return plain


def _reset(model: nn.Module) -> None:
    for name, module in model.named_modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        elif next(module.parameters(recurse=False), None) is not None:
            raise ValueError(
                f"weights='reset' needs a reset_parameters method on {type(module).__name__} "
                f"{name!r}; add one, or use weights='inherit'"
            )


def _compare(model: nn.Module, plain: nn.Module, arch: Architecture, example: object) -> None:
    device = next((p.device for p in model.parameters()), None)
    inputs, _ = place_inputs(example, device)
    with torch.no_grad(), evaluating(model), evaluating(plain):
        actual = plain(*inputs)
        with single_path(model, arch):
            expected = model(*inputs)
    pairs = zip(_tensors(actual), _tensors(expected), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise RuntimeError(
            "the derived model computes something else than the supernet: does its forward "
            "depend on random numbers, or reach into a Choice?"
        )


def _tensors(output: object) -> list[Tensor]:
    flat, _ = tree_flatten(output)
    return [leaf for leaf in flat if isinstance(leaf, Tensor)]
