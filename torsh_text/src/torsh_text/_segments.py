"""The files of an embedding cache: segments of vectors, each with a log of its keys.

A segment is a pair of files that only grow. ``ID.vectors`` is a header and rows of vectors;
``ID.keys`` is a header and one record of 32 bytes for each row. A row is there once its record
is: vectors reach the disk first, so whatever a crash leaves behind the last record is no row.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ._writing import sync

VERSION = 1
KEYS, VECTORS = ".keys", ".vectors"
MAGIC = {KEYS: b"\x89TTKEYS\n", VECTORS: b"\x89TTVECS\n"}
RECORD = np.dtype([("key", "<u8", (2,)), ("row", "<u8"), ("truncated", "<u4"), ("crc", "<u4")])
_SEALED = RECORD.itemsize - 4  # bytes of a record that its checksum covers, with the vector
_FIELDS = struct.Struct("<8sII8sQ92s")  # magic, version, dim, dtype, id of the segment, model
HEADER_BYTES = _FIELDS.size + 4  # and the checksum of these; every version keeps this size
MODEL_BYTES = 92
_CHUNK = 8192


class DamagedFileError(ValueError):
    """A file of a cache whose header does not hold together."""


@dataclass(frozen=True)
class Space:
    """Vectors that belong together: of one model, one size and one stored dtype."""

    model: str
    dim: int
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one vector."""
        return self.dim * np.dtype(self.dtype).itemsize

    @property
    def cost(self) -> int:
        """Bytes that one vector takes on disk, its record included."""
        return self.row_bytes + RECORD.itemsize


def _bytes_of(data: np.ndarray) -> memoryview:
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data


def _write_all(handle: int, view: memoryview, offset: int) -> None:
    """Write all of the data, which one call need not do."""
    while len(view):
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


