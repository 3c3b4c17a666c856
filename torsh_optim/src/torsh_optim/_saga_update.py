"""What a batch changes in the table, computed before anything is changed."""

import math
import operator
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torsh_optim._saga_layers import LinearCall
from torsh_optim._saga_table import allocate, decode, encode, read, write

Index = Tensor | Sequence[int] | int


class Update:
    """Old and new rows of a batch, and their sums for each parameter, in float64.

    ``old_sum`` has the stored gradients of the batch, summed; ``change`` what storing the new ones
    will add to the sum over the table.

    Args:
        state: The optimizer's state, which holds the table.
        dtype: Element type of the table.
        where: Numbers of the samples ``(batch,)``.
        once: ``(batch, 1)``: 1 for one occurrence of each sample, 0 for the others; None if each
            occurs once.
    """

    def __init__(
        self,
        state: MutableMapping[Tensor, Any],
        dtype: torch.dtype,
        where: Tensor,
        once: Tensor | None,
    ) -> None:
        self.old_sum: dict[Tensor, Tensor] = {}
        self.change: dict[Tensor, Tensor] = {}
        self.batch = len(where)
        self._state, self._dtype, self._where, self._once = state, dtype, where, once
        self._rows: list[tuple[Tensor, str, Tensor, Tensor | None]] = []

    def add_rows(self, params: list[Tensor], rows: list[Tensor]) -> None:
        """Take the gradients of each sample, ``(batch, numel)`` for each parameter."""
        for param, row in zip(params, rows, strict=True):
            old = self._read(param, "gradient", row.shape[1])
            new = self._encode(param, "gradient", row.detach())
            self.old_sum[param] = old.sum(0).view_as(param)
            self.change[param] = self._masked(new - old).sum(0).view_as(param)

    def add_layers(self, calls: list[LinearCall], params: list[Tensor], scalar: bool) -> None:
        """Take inputs and output gradients of linear layers.

        Args:
            calls: One call of each layer, with the gradient of the mean loss.
            params: Those that the optimizer has.
            scalar: Whether the input of a sample is always the same, and so is not stored.

        Raises:
            RuntimeError: A number is not finite.
        """
        mine = set(map(id, params))
        for call in calls:
            layer, grad = call.layer, call.output_grad
            weight = layer.weight if id(layer.weight) in mine else None
            bias = layer.bias if id(layer.bias) in mine else None
            owner = bias if weight is None else weight
            assert owner is not None
            if grad is None:  # the loss of this batch does not depend on the layer
                grad = call.input.new_zeros(self.batch, layer.out_features)
            old = self._read(owner, "output_grad", layer.out_features)
            new = self._encode(owner, "output_grad", grad * self.batch)
            if bias is not None:
                self.old_sum[bias] = old.sum(0)
                self.change[bias] = self._masked(new - old).sum(0)
            if weight is None:
                continue
            if scalar:
                both = torch.cat((old, self._masked(new - old)), 1)
                sums = both.T @ call.input.to(torch.float64)  # one product for both
                self.old_sum[weight], self.change[weight] = sums.chunk(2)
            else:
                old_x = self._read(owner, "input", layer.in_features)
                new_x = self._encode(owner, "input", call.input)
                self.old_sum[weight] = old.T @ old_x
                replaced = (
                    self.old_sum[weight] if self._once is None else self._masked(old).T @ old_x
                )
                self.change[weight] = (self._masked(new).T @ new_x).sub_(replaced)

    def _masked(self, rows: Tensor) -> Tensor:
        return rows if self._once is None else rows * self._once

    def _read(self, owner: Tensor, key: str, width: int) -> Tensor:
        state = self._state.get(owner, {})
        if key in state:
            return read(state, key, self._where)
        return torch.zeros(self.batch, width, dtype=torch.float64, device=self._where.device)

    def _encode(self, owner: Tensor, key: str, values: Tensor) -> Tensor:
        """Note rows to be stored; return them as they will be read."""
        codes, scale = encode(values, self._dtype)
        stored = decode(codes, scale)
        # one NaN or infinity is enough to make the sum one; codes of int8 would hide it
        if not math.isfinite(float((stored if scale is None else scale).sum())):
            raise RuntimeError(
                "the batch has gradients or inputs that are not finite; nothing was stored or "
                "changed: leave it out, or lower lr if the loss grows"
            )
        self._rows.append((owner, key, codes, scale))
        return stored

    def store(self, num_samples: int) -> None:
        """Write the new rows; create the table where there is none."""
        where = self._where
        keep = None if self._once is None else self._once.squeeze(1).nonzero().squeeze(1)
        for owner, key, codes, scale in self._rows:
            state = self._state[owner]
            if key not in state:
                shape = (num_samples, codes.shape[1])
                allocate(state, key, shape, self._dtype, owner.device)
            if keep is None:
                write(state, key, where, codes, scale)
            else:
                kept_scale = None if scale is None else scale[keep]
                write(state, key, where[keep], codes[keep], kept_scale)


def sample_numbers(index: Index, num_samples: int) -> list[int]:
    """Return the numbers of a batch's samples, checked.

    Args:
        index: One number or several.
        num_samples: Numbers must be below.

    Raises:
        IndexError: A number is out of range.
        TypeError: There is something else than integers.
        ValueError: There are none, or ``index`` has more than one dimension.
    """
    if isinstance(index, Tensor):
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise TypeError(f"index must hold integers, got {index.dtype}")
        if index.dim() > 1:
            raise ValueError(f"index must be of shape (batch,), got {tuple(index.shape)}")
        numbers: list[int] = index.reshape(-1).tolist()
    else:
        given = index if isinstance(index, Iterable) else (index,)
        numbers = list(map(operator.index, given))
    if not numbers:
        raise ValueError("index is empty; leave out batches without samples")
    for number in (min(numbers), max(numbers)):
        if not 0 <= number < num_samples:
            raise IndexError(
                f"index has {number}, but samples are numbered from 0 to {num_samples - 1} "
                f"(num_samples={num_samples})"
            )
    return numbers
