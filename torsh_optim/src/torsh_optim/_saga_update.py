"""What a batch changes in the table, computed before anything is changed."""

import math
import operator
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torsh_optim._saga_layers import LinearCall
from torsh_optim._saga_table import allocate, decode, encode, input_sums, read, write

Index = Tensor | Sequence[int] | int

_NOT_FINITE = (
    "the batch has gradients or inputs that are not finite; nothing was stored or changed: leave "
    "it out, or lower lr if the loss grows"
)


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
        self._sums: dict[Tensor, Tensor] = {}

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
            RuntimeError: A number is not finite, or an input that is not stored has changed.
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
                self._see_input(owner, call.input)
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

    def _see_input(self, owner: Tensor, inputs: Tensor) -> None:
        """Note checksums of inputs; compare them with those of the last visits."""
        sums, tolerance = input_sums(inputs)
        known = self._state.get(owner, {}).get("input_sum")
        before = torch.zeros_like(sums) if known is None else known[self._where]
        if self._once is not None:  # the batch has a sample twice
            different, place = self._where.unique(return_inverse=True)
            first = sums.new_empty(len(different)).scatter_(0, place, sums)[place]
            before = torch.where(before == 0, first, before)
        before = torch.where(before == 0, sums, before)
        changed = ~((sums - before).abs() <= tolerance)
        if bool(changed.any()):
            i = int(changed.nonzero()[0])
            if not math.isfinite(float(sums[i])):
                raise RuntimeError(_NOT_FINITE)
            raise RuntimeError(
                f"the input of sample {int(self._where[i])} is another one than at its last visit, "
                "and the scalar table needs the same one each time (augmentation, dropout or a "
                "random or changing layer before the linear one?); nothing was stored or changed: "
                "use table='factored' in a new SAGA, or fix the inputs"
            )
        self._sums[owner] = before  # that of the first visit, so that nothing creeps

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
            raise RuntimeError(_NOT_FINITE)
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
        for owner, sums in self._sums.items():
            state = self._state[owner]
            if "input_sum" not in state:  # new, or loaded from a state without it
                state["input_sum"] = sums.new_zeros(num_samples)
            state["input_sum"].index_copy_(0, where, sums)


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
    plain = isinstance(index, Sequence) and any(isinstance(number, bool) for number in index)
    if plain or str(getattr(index, "dtype", "")).removeprefix("torch.") == "bool":
        raise TypeError(
            "index is a mask of torch.bool, not the numbers of the samples; give "
            "mask.nonzero().squeeze(1)"
        )
    if isinstance(index, Tensor):
        if index.is_floating_point() or index.is_complex():
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
