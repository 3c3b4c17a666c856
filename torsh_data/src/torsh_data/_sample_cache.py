"""Decoded samples, kept once for all workers and ranks of a machine."""

import os
import shutil
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
from torch.utils.data import Dataset

from torsh_data._cache_file import CacheFile
from torsh_data._cache_folder import (
    file_name,
    join,
    leave,
    open_shared,
    peek,
    remove_abandoned,
)
from torsh_data._dataset import Transform, _takes_two
from torsh_data._fingerprint import identify
from torsh_data._machine import ranks_here, usable_memory
from torsh_data._map_style import require_map_style
from torsh_data._rng import generator, sample_keys, stream
from torsh_data._sample_key import leaves, sample_key
from torsh_data._sample_layout import Layout, UnfitError
from torsh_data._sample_probe import PROBES, REMEDY, probe
from torsh_data._sizes import format_bytes, parse_bytes

Where: TypeAlias = Literal["ram", "shm", "disk"]

_SHM = Path("/dev/shm")  # noqa: S108 - shared memory, where the user asked for it
_SHARE = 0.9  # of the room that is left, so that others find some too


@dataclass(frozen=True)
class CacheStats:
    """What a `SampleCache` holds and what it was good for, over all processes.

    Attributes:
        samples: Samples that are stored.
        rows: Samples of the data set.
        used: Bytes that they take.
        limit: Bytes that they may take.
        hits: Reads that found their sample.
        misses: Reads that had to go to the data set.
    """

    samples: int
    rows: int
    used: int
    limit: int
    hits: int
    misses: int

    def __str__(self) -> str:
        reads = self.hits + self.misses
        return (
            f"{self.samples:,} of {self.rows:,} samples in {format_bytes(self.used)} of "
            f"{format_bytes(self.limit)}; "
            + (f"{self.hits / reads:.1%} of {reads:,} reads found" if reads else "not read yet")
        )


