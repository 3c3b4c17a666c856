"""All architectures that the choices of a model allow."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import comb
from typing import Any, cast

import torch
from torch import Tensor, nn

from torsh_nas._activation import activated, capture_inputs, find_cells, find_choices
from torsh_nas._architecture import Architecture
from torsh_nas._cell import NONE
from torsh_nas._document import fingerprint
from torsh_nas._measure import place_inputs

_TRIES = 1000


@dataclass(frozen=True)
class CellGraph:
    """The graph of a :class:`Cell`: what is needed to count, draw and constrain its edges."""

    label: str
    inputs: int
    nodes: int
    keep: int | None
    reduce: str

    def edge(self, source: int, target: int) -> str:
        """Label of the edge between two nodes."""
        return f"{self.label}/{source}->{target}"

    @property
    def targets(self) -> range:
        """Numbers of the nodes that have incoming edges."""
        return range(self.inputs, self.inputs + self.nodes)

    def reachable(self, arch: Mapping[str, str]) -> set[int]:
        """Nodes that data can get to from the inputs."""
        reached = set(range(self.inputs))
        for target in self.targets:
            if any(arch[self.edge(s, target)] != NONE for s in range(target) if s in reached):
                reached.add(target)
        return reached

    def connected(self, arch: Mapping[str, str]) -> bool:
        """Whether the output depends on an input."""
        reached = self.reachable(arch)
        if self.reduce == "last":
            return self.targets[-1] in reached
        return len(reached) > self.inputs

    def used(self, arch: Mapping[str, str]) -> list[tuple[int, int]]:
        """Edges that carry something from an input to the output, in order of computation."""
        reached = self.reachable(arch)
        needed = {self.targets[-1]} if self.reduce == "last" else set(self.targets)
        edges: list[tuple[int, int]] = []
        for target in reversed(self.targets):
            if target not in needed or target not in reached:
                continue
            for source in reversed(range(target)):
                if source in reached and arch[self.edge(source, target)] != NONE:
                    edges.append((source, target))
                    needed.add(source)
        return edges[::-1]


@dataclass(frozen=True)
class Group:
    """Edges into one node of which exactly ``keep`` stay."""

    labels: tuple[str, ...]
    keep: int


class Space:
    """The set of architectures of a model; made by :func:`space`.

    Args:
        choices: Options by label.
        cells: Graphs of the cells whose edges are among the labels.

    Example:
        >>> from torsh_nas import Space
        >>> import torch
        >>> space = Space({"a": ("x", "y"), "b": ("x", "y", "z")})
        >>> space.size()
        6
        >>> arch = space.sample(torch.Generator().manual_seed(0))
        >>> len(space.neighbours(arch))  # one other option for a, two for b
        3
        >>> space.encode(space.architecture({"a": "y", "b": "x"})).tolist()
        [0.0, 1.0, 1.0, 0.0, 0.0]
    """

    def __init__(
        self, choices: Mapping[str, Sequence[str]], cells: Sequence[CellGraph] = ()
    ) -> None:
        self._choices = {label: tuple(options) for label, options in choices.items()}
        self._cells = tuple(cells)
        self._groups = tuple(
            Group(tuple(cell.edge(s, target) for s in range(target)), min(cell.keep, target))
            for cell in self._cells
            if cell.keep is not None
            for target in cell.targets
        )
        self._id = fingerprint(self.describe())

    @property
    def choices(self) -> dict[str, tuple[str, ...]]:
        """Options by label, in the order of the model."""
        return dict(self._choices)

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the decisions, in the order of the model."""
        return tuple(self._choices)

    @property
    def cells(self) -> tuple[CellGraph, ...]:
        """Graphs of the cells, one per label."""
        return self._cells

    @property
    def groups(self) -> tuple[Group, ...]:
        """Edge groups of cells with ``keep``: exactly that many edges are not ``"none"``."""
        return self._groups

    @property
    def space_id(self) -> str:
        """Fingerprint of labels, options and cell graphs, 16 hexadecimal digits."""
        return self._id

    def __repr__(self) -> str:
        return f"Space({len(self._choices)} decisions, {self.size():.3g} architectures)"

    def describe(self) -> dict[str, object]:
        """Return the space as JSON-ready data, for :meth:`from_description`."""
        choices = {label: list(options) for label, options in self._choices.items()}
        return {"choices": choices, "cells": [asdict(cell) for cell in self._cells]}

    @classmethod
    def from_description(cls, description: Mapping[str, object]) -> "Space":
        """Make the space that :meth:`describe` described."""
        choices = cast("Mapping[str, Sequence[str]]", description["choices"])
        cells = cast("Sequence[dict[str, Any]]", description["cells"])
        return cls(choices, [CellGraph(**cell) for cell in cells])

    def size(self) -> int:
        """Count the architectures.

        Combinations in which ``"none"`` cuts a cell off from its inputs are counted too, as
        NAS-Bench-201 counts its 15,625 cells, but never sampled.
        """
        total = 1
        for label in self._free():
            total *= len(self._choices[label])
        for group in self._groups:
            operations = len(self._choices[group.labels[0]]) - 1
            total *= comb(len(group.labels), group.keep) * operations**group.keep
        return total

    def architecture(self, choices: Mapping[str, str]) -> Architecture:
        """Make an architecture of this space from option names.

        Raises:
            ValueError: As :meth:`check`.
        """
        arch = Architecture(
            {label: choices[label] for label in self._choices if label in choices}
            | {label: option for label, option in choices.items() if label not in self._choices},
            space_id=self._id,
        )
        self.check(arch)
        return arch

    def check(self, arch: Architecture) -> None:
        """Raise unless ``arch`` belongs to this space and connects inputs and output.

        Raises:
            ValueError: An unknown or missing label, an unknown option, a node with the wrong
                number of edges, a cell cut off by ``"none"``, or another space's fingerprint.
        """
        for label, option in arch.items():
            options = self._choices.get(label)
            if options is None:
                raise ValueError(f"unknown choice {label!r}; this space has {[*self._choices]}")
            if option not in options:
                raise ValueError(f"unknown option {option!r} of {label!r}; use one of {options}")
        for label in self._choices:
            if label not in arch:
                raise ValueError(f"no option given for {label!r}")
        for group in self._groups:
            kept = [label for label in group.labels if arch[label] != NONE]
            if len(kept) != group.keep:
                raise ValueError(
                    f"exactly {group.keep} of the edges {group.labels} may stay, got {kept}"
                )
        for cell in self._cells:
            if not cell.connected(arch):
                raise ValueError(f"'none' stands on every path to the output of {cell.label!r}")
        if arch.space_id != self._id:
            raise ValueError(
                f"the architecture belongs to space {arch.space_id}, not to {self._id}: "
                "same decisions, but other options or cells were on offer"
            )

    def sample(self, generator: torch.Generator) -> Architecture:
        """Draw one architecture, all connected ones being equally likely."""
        for _ in range(_TRIES):
            chosen = {label: self._draw(self._choices[label], generator) for label in self._free()}
            for group in self._groups:
                chosen |= self._draw_group(group, generator)
            if self._connected(chosen):
                return self.architecture(chosen)
        raise RuntimeError(f"{_TRIES} draws gave no connected architecture")

    def mutate(self, arch: Architecture, generator: torch.Generator) -> Architecture:
        """Change one decision, or the edges of one node, at random."""
        self.check(arch)
        units = [*((label,) for label in self._free()), *(group.labels for group in self._groups)]
        everywhere = self.neighbours(arch)
        for position in torch.randperm(len(units), generator=generator).tolist():
            around = [n for n in everywhere if _differs(arch, n) <= set(units[position])]
            if around:
                return around[int(torch.randint(len(around), (), generator=generator))]
        raise ValueError("this space has only one connected architecture")

    def crossover(
        self, first: Architecture, second: Architecture, generator: torch.Generator
    ) -> Architecture:
        """Take each decision, and all edges of a node together, from either parent."""
        self.check(first)
        self.check(second)
        units = [*((label,) for label in self._free()), *(group.labels for group in self._groups)]
        for _ in range(_TRIES):
            coins = torch.randint(2, (len(units),), generator=generator).tolist()
            chosen = {
                label: (second if coin else first)[label]
                for unit, coin in zip(units, coins, strict=True)
                for label in unit
            }
            if self._connected(chosen):
                return self.architecture(chosen)
        return first

    def neighbours(self, arch: Architecture) -> list[Architecture]:
        """Return all connected architectures one step away.

        A step is another option for one decision or, at a node with ``keep``, another operation
        on a kept edge or a kept edge exchanged for a dropped one with any operation.
        """
        self.check(arch)
        changes = [
            {label: option}
            for label in self._free()
            for option in self._choices[label]
            if option != arch[label]
        ]
        for group in self._groups:
            changes += self._group_steps(group, arch)
        mutants = ({**arch, **change} for change in changes)
        return [self.architecture(mutant) for mutant in mutants if self._connected(mutant)]

    def encode(self, arch: Architecture) -> Tensor:
        """Return the one-hot code of shape ``(total number of options,)``, float32."""
        self.check(arch)
        return torch.tensor(
            [
                float(option == arch[label])
                for label, options in self._choices.items()
                for option in options
            ]
        )

    def _free(self) -> list[str]:
        bound = {label for group in self._groups for label in group.labels}
        return [label for label in self._choices if label not in bound]

    def _operations(self, label: str) -> list[str]:
        return [option for option in self._choices[label] if option != NONE]

    def _connected(self, choices: Mapping[str, str]) -> bool:
        return all(cell.connected(choices) for cell in self._cells)

    @staticmethod
    def _draw(options: Sequence[str], generator: torch.Generator) -> str:
        return options[int(torch.randint(len(options), (), generator=generator))]

    def _draw_group(self, group: Group, generator: torch.Generator) -> dict[str, str]:
        order = torch.randperm(len(group.labels), generator=generator).tolist()
        kept = {group.labels[position] for position in order[: group.keep]}
        return {
            label: self._draw(self._operations(label), generator) if label in kept else NONE
            for label in group.labels
        }

    def _group_steps(self, group: Group, arch: Architecture) -> Iterator[dict[str, str]]:
        for kept in (label for label in group.labels if arch[label] != NONE):
            for label in group.labels:
                if label != kept and arch[label] != NONE:
                    continue
                for option in self._operations(label):
                    if label != kept:
                        yield {kept: NONE, label: option}
                    elif option != arch[kept]:
                        yield {kept: option}


