"""A Hugging Face `datasets.Dataset` as source: its memory-mapped Arrow tables in pieces."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import numpy as np
import pyarrow as pa

from torsh_data._arrow_shards import cut, most_rows
from torsh_data._file_column import as_read
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


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    one = (folder / "dataset_info.json").exists() and (folder / "state.json").exists()
    return one or (folder / "dataset_dict.json").exists()


def load_saved(folder: Path) -> "HubDataset":
    """The data set that `save_to_disk` wrote, memory-mapped."""
    splits = folder / "dataset_dict.json"
    if splits.exists():
        names = json.loads(splits.read_text())["splits"]
        raise ValueError(
            f"source={str(folder)!r} holds a DatasetDict with {names}; choose one of them: "
            f"{str(folder / names[0])!r}"
        )
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"source={str(folder)!r} was saved by Hugging Face datasets: pip install datasets"
        ) from None
    return cast("HubDataset", datasets.load_from_disk(str(folder)))


def class_names(schema: pa.Schema, columns: Sequence[str]) -> dict[str, Any]:
    """`{"classes": names}` if a column is a ClassLabel; if several are, their names by column."""
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = noted.get("info", {}).get("features", {})
    found = {
        column: features[column]["names"]
        for column in columns
        if isinstance(features.get(column), dict) and features[column].get("_type") == "ClassLabel"
    }
    if not found:
        return {}
    return {"classes": next(iter(found.values())) if len(found) == 1 else found}


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
            limit = most_rows(rows, self.nbytes)
            counts = [batch.num_rows for batch in batches]
            self.block_rows, self._numbers, self._starts = cut(counts, [limit] * len(counts))
        else:
            full, rest = divmod(rows, _CHOSEN_ROWS)
            self.block_rows = [_CHOSEN_ROWS] * full + [rest] * bool(rest)
            self.nbytes = max(1, self.nbytes * rows // max(1, int(self._ends[-1])))
        self.identity = f"datasets:{self.dataset._fingerprint}:{rows}:{self.blocks}"

    def _open(self) -> list[pa.RecordBatch]:
        if self._batches is None:
            found = self.dataset.data.table.to_batches()
            self._batches = [batch for batch in found if batch.num_rows]
        return self._batches

    def schema(self) -> pa.Schema:
        names = self.dataset.format["columns"]
        schema = self.dataset.data.table.schema
        return as_read(pa.schema([schema.field(name) for name in names], schema.metadata))

    def open(self, block: int, fields: Sequence[pa.Field]) -> Block:
        if self.dataset._indices is None:
            batch = self._open()[self._numbers[block]]
            batch = batch.slice(int(self._starts[block]), self.block_rows[block])
            return ArrowBlock(batch, fields, is_local=True)
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
            number: ArrowBlock(batches[number], fields, is_local=True)
            for number in set(numbers.tolist())
        }

    def sample(self, row: int) -> Sample:
        number, place = self._places[row]
        return self._parts[number].sample(place)
