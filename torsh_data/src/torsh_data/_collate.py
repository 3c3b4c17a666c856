"""A column of a batch from its values, or why it cannot be one."""

import torch

from torsh_data._columns import Value
from torsh_data._order import Ids


def make_column(
    name: str, kind: torch.dtype | type[torch.Tensor] | None, values: list[Value], ids: Ids
) -> torch.Tensor | list[Value]:
    """What `default_collate` makes of the values of a column, which is of a `collated_kind`."""
    if kind is None:
        return values
    try:
        if isinstance(kind, torch.dtype):
            _refuse_other_numbers(kind, values)
            return torch.tensor(values, dtype=kind)
        return torch.stack(values)
    except (TypeError, RuntimeError, ValueError) as error:
        raise _explain(name, ids, values) from error


def _refuse_other_numbers(kind: torch.dtype, values: list[Value]) -> None:
    # torch.tensor would cut 0.5 to 0 where the first lines of a file had whole numbers
    fits = {torch.bool: (bool,), torch.int64: (int,), torch.float64: (int, float)}[kind]
    if not all(type(value) in fits for value in values):
        raise TypeError(f"not all are {kind}")


def _explain(name: str, ids: Ids, values: list[Value]) -> ValueError:
    for number, value in zip(ids.tolist(), values, strict=True):
        if value is None:
            return ValueError(
                f"column {name!r} has a null in sample {number}, and a tensor has none; leave the "
                "column out with columns=, or give a transform that replaces None"
            )
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return ValueError(
                f"column {name!r} holds {value} in sample {number}, beyond int64; leave the column "
                "out with columns=, or give a transform that converts it"
            )
    kinds = sorted({_kind_of(value) for value in values})
    return ValueError(
        f"column {name!r} holds {' and '.join(kinds)} in one batch, which do not make one tensor; "
        "give a transform that makes them alike, or a collate_fn that takes them as they are"
    )


def _kind_of(value: Value) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