def _differs(first: Architecture, second: Architecture) -> set[str]:
    return {label for label in first if first[label] != second[label]}


def space(model: nn.Module, example_inputs: object = None) -> Space:
    """Collect the choices of a model.

    Args:
        model: A model with :class:`Choice` or :class:`Cell` modules in it.
        example_inputs: One input tensor or a tuple of inputs. If given, every option runs on
            what reaches it in a forward pass without gradients, so that options of different
            shape are found now.

    Raises:
        ValueError: No choices, nested choices, a label over different options or cells, options
            whose outputs differ in shape (named), or a choice that the forward never reaches.

    Example:
        >>> from torsh_nas import Choice, Space, space
        >>> from torch import nn
        >>> model = nn.Sequential(
        ...     Choice([nn.ReLU(), nn.Tanh()], label="act"), nn.Linear(4, 4),
        ...     Choice([nn.ReLU(), nn.Tanh()], label="act"), Choice([nn.Identity(), nn.ELU()]))
        >>> space(model).choices
        {'act': ('0', '1'), '3': ('0', '1')}
    """
    found = find_choices(model)
    graphs: dict[str, CellGraph] = {}
    for label, cell in find_cells(model):
        graph = CellGraph(label, cell.inputs, cell.nodes, cell.keep, cell.reduce)
        if graphs.setdefault(label, graph) != graph:
            raise ValueError(
                f"two cells share the label {label!r} but not the graph: "
                f"{graphs[label]} and {graph}"
            )
    result = Space(
        {label: choices[0].options for label, choices in found.items()}, [*graphs.values()]
    )
    if example_inputs is not None:
        capture_inputs(model, found, place_inputs(example_inputs, None)[0])
    return result


@contextmanager
def single_path(model: nn.Module, arch: Mapping[str, str]) -> Generator[None]:
    """Run only the options of one architecture, with the shared weights, inside this context.

    Args:
        model: A model with choices.
        arch: An :class:`Architecture`, or option names by label.

    Raises:
        ValueError: As :meth:`Space.check`.
    """
    its_space = space(model)
    if isinstance(arch, Architecture):
        its_space.check(arch)
        checked = arch
    else:
        checked = its_space.architecture(arch)
    with activated(find_choices(model), checked):
        yield
