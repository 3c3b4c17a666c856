"""A small graph of choices: the searchable cell of DARTS and NAS-Bench-201."""

from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from torsh_nas._choice import Choice
from torsh_nas._mixing import mix

NONE = "none"
"""Option name of an edge that is not there."""

Reduce = Literal["concat", "sum", "last"]


class Edge(Choice):
    """A choice between two nodes of a cell; the option ``none`` is no module but a gap."""

    def __init__(self, ops: dict[str, nn.Module], *, with_none: bool) -> None:
        # A one-operation edge is fine as long as it may also be left out.
        nn.Module.__init__(self)
        if len(ops) + with_none < 2:
            raise ValueError(
                f"op_names={[*ops]} leave nothing to decide on an edge; name at least two, "
                "or set keep"
            )
        self.ops = nn.ModuleDict(ops)
        self.label = None
        self.default = next(iter(ops))
        self.with_none = with_none
        self._active = None
        self._weights = None

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the operations, then ``none`` where the edge may be left out."""
        return (*self.ops, NONE) if self.with_none else tuple(self.ops)

    def contribution(self, x: Tensor) -> tuple[list[Tensor], tuple[Tensor, ...] | None]:
        """Outputs to add to the target node and, in a mixed forward, their weights."""
        if self._weights is not None:
            return self._outputs(x), self._weights[: len(self.ops)]
        name = self._active or self.default
        return ([] if name == NONE else [cast("Tensor", self.ops[name](x))]), None


class Cell(nn.Module):
    """A directed graph of nodes whose edges are choices between operations.

    Node ``j`` is the sum of its incoming edges, one from each input of the cell and from each
    earlier node. A search decides the operation on every edge and which ``keep`` edges of a node
    stay. The edges are decisions named ``"label/source->target"``, the inputs of the cell being
    sources ``0 .. inputs - 1``; give two cells the same label and they share all decisions.

    Args:
        op_factory: Called as ``op_factory(name, channels, stride)`` for each operation of each
            edge. Must keep the number of channels and divide height and width by ``stride``.
        op_names: The operations. The name ``"none"`` is a missing edge and never reaches the
            factory.
        channels: Channels of every input and node.
        stride: Stride of the edges that leave the inputs of the cell; the others have stride 1.
        nodes: Number of nodes between inputs and output.
        keep: Edges that stay at each node (all of them where it has fewer). Every edge then also
            has the option ``"none"``, as in DARTS. ``None`` keeps every edge, and ``"none"`` is
            an operation like the others if it is listed, as in NAS-Bench-201.
        inputs: Number of tensors the cell is called with.
        reduce: Output of the cell: ``"concat"`` of all nodes (``nodes * channels`` channels),
            their ``"sum"``, or the ``"last"`` node alone.
        label: Name of the cell; by default its place in the model.

    Raises:
        ValueError: A count below one, duplicate or too few ``op_names``, unknown ``reduce``.

    Example:
        >>> from torsh_nas import Cell, space
        >>> import torch
        >>> from torch import nn
        >>> def op(name, channels, stride):
        ...     return nn.Identity() if name == "skip" else nn.ReLU()
        >>> cell = Cell(op, ("skip", "relu"), channels=4, nodes=2, inputs=1, label="c")
        >>> space(cell).labels
        ('c/0->1', 'c/0->2', 'c/1->2')
        >>> cell(torch.ones(1, 4, 2, 2)).shape  # two nodes, one after the other
        torch.Size([1, 8, 2, 2])

    Reference:
        Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", 2018, arXiv:1806.09055;
        Dong, Yang, "NAS-Bench-201", 2020, arXiv:2001.00326.
    """

    def __init__(
        self,
        op_factory: Callable[[str, int, int], nn.Module],
        op_names: Sequence[str],
        *,
        channels: int,
        stride: int = 1,
        nodes: int = 4,
        keep: int | None = 2,
        inputs: int = 2,
        reduce: Reduce = "concat",
        label: str | None = None,
    ) -> None:
        super().__init__()
        _check_cell(op_names, channels, stride, nodes, keep, inputs, reduce)
        self.nodes, self.keep, self.inputs = nodes, keep, inputs
        self.reduce: Reduce = reduce
        self.label = label
        operations = [name for name in op_names if name != NONE]
        edges: dict[str, nn.Module] = {}
        for target in range(inputs, inputs + nodes):
            for source in range(target):
                step = stride if source < inputs else 1
                ops = {name: op_factory(name, channels, step) for name in operations}
                with_none = keep is not None or NONE in op_names
                edges[f"{source}_{target}"] = Edge(ops, with_none=with_none)
        self.edges = nn.ModuleDict(edges)

    def edge(self, source: int, target: int) -> Edge:
        """Return the choice between two nodes."""
        return cast("Edge", self.edges[f"{source}_{target}"])

    def forward(self, *inputs: Tensor) -> Tensor:
        """Compute the nodes in order and reduce them to one tensor."""
        if len(inputs) != self.inputs:
            raise ValueError(f"the cell takes {self.inputs} input(s), got {len(inputs)}")
        states: list[Tensor | None] = list(inputs)
        for target in range(self.inputs, self.inputs + self.nodes):
            states.append(self._node(states, target))
        return _reduce(states[self.inputs :], self.reduce)

    def _node(self, states: list[Tensor | None], target: int) -> Tensor | None:
        outputs: list[Tensor] = []
        weights: list[Tensor] = []
        for source in range(target):
            x = states[source]
            if x is None:
                continue
            some, their_weights = self.edge(source, target).contribution(x)
            outputs += some
            weights += their_weights or ()
        if weights:
            return mix(outputs, weights)
        total = outputs[0] if outputs else None
        for output in outputs[1:]:
            total = cast("Tensor", total) + output
        return total

    def extra_repr(self) -> str:
        """Show the shape of the graph."""
        return (
            f"label={self.label!r}, inputs={self.inputs}, nodes={self.nodes}, keep={self.keep}, "
            f"reduce={self.reduce!r}"
        )


def _reduce(nodes: list[Tensor | None], reduce: Reduce) -> Tensor:
    present = [node for node in nodes if node is not None]
    if not present or (reduce == "last" and nodes[-1] is None):
        raise ValueError("'none' stands on every path to the output of the cell")
    if reduce == "last":
        return cast("Tensor", nodes[-1])
    if reduce == "concat":
        # A node without inputs is all zeros, so that the channels stay where they are.
        return torch.cat([torch.zeros_like(present[0]) if n is None else n for n in nodes], dim=1)
    total = present[0]
    for node in present[1:]:
        total = total + node
    return total


def _check_cell(
    op_names: Sequence[str],
    channels: int,
    stride: int,
    nodes: int,
    keep: int | None,
    inputs: int,
    reduce: str,
) -> None:
    counts = {"channels": channels, "stride": stride, "nodes": nodes, "inputs": inputs}
    if keep is not None:
        counts["keep"] = keep
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1")
    if len(set(op_names)) != len(op_names):
        raise ValueError(f"op_names={list(op_names)} has duplicates")
    if not set(op_names) - {NONE}:
        raise ValueError(f"op_names={list(op_names)} has no operation besides {NONE!r}")
    if reduce not in ("concat", "sum", "last"):
        raise ValueError(f"reduce={reduce!r}; use 'concat', 'sum' or 'last'")
