"""Files mapped into memory without keeping them open.

`mmap.mmap` keeps a file descriptor for as long as the mapping lives, and a process may have 1024 of
these by default: too few for a data set of many shards. The kernel itself needs none.
"""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

_PROT_READ, _MAP_SHARED = 1, 1
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_longlong,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Mapping:
    """A file's bytes, read-only; unmapped when nothing refers to them any more."""

    def __init__(
        self, descriptor: int, size: int, closed: Callable[[], None] | None = None
    ) -> None:
        self.size = size
        self._closed = closed
        self._address: int | None = None
        if not size:
            return
        address = _libc.mmap(None, size, _PROT_READ, _MAP_SHARED, descriptor, 0)
        if address == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot map {size} bytes: {os.strerror(number)}")
        self._address = address

    def buffer(self) -> pa.Buffer:
        """The bytes, which keep the mapping alive."""
        if self._address is None:
            return pa.py_buffer(b"")
        return pa.foreign_buffer(self._address, self.size, base=self)

    def __del__(self) -> None:
        if self._address is not None and _libc is not None:
            _libc.munmap(self._address, self.size)
            self._address = None
        if self._closed is not None:
            self._closed()
            self._closed = None


def map_file(path: str | Path) -> Mapping:
    """All bytes of a file, where they lie in the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return Mapping(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)
