"""Arrow and Parquet files from elsewhere: record batches and row groups are their blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from torsh_data._files import DataFile, RemoteFile
from torsh_data._index import INDEX_NAME, MARK
from torsh_data._plan import Plan
from torsh_data._shards import ArrowBlock, Block, MappedArrow, Shard, bytes_outside
from torsh_data._store import Sink, Store


@dataclass
class ArrowShard(Shard):
    """An Arrow IPC file. It is mapped whole; compressed blocks are decoded into the store."""

    file: DataFile
    store: Store | None = None
    _mapped: MappedArrow | None = field(default=None, repr=False)
    _schema: pa.Schema | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.path = self.file.name
        self.is_remote = isinstance(self.file, RemoteFile)
        self.nbytes = self.file.size
        if self.nbytes == 0:
            raise RuntimeError(f"{self.path} is empty, not an Arrow IPC file")
        if isinstance(self.file, RemoteFile):
            plan = Plan.of(self.file, self.store, "arrow", self._look)
        else:
            plan = self._look()
        counts = plan.arrays["rows"].tolist()
        self._schema = plan.schema
        self.block_rows = [rows for rows in counts if rows]
        self._block_numbers = [b for b, rows in enumerate(counts) if rows]
        self.identity = f"{PurePosixPath(self.path).name}:{sum(counts)}:{self.nbytes}"

    def _look(self) -> Plan:
        reader = self._open().reader
        if MARK in (reader.schema.metadata or {}):
            raise RuntimeError(
                f"{self.path} is a shard that no {INDEX_NAME} beside it lists: the writer did not "
                "finish, or the index was not copied; write the data set again or copy its index"
            )
        counts = [reader.get_batch(b).num_rows for b in range(reader.num_record_batches)]
        return Plan.make(reader.schema, rows=counts)

    def _open(self) -> MappedArrow:
        if self._mapped is None:
            mapped = MappedArrow(self.file.whole().content, self.path)
            if isinstance(self.file, RemoteFile):
                return mapped  # blocks keep it open for as long as they are, no longer
            self._mapped = mapped
        return self._mapped

    def schema(self) -> pa.Schema:
        return cast("pa.Schema", self._schema)

    def open(self, block: int, fields: Sequence[pa.Field]) -> Block:
        mapped = self._open()
        batch = mapped.reader.get_batch(self._block_numbers[block])
        batch.validate()
        batch = batch.select([field.name for field in fields])
        opened = ArrowBlock(batch, fields)
        opened.in_memory = mapped.bytes_outside(batch)
        if isinstance(self.file, RemoteFile):
            opened.leased = self.nbytes // self.blocks
        return opened

    def prepare(self, block: int) -> None:
        del block
        self.file.prepare(0, self.nbytes)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_mapped": None}


@dataclass
class ParquetShard(Shard):
    """A Parquet file: row groups are decoded when they are read, with a store once per node."""

    file: DataFile
    store: Store | None = None
    _footer: pq.FileMetaData | None = field(default=None, repr=False)
    _schema: pa.Schema | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.path = self.file.name
        self.is_remote = isinstance(self.file, RemoteFile)
        if isinstance(self.file, RemoteFile):
            plan = Plan.of(self.file, self.store, "parquet", self._look)
        else:
            plan = self._look()
        counts = plan.arrays["rows"].tolist()
        self._group_bytes = plan.arrays["bytes"].tolist()
        self._schema = plan.schema
        self.block_rows = [rows for rows in counts if rows]
        self._block_numbers = [g for g, rows in enumerate(counts) if rows]
        self.nbytes = sum(self._group_bytes)
        self.identity = f"{PurePosixPath(self.path).name}:{sum(counts)}:{self.file.size}"

    def _look(self) -> Plan:
        opened = self._open()
        groups = [opened.metadata.row_group(g) for g in range(opened.metadata.num_row_groups)]
        return Plan.make(
            opened.schema_arrow,
            rows=[group.num_rows for group in groups],
            bytes=[group.total_byte_size for group in groups],
        )

    def _open(self) -> pq.ParquetFile:
        source: Any = self.file.open()
        try:  # one for each use: threads that fetch ahead must not share a reader
            opened = pq.ParquetFile(
                source, memory_map=isinstance(source, str), metadata=self._footer
            )
        except pa.ArrowInvalid as error:
            raise RuntimeError(f"{self.path} is not a readable Parquet file: {error}") from error
        self._footer = opened.metadata
        return opened

    def schema(self) -> pa.Schema:
        return cast("pa.Schema", self._schema)

    def _decode(self, block: int, columns: list[str] | None = None) -> pa.RecordBatch:
        number = self._block_numbers[block]
        try:
            table = self._open().read_row_group(number, columns=columns, use_threads=False)
        except (pa.ArrowInvalid, OSError) as error:
            raise RuntimeError(
                f"{self.path}: row group {number} is damaged or not readable: {error}"
            ) from error
        if table.num_rows != self.block_rows[block]:
            raise RuntimeError(
                f"{self.path}: row group {number} has {table.num_rows} rows, the footer says "
                f"{self.block_rows[block]}"
            )
        batches = table.combine_chunks().to_batches()
        return batches[0] if len(batches) == 1 else pa.concat_batches(batches)

    def _piece(self, block: int) -> tuple[str, int]:
        number = self._block_numbers[block]
        return f"{self.file.identity}:group {number}", self._group_bytes[number]

    def _write(self, sink: Sink, block: int) -> None:
        batch = self._decode(block)
        with pa.ipc.new_file(pa.PythonFile(sink, "w"), batch.schema) as writer:
            writer.write_batch(batch)

    def open(self, block: int, fields: Sequence[pa.Field]) -> Block:
        names = [field.name for field in fields]
        if self.store is None:
            batch = self._decode(block).select(names)
            opened = ArrowBlock(batch, fields)
            opened.in_memory = batch.nbytes
            return opened
        key, size = self._piece(block)
        view = self.store.view(key, lambda sink: self._write(sink, block), size)
        batch = pa.ipc.open_file(view.content).get_batch(0).select(names)
        opened = ArrowBlock(batch, fields)
        opened.leased = view.content.size
        opened.in_memory = view.content.size if view.in_memory else 0
        opened.in_memory += bytes_outside(batch, view.content)
        return opened

    def prepare(self, block: int) -> None:
        if self.store is not None:
            key, size = self._piece(block)
            self.store.prepare(key, lambda sink: self._write(sink, block), size)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_footer": None}
