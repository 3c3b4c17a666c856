"""Files that a data set is read from: on a disk of this machine, or behind a URL.

Whatever a format needs of a file, it asks for as ranges of bytes. A local file is mapped as a
whole. Of a remote one the ranges are fetched once per node into the store; where a server knows no
ranges, or a format must see everything, the whole file is.
"""

import io
import os
import random
import shutil
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow as pa

from torsh_data import _mapping
from torsh_data._store import Sink, Store, View

_T = TypeVar("_T")
Check = Callable[[memoryview], str | None]  # what is wrong with the bytes, if anything

ATTEMPTS = 5
FIRST_DELAY = 0.5  # seconds; doubled after each attempt
_CHUNK = 8 << 20
# What another attempt will not mend. Everything else may be the network.
_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    TypeError,
    AttributeError,
    NotImplementedError,
    MemoryError,
)
_PASSING_STATUS = {408, 425, 429}
_MISSING_STATUS = {404, 410}
_NO_CREDENTIALS = {  # by name: of packages that need not be there
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "DefaultCredentialsError",
    "ClientAuthenticationError",
}


class FetchError(OSError):
    """A remote file that could not be read, after all attempts."""


class UnreachableError(FetchError):
    """A remote file whose server does not answer, or not as it should."""


class AccessError(FetchError, PermissionError):
    """A remote file that the server does not let us read."""


class DataFile(ABC):
    """One file of a data set."""

    name: str
    """Path or URL, as errors name it."""
    size: int
    identity: str
    """Changes when the contents may have."""

    @abstractmethod
    def part(self, start: int, end: int, check: Check | None = None) -> View:
        """The bytes from `start` to `end`; `check` is asked about what was fetched anew."""

    @abstractmethod
    def whole(self) -> View:
        """All bytes."""

    def prepare(self, start: int, end: int, check: Check | None = None) -> None:
        """Fetch what `part` will be asked for."""
        del start, end, check

    def refetch(self, start: int, end: int) -> bool:
        """Forget what was fetched of a damaged range; False if there is no other copy of it."""
        del start, end
        return False

    @abstractmethod
    def open(self) -> Any:
        """The file as pyarrow reads it, from any place to any other."""


