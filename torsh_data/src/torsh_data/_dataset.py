"""A map-style data set over sharded files."""

import glob
import inspect
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch.utils.data import Dataset

from torsh_data._columns import Array, Getter, Value, collated_kind, getter
from torsh_data._index import INDEX_NAME, read_index
from torsh_data._order import Ids
from torsh_data._rng import generator, sample_keys, stream
from torsh_data._shards import Damage, IndexedShard, Shard, Verify, open_shards

Sample: TypeAlias = dict[str, Value]
Transform: TypeAlias = Callable[[Sample], Any] | Callable[[Sample, np.random.Generator], Any]
Source: TypeAlias = "str | os.PathLike[str] | Iterable[str | os.PathLike[str]]"

_SUFFIXES = {".arrow", ".parquet"}
_MAPPED_BLOCKS = 1 << 14  # views into the mapping, a few kB each
_DECODED_BYTES = 512 * 10**6  # blocks that had to be decompressed

_Block: TypeAlias = tuple[list[Getter], list["Array | None"], int]


class ShardedDataset(Dataset[Any]):
    """Samples in Arrow or Parquet files, read from the mapped files at random or in order.

    Reading costs a few microseconds a sample and no memory: Arrow blocks are used where they lie in
    the page cache, which all workers share. Shards from `write_shards` are checked against their
    index: a missing or shortened file when the data set is opened, a changed byte when its block is
    first read. Compressed blocks and Parquet row groups are decoded to memory, of which each
    process keeps the last 512 MB.

    Args:
        source: A folder that `write_shards` wrote, or a folder, a glob pattern or a list of files
            (`.arrow` for Arrow IPC files, `.parquet`). Files are taken in sorted order.
        columns: Names of the columns to read; all by default.
        transform: Called with each sample, or with the sample and a `numpy.random.Generator` if it
            takes two arguments. The generator depends on the sample, and on the seed and epoch of
            the `StreamLoader` that reads it, never on workers or batches.
        verify: `"first_read"` checks a block's checksum when a process first reads it, `"always"`
            at every call, `"never"` not at all. Files from elsewhere have no checksums to check.

    Attributes:
        fingerprint: Changes if a name, a row count or a checksum changes.
        nbytes: Size of all files (of the decoded row groups for Parquet).
        block_rows: Mean rows of a block.

    Raises:
        FileNotFoundError: If there are no files, or one that the index lists is missing.
        RuntimeError: If a file or an index is damaged, cut short or unfinished.
        ValueError: If a column is unknown or files differ in their columns.

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
        verify: Verify = "first_read",
    ) -> None:
        if verify not in ("first_read", "always", "never"):
            raise ValueError(f"verify={verify!r}; use 'first_read', 'always' or 'never'")
        self.transform = transform
        self.verify: Verify = verify
        self._wants_rng = transform is not None and _takes_two(transform)
        self._shards = open_shards(_find(source), verify)
        schema = _shared_schema(self._shards)
        unknown = [name for name in columns or [] if name not in schema.names]
        if unknown:
            raise ValueError(f"columns: no column {unknown[0]!r}; there are {schema.names}")
        self.columns = list(schema.names if columns is None else columns)
        self._fields = [schema.field(name) for name in self.columns]

        counts = [rows for shard in self._shards for rows in shard.block_rows]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._shard_starts = np.cumsum([0, *(shard.blocks for shard in self._shards)]).tolist()
        if not counts:
            raise ValueError(f"source={source!r} has files, but no rows")
        self.nbytes = sum(shard.nbytes for shard in self._shards)
        self.block_rows = -(-len(self) // len(counts))
        digest = xxhash.xxh3_128()
        for shard in self._shards:
            digest.update(f"{shard.identity}\n".encode())
        self.fingerprint = digest.hexdigest()
        self._forget()

    def _forget(self) -> None:
        self._open_blocks: OrderedDict[int, _Block] = OrderedDict()
        self._decoded_bytes = 0
        self._checked: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        leave = {"_open_blocks", "_decoded_bytes", "_checked"}
        return {name: value for name, value in self.__dict__.items() if name not in leave}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

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
        return self.__getitems__([index])[0]

    def __getitems__(self, ids: Sequence[int]) -> list[Any]:
        """Several samples at once, which is faster than one after the other."""
        array = self._valid(ids)
        samples = self._samples(array)
        if self.transform is None:
            return samples
        if not self._wants_rng:
            plain = cast("Callable[[Sample], Any]", self.transform)
            return [plain(sample) for sample in samples]
        random = cast("Callable[[Sample, np.random.Generator], Any]", self.transform)
        keys = sample_keys(*stream.get(), array).tolist()
        return [random(sample, generator(key)) for sample, key in zip(samples, keys, strict=True)]

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
        places = self._places(self._valid(ids))
        batch: dict[str, Any] = {}
        for c, name in enumerate(self.columns):
            tensors = [block[1][c] for block, _ in places]
            if tensors and all(rows is not None for rows in tensors):
                first = cast("Array", tensors[0])
                stacked = np.empty((len(places), *first.shape[1:]), first.dtype)
                for k, (rows, (_, row)) in enumerate(zip(tensors, places, strict=True)):
                    stacked[k] = cast("Array", rows)[row]
                batch[name] = torch.from_numpy(stacked)
                continue
            values = [block[0][c](row) for block, row in places]
            kind = collated_kind(self._fields[c])
            if kind is None:
                batch[name] = values
                continue
            try:
                if isinstance(kind, torch.dtype):
                    batch[name] = torch.tensor(values, dtype=kind)
                else:
                    batch[name] = torch.stack(values)
            except (TypeError, RuntimeError, ValueError) as error:
                raise _explain(name, self._valid(ids), values) from error
        return batch

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
        names = self.columns
        return [
            {name: get(row) for name, get in zip(names, block[0], strict=True)}
            for block, row in self._places(ids)
        ]

    def _places(self, ids: Ids) -> list[tuple[_Block, int]]:
        numbers = np.searchsorted(self._starts, ids, side="right") - 1
        rows = (ids - self._starts[numbers]).tolist()
        wanted = numbers.tolist()
        if self.verify == "always":
            self._checked.clear()
            for number in set(wanted):
                self._verify(number)
        blocks = {number: self._block(number) for number in dict.fromkeys(wanted)}
        return [(blocks[number], row) for number, row in zip(wanted, rows, strict=True)]

    def _locate(self, number: int) -> tuple[Shard, int]:
        shard = bisect_right(self._shard_starts, number) - 1
        return self._shards[shard], number - self._shard_starts[shard]

    def _verify(self, number: int) -> None:
        if self.verify == "never" or number in self._checked:
            return
        shard, block = self._locate(number)
        damage = shard.damage(block)
        if damage is not None:
            raise RuntimeError(str(damage))
        self._checked.add(number)

    def _block(self, number: int) -> _Block:
        known = self._open_blocks.get(number)
        if known is not None:
            if known[2]:
                self._open_blocks.move_to_end(number)
            return known
        self._verify(number)
        shard, block = self._locate(number)
        batch = shard.read(block).select(self.columns)
        getters = [getter(field, batch.column(field.name)) for field in self._fields]
        in_memory = shard.decoded_bytes(batch)
        opened = ([get for get, _ in getters], [rows for _, rows in getters], in_memory)
        self._open_blocks[number] = opened
        self._decoded_bytes += in_memory
        while len(self._open_blocks) > 1 and (
            len(self._open_blocks) > _MAPPED_BLOCKS or self._decoded_bytes > _DECODED_BYTES
        ):
            _, (_, _, freed) = self._open_blocks.popitem(last=False)
            self._decoded_bytes -= freed
        return opened


def _explain(name: str, ids: Ids, values: list[Value]) -> ValueError:
    for number, value in zip(ids.tolist(), values, strict=True):
        if value is None:
            return ValueError(
                f"column {name!r} has a null in sample {number}, and a tensor has none; leave the "
                "column out with columns=, or give a transform that replaces None"
            )
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return ValueError(
                f"column {name!r} holds {value} in sample {number}, beyond int64; leave the column "
                "out with columns=, or give a transform that converts it"
            )
    return ValueError(f"column {name!r} cannot become a tensor")


def _takes_two(transform: Transform) -> bool:
    try:
        parameters = inspect.signature(transform).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return len(needed) == 2


def _shared_schema(shards: Sequence[Shard]) -> pa.Schema:
    first = shards[0].schema()
    described: set[Path] = set()  # shards of one index were written with one schema
    for shard in shards:
        folder = Path(shard.path).parent
        if isinstance(shard, IndexedShard) and folder in described:
            continue
        described.add(folder)
        if not shard.schema().equals(first):
            raise ValueError(
                f"{shard.path} has the columns {_describe(shard.schema())}, but {shards[0].path} "
                f"has {_describe(first)}; open them as two data sets"
            )
    return first


def _describe(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _find(source: Source) -> list[Path]:
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir():
            if (path / INDEX_NAME).exists():
                return [path / entry.name for entry in read_index(path / INDEX_NAME).shards]
            found = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES)
        elif path.is_file():
            found = [path]
        else:
            found = sorted(map(Path, glob.glob(str(source), recursive=True)))  # noqa: PTH207
    else:
        found = [Path(p) for p in source]
    if not found:
        raise FileNotFoundError(
            f"source={source!r}: no .arrow or .parquet files there; a folder without an "
            f"{INDEX_NAME} may be one whose writer did not finish"
        )
    for path in found:
        if path.suffix not in _SUFFIXES:
            raise ValueError(f"{path}: reads .arrow (Arrow IPC files) and .parquet files only")
        if not path.exists() and not (path.parent / INDEX_NAME).exists():
            raise FileNotFoundError(f"{path} is missing")
    return found
