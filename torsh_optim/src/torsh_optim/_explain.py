"""What each parameter group of an optimizer holds, as a table."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

_COLUMNS = ("params", "param_names", "name", "lr", "weight_decay")


class _HasGroups(Protocol):
    param_groups: list[dict[str, Any]]


@dataclass(frozen=True)
class GroupRow:
    """One parameter group.

    Attributes:
        name: Name of the group, or its number.
        tensors: Number of tensors.
        parameters: Number of elements in them.
        lr: Learning rate; None if the group leaves it to the optimizer.
        weight_decay: Weight decay; None if the group has none.
        options: Every other option that is not the same in all groups; None where it is missing.
        param_names: Names of the tensors; empty if the optimizer was not given any.
    """

    name: str
    tensors: int
    parameters: int
    lr: float | None
    weight_decay: float | None
    options: Mapping[str, Any]
    param_names: tuple[str, ...]


@dataclass(frozen=True)
class GroupTable:
    """The parameter groups of an optimizer; ``str()`` is a table in plain text.

    Attributes:
        rows: One row for each group, in the optimizer's order.
    """

    rows: tuple[GroupRow, ...]

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The header and the lines of the table as text, the last line the totals."""
        extra = list(self.rows[0].options) if self.rows else []
        decays = any(row.weight_decay is not None for row in self.rows)
        header = ["group", "tensors", "parameters", "lr", *(["weight decay"] if decays else [])]
        lines = [
            [row.name, f"{row.tensors:,}", f"{row.parameters:,}", _text(row.lr)]
            + ([_text(row.weight_decay)] if decays else [])
            + [_text(row.options[key]) for key in extra]
            for row in self.rows
        ]
        totals = (sum(row.tensors for row in self.rows), sum(row.parameters for row in self.rows))
        lines.append(["total", *(f"{total:,}" for total in totals)])
        lines[-1] += [""] * (len(header) + len(extra) - 3)
        return [*header, *extra], lines

    def __str__(self) -> str:
        header, lines = self.cells()
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in [header, *lines]
        )


def explain_groups(
    opt_or_groups: _HasGroups | Sequence[Mapping[str, Any]],
) -> GroupTable:
    """Show the parameter groups of any optimizer, or groups before an optimizer has them.

    Reading a learning rate that is a tensor on a GPU waits for the GPU.

    Args:
        opt_or_groups: A ``torch.optim.Optimizer``, a wrapper with ``param_groups``, or a list of
            groups such as ``param_groups(model, ...)`` returns.

    Returns:
        A table: print it, or read its ``rows``.

    Raises:
        TypeError: It is none of these, or a group's parameters are an iterator, which counting
            would use up.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 2)
        >>> decay = {"name": "decay", "params": [layer.weight], "weight_decay": 0.1}
        >>> rest = {"name": "no_decay", "params": [layer.bias], "weight_decay": 0.0}
        >>> print(explain_groups(torch.optim.AdamW([decay, rest], lr=0.001)))
        group     tensors  parameters     lr  weight decay
        decay           1           8  0.001           0.1
        no_decay        1           2  0.001             0
        total           2          10
    """
    groups: Any = getattr(opt_or_groups, "param_groups", opt_or_groups)
    if not isinstance(groups, (list, tuple)) or not all(
        isinstance(group, Mapping) and "params" in group for group in groups
    ):
        raise TypeError(
            "explain_groups takes an optimizer or a list of parameter groups, got "
            f"{type(opt_or_groups).__name__}"
            + (
                "; for a model: explain_groups(param_groups(model, lr=...))"
                if isinstance(opt_or_groups, nn.Module)
                else f"{' of other things' if groups else ''}"
            )
        )
    keys = dict.fromkeys(key for group in groups for key in group if key not in _COLUMNS)
    texts = {key: {_text(group.get(key)) for group in groups} for key in keys}
    differing = [key for key in keys if len(texts[key]) > 1]
    return GroupTable(tuple(_row(i, group, differing) for i, group in enumerate(groups)))


def _row(number: int, group: Mapping[str, Any], options: Sequence[str]) -> GroupRow:
    name, params = str(group.get("name", number)), group["params"]
    if isinstance(params, Iterator):
        raise TypeError(
            f"the parameters of group {name!r} are an iterator, which counting would use up; "
            "make it a list"
        )
    entries = [params] if isinstance(params, Tensor) else list(params)
    tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
    names = group.get("param_names") or [e[0] for e in entries if isinstance(e, tuple)]
    return GroupRow(
        name=name,
        tensors=len(tensors),
        parameters=sum(tensor.numel() for tensor in tensors),
        lr=_number(group.get("lr")),
        weight_decay=_number(group.get("weight_decay")),
        options={key: group.get(key) for key in options},
        param_names=tuple(names),
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _text(value: Any) -> str:
    """Write a value so that two that differ by more than rounding look different."""
    if value is None:
        return "-"
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else value.tolist()
    return f"{value:.6g}" if isinstance(value, float) else str(value)
