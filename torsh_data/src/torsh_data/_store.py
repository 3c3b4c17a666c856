"""The cache of a node: pieces of files that were fetched or decoded, shared by all its processes.

A piece is a file under a name that is the hash of what it holds, with a checksum at its end. It is
written under another name, synced and renamed, so whatever is found is whole; a process that is
killed leaves nothing but a name ending in `.tmp`, which the next cleaning removes.

All locks are bytes of one file, `.lock`, locked by the kernel for an open file and not for a
process (open file description locks), so they end with their owner and cost no file each:

* two bytes for each piece: one is locked by who makes it, the other is shared by those who read it;
* one for the number of bytes in use, which is the contents of the file.

Pieces that nobody has used for longest make room when the limit is reached, those to `keep` after
the others, and never one that a process has mapped.
"""

import errno
import fcntl
import io
import logging
import os
import struct
import threading
import warnings
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import xxhash

from torsh_data._mapping import Mapping
from torsh_data._sizes import format_bytes

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_MARK = b"torsh-data part1"
_TRAILER = len(_MARK) + 8
_LEDGER_BYTE = 64
_FIRST_BYTE = 128
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SLACK = 20  # an eviction frees a twentieth of the limit, so that not every piece needs one


class View(NamedTuple):
    """Bytes, and whether they take memory instead of lying in a file."""

    content: pa.Buffer
    in_memory: bool


class Sink(io.RawIOBase):
    """A file that is written from front to end, and its checksum."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = xxhash.xxh3_64()
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._hash.update(view)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def restart(self) -> None:
        """Forget what was written."""
        self._file.seek(0)
        self._file.truncate()
        self._hash, self._size = xxhash.xxh3_64(), 0

    def digest(self) -> bytes:
        """The checksum of what was written."""
        return self._hash.digest()


Make = Callable[[Sink], None]


class Store:
    """A folder of pieces with a limit to their size.

    Args:
        folder: Made if absent. Any number of processes and data sets may share it; each keeps to
            its own `limit` for the whole of the folder.
        limit: In bytes.
        release: Called when room is needed: lets go of what this process has mapped.
    """

    def __init__(self, folder: Path, limit: int, release: Callable[[], None] | None = None) -> None:
        self.folder, self.limit, self.release = folder, limit, release
        folder.mkdir(parents=True, exist_ok=True)
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._readers = _Readers(self.folder / _LOCK)
        self._mapped: weakref.WeakValueDictionary[str, Mapping] = weakref.WeakValueDictionary()
        self._checked: set[str] = set()
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "limit": self.limit, "release": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def view(self, key: str, make: Make, size: int, *, keep: bool = False) -> View:
        """The bytes of a piece, made if it is not there yet.

        Args:
            key: What the piece is; other contents need another key.
            make: Writes the piece.
            size: About as many bytes as that will be.
            keep: Remove it to make room only after all others.
        """
        if os.getpid() != self._process:  # forked: the locks are those of the parent
            self._start()
        name = _name(key, keep)
        for _ in range(3):
            mapping = self._mapped.get(name) or self._map(name)
            if mapping is not None:
                return View(mapping.buffer()[: mapping.size - _TRAILER], in_memory=False)
            if not self._make(name, make, size):
                break
        memory = io.BytesIO()
        make(Sink(memory))
        return View(pa.py_buffer(memory.getbuffer()), in_memory=True)

    def prepare(self, key: str, make: Make, size: int, *, keep: bool = False) -> None:
        """Make a piece that will be read later, or note that it will be."""
        name = _name(key, keep)
        try:
            os.utime(self.folder / name)
        except FileNotFoundError:
            self._make(name, make, size, ahead=True)

    def has(self, key: str, *, keep: bool = False) -> bool:
        """Whether a piece is there now."""
        return (self.folder / _name(key, keep)).exists()

    def forget(self, key: str, *, keep: bool = False) -> None:
        """Remove a piece whose contents are not what they should be."""
        name = _name(key, keep)
        self._mapped.pop(name, None)
        self._checked.discard(name)
        (self.folder / name).unlink(missing_ok=True)

    def _map(self, name: str) -> Mapping | None:
        lease = self._readers.lease(_reading_byte(name))
        path = self.folder / name
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            lease()
            return None
        try:
            mapping = Mapping(descriptor, os.fstat(descriptor).st_size, lease)
        except OSError:
            lease()
            raise
        finally:
            os.close(descriptor)
        if name not in self._checked:
            if not _is_whole(mapping.buffer()):
                logger.warning("%s is damaged; making it anew", path)
                path.unlink(missing_ok=True)
                return None
            self._checked.add(name)
        with suppress(OSError):
            os.utime(path)  # the time of the last use: many file systems keep none
        self._mapped[name] = mapping
        return mapping

    def _make(self, name: str, make: Make, size: int, *, ahead: bool = False) -> bool:
        """Make a piece, or wait for who is making it; False if there is no room."""
        path = self.folder / name
        with _locked(self.folder / _LOCK, _reading_byte(name) + 1):
            if path.exists():
                return True
            temporary = path.with_suffix(".tmp")
            taken = size + _TRAILER
            if not self._reserve(temporary, taken, ahead):
                if ahead:
                    return False
                return self._no_room(f"cache_bytes={format_bytes(self.limit)} is in use")
            try:
                try:
                    _write(temporary, make, taken)
                except OSError as error:
                    if error.errno not in _FULL:
                        raise
                    with self._ledger() as ledger:
                        ledger.used = self._evict(0, at_least=taken)
                    _write(temporary, make, taken)
            except BaseException as error:
                with self._ledger() as ledger:
                    temporary.unlink(missing_ok=True)
                    ledger.used -= taken
                if isinstance(error, OSError) and error.errno in _FULL:
                    return self._no_room(f"the disk under {self.folder} is full")
                raise
            with self._ledger() as ledger:
                ledger.used += temporary.stat().st_size - taken
                temporary.replace(path)
        return True

    def _no_room(self, why: str) -> bool:
        if not self._warned:
            warnings.warn(
                f"{why}: reading through memory, and again for each use; give cache_bytes= more, "
                "or use a smaller window",
                stacklevel=2,
            )
            self._warned = True
        return False

    def _reserve(self, temporary: Path, size: int, ahead: bool) -> bool:
        if size > self.limit:
            return False
        for attempt in range(2):
            with self._ledger() as ledger:
                if ledger.used + size > self.limit:
                    ledger.used = self._evict(self.limit - size)
                if ledger.used + size <= self.limit:
                    ledger.used += size
                    with temporary.open("wb") as file:
                        file.truncate(size)  # seen by whoever counts what there is
                    return True
            if attempt == 0 and self.release is not None and not ahead:
                self.release()
        return False

    def _evict(self, goal: int, at_least: int = 0) -> int:
        """Remove the pieces unused for longest until `goal` bytes are left; returns what is."""
        found: list[tuple[bool, int, str, int]] = []
        total = 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.name.endswith(".tmp") and self._remove(entry.name, making=True):
                        continue
                    if entry.name != _LOCK:
                        status = entry.stat()
                        total += status.st_size
                        kept = entry.name.endswith(".keep")
                        if kept or entry.name.endswith(".part"):
                            found.append((kept, status.st_mtime_ns, entry.name, status.st_size))
        if at_least:
            goal = total - at_least
        elif total > goal:
            goal -= min(self.limit // _SLACK, goal)
        for _, _, name, size in sorted(found):
            if total <= goal:
                break
            if self._remove(name):
                total -= size
        return total

    def _remove(self, name: str, *, making: bool = False) -> bool:
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR)
        try:
            _lock(descriptor, fcntl.F_WRLCK, _reading_byte(name) + making, wait=False)
        except BlockingIOError:
            return False
        else:
            try:
                (self.folder / name).unlink(missing_ok=True)
            finally:
                _unlock(descriptor, _reading_byte(name) + making)
            return True
        finally:
            os.close(descriptor)

    @contextmanager
    def _ledger(self) -> Generator["_Ledger"]:
        with _locked(self.folder / _LOCK, _LEDGER_BYTE) as descriptor:
            ledger = _Ledger(int.from_bytes(os.pread(descriptor, 8, 0), "little", signed=True))
            yield ledger
            os.pwrite(descriptor, max(0, ledger.used).to_bytes(8, "little", signed=True), 0)


class _Ledger:
    """How many bytes the pieces take; set right whenever room is made."""

    def __init__(self, used: int) -> None:
        self.used = used


class _Readers:
    """This process's shared locks on the pieces that it has mapped."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._process = os.getpid()
        self._counts: dict[int, int] = {}
        self._mutex = threading.RLock()  # a mapping may be freed while this thread holds it

    def lease(self, byte: int) -> Callable[[], None]:
        """Keep a piece from being removed until what is returned is called."""
        with self._mutex:
            if byte not in self._counts:
                _lock(self._descriptor, fcntl.F_RDLCK, byte, wait=True)
            self._counts[byte] = self._counts.get(byte, 0) + 1
        return lambda: self._release(byte)

    def _release(self, byte: int) -> None:
        if os.getpid() != self._process:  # a forked child does not own its parent's lock
            return
        with self._mutex:
            self._counts[byte] -= 1
            if not self._counts[byte]:
                del self._counts[byte]
                _unlock(self._descriptor, byte)

    def __del__(self) -> None:
        os.close(self._descriptor)


