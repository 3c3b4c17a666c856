"""A map-style data set over sharded files."""

import inspect
import math
import os
import threading
import warnings
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch.utils.data import Dataset, get_worker_info

from torsh_data._ahead import Ahead
from torsh_data._collate import make_column
from torsh_data._columns import Array, collated_kind
from torsh_data._files import FetchError
from torsh_data._hf import class_names
from torsh_data._order import Ids
from torsh_data._rng import generator, sample_keys, stream
from torsh_data._schemas import chosen_columns, shared_schema
from torsh_data._shards import ArrowBlock, Block, Damage, IndexedShard, Sample, Shard, Verify
from torsh_data._sizes import format_bytes, parse_bytes
from torsh_data._sources import Reading, Source, open_source
from torsh_data._store import Store
from torsh_data._tar_shards import Decode, TarShard, refuse_pickles

Transform: TypeAlias = Callable[[Sample], Any] | Callable[[Sample, np.random.Generator], Any]
OnError: TypeAlias = Literal["raise", "substitute"]

_MAPPED_BLOCKS = 1 << 14  # views into the mapping, a few kB each
_MAPPED_BYTES = 1 << 36  # the kernel's tables for them take a 512th of it
_DECODED_BYTES = 512 * 10**6  # blocks that had to be decompressed
_TOGETHER = 16  # blocks that are fetched at a time
_GOLDEN = 0.6180339887498949


