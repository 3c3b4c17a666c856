"""A tree of pictures, one folder for each class, as torchvision's ImageFolder reads it."""

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from torsh_data._image_file import find_fault

_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
_SHOWN = 5
_TOGETHER = 16  # files that are looked at at a time


class ImageTree(Sequence[dict[str, Any]]):
    """Samples `{"image": the file's bytes, "label": int}`; classes and files in sorted order.

    Args:
        root: The folder of class folders.
        classes: Names in the order of their labels; those of the folders by default.
    """

    def __init__(self, root: Path, classes: Sequence[str] | None = None) -> None:
        self.root = root
        folders = _folders(root)
        self.classes = folders if classes is None else list(classes)
        self._refuse_other_folders(folders, is_given=classes is not None)
        self._files: list[tuple[str, int]] = []
        self._versions: list[tuple[int, int]] = []  # size and time of change
        for name in folders:
            before = len(self._files)
            label = self.classes.index(name)
            for path in _pictures(root / name):
                self._files.append((os.path.relpath(path, root), label))
                status = path.stat()
                self._versions.append((status.st_size, status.st_mtime_ns))
            if len(self._files) == before:
                raise ValueError(
                    f"source={str(root)!r}: the folder {name!r} has no pictures; each folder in it "
                    "is a class"
                )

    def _refuse_other_folders(self, folders: list[str], *, is_given: bool) -> None:
        if is_given:
            if len(set(self.classes)) < len(self.classes):
                raise ValueError(f"classes={self.classes} has a name twice")
            unknown = [name for name in folders if name not in self.classes]
            if unknown:
                raise ValueError(
                    f"classes={_some(self.classes)} does not have {_some(unknown)}, which "
                    f"source={str(self.root)!r} has a folder of"
                )
            return
        if any(any(entry.is_file() for entry in _seen(self.root / name)) for name in folders):
            return
        inner = sorted({name for folder in folders for name in _folders(self.root / folder)})
        raise ValueError(
            f"source={str(self.root)!r}: its folders {_some(folders)} hold no pictures but "
            f"folders of them: {_some(inner)}; convert each by itself, the others with "
            "classes= from the first, so that their labels agree; or if they are the classes, name "
            f"them: convert(..., classes={_some(folders)})"
        )

    def leave_out_broken(self, *, skip: bool) -> None:
        """Look at the beginning and end of each file.

        Args:
            skip: Leave out files that are no pictures, with a warning.

        Raises:
            ValueError: If there are such files and they are not to be skipped, or no others.
        """
        with ThreadPoolExecutor(_TOGETHER) as pool:
            paths = (self.root / path for path, _ in self._files)
            found = list(pool.map(find_fault, paths))
        broken = [
            f"{path} {fault}"
            for (path, _), fault in zip(self._files, found, strict=True)
            if fault is not None
        ]
        if not broken:
            return
        named = ", ".join(broken[:_SHOWN]) + (", ..." if len(broken) > _SHOWN else "")
        text = f"source={str(self.root)!r}: {len(broken)} of {len(found)} files are broken: {named}"
        if not skip or len(broken) == len(found):
            raise ValueError(
                f"{text}; remove or replace them, or leave them out with skip_broken=True"
            )
        warnings.warn(f"{text}; they are left out", stacklevel=4)
        good = [number for number, fault in enumerate(found) if fault is None]
        self._files = [self._files[number] for number in good]
        self._versions = [self._versions[number] for number in good]

    @property
    def fingerprint(self) -> str:
        """Changes if a file's name, size, time of change or label does."""
        digest = xxhash.xxh3_128()
        for (path, label), (size, changed) in zip(self._files, self._versions, strict=True):
            digest.update(f"{path}:{size}:{changed}:{label}\n".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Any) -> Any:
        path, label = self._files[index]
        return {"image": (self.root / path).read_bytes(), "label": label}


def is_image_tree(path: Path) -> bool:
    """Whether a folder holds folders with pictures, and no files of its own but hidden ones."""
    return all(entry.is_dir() for entry in _seen(path)) and any(
        True for name in _folders(path) for _ in _pictures(path / name)
    )


def _pictures(folder: Path) -> Iterator[Path]:
    for inner, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        yield from (
            Path(inner, file) for file in sorted(files) if Path(file).suffix.lower() in _SUFFIXES
        )


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in _seen(path) if entry.is_dir())


def _seen(path: Path) -> list["os.DirEntry[str]"]:
    return [entry for entry in os.scandir(path) if not entry.name.startswith(".")]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return f"[{shown}, ...]" if len(names) > _SHOWN else f"[{shown}]"