class SampleCache(Dataset[Any]):
    """A data set whose samples are read and decoded once, then copied from shared memory.

    All workers, and with `"shm"` and `"disk"` all ranks and jobs of a machine, use one copy.
    Samples may hold CPU tensors, NumPy arrays, numbers, str, bytes and None in dicts, lists and
    tuples. The first sample fixes the structure; extents and lengths may differ. A sample of
    another structure goes by uncached, with a warning.

    What is random must come after the cache, as `transform` here: it is called as that of a
    `ShardedDataset` would be, and draws the same numbers for the same (seed, epoch, sample). As
    there, the sample's number is that in the data set that has the transform: for a loader of
    `Subset(cache, ...)` that is not the number in the subset, from which `batch["key"]` comes.

    Randomness inside is looked for in the first three samples. They are read twice, each must come
    out the same, and reading must not draw from the global generators of Python, NumPy or torch.
    What is not found is a generator of the transform's own that changes none of the three, and
    draws that only later samples make.

    When `bytes` are full, further samples go by uncached, and nothing is evicted: training reads
    each sample once an epoch, so whatever is evicted would be wanted before what replaces it, and
    a cache for half of the data would never be hit, instead of half the time.

    A worker that is killed at any moment leaves no half sample: a sample exists once its place is
    written, which happens last, and each process checks its checksum once.

    Args:
        dataset: A map-style data set; `__getitems__` is used if there.
        where: `"ram"` is memory of this process and the workers it starts. `"shm"` is /dev/shm,
            shared by all ranks of this user and removed with the last process; if that is killed,
            the memory is given back by the next `SampleCache` of any kind that this user makes.
            `"disk"` is a file in `folder`, found again by the next run.
        bytes: Most that the samples may take (`"32GB"`); less if less is free. The file grows with
            them. Another size than the last time's counts, unless more is stored already or other
            processes use the file.
        key: A text by which you vouch for the samples of `"shm"` and `"disk"`: it has to change
            with whatever changes them, and the transform's code is not looked at. Without it,
            samples are known by the data set's `fingerprint`, its columns and the transform: its
            code and arguments, and the values, functions and classes that it names, in modules of
            your own that it names too, as they are when the cache is made. Of installed packages
            the version counts. Not seen are files that the transform reads, names that it makes up
            (`getattr`), imports inside functions, and the code of a data set class. With a key,
            reading may also draw from the global generators, if it has no effect on the samples.
        transform: Called with each sample that leaves the cache, or with the sample and
            a `numpy.random.Generator` if it takes two arguments.
        folder: Of the file, if `where` is `"disk"`.

    Attributes:
        fingerprint: That of the data set, so that a `StreamLoader`'s state fits with and without.
        limit: Bytes that the samples may take.

    Raises:
        TypeError: If the data set has no length or index.
        ValueError: If the data set's transform is found to be random, or the contents cannot be
            told from those of another data set, or there is no room.

    Example:
        >>> import torch
        >>> class Squares:
        ...     def __len__(self):
        ...         return 8
        ...     def __getitem__(self, n):
        ...         return {"square": torch.tensor(n * n)}
        >>> cache = SampleCache(Squares(), bytes="1MB", transform=lambda s: s["square"].item() + 1)
        >>> cache[3], cache[3]
        (10, 10)
        >>> cache.stats().samples, cache.stats().hits
        (4, 1)
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        where: Where = "ram",
        bytes: str | int = "32GB",
        *,
        key: str | None = None,
        transform: Transform | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if where not in ("ram", "shm", "disk"):
            raise ValueError(f"where={where!r}; use 'ram', 'shm' or 'disk'")
        if (where == "disk") != (folder is not None):
            raise ValueError(f"folder={folder!r} and where={where!r}: a folder goes with 'disk'")
        require_map_style(dataset, "dataset", "SampleCache")
        rows = len(cast("Any", dataset))
        if rows < 1:
            raise ValueError("dataset is empty")
        if any(getattr(part, "_wants_rng", False) for part in leaves(dataset)):
            raise ValueError(f"the data set's transform takes a generator; {REMEDY}")
        self.dataset = dataset
        self.where: Where = where
        self.transform = transform
        self.fingerprint = identify(dataset)
        self._wants_rng = transform is not None and _takes_two(transform)
        name = sample_key(dataset, key, must_be_certain=where != "ram")
        home = _SHM if where == "shm" else Path(folder or ".")
        wanted = parse_bytes(bytes, "bytes")
        self._users = -1
        self._is_told = False
        if where != "shm" and _SHM.is_dir():
            remove_abandoned(_SHM)
        if where == "ram":
            if ranks_here() > 1:
                warnings.warn(
                    f"where='ram' keeps one copy in each of {ranks_here()} ranks; 'shm' keeps one "
                    "for all",
                    stacklevel=2,
                )
            description, probes = probe(dataset, may_draw=key is not None)
            free = usable_memory() // ranks_here()
            limit = self._fit(wanted, free, description, "memory", 0, 0)
            self._file = CacheFile(os.memfd_create("torsh-samples"), description, rows, limit)
        else:
            home.mkdir(parents=True, exist_ok=True)
            known, stored, used = peek(home, name) or (None, 0, 0)
            description, probes = known, list[Any]()
            if description is None:
                description, probes = probe(dataset, may_draw=key is not None)
            there = _taken(home, name)
            free = shutil.disk_usage(home).free + there
            if where == "shm":
                free = min(free, usable_memory() + there)
            limit = self._fit(wanted, free, description, str(home), stored, used)
            self._file, self._users = open_shared(
                home, name, description | {"asked": wanted}, rows, limit, keep=where == "disk"
            )
            if known is not None:
                self._compare(home / file_name(name), wanted, known["asked"], used)
        self.limit = self._file.limit
        if self._is_told:
            self._file.warn_once("room")
        self._layout = Layout(self._file.description["layout"])
        for row, sample in enumerate(probes):
            self._store(row, sample)
        self._hold()

    def _fit(
        self, wanted: int, free: int, description: dict[str, Any], place: str, known: int, used: int
    ) -> int:
        """The limit that there is room for; warns if that is less than wanted and needed.

        `known` samples are there already and take `used` bytes.
        """
        limit = max(used, min(wanted, int(free * _SHARE)))
        each, rows = description["sample_bytes"], len(self)
        if limit < each:
            raise ValueError(
                f"where={self.where!r}: {place} has {format_bytes(free)} free, and one sample "
                f"takes {format_bytes(each)}{_SHM_REMEDY if self.where == 'shm' else ''}"
            )
        each = used / known if known else each
        if limit < each * rows:
            is_asked = wanted <= max(used, free * _SHARE)
            has = f"bytes={wanted:,}" if is_asked else f"{place} has {format_bytes(free)} free"
            remedy = _SHM_REMEDY if not is_asked and self.where == "shm" else ""
            warnings.warn(
                f"{has}, and all {rows:,} samples take about {format_bytes(int(each * rows))} if "
                f"they are like the first {known or PROBES:,}: about {limit / (each * rows):.1%} "
                f"of them will be cached{remedy}",
                stacklevel=3,
            )
            self._is_told = True
        return limit

    def _compare(self, path: Path, wanted: int, was_asked: int, used: int) -> None:
        """Warn if a file that was there has another limit than was asked for."""
        if self._file.description["asked"] != wanted:
            warnings.warn(
                f"bytes={wanted:,}, but another process uses {path} with bytes={was_asked:,}, "
                "which holds for all until the last has closed it; give the same everywhere",
                stacklevel=3,
            )
        elif wanted < used:
            warnings.warn(
                f"bytes={wanted:,}, but the samples in {path} take {used:,} bytes; they stay, and "
                "no others are stored. Remove the file to keep fewer",
                stacklevel=3,
            )

    def _hold(self) -> None:
        self._end: weakref.finalize[Any, Any] = weakref.finalize(
            self, _let_go, self._file, self._users, self.where, os.getpid()
        )

    def close(self) -> None:
        """Let go of the samples, and remove those in /dev/shm if no other process uses them."""
        self._end()

    def stats(self) -> CacheStats:
        """What is stored, and hits and misses of all processes since the cache was made."""
        hits, misses = self._file.counts()
        stored = int(np.count_nonzero(self._file.places))
        return CacheStats(stored, len(self), self._file.used, self.limit, hits, misses)

    def __repr__(self) -> str:
        held = str(self.stats()) if self._end.alive else "closed"
        return f"SampleCache({self.where!r}: {held})"

    def __len__(self) -> int:
        return len(cast("Any", self.dataset))

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, ids: Sequence[int]) -> list[Any]:
        """Several samples at once; those that are not cached are read together."""
        if not self._end.alive:
            raise RuntimeError("this SampleCache was closed")
        rows = len(self)
        wrong = [i for i in ids if not -rows <= i < rows]
        if wrong:
            raise IndexError(f"sample {wrong[0]} of a data set of {rows}")
        wanted = [int(i) % rows for i in ids]
        samples: list[Any] = []
        missing: list[int] = []
        for place, row in enumerate(wanted):
            body = self._file.read(row)
            samples.append(None if body is None else self._layout.decode(body))
            if body is None:
                missing.append(place)
        if missing:
            read = self._read([wanted[place] for place in missing])
            for place, sample in zip(missing, read, strict=True):
                self._store(wanted[place], sample)
                samples[place] = sample
        self._file.count(len(wanted) - len(missing), len(missing))
        return self._transformed(wanted, samples)

    def _read(self, rows: list[int]) -> list[Any]:
        dataset = cast("Any", self.dataset)
        if hasattr(dataset, "__getitems__"):
            return dataset.__getitems__(rows)
        return [dataset[row] for row in rows]

    def _store(self, row: int, sample: Any) -> None:
        try:
            table, parts, size = self._layout.encode(sample)
        except UnfitError as error:
            if self._file.warn_once("structure"):
                warnings.warn(
                    f"sample {row} is not cached, nor are others like it: {error}", stacklevel=4
                )
            return
        has_room = self._file.write(row, table, parts, size) or self._file.places[row]
        if not has_room and self._file.warn_once("room"):
            stats = self.stats()
            warnings.warn(
                f"the cache has no room for sample {row}: {stats.samples:,} of {stats.rows:,} "
                f"samples take {format_bytes(stats.used)} of {format_bytes(stats.limit)}; the "
                "others are read each time",
                stacklevel=4,
            )

    def _transformed(self, rows: list[int], samples: list[Any]) -> list[Any]:
        if self.transform is None:
            return samples
        if not self._wants_rng:
            plain = cast("Callable[[Any], Any]", self.transform)
            return [plain(sample) for sample in samples]
        random = cast("Callable[[Any, np.random.Generator], Any]", self.transform)
        keys = sample_keys(*stream.get(), np.array(rows, np.int64)).tolist()
        return [random(sample, generator(key)) for sample, key in zip(samples, keys, strict=True)]

    def __copy__(self) -> "SampleCache":
        twin = object.__new__(type(self))
        twin.__dict__ = self.__dict__ | {"_original": self}  # whose end is the end of the file
        return twin

    def __getstate__(self) -> dict[str, Any]:
        leave_out = ("_end", "_users", "_layout", "_original")
        return {name: value for name, value in self.__dict__.items() if name not in leave_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._layout = Layout(self._file.description["layout"])
        self._users = -1 if self._file.path is None else join(self._file.path)
        self._hold()


_SHM_REMEDY = "; in a container, make /dev/shm larger (docker run --shm-size=32g) or use 'disk'"


def _taken(home: Path, name: str) -> int:
    """Bytes that the file has from the file system already."""
    path = home / file_name(name)
    return path.stat().st_blocks * 512 if path.exists() else 0


def _let_go(file: CacheFile, users: int, where: Where, process: int) -> None:
    if os.getpid() != process:  # a worker that was forked; the kernel closes what it inherited
        return
    file.close()
    if file.path is not None:
        leave(file.path, users, keep=where == "disk")
