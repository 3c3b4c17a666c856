"""What a data set asks of a file: rows in blocks. Here, the shards that `write_shards` wrote."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import pyarrow as pa

from torsh_data._columns import Array, Getter, Value, getter
from torsh_data._file_column import file_getter
from torsh_data._files import DataFile, LocalFile
from torsh_data._index import INDEX_NAME, ShardEntry, hash_bytes

Verify = Literal["first_read", "always", "never"]
Sample: TypeAlias = dict[str, Value]


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


class Block(ABC):
    """Rows that lie together in storage."""

    in_memory: int = 0
    """Bytes of memory of its own."""
    leased: int = 0
    """Bytes in the store that stay there while this block is open."""
    tensors: Sequence[Array | None] | None = None
    """The columns that are stacked tensors already; None if no column can be."""

    @abstractmethod
    def sample(self, row: int) -> Sample:
        """One row."""


class ArrowBlock(Block):
    """A record batch, used where it lies."""

    def __init__(
        self, batch: pa.RecordBatch, fields: Sequence[pa.Field], *, is_local: bool = False
    ) -> None:
        pairs: list[tuple[Getter, Array | None]] = []
        for wanted in fields:
            column = batch.column(wanted.name)
            get = file_getter(column, is_local=is_local)
            pairs.append(getter(wanted, column) if get is None else (get, None))
        self.getters: list[Getter] = [get for get, _ in pairs]
        self.tensors = [rows for _, rows in pairs]
        self.source: object = None
        """What is kept open for as long as this block is."""
        self._named = [(field.name, get) for field, get in zip(fields, self.getters, strict=True)]

    def sample(self, row: int) -> Sample:
        return {name: get(row) for name, get in self._named}


class Shard(ABC):
    """A file of rows in blocks; opened at the first read, and again in each worker process."""

    path: str
    block_rows: Sequence[int]
    nbytes: int
    identity: str
    """What the data set's fingerprint knows of this file."""
    is_remote: bool = False
    """Whether reading a block may take a request to another machine."""
    is_fetched_whole: bool = False
    """Whether reading a block brings the whole file into the store."""

    @property
    def blocks(self) -> int:
        return len(self.block_rows)

    @abstractmethod
    def schema(self) -> pa.Schema:
        """The columns."""

    def choose(self, columns: Sequence[str]) -> None:
        """Say which columns will be read, before a block is."""
        del columns

    def decoded_bytes(self) -> int:
        """Memory that all blocks would take in each process; 0 if they are used where they lie."""
        return 0

    @abstractmethod
    def open(self, block: int, fields: Sequence[pa.Field]) -> Block:
        """One block, without checking it."""

    def prepare(self, block: int) -> None:
        """Bring a block into the store, if there is one between the file and this machine."""
        del block

    def damage(self, block: int) -> Damage | None:
        """What is wrong with a block (`blocks` stands for the footer); None if nothing can be."""
        del block
        return None