def row_checksums(records: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Checksums of rows: CRC-32 of key, row number, flag and vector, uint32 ``(rows,)``."""
    heads, rows = _bytes_of(records), _bytes_of(vectors)
    step, size, crc32 = RECORD.itemsize, len(rows) // max(1, len(records)), zlib.crc32
    sums = (
        crc32(rows[i * size : (i + 1) * size], crc32(heads[i * step : i * step + _SEALED]))
        for i in range(len(records))
    )
    return np.fromiter(sums, np.uint32, count=len(records))


def _pack_header(suffix: str, space: Space, number: int) -> bytes:
    fields = _FIELDS.pack(
        MAGIC[suffix],
        VERSION,
        space.dim,
        np.dtype(space.dtype).str.encode(),
        number,
        space.model.encode(),
    )
    return fields + struct.pack("<I", zlib.crc32(fields))


def _read_header(path: Path) -> Space:
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        raise DamagedFileError("it ends within its header")
    magic, version, dim, dtype, number, model = _FIELDS.unpack(header[:-4])
    if magic != MAGIC[path.suffix]:
        raise ValueError(
            f"{path} is no file of an embedding cache (it begins with {magic!r}); remove it or use"
            " another folder"
        )
    if struct.pack("<I", zlib.crc32(header[:-4])) != header[-4:]:
        raise DamagedFileError("its header does not match its checksum")
    if version != VERSION:
        raise ValueError(
            f"{path} has version {version} of the format, this package reads version {VERSION};"
            " upgrade torsh-text or use another folder"
        )
    if number != int(path.stem):
        raise DamagedFileError(f"its header names segment {number}")
    return Space(model.rstrip(b"\0").decode(), dim, np.dtype(dtype.rstrip(b"\0").decode()).name)


class Segment:
    """One pair of files, read through memory maps and appended to under the cache's lock.

    Args:
        keys_path: Its ``.keys`` file.

    Attributes:
        space: What its vectors are.
        rows: Rows that are finished.
        records: Records of these rows, a memory map.
        vectors: The rows themselves, ``(rows, dim)``, a memory map.
        missing: Records whose vectors are beyond the end of their file.

    Raises:
        DamagedFileError: If a header is damaged.
        ValueError: If a file is foreign or of another version; the message names it.
        FileNotFoundError: If the segment is not there any more.
    """

    def __init__(self, keys_path: Path) -> None:
        self.number = int(keys_path.stem)
        self._keys_path = keys_path
        self._vectors_path = keys_path.with_suffix(VECTORS)
        self.space = _read_header(keys_path)
        if _read_header(self._vectors_path) != self.space:
            raise DamagedFileError("its two headers differ")
        self.rows = self.missing = 0
        self.records: np.ndarray = np.empty(0, RECORD)
        self.vectors: np.ndarray = np.empty((0, self.space.dim), self.space.dtype)
        self.grow()

    @classmethod
    def create(cls, folder: Path, space: Space, number: int) -> "Segment":
        """Make an empty segment; its keys file appears complete or not at all."""
        path = folder / f"{number:019d}{KEYS}"
        hidden = path.with_suffix(".new")
        try:
            for target, suffix in ((path.with_suffix(VECTORS), VECTORS), (hidden, KEYS)):
                handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
                try:
                    _write_all(handle, memoryview(_pack_header(suffix, space, number)), 0)
                    os.fsync(handle)
                finally:
                    os.close(handle)
            hidden.rename(path)
            sync(folder)
        except OSError:
            for target in (path, hidden, path.with_suffix(VECTORS)):
                target.unlink(missing_ok=True)
            raise
        return cls(path)

    @property
    def name(self) -> str:
        """Stem of the file names."""
        return self._keys_path.stem

    def grow(self) -> bool:
        """Map the rows that were finished since the last look; False if some went away."""
        told = (self._keys_path.stat().st_size - HEADER_BYTES) // RECORD.itemsize
        room = (self._vectors_path.stat().st_size - HEADER_BYTES) // self.space.row_bytes
        rows, self.missing = max(0, min(told, room)), max(0, told - room)
        if rows <= self.rows:
            return rows == self.rows
        shape = (rows, self.space.dim)
        dtype = np.dtype(self.space.dtype)
        # plain arrays over the maps: indexing np.memmap itself costs more
        self.records = np.asarray(np.memmap(self._keys_path, RECORD, "r", HEADER_BYTES, (rows,)))
        self.vectors = np.asarray(np.memmap(self._vectors_path, dtype, "r", HEADER_BYTES, shape))
        self.rows = rows
        return True

    def whole(self, start: int = 0) -> np.ndarray:
        """Whether each record from ``start`` on is the one written for its row."""
        records = self.records[start:]
        return (records["row"] == np.arange(start, self.rows)) & (records["truncated"] <= 1)

    def checked_chunks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Yield ``(first row, records, vectors, whether each is whole)``, bit by bit."""
        whole = self.whole()
        for start in range(0, self.rows, _CHUNK):
            stop = min(start + _CHUNK, self.rows)
            records, vectors = self.records[start:stop], self.vectors[start:stop]
            good = whole[start:stop] & (row_checksums(records, vectors) == records["crc"])
            yield start, records, vectors, good

    def append(self, keys: np.ndarray, vectors: np.ndarray, truncated: np.ndarray) -> None:
        """Add rows behind the finished ones; first cut off what a dead writer left there.

        If the disk is full, the rows whose records were written stay: a reader may have mapped
        them, and would be killed if they were taken back.
        """
        records = np.zeros(len(keys), RECORD)
        records["key"], records["truncated"] = keys, truncated
        records["row"] = np.arange(self.rows, self.rows + len(keys))
        records["crc"] = row_checksums(records, vectors)
        ends = (
            HEADER_BYTES + self.rows * self.space.row_bytes,
            HEADER_BYTES + self.rows * RECORD.itemsize,
        )
        paths = (self._vectors_path, self._keys_path)
        for path, data, end in zip(paths, (vectors, records), ends, strict=True):
            handle = os.open(path, os.O_WRONLY)
            try:
                os.ftruncate(handle, end)
                _write_all(handle, _bytes_of(data), end)
                os.fsync(handle)
            except OSError:
                self.grow()
                os.truncate(self._vectors_path, HEADER_BYTES + self.rows * self.space.row_bytes)
                raise
            finally:
                os.close(handle)
        self.grow()
