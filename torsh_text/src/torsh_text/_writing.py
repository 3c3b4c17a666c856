"""Writing files and folders so that nobody ever reads half of one."""

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """Give a file to write, which then takes the place of ``target``, unless the body raises."""
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(target.parent)!r}; make it first")
    # not of tempfile, which would make the target readable by its owner only
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(target: Path, content: bytes) -> None:
    """Write a whole file."""
    with replacing(target) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people to read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def staged_folder(folder: Path, *, last: str | None = None) -> Iterator[Path]:
    """Give a folder to write in, whose files are then synced and moved into ``folder``.

    Files of ``folder`` that are not written again stay. If the body raises, nothing is moved.

    Args:
        folder: Where the files shall be; made if it does not exist.
        last: Name of the file that is moved when all others are there.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{str(folder)!r} is a file; pass a folder, or a new name for one")
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield staging
        for path in sorted(staging.rglob("*"), key=lambda path: (path.name == last, path)):
            target = folder / path.relative_to(staging)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                sync(path)
                path.replace(target)
        sync(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
