"""Writing a folder so that no file in it is ever half there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write in, whose files are then synced and moved into ``folder``.

    Files of ``folder`` that are not written again stay. If the body raises, nothing is moved.

    Args:
        folder: Where the files shall be; made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield staging
        for path in sorted(staging.rglob("*")):
            target = folder / path.relative_to(staging)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                _sync(path)
                path.replace(target)
        _sync(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
