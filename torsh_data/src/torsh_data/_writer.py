"""Writing a data set as Arrow shards that are checked block by block."""

import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from torsh_data._claim import claim, refuse_finished
from torsh_data._feed import Feed, SampleFeed, Samples
from torsh_data._index import (
    MARK,
    Index,
    ShardEntry,
    checked_metadata,
    hash_bytes,
    publish,
    write_index,
)
from torsh_data._journal import REMEDY, Journal, Plan, journal_path, read_journal
from torsh_data._parts import run_parts
from torsh_data._progress import progress_bar
from torsh_data._sizes import parse_bytes

Compression: TypeAlias = Literal["lz4", "zstd"] | None


def write_shards(
    samples: Samples,
    out: str | os.PathLike[str],
    *,
    shard_bytes: str | int = "256MB",
    block_bytes: str | int = "4MB",
    schema: pa.Schema | None = None,
    compression: Compression = None,
    shuffle_seed: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    num_workers: int = 0,
    resume: bool = True,
    progress: bool = False,
) -> None:
    """Write samples as Arrow files with a checksum for each block, and an index.

    Each shard gets its final name once it is complete and on disk, and the index comes last: a
    writer that is killed leaves a folder that nothing mistakes for a data set. The same call then
    goes on behind the last finished shard, and ends with the bytes of an unbroken run. It refuses
    to if an option, the columns, or the first or last finished block are not those of before.

    The same samples and options give the same bytes. Only one writer works in a folder at a time.
    The shards are plain Arrow IPC files that any Arrow program reads.

    Args:
        samples: Mappings with the same keys: a sequence or map-style data set, any other iterable,
            or a function that is given a number `n` and returns an iterable from sample `n` on. To
            go on after a kill, an iterable is run through from its start, while nothing is computed
            again for the other two. A value is a tensor or array (same dtype and shape in all
            samples), int, float, bool, str or bytes; zero-dimensional ones count as numbers. Or a
            list of any length of one of these; lists of int and float come back as tensors.
        out: Folder to write to; made if absent. A folder that holds a finished data set is refused.
        shard_bytes: Size at which a shard is closed. Large files are read and copied faster, small
            ones spread better; the default suits disks and object stores alike.
        block_bytes: Size of a block, the unit of checksums and of shuffling (see `StreamLoader`'s
            window): 4 MB is read at full speed from most storage. Smaller blocks shuffle better.
        schema: Arrow schema for types other than those inferred from the first sample, such as
            `pa.int8()` for labels, for values that may be None, or `pa.list_(pa.int32())` for
            tensors of different lengths. Numbers come back as Python's int and float in any case.
        compression: Compress the blocks. Saves disk, but each block is then decompressed to memory
            before use; leave it out for JPEG or other compressed contents.
        shuffle_seed: Write the samples in a random order; `samples` must then be a sequence.
        metadata: What else is worth knowing about the data set, such as the names of classes; kept
            in the index as JSON.
        num_workers: Processes that get and write samples, each its share of consecutive ones;
            `samples` must then be a sequence. 0 writes in this process.
        resume: False discards the shards of a writer that was stopped.
        progress: Show a bar once it takes more than two seconds.

    Raises:
        FileExistsError: If `out` has files named like shards that no stopped writer left there.
        RuntimeError: If another process is writing to `out`, a worker was killed, or a shard that a
            stopped writer had finished is missing or damaged.
        ValueError: If there are no samples, shapes or columns differ, `out` holds a finished data
            set, or unfinished shards of other samples or options.
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
    if isinstance(samples, (str, os.PathLike)) or not isinstance(out, (str, os.PathLike)):
        raise TypeError(
            f"samples is a {type(samples).__name__} and out a {type(out).__name__}; call "
            "write_shards(samples, out) with samples and a path, or convert(source, out) for files"
        )
    layout = Layout.of(shard_bytes, block_bytes, compression)
    refuse_finished(Path(out))
    feed = SampleFeed(samples, schema, shuffle_seed)
    plan: Plan = {"shuffle_seed": shuffle_seed}
    write(feed, out, layout, plan, metadata, num_workers, resume, progress)


@dataclass(frozen=True)
class Layout:
    """How rows are put into files."""

    shard_limit: int
    block_limit: int
    compression: Compression

    @classmethod
    def of(
        cls, shard_bytes: str | int, block_bytes: str | int, compression: Compression
    ) -> "Layout":
        """The layout of these arguments, checked."""
        shard_limit = parse_bytes(shard_bytes, "shard_bytes")
        block_limit = parse_bytes(block_bytes, "block_bytes")
        if block_limit > shard_limit:
            raise ValueError(
                f"block_bytes={block_bytes!r} is larger than shard_bytes={shard_bytes!r}; a shard "
                "holds whole blocks"
            )
        if compression not in (None, "lz4", "zstd"):
            raise ValueError(f"compression={compression!r}; use None, 'lz4' or 'zstd'")
        return cls(shard_limit, block_limit, compression)


def write(
    feed: Feed,
    out: str | os.PathLike[str],
    layout: Layout,
    plan: Plan,
    metadata: Mapping[str, Any] | None,
    num_workers: int,
    resume: bool,
    progress: bool,
) -> None:
    """Write a feed's rows; `plan` is what they depend on beside the layout and the columns."""
    folder = Path(out)
    kept_metadata = checked_metadata(metadata)
    parts = _parts(feed, num_workers)
    plan = {
        **plan,
        "shard_bytes": layout.shard_limit,
        "block_bytes": layout.block_limit,
        "compression": layout.compression,
        "num_workers": num_workers,
        "columns": str(feed.schema),
    }
    schema = feed.schema.with_metadata({**(feed.schema.metadata or {}), MARK: b"1"})
    job = Job(feed, folder, layout, plan, schema, parts)
    folder.mkdir(parents=True, exist_ok=True)
    with claim(folder, plan, resume), progress_bar(progress, feed.rows) as advance:
        if parts == 1:
            write_part(job, 0, advance)
        else:
            run_parts(job, parts, advance)
        shards = [entry for part in range(parts) for entry in _entries(folder, part)]
        rows, size = sum(s.rows for s in shards), sum(s.bytes for s in shards)
        columns = {field.name: str(field.type) for field in feed.schema}
        index = Index(rows, size, columns, layout.compression, shards, kept_metadata)
        write_index(folder, index)


