"""Vectors kept on disk under a hash of what they were made from."""

import errno
import hashlib
import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from ._cache_folder import CacheFolder
from ._key_table import KeyTable
from ._segments import HEADER_BYTES, MODEL_BYTES, RECORD, Segment, Space, row_checksums

_PERSON = b"torsh-text-cache"  # 16 bytes, which BLAKE2b takes as the name of its use
_ROW_BITS = 32


@dataclass(frozen=True)
class CacheHits:
    """What a cache knows about some keys.

    Attributes:
        found: Which keys have a vector, bool ``(keys,)``.
        vectors: Their vectors in the order of the keys, float32 ``(found, dim)``.
        truncated: Whether the text of each was cut, bool ``(found,)``.
    """

    found: np.ndarray
    vectors: np.ndarray
    truncated: np.ndarray


@dataclass(frozen=True)
class CacheStats:
    """Size of a cache, and what happened through this object since it was opened.

    Attributes:
        rows: Vectors on disk, of all models.
        bytes: Sizes of all its files.
        segments: Pairs of files.
        models: Different models.
        hits: Keys that were found.
        misses: Keys that were not.
        stored: Vectors that were added.
        evicted: Vectors that were deleted to stay within ``max_bytes``.
        damaged: Vectors that were not returned because their checksum did not match.
    """

    rows: int
    bytes: int
    segments: int
    models: int
    hits: int
    misses: int
    stored: int
    evicted: int
    damaged: int


@dataclass(frozen=True)
class CacheDamage:
    """One place in a cache that cannot be read.

    Attributes:
        segment: Stem of the file names.
        row: Row in this segment; None for all of it.
        reason: What is wrong.
    """

    segment: str
    row: int | None
    reason: str