@dataclass
class IndexedShard(Shard):
    """A shard that `write_shards` wrote, with checksums from its index.

    A local one is opened as the Arrow file that it is. Of a remote one the blocks are fetched as
    they are needed and read one by one, without the footer.
    """

    file: DataFile
    entry: ShardEntry
    verify: Verify
    known_schema: pa.Schema | None = None
    _mapped: "weakref.ref[MappedArrow] | None" = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.path = self.file.name
        self.is_remote = not isinstance(self.file, LocalFile)
        self.block_rows = self.entry.block_rows
        self.nbytes = self.entry.bytes
        self.identity = f"{self.entry.name}:{self.entry.rows}:{self.entry.tail}:" + hash_bytes(
            "".join(self.entry.xxh3).encode()
        )
        if self.file.size != self.entry.bytes:
            raise RuntimeError(
                f"{self.path} has {self.file.size} bytes, {INDEX_NAME} says {self.entry.bytes}; "
                "the file was cut short or replaced, copy it anew"
            )

    def _is_read_whole(self) -> bool:
        if isinstance(self.file, LocalFile):
            return True
        return any(pa.types.is_dictionary(field.type) for field in self.schema())

    def _open(self) -> "MappedArrow":
        mapped = None if self._mapped is None else self._mapped()
        if mapped is None:
            content = self.file.whole().content
            if self.verify != "never":  # a damaged footer must not reach the parser
                start = self.entry.starts[-1]
                damage = self._compare(memoryview(content)[start:], self.blocks)
                if damage is not None:
                    raise RuntimeError(str(damage))
            mapped = MappedArrow(content, self.path)
            self._mapped = weakref.ref(mapped)
        return mapped

    def _compare(self, part: memoryview, block: int) -> Damage | None:
        expected = [*self.entry.xxh3, self.entry.tail][block]
        found = hash_bytes(part)
        if found == expected:
            return None
        return Damage(self.path, block, self.blocks, expected, found)

    def _range(self, block: int) -> tuple[int, int]:
        starts = [*self.entry.starts, self.entry.bytes]
        return starts[block], starts[block + 1]

    def _check(self, part: memoryview, block: int) -> str | None:
        damage = None if self.verify == "never" else self._compare(part, block)
        return None if damage is None else str(damage)

    def schema(self) -> pa.Schema:
        if self.known_schema is None:
            if isinstance(self.file, LocalFile):
                self.known_schema = self._open().reader.schema
            else:
                head = self.file.part(*self._range(0), lambda part: self._check(part, 0)).content
                self.known_schema = pa.ipc.open_stream(head[8:]).schema
        return self.known_schema

    def open(self, block: int, fields: Sequence[pa.Field]) -> Block:
        if self._is_read_whole():
            mapped = self._open()
            batch = mapped.reader.get_batch(block).select([field.name for field in fields])
            opened = ArrowBlock(batch, fields)
            opened.source = mapped
            opened.in_memory = mapped.bytes_outside(batch)
            return opened
        view = self.file.part(*self._range(block), lambda part: self._check(part, block))
        messages = pa.ipc.MessageReader.open_stream(view.content[8 if block == 0 else 0 :])
        if block == 0:
            messages.read_next_message()  # the schema
        batch = pa.ipc.read_record_batch(messages.read_next_message(), self.schema())
        batch = batch.select([field.name for field in fields])
        opened = ArrowBlock(batch, fields)
        opened.in_memory = view.content.size if view.in_memory else 0
        opened.in_memory += bytes_outside(batch, view.content)
        opened.leased = view.content.size
        return opened

    def decoded_bytes(self) -> int:
        if self.verify != "never" and self.damage(0) is not None:  # whoever reads it is told
            return 0
        opened = self.open(0, list(self.schema()))
        return opened.in_memory * self.entry.rows // self.block_rows[0]

    def prepare(self, block: int) -> None:
        self.file.prepare(*self._range(block), lambda part: self._check(part, block))

    def damage(self, block: int) -> Damage | None:
        begin, end = self._range(block)
        damage = self._compare(memoryview(self.file.part(begin, end).content), block)
        if damage is not None and self.file.refetch(begin, end):
            damage = self._compare(memoryview(self.file.part(begin, end).content), block)
        return damage

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_mapped": None}


class MappedArrow:
    """An open Arrow IPC file whose blocks are slices of the mapping."""

    def __init__(self, content: pa.Buffer, path: str, columns: Sequence[str] | None = None) -> None:
        self.content = content
        try:
            self.reader = pa.ipc.open_file(content)
            if columns is not None:  # others would be decompressed as well
                numbers = [self.reader.schema.get_field_index(name) for name in columns]
                options = pa.ipc.IpcReadOptions(included_fields=numbers)
                self.reader = pa.ipc.open_file(content, options=options)
        except pa.ArrowInvalid as error:
            raise RuntimeError(f"{path} is not a readable Arrow IPC file: {error}") from error

    def bytes_outside(self, batch: pa.RecordBatch) -> int:
        """Bytes of a batch that are not slices of the mapping: what had to be decompressed."""
        return bytes_outside(batch, self.content)


def bytes_outside(batch: pa.RecordBatch, content: pa.Buffer) -> int:
    """Bytes of a batch that are not slices of `content`."""
    begin, end = content.address, content.address + content.size
    buffers = (buffer for column in batch.columns for buffer in column.buffers())
    return sum(
        buffer.size
        for buffer in buffers
        if buffer is not None and not begin <= buffer.address < end
    )
