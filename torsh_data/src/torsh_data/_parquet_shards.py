"""Parquet files: row groups are their blocks, of which the chosen columns are decoded."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from torsh_data._arrow_shards import chosen_of, open_decoded, piece_of, write_decoded
from torsh_data._file_column import as_read
from torsh_data._files import DataFile, RemoteFile
from torsh_data._index import hash_bytes
from torsh_data._plan import Plan
from torsh_data._shards import ArrowBlock, Block, Shard
from torsh_data._store import Store

_TAIL = 8  # the footer's length and the format's mark
_WIDTHS = {"BOOLEAN": 0, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 8}


@dataclass
class ParquetShard(Shard):
    """A Parquet file: row groups are decoded when they are read, with a store once per node."""

    file: DataFile
    store: Store | None = None
    _footer: pq.FileMetaData | None = field(default=None, repr=False)
    _columns: list[str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.path = self.file.name
        self.is_remote = isinstance(self.file, RemoteFile)
        plan = Plan.of(self.file, self.store, "parquet", self._look)
        counts = plan.arrays["rows"].tolist()
        self._bytes = plan.arrays["bytes"].reshape(len(counts), len(plan.schema))
        self._schema = as_read(plan.schema)
        self.block_rows = [rows for rows in counts if rows]
        self._block_numbers = [g for g, rows in enumerate(counts) if rows]
        name = PurePosixPath(self.path).name
        self.identity = f"{name}:{sum(counts)}:{self.file.size}:{plan.digest}"
        self.choose(self._schema.names)

    def _look(self) -> Plan:
        opened = self._open()
        footer = opened.metadata
        names = opened.schema_arrow.names
        tops = [_top(footer.schema.column(c).path, names) for c in range(footer.num_columns)]
        rows: list[int] = []
        sizes: list[list[int]] = []
        for g in range(footer.num_row_groups):
            group = footer.row_group(g)
            rows.append(group.num_rows)
            sizes.append([0] * len(names))
            for c, top in enumerate(tops):
                column = group.column(c)
                width = _WIDTHS.get(column.physical_type, 0)  # of what is not in a dictionary
                sizes[g][top] += max(column.total_uncompressed_size, column.num_values * width)
        start = self.file.size - _TAIL - footer.serialized_size
        digest = hash_bytes(memoryview(self.file.part(start, self.file.size).content))
        flat = [size for group in sizes for size in group]
        return Plan.make(opened.schema_arrow, digest, rows=rows, bytes=flat)

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

    def choose(self, columns: Sequence[str]) -> None:
        self._columns, numbers = chosen_of(self._schema, columns)
        self._group_bytes = self._bytes[:, numbers].sum(axis=1).tolist()
        self.nbytes = sum(self._group_bytes)

    def decoded_bytes(self) -> int:
        return 0 if self.store is not None else self.nbytes

    def _decode(self, block: int) -> pa.RecordBatch:
        number = self._block_numbers[block]
        try:
            table = self._open().read_row_group(number, columns=self._columns, use_threads=False)
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
        return piece_of(self.file, f"group {number}", self._columns), self._group_bytes[number]

    def open(self, block: int, fields: Sequence[pa.Field]) -> Block:
        if self.store is not None:
            key, size = self._piece(block)
            return open_decoded(self.store, key, lambda: self._decode(block), size, fields)
        batch = self._decode(block).select([field.name for field in fields])
        opened = ArrowBlock(batch, fields)
        opened.in_memory = batch.nbytes
        return opened

    def prepare(self, block: int) -> None:
        if self.store is not None:
            key, size = self._piece(block)
            self.store.prepare(key, lambda sink: write_decoded(sink, self._decode(block)), size)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_footer": None}


def _top(path: str, names: Sequence[str]) -> int:
    """The column that a leaf is in; names may have dots themselves."""
    return next(n for n, name in enumerate(names) if f"{path}.".startswith(f"{name}."))
