"""A Hugging Face `datasets.Dataset` as source: its memory-mapped Arrow tables are the blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import pyarrow as pa

from torsh_data._shards import ArrowBlock, Block, Sample, Shard

if TYPE_CHECKING:
    from datasets import Dataset as HubDataset

_CHOSEN_ROWS = 1024  # rows of a block where the data set is a choice of rows of its tables


def is_hub_dataset(source: object) -> "TypeGuard[HubDataset]":
    """Whether `source` comes from `datasets`, without importing it; refuses what has no rows."""
    kind = type(source)
    if not kind.__module__.startswith("datasets."):
        return False
    if kind.__name__ == "DatasetDict":
        names = list(source)  # type: ignore[call-overload]
        raise TypeError(
            f"source is a DatasetDict with {names}; choose one of them: source[{names[0]!r}]"
            if names
            else "source is an empty DatasetDict"
        )
    if kind.__name__ != "Dataset":
        raise TypeError(
            f"source is a {kind.__name__}, which has no random access; load it without "
            "streaming=True, or write it to shards first (write_shards)"
        )
    return True


@dataclass
class HubShard(Shard):
    """The tables of a `datasets.Dataset`; `select`, `shuffle` and `filter` are followed."""

    dataset: Any
    _batches: list[pa.RecordBatch] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        style = self.dataset.format["type"]
        if style not in (None, "torch"):
            raise ValueError(
                f"source has the format {style!r}, which ShardedDataset does not follow; give it "
                "source.with_format(None) and a transform, or give the data set itself to "
                "StreamLoader"
            )
        self.path = f"datasets.Dataset {self.dataset._fingerprint}"
        batches = self._open()
        self.nbytes = sum(batch.nbytes for batch in batches)
        rows = self.dataset.num_rows
        self._ends = np.cumsum([0, *(batch.num_rows for batch in batches)])
        if self.dataset._indices is None:
            self.block_rows = [batch.num_rows for batch in batches]
        else:
            full, rest = divmod(rows, _CHOSEN_ROWS)
            self.block_rows = [_CHOSEN_ROWS] * full + [rest] * bool(rest)
            self.nbytes = max(1, self.nbytes * rows // max(1, int(self._ends[-1])))
        self.identity = f"datasets:{self.dataset._fingerprint}:{rows}"

    def _open(self) -> list[pa.RecordBatch]:
        if self._batches is None:
            found = self.dataset.data.table.to_batches()
            self._batches = [batch for batch in found if batch.num_rows]
        return self._batches

    def schema(self) -> pa.Schema:
        names = self.dataset.format["columns"]
        schema = self.dataset.data.table.schema
        return pa.schema([schema.field(name) for name in names])

    def open(self, block: int, fields: Sequence[pa.Field]) -> Block:
        if self.dataset._indices is None:
            return ArrowBlock(self._open()[block], fields)
        start = block * _CHOSEN_ROWS
        chosen = self.dataset._indices.column(0).slice(start, self.block_rows[block]).to_numpy()
        return _ChosenBlock(self._open(), self._ends, chosen.astype(np.int64), fields)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_batches": None}


class _ChosenBlock(Block):
    """Rows from anywhere in the tables."""

    def __init__(
        self, batches: list[pa.RecordBatch], ends: Any, chosen: Any, fields: Sequence[pa.Field]
    ) -> None:
        numbers = np.searchsorted(ends, chosen, side="right") - 1
        self._places = list(zip(numbers.tolist(), (chosen - ends[numbers]).tolist(), strict=True))
        self._parts = {
            number: ArrowBlock(batches[number], fields) for number in set(numbers.tolist())
        }

    def sample(self, row: int) -> Sample:
        number, place = self._places[row]
        return self._parts[number].sample(place)
