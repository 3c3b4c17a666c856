"""Arrow files from elsewhere: pieces of their record batches are the blocks."""

import json
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import PurePosixPath
from typing import cast

import numpy as np
import pyarrow as pa

from torsh_data._file_column import as_read
from torsh_data._files import DataFile, RemoteFile
from torsh_data._index import INDEX_NAME, MARK
from torsh_data._numbers import Array
from torsh_data._plan import Plan, sample_bytes
from torsh_data._shards import ArrowBlock, Block, MappedArrow, Shard, bytes_outside
from torsh_data._store import Sink, Store

_MOST_ROWS = 1024
_MOST_BYTES = 4 << 20


@dataclass
class ArrowShard(Shard):
    """A mapped Arrow IPC file; compressed blocks are decoded, once per node with a store."""

    file: DataFile
    store: Store | None = None
    _mapped: "weakref.ref[MappedArrow] | None" = field(default=None, repr=False)
    _columns: list[str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.path = self.file.name
        self.is_remote = isinstance(self.file, RemoteFile)
        self.is_fetched_whole = self.is_remote
        self.nbytes = self.file.size
        if self.nbytes == 0:
            raise RuntimeError(f"{self.path} is empty, not an Arrow IPC file")
        plan = Plan.of(self.file, self.store, "arrow", self._look)
        counts = plan.arrays["rows"].tolist()
        self._schema = as_read(plan.schema)
        self._decoded = plan.arrays["decoded"].reshape(len(counts), len(plan.schema))
        # what has to be decoded is decoded whole
        most = np.where(self._decoded.any(axis=1), counts, most_rows(sum(counts), self.nbytes))
        self.block_rows, self._numbers, self._starts = cut(counts, most.tolist())
        name = PurePosixPath(self.path).name
        self.identity = f"{name}:{sum(counts)}:{self.nbytes}:{self.blocks}:{plan.digest}"
        self.choose(self._schema.names)

    def _look(self) -> Plan:
        mapped = self._open()
        reader = mapped.reader
        if MARK in (reader.schema.metadata or {}):
            raise RuntimeError(
                f"{self.path} is a shard that no {INDEX_NAME} beside it lists: the writer did not "
                "finish, or the index was not copied; write the data set again or copy its index"
            )
        rows: list[int] = []
        decoded: list[int] = []
        for b in range(reader.num_record_batches):
            batch = reader.get_batch(b)
            rows.append(batch.num_rows)
            decoded += [mapped.bytes_outside(batch.select([c])) for c in range(batch.num_columns)]
        digest = sample_bytes(mapped.content)
        return Plan.make(reader.schema, digest, rows=rows, decoded=decoded)

    def _open(self) -> MappedArrow:
        mapped = None if self._mapped is None else self._mapped()
        if mapped is None:
            mapped = MappedArrow(self.file.whole().content, self.path, self._columns)
            self._mapped = weakref.ref(mapped)
        return mapped

    def schema(self) -> pa.Schema:
        return cast("pa.Schema", self._schema)

    def choose(self, columns: Sequence[str]) -> None:
        self._columns, numbers = chosen_of(self._schema, columns)
        self._decoded_bytes = self._decoded[:, numbers].sum(axis=1).tolist()
        self._mapped = None

    def decoded_bytes(self) -> int:
        return 0 if self.store is not None else sum(self._decoded_bytes)

    def _decode(self, block: int) -> pa.RecordBatch:
        batch = self._open().reader.get_batch(int(self._numbers[block]))
        batch.validate()
        return batch.slice(int(self._starts[block]), self.block_rows[block])

    def open(self, block: int, fields: Sequence[pa.Field]) -> Block:
        number = int(self._numbers[block])
        size = self._decoded_bytes[number]
        if size and self.store is not None:
            key = piece_of(self.file, f"block {number}", self._columns)
            return open_decoded(self.store, key, lambda: self._decode(block), size, fields)
        mapped = self._open()
        batch = self._decode(block).select([field.name for field in fields])
        opened = ArrowBlock(batch, fields)
        opened.source = mapped
        opened.in_memory = mapped.bytes_outside(batch)
        if isinstance(self.file, RemoteFile):
            opened.leased = self.nbytes // self.blocks
        return opened

    def prepare(self, block: int) -> None:
        del block
        self.file.prepare(0, self.nbytes)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_mapped": None}


def most_rows(rows: int, nbytes: int) -> int:
    """Rows of a block where blocks are mapped, and small ones cost nothing but are mixed better."""
    return max(1, min(_MOST_ROWS, _MOST_BYTES * rows // max(1, nbytes)))


def cut(counts: Sequence[int], most: Sequence[int]) -> tuple[list[int], Array, Array]:
    """Record batches of `counts` rows in even pieces of at most `most` rows.

    Returns:
        Rows of each piece, the number of the batch that it is of, and the first row in that.
    """
    rows: list[int] = []
    numbers: list[int] = []
    starts: list[int] = []
    for number, (count, limit) in enumerate(zip(counts, most, strict=True)):
        pieces = -(-count // max(1, limit))
        ends = [count * k // pieces for k in range(pieces + 1)] if pieces else []
        starts += ends[:-1]
        rows += [end - start for start, end in pairwise(ends)]
        numbers += [number] * pieces
    return rows, np.array(numbers, np.int64), np.array(starts, np.int64)


def chosen_of(schema: pa.Schema, columns: Sequence[str]) -> tuple[list[str] | None, list[int]]:
    """The chosen columns in the order of a file, None for all of them, and their numbers."""
    numbers = [n for n, name in enumerate(schema.names) if name in columns]
    names = [schema.names[n] for n in numbers]
    return (None if len(names) == len(schema.names) else names), numbers


def piece_of(file: DataFile, block: str, columns: list[str] | None) -> str:
    """What the store calls the chosen columns of a decoded block."""
    return f"{file.identity}:{block}" + ("" if columns is None else f":{json.dumps(columns)}")


def open_decoded(
    store: Store,
    key: str,
    decode: Callable[[], pa.RecordBatch],
    size: int,
    fields: Sequence[pa.Field],
) -> Block:
    """A block from the store, where the first process that wants it puts it."""
    view = store.view(key, lambda sink: write_decoded(sink, decode()), size)
    batch = pa.ipc.open_file(view.content).get_batch(0).select([field.name for field in fields])
    opened = ArrowBlock(batch, fields)
    opened.leased = view.content.size
    opened.in_memory = view.content.size if view.in_memory else 0
    opened.in_memory += bytes_outside(batch, view.content)
    return opened


def write_decoded(sink: Sink, batch: pa.RecordBatch) -> None:
    """Write a block as the store keeps it."""
    with pa.ipc.new_file(pa.PythonFile(sink, "w"), batch.schema) as writer:
        writer.write_batch(batch)
