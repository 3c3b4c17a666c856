"""Only one writer in a folder, and what it may keep or remove there.

The lock is the kernel's, on a hidden file with the writer's process number, so it ends with the
process. The file is removed when the index is written: one that is left belongs to a writer that
was stopped. Only then are shards without an index known to be its work and not a data set whose
index went missing; those in its journals are kept, the others are removed.
"""

import fcntl
import logging
import os
import re
import socket
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from torsh_data._index import INDEX_NAME, MARK
from torsh_data._journal import Plan, find_journals, read_journal, refuse_changes, refuse_damage

logger = logging.getLogger(__name__)

_LOCK_NAME = ".write_shards.lock"
_SHARD = re.compile(r"shard-\d{5,}(-\d{5,})?\.arrow")
_TEMPORARY = re.compile(r"\.(shard-\d{5,}(-\d{5,})?\.arrow|index\.json)\.tmp")
_OWNER = re.compile(r"process (\d+) on (.*)")
_PATIENCE = 10  # seconds for the workers of a killed writer to follow it


def refuse_finished(folder: Path) -> None:
    """Raise if a folder has an index, beside which a killed writer may have left hidden files."""
    if (folder / INDEX_NAME).exists():
        _tidy(folder)
        raise ValueError(
            f"out={str(folder)!r} holds a finished data set; remove it or write elsewhere"
        )


@contextmanager
def claim(folder: Path, plan: Plan, resume: bool) -> Generator[None]:
    """Keep other writers out of a folder, and clear it of all but what this one can go on with.

    If the body fails before there is an index, finished shards stay for the next call; if there are
    none, all that it wrote is removed.
    """
    lock = folder / _LOCK_NAME
    descriptor, was_stopped = _lock(lock)
    try:
        try:
            was_stopped = was_stopped or bool(find_journals(folder))
            refuse_finished(folder)
            if not resume:
                _remove(find_journals(folder))
            _clear(folder, _kept(folder, plan), was_stopped)
        except (OSError, RuntimeError, ValueError):
            if not was_stopped:
                _remove([lock])
            raise
        try:
            yield
        except BaseException as error:
            if not (folder / INDEX_NAME).exists():
                kept = _finished(folder)
                _clear(folder, kept, was_stopped=True)
                if kept:
                    error.add_note(
                        f"{len(kept)} finished shard(s) stay in {folder}; the same call goes on "
                        "behind them, resume=False starts over"
                    )
                    raise
            _tidy(folder)
            raise
        _tidy(folder)
    finally:
        os.close(descriptor)


def _lock(path: Path) -> tuple[int, bool]:
    """The open lock file, and whether a writer that was stopped had left it."""
    patience = time.monotonic() + _PATIENCE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        owner = os.read(descriptor, 400).decode(errors="replace")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if _is_dead(owner) and time.monotonic() < patience:
                time.sleep(0.01)
                continue
            raise RuntimeError(
                f"out={str(path.parent)!r}: {owner or 'another process'} is writing there; wait "
                "for it, stop it, or write elsewhere"
            ) from None
        except OSError as error:
            warnings.warn(
                f"out={str(path.parent)!r}: this file system has no locks ({error}); make sure "
                "that only one process writes there",
                stacklevel=6,
            )
        if os.fstat(descriptor).st_nlink:
            break
        os.close(descriptor)  # its writer finished and removed it meanwhile
    owner = os.pread(descriptor, 400, 0).decode(errors="replace")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return descriptor, bool(owner)


def _is_dead(owner: str) -> bool:
    known = _OWNER.fullmatch(owner)
    if known is None or known[2] != socket.gethostname():
        return False
    return not Path(f"/proc/{known[1]}").exists()


def _kept(folder: Path, plan: Plan) -> set[str]:
    """Names of the shards to go on behind; raises if this writer would write others."""
    names: set[str] = set()
    for path in find_journals(folder):
        record = read_journal(path)
        if record is None:
            continue
        if record.shards or record.complete:
            refuse_changes(folder, record.plan, plan)
            refuse_damage(folder, record.shards)
            names |= {shard.name for shard in record.shards}
        else:
            path.unlink()  # nothing was finished, so another plan is as good
    return names


def _finished(folder: Path) -> set[str]:
    records = [read_journal(path) for path in find_journals(folder)]
    return {shard.name for record in records if record is not None for shard in record.shards}


def _clear(folder: Path, kept: set[str], was_stopped: bool) -> None:
    paths = sorted(folder.iterdir())
    shards = [p for p in paths if _SHARD.fullmatch(p.name) and p.name not in kept]
    for path in shards:
        if not _is_marked(path):
            raise FileExistsError(
                f"{path} was not written by write_shards, which would need its name; move it or "
                "write elsewhere"
            )
        if not was_stopped:
            raise FileExistsError(
                f"{path} is a shard of a data set whose {INDEX_NAME} is missing; copy the index "
                "back, or remove the shards to write anew"
            )
    leftovers = [*shards, *(path for path in paths if _TEMPORARY.fullmatch(path.name))]
    for path in leftovers:
        logger.info("removing %s, left by a writer that did not finish", path)
    _remove(leftovers)


def _tidy(folder: Path) -> None:
    """Remove what only an unfinished data set needs, the lock last."""
    temporaries = [path for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name)]
    _remove([*temporaries, *find_journals(folder), folder / _LOCK_NAME])


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _is_marked(path: Path) -> bool:
    try:
        with pa.memory_map(str(path)) as file:
            return MARK in (pa.ipc.open_file(file).schema.metadata or {})
    except (pa.ArrowInvalid, OSError):
        return False