def _parts(feed: Feed, num_workers: int) -> int:
    if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 0:
        raise ValueError(f"num_workers={num_workers!r} must be a number of processes, 0 or more")
    if num_workers == 0:
        return 1
    if feed.rows is None:
        raise TypeError(
            f"num_workers={num_workers} needs samples with a length and an index, to give each "
            "worker its share; pass a list or a map-style data set, or num_workers=0"
        )
    return max(1, min(num_workers, feed.rows))


def _entries(folder: Path, part: int) -> list[ShardEntry]:
    record = read_journal(journal_path(folder, part))
    if record is None or not record.complete:
        raise RuntimeError(f"{journal_path(folder, part)} was changed by someone else")
    return record.shards


@dataclass(frozen=True)
class Job:
    """What all parts of a data set have in common."""

    feed: Feed
    folder: Path
    layout: Layout
    plan: Plan
    schema: pa.Schema
    parts: int

    def bounds(self, part: int) -> tuple[int, int | None]:
        """The rows of a part."""
        if self.parts == 1:
            return 0, self.feed.rows
        rows = self.feed.rows or 0
        return rows * part // self.parts, rows * (part + 1) // self.parts

    def shard_name(self, part: int, number: int) -> str:
        """A name that sorts by part and number."""
        middle = "" if self.parts == 1 else f"{part:05d}-"
        return f"shard-{middle}{number:05d}.arrow"


def write_part(job: Job, part: int, advance: Callable[[int], None]) -> None:
    """Write one part behind what its journal says is finished."""
    journal = Journal(journal_path(job.folder, part), job.plan)
    try:
        advance(journal.rows)
        if not journal.complete:
            _go_on(job, part, journal, advance)
    finally:
        journal.close()


def _go_on(job: Job, part: int, journal: Journal, advance: Callable[[int], None]) -> None:
    begin, end = job.bounds(part)
    options = pa.ipc.IpcWriteOptions(compression=job.layout.compression)
    if journal.shards:
        first, last = journal.shards[0], journal.shards[-1]
        _check_block(job, begin, first, 0, options)
        if last.name != first.name or len(last.block_rows) > 1:
            at = begin + journal.rows - last.block_rows[-1]
            _check_block(job, at, last, len(last.block_rows) - 1, options)
    shard: _OpenShard | None = None
    try:
        for block in job.feed.blocks(begin + journal.rows, end, job.layout.block_limit):
            if shard is not None and shard.size + block.nbytes > job.layout.shard_limit:
                journal.add(shard.finish())
                shard = None
            if shard is None:
                path = job.folder / job.shard_name(part, len(journal.shards))
                shard = _OpenShard(path, job.schema, options)
            shard.append(block)
            advance(block.num_rows)
        if shard is not None:
            journal.add(shard.finish())
            shard = None
        journal.finish()
    finally:
        if shard is not None:
            shard.sink.close()


def _check_block(
    job: Job, begin: int, entry: ShardEntry, number: int, options: pa.ipc.IpcWriteOptions
) -> None:
    """Raise if the samples from `begin` on do not make the bytes of a finished block."""
    rows = entry.block_rows[number]
    # no further than that block: what a stream has given is gone
    block = next(job.feed.blocks(begin, begin + rows, job.layout.block_limit), None)
    sink = pa.BufferOutputStream()
    if block is not None:
        with pa.ipc.new_file(sink, job.schema, options=options) as writer:
            start = 0
            for _ in range(2 if number else 1):  # the first has the head of the file before it
                start = sink.tell() if number else 0
                writer.write_batch(_marked(block, job.schema))
            length = sink.tell()
        if hash_bytes(memoryview(sink.getvalue())[start:length]) == entry.xxh3[number]:
            return
    raise ValueError(
        f"samples: the {rows} from number {begin} on are not those that the unfinished shards in "
        f"{str(job.folder)!r} hold{REMEDY}"
    )


def _marked(block: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(block.columns, schema=schema)


class _OpenShard:
    """A shard being written under a temporary name."""

    def __init__(self, path: Path, schema: pa.Schema, options: pa.ipc.IpcWriteOptions) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.tmp")
        self.sink = pa.OSFile(str(self.temporary), "wb")
        self.schema = schema
        self.writer = pa.ipc.new_file(self.sink, schema, options=options)
        self.block_rows: list[int] = []
        self.starts = [0]

    @property
    def size(self) -> int:
        return self.sink.tell()

    def append(self, block: pa.RecordBatch) -> None:
        self.writer.write_batch(_marked(block, self.schema))
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
        rows = sum(self.block_rows)
        return ShardEntry(self.path.name, rows, size, self.block_rows, self.starts, sums, tail)
