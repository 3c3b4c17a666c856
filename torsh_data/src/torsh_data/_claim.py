"""Only one writer in a folder, and what it may remove there.

The lock is the kernel's, on a hidden file with the writer's process number, so it ends with the
process. The file is removed when the index is written: one that is left belongs to a writer that
was killed, and only then are shards without an index known to be its leftovers and not a data set
whose index went missing.
"""

import fcntl
import logging
import os
import re
import socket
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from torsh_data._index import INDEX_NAME, MARK

logger = logging.getLogger(__name__)

_LOCK_NAME = ".write_shards.lock"
_SHARD = re.compile(r"shard-\d{5,}\.arrow")
_TEMPORARY = re.compile(r"\.(shard-\d{5,}\.arrow|index\.json)\.tmp")


def refuse_finished(folder: Path) -> None:
    """Raise if a folder has an index."""
    if (folder / INDEX_NAME).exists():
        raise ValueError(
            f"out={str(folder)!r} holds a finished data set; remove it or write elsewhere"
        )


@contextmanager
def claim(folder: Path) -> Generator[None]:
    """Keep other writers out of a folder and clear it of what a killed one left.

    If the body fails before there is an index, what it wrote is removed.
    """
    lock = folder / _LOCK_NAME
    descriptor, was_killed = _lock(lock)
    try:
        try:
            refuse_finished(folder)
            _clear(folder, was_killed)
        except (OSError, ValueError):
            if not was_killed:
                lock.unlink()
            raise
        try:
            yield
        except BaseException:
            if not (folder / INDEX_NAME).exists():
                _clear(folder, was_killed=True)
            raise
        finally:
            lock.unlink()
    finally:
        os.close(descriptor)


def _lock(path: Path) -> tuple[int, bool]:
    """The open lock file, and whether a writer that was killed had left it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        owner = os.read(descriptor, 400).decode(errors="replace")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise RuntimeError(
                f"out={str(path.parent)!r}: {owner or 'another process'} is writing there; wait "
                "for it, stop it, or write elsewhere"
            ) from None
        except OSError as error:
            warnings.warn(
                f"out={str(path.parent)!r}: this file system has no locks ({error}); make sure "
                "that only one process writes there",
                stacklevel=5,
            )
        if os.fstat(descriptor).st_nlink:
            break
        os.close(descriptor)  # its writer finished and removed it meanwhile
    owner = os.pread(descriptor, 400, 0).decode(errors="replace")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return descriptor, bool(owner)


def _clear(folder: Path, was_killed: bool) -> None:
    paths = sorted(folder.iterdir())
    shards = [path for path in paths if _SHARD.fullmatch(path.name)]
    for path in shards:
        if not _is_marked(path):
            raise FileExistsError(
                f"{path} was not written by write_shards, which would need its name; move it or "
                "write elsewhere"
            )
        if not was_killed:
            raise FileExistsError(
                f"{path} is a shard of a data set whose {INDEX_NAME} is missing; copy the index "
                "back, or remove the shards to write anew"
            )
    for path in [*shards, *(path for path in paths if _TEMPORARY.fullmatch(path.name))]:
        logger.info("removing %s, left by a writer that did not finish", path)
        path.unlink()


def _is_marked(path: Path) -> bool:
    try:
        with pa.memory_map(str(path)) as file:
            return MARK in (pa.ipc.open_file(file).schema.metadata or {})
    except (pa.ArrowInvalid, OSError):
        return False