class EmbeddingCache:
    """Vectors on disk under a hash of the model, its settings and the text.

    Give it, or just its path, to :meth:`Encoder.encode`: texts seen before are then read instead
    of computed. A folder serves any number of models; whatever changes a vector changes its key,
    so that a fine-tuned model does not see vectors of its old weights.

    Any number of processes may read and write the same folder on one machine: writers take turns
    through a file lock, readers take none and see finished rows only. A killed process costs at
    most the rows that it had not finished. Each row has a checksum, which is compared at every
    read: a damaged row is never returned, but computed and stored again.

    When the files would exceed ``max_bytes``, the oldest sixteenth (by time of writing, of all
    models) is deleted, then the next. There is no reordering at reads, so readers write nothing.

    Args:
        path: Folder of the cache; made if it is not there.
        max_bytes: Most bytes of all files after a store; None for no limit.
        dtype: How vectors are kept. ``"float16"`` halves the files; entries of a unit vector move
            by up to 2.5e-4, and vectors kept as the one are not found as the other.
        readonly: Never write, not even an empty folder.

    Raises:
        ValueError: If the folder holds files of another kind or of a newer format, or an argument
            does not fit.
        FileNotFoundError: If ``readonly`` and there is no folder.
        PermissionError: If not ``readonly`` and the folder cannot be written.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> cache = EmbeddingCache(tempfile.mkdtemp(), max_bytes=10_000_000)
        >>> keys = cache.keys("my-model", ["one", "two"])
        >>> cache.store("my-model", keys, np.array([[1.0, 2.0], [3.0, 4.0]], np.float32))
        2
        >>> hits = cache.lookup("my-model", 2, cache.keys("my-model", ["two", "three"]))
        >>> hits.found.tolist(), hits.vectors.tolist()
        ([True, False], [[3.0, 4.0]])
        >>> cache.stats().rows
        2
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int | None = None,
        dtype: Literal["float32", "float16"] = "float32",
        readonly: bool = False,
    ) -> None:
        if dtype not in ("float32", "float16"):
            raise ValueError(f"dtype={dtype!r} is neither 'float32' nor 'float16'")
        if max_bytes is not None:
            if not isinstance(max_bytes, int) or isinstance(max_bytes, bool):
                raise TypeError(f"max_bytes={max_bytes!r} is neither None nor an integer")
            if max_bytes < 1:
                raise ValueError(f"max_bytes={max_bytes} is not positive; use None for no limit")
        self.path = Path(path)
        self.max_bytes = max_bytes
        self.dtype: Literal["float32", "float16"] = dtype
        self.readonly = readonly
        self._mutex = threading.RLock()
        self._folder = CacheFolder(self.path, max_bytes=max_bytes, readonly=readonly)
        self._tables: dict[Space, KeyTable] = {}  # key to place of a segment and row in it
        self._indexed: dict[Space, dict[int, int]] = {}  # place to rows that the table has
        self._hits = self._misses = self._stored = self._damaged = 0
        if not readonly:
            with self._folder.lock():  # says now if the folder cannot be written
                pass
        self._folder.refresh()

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.path, self.max_bytes, self.dtype, self.readonly)

    def __repr__(self) -> str:
        return f"EmbeddingCache({str(self.path)!r}, max_bytes={self.max_bytes})"

    def keys(self, model: str, texts: Sequence[str], *, settings: str = "") -> np.ndarray:
        """Hash texts, with all else that a vector depends on, to keys of 16 bytes.

        Args:
            model: What makes the vectors, such as :attr:`Encoder.fingerprint`.
            texts: The texts as the model gets them, prompts included.
            settings: Anything else that changes the vectors.

        Returns:
            uint64 ``(texts, 2)``.
        """
        about = repr((model, settings, self.dtype)).encode()
        salt = hashlib.blake2b(about, digest_size=16, person=_PERSON).digest()
        blake2b = hashlib.blake2b
        found = b"".join(
            # a lone surrogate is no Unicode text: the tokenizer refuses it by its index
            blake2b(
                text.encode(errors="surrogatepass"), digest_size=16, salt=salt, person=_PERSON
            ).digest()
            for text in texts
        )
        return np.frombuffer(found, "<u8").reshape(-1, 2)

    def lookup(self, model: str, dim: int, keys: np.ndarray) -> CacheHits:
        """Read the vectors of keys, checking each row.

        Args:
            model: What made the vectors, as for :meth:`store`; at most 92 bytes.
            dim: Entries of a vector.
            keys: uint64 ``(n, 2)``, as from :meth:`keys`.

        Returns:
            Which keys are known, and their vectors.

        Raises:
            ValueError: If the keys have another shape, or not even one vector of this size fits
                into ``max_bytes``.
        """
        space = self._space(model, dim)
        _check_keys(keys)
        with self._mutex:
            self._folder.refresh()
            table = self._table(space)
            values = table.find(keys)
            at = np.flatnonzero(values >= 0)
            vectors = np.empty((len(at), dim), space.dtype)
            records = self._gather(values[at], vectors)
            good = row_checksums(records, vectors) == records["crc"]
            good &= (records["key"] == keys[at]).all(1)
            if not good.all():
                bad = at[~good]
                self._damaged += len(bad)
                table.assign(keys[bad], np.full(len(bad), -1))
                warnings.warn(
                    f"{len(bad)} vectors in {self.path} are damaged and count as missing;"
                    " verify() names them, compact() drops them",
                    stacklevel=2,
                )
                at, vectors, records = at[good], vectors[good], records[good]
            found = np.zeros(len(keys), bool)
            found[at] = True
            self._hits += len(at)
            self._misses += len(keys) - len(at)
        return CacheHits(
            found, vectors.astype(np.float32, copy=False), records["truncated"].astype(bool)
        )

    def store(
        self,
        model: str,
        keys: np.ndarray,
        vectors: np.ndarray,
        *,
        truncated: np.ndarray | None = None,
    ) -> int:
        """Add vectors; those whose key is there already are left out.

        They have reached the disk when this returns. If there are more than ``max_bytes`` holds,
        the last ones are kept.

        Args:
            model: What made the vectors.
            keys: uint64 ``(n, 2)``.
            vectors: ``(n, dim)``, finite.
            truncated: Whether each text was cut, bool ``(n,)``; None for none.

        Returns:
            Number of vectors that were added.

        Raises:
            RuntimeError: If the cache is open for reading only.
            ValueError: If a vector is not finite, or shapes do not fit.
            OSError: If the disk is full; what is there stays whole.
        """
        self._writable("store")
        _check_keys(keys)
        if vectors.ndim != 2 or len(vectors) != len(keys):
            raise ValueError(f"vectors has shape {vectors.shape}, not ({len(keys)}, dim)")
        if truncated is None:
            truncated = np.zeros(len(keys), bool)
        if truncated.shape != (len(keys),):
            raise ValueError(f"truncated has shape {truncated.shape}, not ({len(keys)},)")
        with np.errstate(over="ignore"):  # float16 may overflow, which the next line finds
            rows = np.ascontiguousarray(vectors, self.dtype)
        finite = np.isfinite(rows).all(1)
        if not finite.all():
            raise ValueError(
                f"vectors[{int(np.argmin(finite))}] is not finite as {self.dtype}; leave it out"
            )
        space = self._space(model, rows.shape[1])
        if not len(keys):
            return 0
        folder = self._folder
        with self._mutex, folder.lock():
            folder.refresh()
            folder.sweep()
            _, first = np.unique(np.ascontiguousarray(keys).view("V16"), return_index=True)
            first.sort()
            left = first[self._table(space).find(keys[first]) < 0]
            if self.max_bytes is not None:
                left = left[-(self.max_bytes // space.cost) :]
            added = len(left)
            while len(left):
                segment = folder.active(space)
                part = left[: folder.limit(space) - (segment.rows if segment else 0)]
                need = len(part) * space.cost + (0 if segment else 2 * HEADER_BYTES)
                if folder.make_room(need):
                    continue  # the active segment may be gone
                try:
                    segment = segment or folder.create(space)
                    segment.append(keys[part], rows[part], truncated[part])
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                        raise
                    raise OSError(
                        error.errno, f"the cache {self.path} is full: {error.strerror}"
                    ) from error
                left = left[len(part) :]
            self._stored += added
        return added

    def stats(self) -> CacheStats:
        """Count what is on disk now and what happened through this object."""
        with self._mutex:
            self._folder.refresh()
            segments = [segment for _, segment in self._folder.segments()]
            return CacheStats(
                rows=sum(segment.rows for segment in segments),
                bytes=self._folder.bytes,
                segments=len(segments),
                models=len({segment.space.model for segment in segments}),
                hits=self._hits,
                misses=self._misses,
                stored=self._stored,
                evicted=self._folder.evicted,
                damaged=self._damaged,
            )

    def verify(self) -> list[CacheDamage]:
        """Compare the checksum of every row; return what is damaged, nothing if all is well."""
        with self._mutex:
            self._folder.refresh()
            segments, broken = self._folder.segments(), dict(self._folder.broken)
        found = [CacheDamage(f"{number:019d}", None, why) for number, why in broken.items()]
        for _, segment in segments:
            for start, _, _, good in segment.checked_chunks():
                rows = (start + np.flatnonzero(~good)).tolist()
                found += [CacheDamage(segment.name, row, "checksum differs") for row in rows]
            beyond = range(segment.rows, segment.rows + segment.missing)
            reason = "beyond the end of its vectors"
            found += [CacheDamage(segment.name, row, reason) for row in beyond]
        return sorted(found, key=lambda damage: (damage.segment, damage.row or 0))

    def compact(self) -> int:
        """Write all good rows anew and delete what is damaged, stored twice or left over.

        Readers go on meanwhile. A segment is deleted when its rows have reached the disk a second
        time, so that nothing is lost at any moment; this takes the room of one segment.

        Returns:
            Bytes that were freed.

        Raises:
            RuntimeError: If the cache is open for reading only.
            OSError: If the disk is full; no row is lost.
        """
        self._writable("compact")
        folder = self._folder
        with self._mutex, folder.lock():
            folder.refresh()
            before = folder.bytes
            folder.sweep()
            folder.delete_broken()
            targets: dict[Space, Segment] = {}
            for place, old in folder.segments():
                table = self._table(old.space)
                for start, records, vectors, good in old.checked_chunks():
                    here = (place << _ROW_BITS) + np.arange(start, start + len(records))
                    left = np.flatnonzero(good & (table.find(records["key"]) == here))
                    while len(left):
                        target = targets.get(old.space)
                        if target is None or target.rows >= folder.limit(old.space):
                            target = targets[old.space] = folder.create(old.space)
                        part = left[: folder.limit(old.space) - target.rows]
                        flags = records["truncated"][part] > 0
                        target.append(records["key"][part], vectors[part], flags)
                        left = left[len(part) :]
                folder.delete(old)
            folder.refresh()
            return before - folder.bytes

    def _space(self, model: str, dim: int) -> Space:
        if not model or "\0" in model or len(model.encode()) > MODEL_BYTES:
            raise ValueError(
                f"model={model!r} is not 1 to {MODEL_BYTES} bytes of text; use a hash of it"
            )
        if dim < 1:
            raise ValueError(f"dim={dim} is not positive")
        space = Space(model, dim, self.dtype)
        least = 2 * HEADER_BYTES + space.cost
        if self.max_bytes is not None and self.max_bytes < least:
            raise ValueError(
                f"max_bytes={self.max_bytes} does not hold one vector of {dim} entries; use at"
                f" least {least}"
            )
        return space

    def _writable(self, what: str) -> None:
        if self.readonly:
            raise RuntimeError(
                f"{what}() writes, but the cache {self.path} was opened with readonly=True"
            )

    def _table(self, space: Space) -> KeyTable:
        """The keys of a space, with what was added and deleted since the last call."""
        table = self._tables.setdefault(space, KeyTable())
        indexed = self._indexed.setdefault(space, {})
        for place in [place for place in indexed if self._folder.places[place] is None]:
            table.forget(place << _ROW_BITS, (place + 1) << _ROW_BITS)
            del indexed[place]
        for place, segment in self._folder.segments():
            start = indexed.get(place, 0)
            if segment.space == space and start < segment.rows:
                rows = start + np.flatnonzero(segment.whole(start))
                table.assign(segment.records["key"][rows], (place << _ROW_BITS) + rows)
                indexed[place] = segment.rows
        return table

    def _gather(self, values: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Copy rows into ``out`` and return their records."""
        places, rows = values >> _ROW_BITS, values & ((1 << _ROW_BITS) - 1)
        records: np.ndarray | None = None
        for place in np.unique(places).tolist():
            segment = self._folder.places[place]
            assert segment is not None  # its rows left the table with it
            part = places == place
            if part.all():
                np.take(segment.vectors, rows, axis=0, out=out, mode="clip")
                return segment.records[rows]
            if records is None:
                records = np.empty(len(values), RECORD)
            out[part] = segment.vectors[rows[part]]
            records[part] = segment.records[rows[part]]
        return np.empty(0, RECORD) if records is None else records


def _reopen(
    path: Path, max_bytes: int | None, dtype: Literal["float32", "float16"], readonly: bool
) -> EmbeddingCache:
    return EmbeddingCache(path, max_bytes=max_bytes, dtype=dtype, readonly=readonly)


@lru_cache(maxsize=8)
def _opened(path: str) -> EmbeddingCache:
    return EmbeddingCache(path)


def open_cache(cache: EmbeddingCache | str | os.PathLike[str]) -> EmbeddingCache:
    """Return a cache, opening a path only once in a process."""
    if isinstance(cache, EmbeddingCache):
        return cache
    if not isinstance(cache, (str, os.PathLike)):
        raise TypeError(f"cache={cache!r} is neither an EmbeddingCache nor a path")
    return _opened(str(Path(cache).resolve()))


def _check_keys(keys: np.ndarray) -> None:
    if keys.ndim != 2 or keys.shape[1] != 2 or keys.dtype != np.uint64:
        raise ValueError(f"keys is {keys.dtype} {keys.shape}, not uint64 (n, 2); use cache.keys()")
