"""Writing a data set as Arrow shards that are checked block by block."""

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa

from torsh_data._claim import claim, refuse_finished
from torsh_data._columns import encode, infer_schema
from torsh_data._index import MARK, Index, ShardEntry, hash_bytes, publish, write_index
from torsh_data._order import Order
from torsh_data._sizes import parse_bytes


def write_shards(
    samples: Iterable[Mapping[str, Any]],
    out: str | os.PathLike[str],
    *,
    shard_bytes: str | int = "256MB",
    block_bytes: str | int = "4MB",
    schema: pa.Schema | None = None,
    compression: Literal["lz4", "zstd"] | None = None,
    shuffle_seed: int | None = None,
) -> None:
    """Write samples as Arrow files with a checksum for each block, and an index.

    The same samples give the same bytes. Each shard gets its final name once it is complete and on
    disk, and the index comes last: a writer that is killed leaves a folder that nothing mistakes
    for a data set, and running it again starts over; one that fails takes back what it wrote. Only
    one writer works in a folder at a time. The shards are plain Arrow IPC files that any Arrow
    program reads.

    Args:
        samples: Mappings with the same keys. A value is a tensor or array (same dtype and shape in
            all samples), int, float, bool, str or bytes; zero-dimensional ones count as numbers.
        out: Folder to write to; made if absent. A folder that holds a finished data set is refused.
        shard_bytes: Size at which a shard is closed. Large files are read and copied faster, small
            ones spread better; the default suits disks and object stores alike.
        block_bytes: Size of a block, the unit of checksums and of shuffling (see `StreamLoader`'s
            window): 4 MB is read at full speed from most storage. Smaller blocks shuffle better.
        schema: Arrow schema for types other than those inferred from the first sample, such as
            `pa.int8()` for labels. Numbers come back as Python's int and float in any case.
        compression: Compress the blocks. Saves disk, but each block is then decompressed to memory
            before use; leave it out for JPEG or other compressed contents.
        shuffle_seed: Write the samples in a random order; `samples` must then be a sequence.

    Raises:
        FileExistsError: If `out` has files named like shards that no unfinished writer left there.
        RuntimeError: If another process is writing to `out`.
        ValueError: If there are no samples, shapes or columns differ, or `out` holds a finished
            data set.
        TypeError: If a value's type has no column type.

    Example:
        >>> import tempfile
        >>> from torsh_data import ShardedDataset
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_shards(({"x": n * n} for n in range(10)), folder + "/squares")
        ...     data = ShardedDataset(folder + "/squares")
        ...     len(data), data[3]
        (10, {'x': 9})
    """
    shard_limit = parse_bytes(shard_bytes, "shard_bytes")
    block_limit = parse_bytes(block_bytes, "block_bytes")
    if block_limit > shard_limit:
        raise ValueError(
            f"block_bytes={block_bytes!r} is larger than shard_bytes={shard_bytes!r}; a shard "
            "holds whole blocks"
        )
    if compression not in (None, "lz4", "zstd"):
        raise ValueError(f"compression={compression!r}; use None, 'lz4' or 'zstd'")
    folder = Path(out)
    refuse_finished(folder)
    stream = iter(samples if shuffle_seed is None else _shuffled(samples, shuffle_seed))
    first = next(stream, None)
    if first is None:
        raise ValueError("samples is empty; a data set has at least one sample")
    _check_columns(first, None if schema is None else list(schema.names), 0)
    schema = infer_schema(first) if schema is None else schema

    marked = schema.with_metadata({**(schema.metadata or {}), MARK: b"1"})
    options = pa.ipc.IpcWriteOptions(compression=compression)
    folder.mkdir(parents=True, exist_ok=True)
    with claim(folder):
        shards: list[ShardEntry] = []
        shard = _OpenShard(folder, 0, marked, options)
        for block in _blocks(first, stream, marked, block_limit):
            if shard.rows and shard.size + block.nbytes > shard_limit:
                shards.append(shard.finish())
                shard = _OpenShard(folder, len(shards), marked, options)
            shard.append(block)
        shards.append(shard.finish())
        rows, size = sum(s.rows for s in shards), sum(s.bytes for s in shards)
        columns = {field.name: str(field.type) for field in schema}
        write_index(folder, Index(rows, size, columns, compression, shards))


def _shuffled(samples: Iterable[Mapping[str, Any]], seed: int) -> Iterator[Mapping[str, Any]]:
    if not hasattr(samples, "__len__") or not hasattr(samples, "__getitem__"):
        raise TypeError(
            f"shuffle_seed={seed} needs samples with a length and an index, got "
            f"{type(samples).__name__}; pass a list or a map-style data set"
        )
    chosen = cast("Sequence[Mapping[str, Any]]", samples)
    rows = len(chosen)
    order = Order(max(rows, 1), seed, window=max(rows, 1))
    return (chosen[int(i)] for i in order(0, np.arange(rows)))


def _blocks(
    first: Mapping[str, Any], rest: Iterator[Mapping[str, Any]], schema: pa.Schema, limit: int
) -> Iterator[pa.RecordBatch]:
    names = list(schema.names)
    values: dict[str, list[Any]] = {name: [] for name in names}
    written = rows = size = 0
    sample: Mapping[str, Any] | None = first
    while sample is not None:
        _check_columns(sample, names, written + rows)
        for name in names:
            values[name].append(sample[name])
        rows += 1
        size += sum(_value_bytes(sample[name]) for name in names)
        sample = next(rest, None)
        if size >= limit or sample is None:
            columns = [encode(schema.field(name), values[name], written) for name in names]
            yield pa.RecordBatch.from_arrays(columns, schema=schema)
            written += rows
            values = {name: [] for name in names}
            rows = size = 0


def _check_columns(sample: Mapping[str, Any], names: list[str] | None, number: int) -> None:
    if not isinstance(sample, Mapping):
        raise TypeError(f"sample {number} is a {type(sample).__name__}; a sample is a mapping")
    if names is not None and list(sample) != names and set(sample) != set(names):
        raise ValueError(
            f"sample {number} has the columns {sorted(map(str, sample))}, expected {sorted(names)}"
        )


def _value_bytes(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, (bytes, bytearray)):
        return len(value)
    return int(getattr(value, "nbytes", 8))


class _OpenShard:
    """A shard being written under a temporary name."""

    def __init__(
        self, folder: Path, number: int, schema: pa.Schema, options: pa.ipc.IpcWriteOptions
    ) -> None:
        self.path = folder / f"shard-{number:05d}.arrow"
        self.temporary = self.path.with_name(f".{self.path.name}.tmp")
        self.sink = pa.OSFile(str(self.temporary), "wb")
        self.writer = pa.ipc.new_file(self.sink, schema, options=options)
        self.block_rows: list[int] = []
        self.starts = [0]

    @property
    def rows(self) -> int:
        return sum(self.block_rows)

    @property
    def size(self) -> int:
        return self.sink.tell()

    def append(self, block: pa.RecordBatch) -> None:
        self.writer.write_batch(block)
        self.block_rows.append(block.num_rows)
        self.starts.append(self.sink.tell())

    def finish(self) -> ShardEntry:
        self.writer.close()
        self.sink.close()
        with self.temporary.open("rb") as file:
            os.fsync(file.fileno())
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                data = memoryview(mapped)
                size = len(data)
                sums = [
                    hash_bytes(data[a:b])
                    for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)
                ]
                tail = hash_bytes(data[self.starts[-1] :])
                data.release()
        publish(self.temporary, self.path)
        return ShardEntry(self.path.name, self.rows, size, self.block_rows, self.starts, sums, tail)
