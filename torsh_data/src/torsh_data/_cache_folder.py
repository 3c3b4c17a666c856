"""Cache files that the processes of a machine share by name, and what dead processes left.

Whoever uses a file holds a shared lock of the kernel on its companion, which ends with the process:
a file whose companion can be locked for oneself alone has no user left.
"""

import fcntl
import logging
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from torsh_data._cache_file import CacheFile

logger = logging.getLogger(__name__)


def file_name(key: str) -> str:
    """Name of the file for samples of one key."""
    return f"torsh-samples-{os.getuid()}-{key}.cache"


def open_shared(
    folder: Path, key: str, description: dict[str, Any], rows: int, limit: int, *, keep: bool
) -> tuple[CacheFile, int]:
    """Open the file of a key, or make it, and note that this process uses it.

    Args:
        folder: Where it is.
        key: Of the samples.
        description: To write into a new file, with the limit that was `asked` for.
        rows: Number of samples.
        limit: Bytes that they may take. A file that others use keeps its own, and one that holds
            more keeps what it holds.
        keep: False removes files without a user first.

    Returns:
        The file, and a descriptor that holds the note until it is closed.
    """
    path = folder / file_name(key)
    with _gate(folder):
        if not keep:
            for stale in _abandoned(folder):
                if stale != path:
                    _remove(stale)
        users = os.open(_companion(path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        alone = _lock_alone(users)
        file = _open_existing(path, description, limit, alone)
        if file is None:
            temporary = path.with_suffix(".tmp")
            temporary.unlink(missing_ok=True)
            made = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                file = CacheFile(made, description, rows, limit, path)
            except OSError:
                temporary.unlink()
                raise
            temporary.replace(path)
        fcntl.flock(users, fcntl.LOCK_SH)
        return file, users


def join(path: Path) -> int:
    """Note that this process uses a file too; returns the descriptor of the note."""
    users = os.open(_companion(path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    fcntl.flock(users, fcntl.LOCK_SH)
    return users


def peek(folder: Path, key: str) -> tuple[dict[str, Any], int, int] | None:
    """Of a file that is there: its description, samples and bytes that they take."""
    path = folder / file_name(key)
    with suppress(FileNotFoundError, ValueError):
        file = CacheFile(_open_own(path), path=path)
        try:
            return file.description, int(np.count_nonzero(file.places)), file.used
        finally:
            file.close()
    return None


def abandoned(folder: Path) -> dict[Path, int]:
    """Files of this user whose processes are gone, with the bytes that they take.

    That of a killed process cannot be removed by it. Files that are to be kept are such files too,
    so this is for folders that have none: /dev/shm.
    """
    if not any(folder.glob(f"torsh-samples-{os.getuid()}-*")):
        return {}
    with _gate(folder):
        return {path: path.stat().st_blocks * 512 for path in _abandoned(folder)}


def remove_abandoned(folder: Path) -> int:
    """Remove the files that `abandoned` names; returns the bytes that this gives back."""
    found = abandoned(folder)
    if not found:
        return 0
    with _gate(folder):
        for path in _abandoned(folder):
            _remove(path)
    return sum(found.values())


def leave(path: Path, users: int, *, keep: bool) -> None:
    """Withdraw the note, and remove the file if that was the last and it is not to be kept."""
    with suppress(FileNotFoundError), _gate(path.parent):
        fcntl.flock(users, fcntl.LOCK_UN)  # workers that inherited the descriptor need no note
        if not keep and _lock_alone(users):
            path.unlink(missing_ok=True)
            _companion(path).unlink(missing_ok=True)
    os.close(users)


def _open_existing(
    path: Path, description: dict[str, Any], limit: int, alone: bool
) -> CacheFile | None:
    if not path.exists():
        return None
    try:
        file = CacheFile(_open_own(path), path=path)
    except ValueError as error:
        if not alone:
            raise
        logger.warning("%s; it is made anew", error)
        path.unlink()
        return None
    if not alone:
        return file
    file.recover()
    limit, asked = max(limit, file.used), {"asked": description["asked"]}
    if file.limit != limit or not asked.items() <= file.description.items():
        described, rows = file.description | asked, file.rows
        file.close()
        file = CacheFile(_open_own(path), described, rows, limit, path)
    return file


def _open_own(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    if os.fstat(descriptor).st_uid != os.getuid():
        os.close(descriptor)
        raise PermissionError(f"{path} belongs to another user; remove it or use another folder")
    return descriptor


@contextmanager
def _gate(folder: Path) -> Generator[None]:
    """One process at a time opens, leaves and removes files of a folder."""
    gate = os.open(
        folder / f".torsh-samples-{os.getuid()}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600
    )
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        yield
    finally:
        os.close(gate)


def _companion(path: Path) -> Path:
    return path.with_suffix(".users")


def _lock_alone(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _abandoned(folder: Path) -> Iterator[Path]:
    """Files without a user; the caller holds the gate."""
    for path in sorted(folder.glob(f"torsh-samples-{os.getuid()}-*")):
        if path.suffix == ".tmp":  # a maker holds the gate, so this one was killed
            yield path
        if path.suffix != ".cache":
            continue
        users = os.open(_companion(path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            if _lock_alone(users):
                yield path
        finally:
            os.close(users)


def _remove(path: Path) -> None:
    logger.info("removing %s, whose processes are gone", path)
    path.unlink(missing_ok=True)
    if path.suffix == ".cache":
        _companion(path).unlink(missing_ok=True)
