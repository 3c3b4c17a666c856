"""Files of rows in blocks, mapped into memory: our shards, plain Arrow files and Parquet files."""

import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from torsh_data._index import INDEX_NAME, MARK, ShardEntry, hash_bytes, read_index

Verify = Literal["first_read", "always", "never"]


@dataclass(frozen=True)
class Damage:
    """A block whose bytes are not those that were written."""

    shard: str
    block: int
    blocks: int
    expected: str
    found: str

    def __str__(self) -> str:
        part = "the footer" if self.block == self.blocks else f"block {self.block} of {self.blocks}"
        return (
            f"{self.shard}: {part} is damaged: expected xxh3 {self.expected}, found {self.found}; "
            "copy the shard anew"
        )


class Shard(ABC):
    """A file of rows in blocks; opened at the first read, and again in each worker process."""

    path: str
    block_rows: Sequence[int]
    nbytes: int
    identity: str
    """What the data set's fingerprint knows of this file."""

    @property
    def blocks(self) -> int:
        return len(self.block_rows)

    @abstractmethod
    def schema(self) -> pa.Schema:
        """The columns."""

    @abstractmethod
    def read(self, block: int) -> pa.RecordBatch:
        """One block, without checking it."""

    @abstractmethod
    def decoded_bytes(self, batch: pa.RecordBatch) -> int:
        """How much of a block lies in memory of its own instead of the mapped file."""

    def damage(self, block: int) -> Damage | None:
        """What is wrong with a block (`blocks` stands for the footer); None if nothing can be."""
        del block
        return None


@dataclass
class IndexedShard(Shard):
    """A shard that `write_shards` wrote, with checksums from its index."""

    path: str
    entry: ShardEntry
    verify: Verify
    _mapped: "_MappedArrow | None" = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.block_rows = self.entry.block_rows
        self.nbytes = self.entry.bytes
        self.identity = f"{self.entry.name}:{self.entry.rows}:{self.entry.tail}:" + hash_bytes(
            "".join(self.entry.xxh3).encode()
        )
        self.check_size()

    def check_size(self) -> None:
        path = Path(self.path)
        if not path.exists():
            raise FileNotFoundError(
                f"{self.path} is missing: {INDEX_NAME} beside it lists it with "
                f"{self.entry.rows} rows, {self.entry.bytes} bytes"
            )
        size = path.stat().st_size
        if size != self.entry.bytes:
            raise RuntimeError(
                f"{self.path} has {size} bytes, {INDEX_NAME} says {self.entry.bytes}; "
                "the file was cut short or replaced, copy it anew"
            )

    def _open(self) -> "_MappedArrow":
        if self._mapped is None:
            mapped = _map(self.path)
            if self.verify != "never":  # a damaged footer must not reach the parser
                damage = self._compare(mapped, self.blocks)
                if damage is not None:
                    raise RuntimeError(str(damage))
            self._mapped = _MappedArrow(mapped, self.path)
        return self._mapped

    def _compare(self, mapped: mmap.mmap, block: int) -> Damage | None:
        entry = self.entry
        expected = [*entry.xxh3, entry.tail][block]
        end = entry.starts[block + 1] if block < self.blocks else entry.bytes
        with memoryview(mapped) as view, view[entry.starts[block] : end] as part:
            found = hash_bytes(part)
        if found == expected:
            return None
        return Damage(self.path, block, self.blocks, expected, found)

    def schema(self) -> pa.Schema:
        return self._open().reader.schema

    def read(self, block: int) -> pa.RecordBatch:
        return self._open().reader.get_batch(block)

    def decoded_bytes(self, batch: pa.RecordBatch) -> int:
        return self._open().bytes_outside(batch)

    def damage(self, block: int) -> Damage | None:
        mapped = self._mapped.mapped if self._mapped is not None else _map(self.path)
        return self._compare(mapped, block)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_mapped": None}