class ShardedDataset(Dataset[Any]):
    """Samples in files, here or behind a URL, read at random or in order.

    Reading costs a few microseconds a sample and no memory: Arrow blocks, the members of tar files
    and the lines of JSON are used where they lie in the page cache, which all workers share. Shards
    from `write_shards` are checked against their index: a missing or shortened file when the data
    set is opened, a changed byte when its block is first read.

    Of remote files only the blocks that are read are fetched, once for all processes of a node, and
    kept in `cache_dir` up to `cache_bytes`; what has not been used for longest is given up first.
    Parquet files and Arrow files with compression are decoded, with a `cache_dir` once per node as
    well. Without one, and of compressed shards of `write_shards`, each process keeps the last
    512 MB of what it decoded.

    Args:
        source: A folder that `write_shards` wrote, or a folder, a glob pattern or a list of files,
            local or any URL that fsspec knows (`s3://`, `gs://`, `hf://`, `https://`, ...): Arrow
            IPC (`.arrow`), Parquet (`.parquet`), WebDataset (`.tar`) or JSON Lines (`.jsonl`,
            `.ndjson`; with a `cache_dir` also `.gz` and `.zst`). Files are taken in sorted order.
            Or a `datasets.Dataset`, whose memory-mapped tables are used directly.
        columns: Names of the columns to read; all by default.
        transform: Called with each sample, or with the sample and a `numpy.random.Generator` if it
            takes two arguments. The generator depends on the sample, and on the seed and epoch of
            the `StreamLoader` that reads it, never on workers or batches.
        cache_dir: Folder on this node for what is fetched, decoded or unpacked, which any number of
            processes and data sets may share; by default `torsh-data` in the user's cache folder
            for URLs, and none for local files.
        cache_bytes: Limit to the size of that folder.
        verify: `"first_read"` checks a block's checksum when a process first reads it, `"always"`
            at every call, `"never"` not at all. Files from elsewhere have no checksums to check.
        on_error: `"raise"`, or `"substitute"` to replace a sample that is damaged, or whose
            transform fails, by another one: always the same one, whoever reads it, so that batches
            keep their shape and ranks stay in step. It is in `errors` then, and the first one is
            a warning.
        max_errors: How many bad samples each rank replaces before the next one is an error. The
            state of a `StreamLoader` carries them over a restart.
        storage_options: What fsspec's file system needs besides the URL, such as credentials.
        decode: For tar files. `"torch"` makes of each member what its suffix says: images
            (`.jpg`, `.png`) and `.npy` become tensors, `.cls` an int, `.txt` a str, `.json`
            its value, all else bytes. `"files"` does so too, but leaves images and arrays
            as the bytes of their files. `"bytes"` leaves all as bytes.

    Attributes:
        fingerprint: Changes if a name, a row count, a size or a checksum changes. Files that have
            no index are known by their layout and, for Parquet, by the hash of the footer, whose
            statistics change with most contents; for all others by a hash of 64 kB at the start,
            in the middle and at the end. What changes elsewhere, at the same size, is not noticed.
        nbytes: Size of all files (of the chosen columns of the decoded row groups for Parquet).
        block_rows: Mean rows of a block.
        metadata: What the writer noted (`write_shards(metadata=)`), such as names of classes.
        errors: What was wrong with the samples that were replaced, by sample id: in this process,
            in the workers of its `StreamLoader`, and before the restart that a loaded state is of.

    Raises:
        FileNotFoundError: If there are no files, or one that the index lists is missing.
        RuntimeError: If a file or an index is damaged, cut short or unfinished.
        TypeError: If the transform takes neither `(sample)` nor `(sample, rng)`.
        ValueError: If a column is unknown or files differ in their columns.
        OSError: If a remote file cannot be read, after five attempts.

    Example:
        >>> import tempfile
        >>> from torsh_data import write_shards
        >>> folder = tempfile.mkdtemp()
        >>> write_shards([{"text": "red", "label": 0}, {"text": "blue", "label": 1}], folder)
        >>> data = ShardedDataset(folder, transform=lambda s: s["text"].upper())
        >>> data[1], data.__getitems__([0, 1])
        ('BLUE', ['RED', 'BLUE'])
    """

    def __init__(
        self,
        source: Source,
        *,
        columns: Sequence[str] | None = None,
        transform: Transform | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: str | int = "64GB",
        verify: Verify = "first_read",
        on_error: OnError = "raise",
        max_errors: int = 0,
        storage_options: Mapping[str, Any] | None = None,
        decode: Decode = "torch",
    ) -> None:
        if verify not in ("first_read", "always", "never"):
            raise ValueError(f"verify={verify!r}; use 'first_read', 'always' or 'never'")
        if decode not in ("torch", "files", "bytes"):
            raise ValueError(f"decode={decode!r}; use 'torch', 'files' or 'bytes'")
        if on_error not in ("raise", "substitute"):
            raise ValueError(f"on_error={on_error!r}; use 'raise' or 'substitute'")
        if max_errors < 0 or (on_error == "substitute") != (max_errors > 0):
            raise ValueError(
                f"on_error={on_error!r} with max_errors={max_errors}: say how many bad samples to "
                "replace with on_error='substitute', max_errors=..., and nothing with 'raise'"
            )
        limit = parse_bytes(cache_bytes, "cache_bytes")
        self.transform = transform
        self.verify: Verify = verify
        self.on_error: OnError = on_error
        self.max_errors = max_errors
        self.errors: dict[int, str] = {}
        self._has_warned = False
        self._wants_rng = transform is not None and _takes_two(transform)
        folder = _default_cache() if cache_dir is None else Path(cache_dir)
        reading = Reading(
            verify=verify,
            decode=decode,
            refuse_unknown=columns is None,
            storage_options=storage_options or {},
            make_store=lambda: Store(folder, limit),
            has_store=cache_dir is not None,
        )
        self._shards, self._store = open_source(source, reading)
        self.is_remote = any(shard.is_remote for shard in self._shards)
        schema = shared_schema(self._shards)
        self.columns = chosen_columns(columns, schema.names)
        for shard in self._shards:
            shard.choose(self.columns)
        self.metadata = {**class_names(schema, self.columns), **reading.metadata}
        if isinstance(self._shards[0], TarShard) and decode == "torch":
            refuse_pickles(self.columns, self._shards[0].path)
        self._fields = [schema.field(name) for name in self.columns]

        counts = [rows for shard in self._shards for rows in shard.block_rows]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._shard_starts = np.cumsum([0, *(shard.blocks for shard in self._shards)]).tolist()
        if not counts:
            raise ValueError(f"source={source!r} has files, but no rows")
        self.nbytes = sum(shard.nbytes for shard in self._shards)
        self.block_rows = -(-len(self) // len(counts))
        self._most_blocks = max(
            16, min(_MAPPED_BLOCKS, _MAPPED_BYTES * len(counts) // max(1, self.nbytes))
        )
        digest = xxhash.xxh3_128()
        for shard in self._shards:
            digest.update(f"{shard.identity}\n".encode())
        self.fingerprint = digest.hexdigest()
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._open_blocks: OrderedDict[int, Block] = OrderedDict()
        self._decoded_bytes = 0
        self._leased_bytes = 0
        self._checked = bytearray(self._shard_starts[-1])  # a flag for each block
        self._ahead: Ahead | None = None
        self._mutex = threading.RLock()  # worker threads share the open blocks
        if self._store is not None:
            self._store.release = self._let_go

    def _let_go(self) -> None:
        with self._mutex:
            self._open_blocks.clear()
            self._decoded_bytes = self._leased_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        leave = {"_open_blocks", "_decoded_bytes", "_leased_bytes", "_checked", "_ahead", "_mutex"}
        return {name: value for name, value in self.__dict__.items() if name not in leave}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __repr__(self) -> str:
        first, *others = self.files
        where = first if not others else f"{first.rpartition('/')[0]}: {len(others) + 1} files"
        columns = ", ".join(self.columns)
        return f"ShardedDataset({where}; {len(self):,} samples of {columns})"

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of the columns that are read."""
        return pa.schema(self._fields)

    @property
    def files(self) -> dict[str, int]:
        """Rows of each file, in order."""
        return {shard.path: sum(shard.block_rows) for shard in self._shards}

    def __getitem__(self, index: int) -> Any:
        if isinstance(index, (slice, str)):
            raise TypeError(
                f"index={index!r}: a sample has a number; data.__getitems__([0, 1]) gives several, "
                "data.read_batch([0, 1]) their columns, torch.utils.data.Subset a part"
            )
        return self.__getitems__([index])[0]

    def __getitems__(self, ids: Sequence[int]) -> list[Any]:
        """Several samples at once, which is faster than one after the other."""
        return self._replacing(self._valid(ids), self._transformed)

    def _transformed(self, ids: Ids) -> list[Any]:
        samples = self._samples(ids)
        if self.transform is None:
            return samples
        if not self._wants_rng:
            plain = cast("Callable[[Sample], Any]", self.transform)
            return [plain(sample) for sample in samples]
        random = cast("Callable[[Sample, np.random.Generator], Any]", self.transform)
        keys = sample_keys(*stream.get(), ids).tolist()
        return [random(sample, generator(key)) for sample, key in zip(samples, keys, strict=True)]

    def _replacing(self, ids: Ids, read: Callable[[Ids], list[Any]]) -> list[Any]:
        if self.on_error == "raise":
            return read(ids)
        if self._are_thought_good(ids):
            try:
                return read(ids)
            except (FetchError, MemoryError, ImportError):  # no sample's fault
                raise
            except Exception:  # noqa: S110  a transform may fail in any way
                pass  # which of them it is shows when each is read alone
        return [self._first_good(number, read) for number in ids.tolist()]

    def _are_thought_good(self, ids: Ids) -> bool:
        # what was bad once stays replaced, whichever samples it is read with
        return not self.errors or self.errors.keys().isdisjoint(ids.tolist())

    def _first_good(self, number: int, read: Callable[[Ids], list[Any]]) -> Any:
        """A sample, or the one that takes its place: the next that is good on a walk through all.

        The walk has a stride of about the golden section of the data set, so the rows of a damaged
        block are replaced by rows from different places.
        """
        rows = len(self)
        stride = _coprime(max(1, round(rows * _GOLDEN)), rows)
        candidate = number
        for _ in range(rows):
            if candidate not in self.errors:
                try:
                    return read(np.array([candidate]))[0]
                except (FetchError, MemoryError, ImportError):
                    raise
                except Exception as error:
                    self.add_errors({candidate: f"{type(error).__name__}: {error}"}, error)
            candidate = (candidate + stride) % rows
        raise RuntimeError(
            f"none of the {rows} samples is good; sample {number} says: {self.errors[number]}"
        )

    def add_errors(self, errors: Mapping[int, str], cause: Exception | None = None) -> None:
        """Count bad samples that another process has found, such as a worker.

        Args:
            errors: What was wrong, by sample id, as in `errors`.
            cause: What to show as the reason if these are too many.

        Raises:
            RuntimeError: If there are more than `max_errors` now.
        """
        self.errors.update(errors)
        if len(self.errors) > self.max_errors:
            number, text = next(reversed(self.errors.items()))
            raise RuntimeError(
                f"{len(self.errors)} bad samples, more than max_errors={self.max_errors}; the last "
                f"is sample {number}: {text}"
            ) from cause
        if errors and not self._has_warned and get_worker_info() is None:  # its parent warns
            self._has_warned = True
            number, text = next(iter(errors.items()))
            shard, block = self._locate(int(np.searchsorted(self._starts, number, "right")) - 1)
            warnings.warn(
                f"sample {number}, in block {block} of {shard.path}, is replaced by another one: "
                f"{text}. No more is said of others; data.errors holds all",
                stacklevel=2,
            )

    def read_batch(self, ids: Sequence[int] | Ids) -> dict[str, Any]:
        """Several samples column by column, without the transform.

        What `default_collate` makes of such samples, without making the samples: numbers become a
        tensor `(n,)` of int64, float64 or bool, tensors are stacked to `(n, ...)`, all else comes
        as a list of `n`. Which of these a column becomes depends on its type alone.

        Args:
            ids: `n` sample ids.

        Raises:
            ValueError: If a column of numbers or tensors has a null in one of these rows, or a
                number beyond int64. Samples read one by one hold None, for a transform to replace.
        """
        valid = self._valid(ids)
        if self.on_error == "raise":
            return self._columns(valid)
        if self._are_thought_good(valid):
            try:
                return self._columns(valid)
            except (FetchError, MemoryError, ImportError):
                raise
            except Exception:  # noqa: S110
                pass
        good = [self._first_good(number, self._batch_of_one) for number in valid.tolist()]
        return self._columns(np.array(good, dtype=np.int64))

    def _batch_of_one(self, ids: Ids) -> list[int]:
        self._columns(ids)
        return ids.tolist()

    def _columns(self, ids: Ids) -> dict[str, Any]:
        places = self._places(ids)
        samples: list[Sample] | None = None
        batch: dict[str, Any] = {}
        for c, name in enumerate(self.columns):
            tensors = [None if block.tensors is None else block.tensors[c] for block, _ in places]
            if tensors and all(rows is not None for rows in tensors):
                first = cast("Array", tensors[0])
                stacked = np.empty((len(places), *first.shape[1:]), first.dtype)
                for k, (rows, (_, row)) in enumerate(zip(tensors, places, strict=True)):
                    stacked[k] = cast("Array", rows)[row]
                batch[name] = torch.from_numpy(stacked)
                continue
            if all(isinstance(block, ArrowBlock) for block, _ in places):
                values = [cast("ArrowBlock", block).getters[c](row) for block, row in places]
            else:
                if samples is None:
                    samples = [block.sample(row) for block, row in places]
                values = [sample[name] for sample in samples]
            batch[name] = make_column(name, collated_kind(self._fields[c]), values, ids)
        return batch

    def will_read(self, ids: Sequence[int] | Ids) -> None:
        """Say what will be read next, so that it is fetched meanwhile.

        Threads of this process fetch the blocks of these samples in the order in which they are
        first needed; what is in the cache already is kept there. A later call replaces what an
        earlier one has not come to. Does nothing for local files.

        Args:
            ids: Sample ids in the order in which they will be read, such as those of a window.
        """
        if self._store is None or not self.is_remote:
            return
        if self._ahead is None or self._process != os.getpid():
            self._process = os.getpid()
            self._ahead = Ahead(self._prepare)
        numbers = np.searchsorted(self._starts, self._valid(ids), side="right") - 1
        self._ahead.next = deque(dict.fromkeys(numbers.tolist()))
        self._ahead.start()

    def _needed_memory(self) -> int:
        """What this process would take to keep all blocks that have to be decoded."""
        shards = self._shards
        if isinstance(shards[0], IndexedShard):
            shards = shards[:1]  # has to look into a block, and they are alike
        rows = sum(sum(shard.block_rows) for shard in shards)
        return sum(shard.decoded_bytes() for shard in shards) * len(self) // max(1, rows)

    def largest_window(self) -> int:
        """Rows of the largest window of which two fit into what a process keeps decoded."""
        needed = self._needed_memory()
        if needed <= _DECODED_BYTES:
            return len(self)
        return max(0, _DECODED_BYTES * len(self) // needed // 2 - self.block_rows)

    def require_cache(self, window: int) -> None:
        """Refuse a cache that cannot hold what a shuffle uses at a time; warn of too little memory.

        Args:
            window: Rows that are shuffled together, of which up to two windows are in use.

        Raises:
            ValueError: If `cache_bytes` is less than that takes; it says how much that is.
        """
        share = min(1.0, (2 * window + 2 * self.block_rows) / len(self))
        decoded = int(self._needed_memory() * share)
        if decoded > _DECODED_BYTES:
            remedy = "give the ShardedDataset a cache_dir=, where they are decoded once"
            if isinstance(self._shards[0], IndexedShard):
                remedy = "write the shards without compression="
            largest = self.largest_window()
            if largest >= self.block_rows:
                remedy += f", or use window={largest}"
            warnings.warn(
                f"a shuffle with a window of {window} rows uses {format_bytes(decoded)} of decoded "
                f"blocks at a time, more than the {format_bytes(_DECODED_BYTES)} that a process "
                f"keeps, so they are decoded again and again; {remedy}",
                stacklevel=4,
            )
        if self._store is None:
            return
        # of files that are fetched whole, those with any block in use
        needed = sum(
            shard.nbytes * (1 - (1 - share) ** shard.blocks if shard.is_fetched_whole else share)
            for shard in self._shards
        )
        blocks = [shard.nbytes / shard.blocks for shard in self._shards if shard.blocks]
        needed = int(needed * 1.1 + max(blocks))
        if self._store.limit < min(needed, int(self.nbytes * 1.02) + 2**20):
            raise ValueError(
                f"cache_bytes={format_bytes(self._store.limit)} does not hold the two windows of "
                f"{window} rows that a shuffle uses at a time; give it {format_bytes(needed)}, or "
                "use a smaller window"
            )

    def _prepare(self, number: int) -> None:
        shard, block = self._locate(number)
        shard.prepare(block)

    def check(self) -> Iterator[tuple[str, Damage | None]]:
        """Read every byte of every file with checksums; one pair (file, damage) for each block."""
        for shard in self._shards:
            for block in range(shard.blocks + 1):
                yield shard.path, shard.damage(block)

    def _valid(self, ids: Sequence[int] | Ids) -> Ids:
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        rows = len(self)
        wrong = (array < -rows) | (array >= rows)
        if wrong.any():
            raise IndexError(f"sample {array[wrong][0]} of a data set of {rows}")
        return np.where(array < 0, array + rows, array)

    def _samples(self, ids: Ids) -> list[Sample]:
        return [block.sample(row) for block, row in self._places(ids)]

    def _places(self, ids: Ids) -> list[tuple[Block, int]]:
        if self._process != os.getpid():  # forked: what is open is the parent's
            self._process = os.getpid()
            self._mutex = threading.RLock()
            if self._store is not None:
                self._forget()
        numbers = np.searchsorted(self._starts, ids, side="right") - 1
        rows = (ids - self._starts[numbers]).tolist()
        wanted = numbers.tolist()
        distinct = dict.fromkeys(wanted)
        if self.is_remote:
            absent = [number for number in distinct if number not in self._open_blocks]
            if len(absent) > 1:
                with ThreadPoolExecutor(min(_TOGETHER, len(absent))) as pool:
                    list(pool.map(self._prepare, absent))
        if self.verify == "always":
            self._checked = bytearray(len(self._checked))
            for number in distinct:
                self._verify(number)
        blocks = {number: self._block(number) for number in distinct}
        return [(blocks[number], row) for number, row in zip(wanted, rows, strict=True)]

    def _locate(self, number: int) -> tuple[Shard, int]:
        shard = bisect_right(self._shard_starts, number) - 1
        return self._shards[shard], number - self._shard_starts[shard]

    def _verify(self, number: int) -> None:
        if self.verify == "never" or self._checked[number]:
            return
        shard, block = self._locate(number)
        damage = shard.damage(block)
        if damage is not None:
            raise RuntimeError(str(damage))
        self._checked[number] = 1

    def _block(self, number: int) -> Block:
        known = self._open_blocks.get(number)
        if known is not None:
            if known.in_memory or known.leased:
                with self._mutex:
                    if number in self._open_blocks:
                        self._open_blocks.move_to_end(number)
            return known
        self._verify(number)
        shard, block = self._locate(number)
        opened = shard.open(block, self._fields)
        with self._mutex:
            self._keep(number, opened)
        return opened

    def _keep(self, number: int, opened: Block) -> None:
        if number in self._open_blocks:  # another thread was faster
            return
        self._open_blocks[number] = opened
        self._decoded_bytes += opened.in_memory
        self._leased_bytes += opened.leased
        # half of the cache at most, so that there is always something to make room from
        leasable = self._store.limit // 2 if self._store is not None else 0
        while len(self._open_blocks) > 1 and (
            len(self._open_blocks) > self._most_blocks
            or self._decoded_bytes > _DECODED_BYTES
            or self._leased_bytes > leasable
        ):
            _, closed = self._open_blocks.popitem(last=False)
            self._decoded_bytes -= closed.in_memory
            self._leased_bytes -= closed.leased


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torsh-data"


def _coprime(number: int, rows: int) -> int:
    while math.gcd(number, rows) != 1:
        number += 1
    return number


def _takes_two(transform: Transform) -> bool:
    if not callable(transform):
        raise TypeError(f"transform is a {type(transform).__name__}; give a function or None")
    try:
        signature = inspect.signature(transform)
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    for arguments in (1, 2):
        try:
            signature.bind(*range(arguments))
        except TypeError:
            continue
        return arguments == 2
    raise TypeError(
        f"transform has the parameters {signature}, but is called with (sample) or, if it needs "
        "two, (sample, rng); bind others with functools.partial or give them defaults"
    )
