"""Records that several processes share in one mapped file.

The file is a header, a table with the place of each record (0: none yet) and the records. Room for
a record is taken under a lock of the kernel, which ends with its owner; the record is written
without one, and its place in the table, one aligned word, is written last. A process that is killed
at any moment leaves room unused, never half a record that reads.
"""

import fcntl
import json
import logging
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing import reduction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

logger = logging.getLogger(__name__)

Places = npt.NDArray[np.int64]

_VERSION = 1
_MAGIC = b"TORSHSC1"
_HEADER = 1 << 16  # magic, length and checksum of the description, the description, counters
_COUNTERS = 1 << 15  # where the counters begin
_CELLS = 1024  # one pair of hits and misses for each process, so that none waits for another
_RECORD = struct.Struct("<qQ")  # size and checksum of what follows
_GROWTH = 64 << 20
_PATIENCE = 1.0  # seconds to wait for room before a sample goes by uncached


_joining = [threading.Lock()]


def _renew() -> None:
    _joining[0] = threading.Lock()  # another thread of the parent may have held the old one


os.register_at_fork(after_in_child=_renew)


class CacheFile:
    """Records 0 to `rows` - 1, each written at most once, in a file that may be anonymous.

    Args:
        descriptor: An open file, which the object then owns.
        description: What to write into the header of a file that is new; None opens one that is
            not.
        rows: How many records there may be.
        limit: Bytes that they may take together.
        path: Where the file is; None if it has no name.
    """

    def __init__(
        self,
        descriptor: int,
        description: dict[str, Any] | None = None,
        rows: int = 0,
        limit: int = 0,
        path: Path | None = None,
    ) -> None:
        self.path = path
        self._descriptor = descriptor
        if description is not None:
            self._create(description, rows, limit)
        head = os.pread(descriptor, _COUNTERS, 0)
        size, digest = struct.unpack_from("<qQ", head, 8)
        text = head[24 : 24 + max(0, size)]
        if head[:8] != _MAGIC or xxhash.xxh3_64_intdigest(text) != digest:
            raise ValueError(f"{path or 'the file'} is not a file of a SampleCache, or is damaged")
        self.description: dict[str, Any] = json.loads(text)
        self.rows, self.limit = self.description["rows"], self.description["limit"]
        self._begin = _begin(self.rows)
        self._memory = mmap.mmap(descriptor, self._begin + self.limit)
        self._view = memoryview(self._memory)
        self.places: Places = np.frombuffer(self._view, np.int64, self.rows, _HEADER)
        self._counters: Places = np.frombuffer(self._view, np.int64, 8 + 2 * _CELLS, _COUNTERS)
        self._threads = threading.Lock()
        self._owner = 0
        self._lock = self._cell = -1
        self._checked = np.zeros(self.rows, bool)

    def _create(self, description: dict[str, Any], rows: int, limit: int) -> None:
        described = description | {"version": _VERSION, "rows": rows, "limit": limit}
        text = json.dumps(described).encode()
        if len(text) > _COUNTERS - 24:
            raise ValueError(f"the samples' structure takes {len(text)} bytes to describe")
        os.ftruncate(self._descriptor, _begin(rows) + limit)
        os.posix_fallocate(self._descriptor, 0, _begin(rows))
        head = struct.pack("<qQ", len(text), xxhash.xxh3_64_intdigest(text))
        os.pwrite(self._descriptor, head + text, 8)
        os.pwrite(self._descriptor, _MAGIC, 0)

    # The counters: 0 bytes taken, 1 bytes that the file system has promised, 2 cells given out,
    # 3 and 4 whether warnings were given, from 8 on hits and misses of each process.

    @property
    def used(self) -> int:
        """Bytes that records take, those of killed writers included."""
        return int(self._counters[0])

    def warn_once(self, about: Literal["structure", "room"]) -> bool:
        """Whether the caller is the first of all processes to ask."""
        cell = 3 if about == "structure" else 4
        first = not self._counters[cell]
        self._counters[cell] = 1
        return first

    def count(self, hits: int, misses: int) -> None:
        """Add to the counts of hits and misses."""
        self._join()
        with self._threads:
            self._counters[self._cell] += hits
            self._counters[self._cell + 1] += misses

    def counts(self) -> tuple[int, int]:
        """Hits and misses of all processes."""
        cells = self._counters[8:].reshape(-1, 2).sum(0)
        return int(cells[0]), int(cells[1])

    def _join(self) -> None:
        """What a process needs of its own, after a fork too: a lock is shared with the parent."""
        if self._owner == os.getpid():
            return
        with _joining[0]:
            if self._owner != os.getpid():
                self._open_own()
                self._owner = os.getpid()  # last, for threads that look without the lock

    def _open_own(self) -> None:
        self._threads = threading.Lock()
        self._lock = os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDWR)
        self._cell = 8
        if self._acquire():
            self._cell = 8 + 2 * (int(self._counters[2]) % _CELLS)
            self._counters[2] += 1
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _acquire(self) -> bool:
        patience = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > patience:
                    return False
                time.sleep(1e-4)
            else:
                return True

    def _reserve(self, size: int) -> int | None:
        """The place of `size` bytes of room, or None if there is none."""
        with self._threads:
            if not self._acquire():
                return None
            try:
                place = int(self._counters[0])
                end = place + -(-size // 64) * 64
                if end > self.limit:
                    return None
                if end > self._counters[1] and not self._promise(end):
                    return None
                self._counters[0] = end
                return self._begin + place
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _promise(self, end: int) -> bool:
        # Writing to a mapped page that the file system has no room for is a bus error, so room is
        # asked for first, which fails with an error.
        have = int(self._counters[1])
        for wanted in (max(end, min(have + _GROWTH, self.limit)), end):
            try:
                os.posix_fallocate(self._descriptor, self._begin + have, wanted - have)
            except OSError as error:
                logger.info("no room for %d bytes: %s", wanted - have, error)
            else:
                self._counters[1] = wanted
                return True
        return False

    def write(self, row: int, table: bytes, parts: Iterable[Any], size: int) -> bool:
        """Store a record; False if there is no room or it is there already."""
        self._join()
        if self.places[row]:
            return False
        head = 64  # keeps what follows aligned
        place = self._reserve(head + size)
        if place is None:
            return False
        at = place + head
        body = self._view[at : at + size]
        body[: len(table)] = table
        end = len(table)
        for part in parts:
            begin = -(-end // 64) * 64
            body[end:begin] = bytes(begin - end)
            end = begin + len(part)
            body[begin:end] = memoryview(part)
        _RECORD.pack_into(self._view, place, size, self._digest(row, body))
        self.places[row] = place  # last: from here on the record exists
        return True

    def read(self, row: int) -> memoryview | None:
        """The record of a row, or None if there is none.

        A process checks each record once, when it first reads it; a damaged one is as none.
        """
        place = int(self.places[row])
        if not place:
            return None
        if not self._begin <= place <= self._begin + self.limit - 64:
            return self._drop(row)
        size, digest = _RECORD.unpack_from(self._view, place)
        if size < 0 or place + 64 + size > self._begin + self.limit:
            return self._drop(row)
        body = self._view[place + 64 : place + 64 + size]
        if not self._checked[row]:
            if self._digest(row, body) != digest:
                return self._drop(row)
            self._checked[row] = True
        return body

    def _drop(self, row: int) -> None:
        logger.warning("the cached sample %d is damaged; it is read anew", row)
        self.places[row] = 0

    @staticmethod
    def _digest(row: int, body: memoryview) -> int:
        return xxhash.xxh3_64_intdigest(body, seed=row)

    def recover(self) -> None:
        """Put a file that no other process has open in order, after a crash of the machine."""
        for row in self._from_the_end():
            body = self.read(row)
            if body is not None:  # the last record that is whole: room is free behind it
                end = int(self.places[row]) + 64 + len(body) - self._begin
                self._counters[0] = max(self.used, -(-end // 64) * 64)
                break
        self._counters[1] = 0  # the promise is asked for anew, which costs nothing where it holds

    def _from_the_end(self) -> Iterator[int]:
        yield int(self.places.argmax())  # as a rule it is whole, and nothing has to be sorted
        stored = np.flatnonzero(self.places)
        yield from map(int, stored[self.places[stored].argsort()[::-1]])

    def close(self) -> None:
        """Let go of the file; arrays and records of it must not be used any more."""
        if self._descriptor < 0:
            return
        self.places = self._counters = np.empty(0, np.int64)
        self._view.release()
        self._memory.close()
        os.close(self._descriptor)
        if self._owner == os.getpid():
            os.close(self._lock)
        self._descriptor = -1

    def __getstate__(self) -> dict[str, Any]:
        if self.path is None:
            return {"path": None, "descriptor": reduction.DupFd(self._descriptor)}
        return {"path": self.path, "descriptor": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        path, handle = state["path"], state["descriptor"]
        descriptor = os.open(path, os.O_RDWR) if handle is None else handle.detach()
        self.__init__(descriptor, path=path)


def _begin(rows: int) -> int:
    """Where the records begin: after the header and the table, on a page."""
    page = 4096
    return -(-(_HEADER + 8 * rows) // page) * page