def _name(key: str, keep: bool = False) -> str:
    return xxhash.xxh3_128_hexdigest(key.encode()) + (".keep" if keep else ".part")


def _reading_byte(name: str) -> int:
    return _FIRST_BYTE + 2 * int(name[:15], 16)


def _lock(descriptor: int, kind: int, byte: int, *, wait: bool) -> None:
    request = struct.pack("hhqqi0q", kind, os.SEEK_SET, byte, 1, 0)
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, request)


def _unlock(descriptor: int, byte: int) -> None:
    # closing is not enough: a process that was forked meanwhile holds the same open file
    _lock(descriptor, fcntl.F_UNLCK, byte, wait=False)


@contextmanager
def _locked(path: Path, byte: int) -> Generator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # its own: keeps threads apart, too
    try:
        _lock(descriptor, fcntl.F_WRLCK, byte, wait=True)
        try:
            yield descriptor
        finally:
            _unlock(descriptor, byte)
    finally:
        os.close(descriptor)


def _write(temporary: Path, make: Make, size: int) -> None:
    with temporary.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk is known before the work
        sink = Sink(file)
        make(sink)
        file.write(_MARK + sink.digest())
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def _is_whole(content: pa.Buffer) -> bool:
    size = content.size - _TRAILER
    if size < 0 or content[size : size + len(_MARK)].to_pybytes() != _MARK:
        return False
    found = xxhash.xxh3_64_digest(memoryview(content)[:size])
    return found == content[size + len(_MARK) :].to_pybytes()
