"""The folder of an embedding cache: which segments it has, and who may change them."""

import errno
import logging
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ._segments import HEADER_BYTES, KEYS, VECTORS, DamagedFileError, Segment, Space

logger = logging.getLogger(__name__)

LOCK = "torsh-text-cache.lock"  # marks the folder as a cache, too
_FILE = re.compile(rf"(\d{{19}})({re.escape(KEYS)}|{re.escape(VECTORS)}|\.new)")
_SEGMENT_BYTES = 256 << 20
_SHARES = 16  # segments of a full cache, at least: eviction takes one at a time


class CacheFolder:
    """Segments on disk as this process last saw them.

    Args:
        path: The folder.
        max_bytes: Most bytes of all files, or None.
        readonly: Whether the folder must be there already.

    Attributes:
        places: Every segment this object has seen, in the order of seeing; a segment keeps its
            place, and None takes it when the segment is gone.
        broken: Segments that cannot be read, and why.
        bytes: Sizes of all files.
        evicted: Rows deleted to stay within ``max_bytes``.
    """

    def __init__(self, path: Path, *, max_bytes: int | None, readonly: bool) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.places: list[Segment | None] = []
        self.broken: dict[int, str] = {}
        self.bytes = self.evicted = 0
        self._numbers: dict[int, int] = {}  # number of a segment to its place
        if not path.exists():
            if readonly:
                raise FileNotFoundError(
                    f"there is no cache at {path}, and readonly=True does not make one"
                )
            return
        if not path.is_dir():
            raise ValueError(f"{path} is a file; a cache is a folder")
        names = sorted(entry.name for entry in os.scandir(path))
        if names and LOCK not in names:
            raise ValueError(
                f"{path} holds other files, such as {names[0]!r}; name a new or empty folder"
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Wait until no other process writes; the system frees the lock of a dead one."""
        import fcntl

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # opened anew each time, so that no forked child shares it
            handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise PermissionError(
                error.errno, f"the cache {self.path} cannot be written; use readonly=True"
            ) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("waiting for another process that writes to %s", self.path)
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def refresh(self) -> None:
        """See what other processes added and deleted."""
        # a writer that compacts may delete what was just listed: then list again
        while not self._see(self._sizes()):
            pass

    def segments(self) -> list[tuple[int, Segment]]:
        """All segments with their places, the oldest first."""
        found = [(i, segment) for i, segment in enumerate(self.places) if segment is not None]
        return sorted(found, key=lambda item: item[1].number)

    def limit(self, space: Space) -> int:
        """Rows of a full segment."""
        size = _SEGMENT_BYTES
        if self.max_bytes is not None:
            size = min(size, self.max_bytes // _SHARES)
        return max(1, (size - 2 * HEADER_BYTES) // space.cost)

    def active(self, space: Space) -> Segment | None:
        """The segment that takes new rows: the newest of its space, if it has room."""
        mine = [segment for _, segment in self.segments() if segment.space == space]
        return mine[-1] if mine and mine[-1].rows < self.limit(space) else None

    def create(self, space: Space) -> Segment:
        """Start a segment; under the lock."""
        # names are times, so that none is used again after all segments were deleted
        newest = max([*self._numbers, *self.broken], default=0)
        segment = Segment.create(self.path, space, max(newest + 1, time.time_ns()))
        self._add(segment)
        return segment

    def sweep(self) -> None:
        """Delete what a killed writer left; only under the lock is nobody at work on it."""
        names = self._sizes()
        for name in names:
            if name.endswith(".new") or (
                name.endswith(VECTORS) and name.replace(VECTORS, KEYS) not in names
            ):
                (self.path / name).unlink(missing_ok=True)

    def make_room(self, need: int) -> bool:
        """Delete the oldest segments until ``need`` more bytes fit; say whether any was."""
        done = False
        while self.max_bytes is not None and self._total() + need > self.max_bytes:
            if self.broken:
                self.delete_broken()
            else:
                _, oldest = self.segments()[0]
                self.evicted += oldest.rows
                self.delete(oldest)
            done = True
        return done

    def delete(self, segment: Segment) -> None:
        """Delete the files of a segment; maps that others hold stay readable."""
        self._unlink(segment.number)
        self._retire(segment.number)

    def delete_broken(self) -> None:
        """Delete the segments that cannot be read."""
        for number in self.broken:
            self._unlink(number)
        self.broken = {}

    def _sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    if _FILE.fullmatch(entry.name):
                        try:
                            sizes[entry.name] = entry.stat().st_size
                        except FileNotFoundError:  # deleted since the listing
                            continue
        except FileNotFoundError:
            pass
        return sizes

    def _total(self) -> int:
        return sum(self._sizes().values())

    def _see(self, sizes: dict[str, int]) -> bool:
        self.bytes = sum(sizes.values())
        numbers = {int(name[:19]) for name in sizes if name.endswith(KEYS)}
        for number in set(self._numbers) - numbers:
            self._retire(number)
        self.broken = {number: why for number, why in self.broken.items() if number in numbers}
        for number in sorted(numbers - set(self.broken)):
            path = self.path / f"{number:019d}{KEYS}"
            try:
                known = self.places[self._numbers[number]] if number in self._numbers else None
                if known is not None and not known.grow():
                    self._retire(number)  # somebody cut its files: reading its maps would kill
                    known = None
                if known is None:
                    self._add(Segment(path))
            except FileNotFoundError:
                if not path.exists():
                    return False
                self._set_aside(number, "its vectors are not there")
            except DamagedFileError as error:
                self._set_aside(number, str(error))
        return True

    def _add(self, segment: Segment) -> None:
        self._numbers[segment.number] = len(self.places)
        self.places.append(segment)

    def _set_aside(self, number: int, why: str) -> None:
        self.broken[number] = why
        if number in self._numbers:
            self._retire(number)
        warnings.warn(
            f"segment {number:019d} of the cache {self.path} is damaged and not used: {why};"
            " compact() deletes it",
            stacklevel=2,
        )

    def _retire(self, number: int) -> None:
        self.places[self._numbers.pop(number)] = None

    def _unlink(self, number: int) -> None:
        """Delete keys first: vectors without keys are nothing, to readers and to sweep()."""
        for suffix in (KEYS, VECTORS):
            (self.path / f"{number:019d}{suffix}").unlink(missing_ok=True)