@dataclass
class ArrowShard(Shard):
    """An Arrow IPC file from elsewhere: record batches are its blocks, there are no checksums."""

    path: str
    _mapped: "_MappedArrow | None" = field(default=None, repr=False)

    def __post_init__(self) -> None:
        reader = self._open().reader
        counts = [reader.get_batch(b).num_rows for b in range(reader.num_record_batches)]
        self.block_rows = [rows for rows in counts if rows]
        self._block_numbers = [b for b, rows in enumerate(counts) if rows]
        self.nbytes = Path(self.path).stat().st_size
        self.identity = f"{Path(self.path).name}:{sum(counts)}:{self.nbytes}"

    def _open(self) -> "_MappedArrow":
        if self._mapped is None:
            self._mapped = _MappedArrow(_map(self.path), self.path)
        return self._mapped

    def schema(self) -> pa.Schema:
        return self._open().reader.schema

    def read(self, block: int) -> pa.RecordBatch:
        batch = self._open().reader.get_batch(self._block_numbers[block])
        batch.validate()
        return batch

    def decoded_bytes(self, batch: pa.RecordBatch) -> int:
        return self._open().bytes_outside(batch)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_mapped": None}


@dataclass
class ParquetShard(Shard):
    """A Parquet file: row groups are its blocks, decoded when they are read."""

    path: str
    _file: "pq.ParquetFile | None" = field(default=None, repr=False)

    def __post_init__(self) -> None:
        metadata = self._open().metadata
        counts = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        self.block_rows = [rows for rows in counts if rows]
        self._block_numbers = [g for g, rows in enumerate(counts) if rows]
        self.nbytes = sum(metadata.row_group(g).total_byte_size for g in range(len(counts)))
        self.identity = f"{Path(self.path).name}:{sum(counts)}:{Path(self.path).stat().st_size}"

    def _open(self) -> pq.ParquetFile:
        if self._file is None:
            self._file = pq.ParquetFile(self.path, memory_map=True)
        return self._file

    def schema(self) -> pa.Schema:
        return self._open().schema_arrow

    def read(self, block: int) -> pa.RecordBatch:
        table = self._open().read_row_group(self._block_numbers[block], use_threads=False)
        return table.combine_chunks().to_batches()[0]

    def decoded_bytes(self, batch: pa.RecordBatch) -> int:
        return batch.nbytes

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}


class _MappedArrow:
    """An open Arrow IPC file whose blocks are slices of the mapping."""

    def __init__(self, mapped: mmap.mmap, path: str) -> None:
        self.mapped = mapped
        whole = pa.py_buffer(mapped)
        self._begin, self._end = whole.address, whole.address + whole.size
        try:
            self.reader = pa.ipc.open_file(whole)
        except pa.ArrowInvalid as error:
            raise RuntimeError(f"{path} is not a readable Arrow IPC file: {error}") from error

    def bytes_outside(self, batch: pa.RecordBatch) -> int:
        """Bytes of a batch that are not slices of the mapping: what had to be decompressed."""
        buffers = (buffer for column in batch.columns for buffer in column.buffers())
        return sum(
            buffer.size
            for buffer in buffers
            if buffer is not None and not self._begin <= buffer.address < self._end
        )


def _map(path: str) -> mmap.mmap:
    with Path(path).open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def open_shards(paths: Sequence[Path], verify: Verify) -> list[Shard]:
    """The shards at `paths`; those of `write_shards` through the index beside them."""
    entries: dict[Path, ShardEntry] = {}
    shards: list[Shard] = []
    for folder in dict.fromkeys(path.parent for path in paths):
        if (folder / INDEX_NAME).exists():
            index = read_index(folder / INDEX_NAME)
            entries |= {folder / entry.name: entry for entry in index.shards}
    for path in paths:
        if path in entries:
            shards.append(IndexedShard(str(path), entries[path], verify))
        elif path.suffix == ".parquet":
            shards.append(ParquetShard(str(path)))
        else:
            shards.append(_open_arrow(path))
    return shards


def _open_arrow(path: Path) -> ArrowShard:
    if path.stat().st_size == 0:
        raise RuntimeError(f"{path} is empty, not an Arrow IPC file")
    shard = ArrowShard(str(path))
    if MARK in (shard.schema().metadata or {}):
        raise RuntimeError(
            f"{path} is a shard that no {INDEX_NAME} beside it lists: the writer did not finish, "
            "or the index was not copied; write the data set again or copy its index"
        )
    return shard
