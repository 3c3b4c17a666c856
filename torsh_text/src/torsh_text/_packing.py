"""Rows of tokens laid end to end, without padding, and the plan that groups them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Token rows laid end to end: what an encoder reads instead of a padded matrix.

    Everything a model needs to keep the rows apart is computed on the host and travels in one
    int32 buffer, so moving a batch is one copy and no layer ever waits for the device to learn a
    length. Rows of equal length that are neighbours share one attention call on the CPU, so sort
    rows by length where order is free (:meth:`torsh_text.Encoder.encode` does).

    Attributes:
        buffer: int32 ``(2 * tokens + rows + 1,)``: token ids, positions, cumulative lengths; then,
            if ``typed``, the type of each token (which text of a pair it belongs to).
        lengths: Tokens in each row.
        first_position: Position of each row's first token.
        typed: Whether the buffer holds token types.

    Example:
        >>> batch = PackedBatch.pack([[5, 6, 7], [8, 9]])
        >>> batch.input_ids.tolist(), batch.position_ids.tolist(), batch.cu_seqlens.tolist()
        ([[5, 6, 7, 8, 9]], [[0, 1, 2, 0, 1]], [0, 3, 5])
    """

    buffer: Tensor
    lengths: tuple[int, ...]
    first_position: int = 0
    typed: bool = False

    @classmethod
    def pack(cls, rows: Sequence[Sequence[int]], *, first_position: int = 0) -> "PackedBatch":
        """Lay rows of token ids end to end.

        Args:
            rows: Token ids of each row; no row may be empty.
            first_position: Position of each row's first token; RoBERTa and its relatives count
                from ``padding_idx + 1`` (:attr:`torsh_text.Encoder.first_position` knows).

        Raises:
            ValueError: If there is no row or one is empty.
        """
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        ids = np.fromiter((i for row in rows for i in row), dtype=np.int32, count=lengths.sum())
        return cls.from_arrays(ids, lengths, first_position=first_position)

    @classmethod
    def from_arrays(
        cls,
        ids: np.ndarray,
        lengths: np.ndarray,
        *,
        types: np.ndarray | None = None,
        first_position: int = 0,
    ) -> "PackedBatch":
        """Build from ids (and types) that already lie end to end and the length of each row."""
        if len(lengths) == 0:
            raise ValueError("rows is empty; a packed batch needs at least one row")
        if lengths.min() < 1:
            raise ValueError(
                f"row {int(lengths.argmin())} has no tokens; every row needs at least one"
            )
        total = len(ids)
        ends = np.cumsum(lengths)
        typed = types is not None
        buffer = np.empty((2 + typed) * total + len(lengths) + 1, dtype=np.int32)
        buffer[:total] = ids
        positions = np.arange(first_position, total + first_position, dtype=np.int64)
        buffer[total : 2 * total] = positions - np.repeat(ends - lengths, lengths)
        buffer[2 * total] = 0
        buffer[2 * total + 1 : 2 * total + 1 + len(lengths)] = ends
        if typed:
            buffer[2 * total + 1 + len(lengths) :] = types
        return cls(torch.from_numpy(buffer), tuple(lengths.tolist()), first_position, typed)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lengths)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens in all rows together."""
        return sum(self.lengths)

    @cached_property
    def max_length(self) -> int:
        """Tokens in the longest row."""
        return max(self.lengths)

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Neighbouring rows of equal length as ``(rows, length)`` pairs, in order."""
        return tuple((sum(1 for _ in group), length) for length, group in groupby(self.lengths))

    @property
    def input_ids(self) -> Tensor:
        """Token ids ``(1, tokens)``."""
        return self.buffer[: self.num_tokens].unsqueeze(0)

    @property
    def position_ids(self) -> Tensor:
        """Position of each token within its row ``(1, tokens)``."""
        return self.buffer[self.num_tokens : 2 * self.num_tokens].unsqueeze(0)

    @property
    def cu_seqlens(self) -> Tensor:
        """Where each row starts, and the end: int32 ``(rows + 1,)``."""
        return self.buffer[2 * self.num_tokens :][: len(self.lengths) + 1]

    @property
    def token_type_ids(self) -> Tensor | None:
        """Which text of a pair each token belongs to ``(1, tokens)``; None without types."""
        return self.buffer[-self.num_tokens :].unsqueeze(0) if self.typed else None

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self.buffer.device

    def to(
        self, device: torch.device | str, *, non_blocking: bool = False, copy: bool = False
    ) -> "PackedBatch":
        """Move to a device with one copy."""
        moved = self.buffer.to(device, non_blocking=non_blocking, copy=copy)
        return replace(self, buffer=moved)

    def pin_memory(self) -> "PackedBatch":
        """Copy into page-locked host memory (a ``DataLoader`` with ``pin_memory`` calls this)."""
        return replace(self, buffer=self.buffer.pin_memory())

    def padded(self, pad_id: int = 0) -> dict[str, Tensor]:
        """Return the same rows as a padded batch of int64 tensors ``(rows, length)``.

        They are ``input_ids``, ``attention_mask`` and, if there are types, ``token_type_ids``.

        Args:
            pad_id: Token id written behind the end of the shorter rows.

        Example:
            >>> PackedBatch.pack([[5, 6, 7], [8, 9]]).padded()["input_ids"].tolist()
            [[5, 6, 7], [8, 9, 0]]
        """
        lengths = torch.tensor(self.lengths)
        mask = (torch.arange(self.max_length) < lengths.unsqueeze(1)).to(self.device)
        ids = torch.full(mask.shape, pad_id, dtype=torch.int64, device=self.device)
        ids.masked_scatter_(mask, self.input_ids.long())
        found = {"input_ids": ids, "attention_mask": mask.long()}
        if (types := self.token_type_ids) is not None:
            found["token_type_ids"] = torch.zeros_like(ids).masked_scatter_(mask, types.long())
        return found


def plan_batches(
    lengths: np.ndarray, *, max_tokens: int, max_rows: int, padded: bool = False
) -> list[np.ndarray]:
    """Group rows into batches of at most ``max_tokens`` tokens, longest rows first.

    Longest first, so that a budget that does not fit the memory shows at once. A row longer than
    the budget gets a batch of its own. Ties keep the input order, so a plan is repeatable.

    Args:
        lengths: Tokens in each row, int ``(rows,)``.
        max_tokens: Budget of a batch; with ``padded`` it counts the padding too.
        max_rows: Most rows in a batch.
        padded: Plan for padded batches, whose cost is rows times the longest row.

    Returns:
        Row indices of each batch; together every row exactly once.

    Example:
        >>> [batch.tolist() for batch in plan_batches(np.array([2, 9, 3, 2]), max_tokens=7,
        ...                                           max_rows=8)]
        [[1], [2, 0, 3]]
    """
    order = np.argsort(-lengths, kind="stable")
    batches: list[np.ndarray] = []
    start = tokens = longest = 0
    for end, length in enumerate(lengths[order].tolist()):
        rows = end - start
        cost = longest * (rows + 1) if padded and rows else tokens + length
        if rows and (rows == max_rows or cost > max_tokens):
            batches.append(order[start:end])
            start, tokens = end, 0
        if start == end:
            longest = length
        tokens += length
    if start < len(order):
        batches.append(order[start:])
    return batches