class LocalFile(DataFile):
    """A file on a disk of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        status = path.stat()
        self.size = status.st_size
        self.identity = f"{path.absolute()}:{self.size}:{status.st_mtime_ns}"
        self._mapping: weakref.ref[_mapping.Mapping] | None = None

    def whole(self) -> View:
        # Weak, so that the file is mapped for as long as somebody uses it: what a mapping costs
        # the kernel (a 512th of what was read) comes back only when it ends.
        mapping = None if self._mapping is None else self._mapping()
        if mapping is None:
            mapping = _mapping.map_file(self.path)
            self._mapping = weakref.ref(mapping)
        return View(mapping.buffer(), in_memory=False)

    def part(self, start: int, end: int, check: Check | None = None) -> View:
        del check
        content = self.whole().content
        if not 0 <= start <= end <= content.size:
            raise RuntimeError(
                f"{self.name} has {content.size} bytes, bytes {start} to {end} are needed; the "
                "file was cut short or replaced"
            )
        return View(content[start:end], in_memory=False)

    def open(self) -> Any:
        return str(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapping": None}


class Remote:
    """A file system behind URLs; made anew in each process, since few survive a fork."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.url, self.options = url, dict(options)
        self.has_ranges = True
        self._made: tuple[int, Any, str] | None = None

    def _make(self) -> tuple[int, Any, str]:
        from fsspec.core import url_to_fs

        if self._made is None or self._made[0] != os.getpid():
            try:
                system, path = url_to_fs(self.url, **self.options)
            except ImportError as error:
                raise _explain_import(self.url, error) from error
            except ValueError as error:
                raise ValueError(f"source={self.url!r}: {error}") from error
            self._made = os.getpid(), system, cast("str", path)
        return self._made

    @property
    def system(self) -> Any:
        """The fsspec file system."""
        return self._make()[1]

    @property
    def path(self) -> str:
        """The URL's path in it."""
        return self._make()[2]

    def name(self, path: str) -> str:
        """The URL of a path."""
        return str(self.system.unstrip_protocol(path))

    def retry(self, action: Callable[[], _T], name: str, if_missing: str = "check the URL") -> _T:
        """Do something that may fail for a while: twice as long a pause after each attempt."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return _uncovered(action)
            except _PERMANENT as error:
                if isinstance(error, FileNotFoundError):
                    raise FileNotFoundError(f"{name} is missing; {if_missing}") from error
                if isinstance(error, PermissionError):
                    raise AccessError(
                        f"{name}: the server refuses access ({error}); check that the credentials "
                        "in storage_options, or else in the environment, are right and may read it"
                    ) from error
                if isinstance(error, TypeError) and self.options:
                    raise TypeError(
                        f"{name}: {error}; is one of storage_options {sorted(self.options)} "
                        "unknown to this file system?"
                    ) from error
                raise
            except Exception as error:
                if type(error).__name__ in _NO_CREDENTIALS:
                    raise AccessError(
                        f"{name} needs credentials ({error}); give them in storage_options, such "
                        "as {'key': ..., 'secret': ...} for s3://, or set them up as for the "
                        "cloud's own tools; {'anon': True} reads public data"
                    ) from error
                status = getattr(error, "status", None)
                refused = isinstance(status, int) and 400 <= status < 500
                if refused and status not in _PASSING_STATUS:
                    raise FetchError(f"{name}: the server says {status}: {error}") from error
                if attempt == ATTEMPTS:
                    raise UnreachableError(
                        f"{name} could not be read in {ATTEMPTS} attempts; the last one ended "
                        f"with {type(error).__name__}: {error}"
                    ) from error
                # jitter: a thousand readers that failed together must not come back together
                time.sleep(FIRST_DELAY * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))  # noqa: S311
        raise AssertionError

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}


def _uncovered(action: Callable[[], _T]) -> _T:
    """Do something, and fail as it really did."""
    try:
        return action()
    except FileNotFoundError as error:
        cause = error.__cause__  # of an http:// file, whatever kept its size from being known
        is_http = type(cause).__module__.partition(".")[0] == "aiohttp"
        if isinstance(cause, TimeoutError) or (
            is_http and getattr(cause, "status", None) not in _MISSING_STATUS
        ):
            raise cast("Exception", cause) from None
        raise


def _explain_import(url: str, error: ImportError) -> ImportError:
    from fsspec.registry import known_implementations

    known = known_implementations.get(url.partition("://")[0].rpartition("::")[2], {})
    package = str(known.get("class", "fsspec")).partition(".")[0]
    if "aiohttp" in str(error):
        package = "'torsh-data[remote]'"
    if package == "fsspec":
        return ImportError(f"source={url!r}: {error}")
    return ImportError(f"source={url!r} needs another package: pip install {package}")


class RemoteFile(DataFile):
    """A file behind a URL."""

    def __init__(self, remote: Remote, store: Store, path: str, size: int, version: str) -> None:
        self.remote, self.store, self.path, self.size = remote, store, path, size
        self.name = remote.name(path)
        self.identity = f"{self.name}:{size}:{version}"

    def whole(self) -> View:
        return self.store.view(self.identity, self._fetch_whole, self.size)

    def part(self, start: int, end: int, check: Check | None = None) -> View:
        if not self._is_in_parts():
            view = self.whole()
            return View(view.content[start:end], view.in_memory)
        key, make = self._part(start, end, check)
        try:
            return self.store.view(key, make, end - start)
        except _NoRangesError:
            return self.part(start, end, check)

    def prepare(self, start: int, end: int, check: Check | None = None) -> None:
        if self._is_in_parts():
            key, make = self._part(start, end, check)
            try:
                self.store.prepare(key, make, end - start)
            except _NoRangesError:
                pass
            else:
                return
        self.store.prepare(self.identity, self._fetch_whole, self.size)

    def refetch(self, start: int, end: int) -> bool:
        self.store.forget(self._part(start, end, None)[0])
        self.store.forget(self.identity)
        return True

    def _is_in_parts(self) -> bool:
        return self.remote.has_ranges and not self.store.has(self.identity)

    def _part(
        self, start: int, end: int, check: Check | None
    ) -> tuple[str, Callable[[Sink], None]]:
        def make(sink: Sink) -> None:
            for is_last in (False, True):
                content = self._retry(lambda: self._fetch(start, end))
                damage = None if check is None else check(memoryview(content))
                if damage is None:
                    sink.write(content)
                    return
                if is_last:
                    raise RuntimeError(f"{damage} (fetched twice)")

        return f"{self.identity}:{start}:{end}", make

    def _retry(self, action: Callable[[], _T]) -> _T:
        listed = "it was listed when the data set was opened; put it back"
        return self.remote.retry(action, self.name, listed)

    def _fetch(self, start: int, end: int) -> bytes:
        content = cast("bytes", self.remote.system.cat_file(self.path, start=start, end=end))
        if len(content) == end - start:
            return content
        if len(content) == self.size:  # the server did not look at the range
            self.remote.has_ranges = False
            raise _NoRangesError
        raise ConnectionError(f"bytes {start} to {end} came as {len(content)} bytes")

    def _fetch_whole(self, sink: Sink) -> None:
        def fetch() -> None:
            sink.restart()
            with self.remote.system.open(self.path, "rb") as file:
                shutil.copyfileobj(file, cast("Any", sink), _CHUNK)
            if sink.tell() != self.size:
                raise ConnectionError(f"came as {sink.tell()} bytes, expected {self.size}")

        self._retry(fetch)

    def open(self) -> Any:
        if not self._is_in_parts():
            return pa.BufferReader(self.whole().content)
        return pa.PythonFile(_Ranges(self), "r")


class _NoRangesError(NotImplementedError):
    """The server sends whole files alone."""


class _Ranges(io.RawIOBase):
    """A remote file from any place to any other, one request for each read; nothing is kept."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._file.size}[whence]
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> bytes:
        file = self._file
        end = file.size if size < 0 else min(self._place + size, file.size)
        start, self._place = self._place, max(end, self._place)
        if start >= end:
            return b""
        try:
            return file._retry(lambda: file._fetch(start, end))
        except _NoRangesError:
            return file.part(start, end).content.to_pybytes()
