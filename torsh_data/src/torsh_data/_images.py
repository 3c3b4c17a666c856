"""A tree of pictures, one folder for each class, as torchvision's ImageFolder reads it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}


class ImageTree(Sequence[dict[str, Any]]):
    """Samples `{"image": the file's bytes, "label": int}`; classes and files in sorted order."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        self._files: list[tuple[str, int]] = []
        digest = xxhash.xxh3_128()
        for label, name in enumerate(self.classes):
            before = len(self._files)
            for folder, folders, files in os.walk(root / name, followlinks=True):
                folders.sort()
                for file in sorted(files):
                    if Path(file).suffix.lower() in _SUFFIXES:
                        path = f"{os.path.relpath(folder, root)}/{file}"
                        self._files.append((path, label))
                        digest.update(f"{path}:{(root / path).stat().st_size}\n".encode())
            if len(self._files) == before:
                raise ValueError(
                    f"source={str(root)!r}: the folder {name!r} has no pictures; each folder in it "
                    "is a class"
                )
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Any) -> Any:
        path, label = self._files[index]
        return {"image": (self.root / path).read_bytes(), "label": label}


def is_image_tree(path: Path) -> bool:
    """Whether a folder holds folders with pictures, and no files of its own but hidden ones."""
    entries = [entry for entry in os.scandir(path) if not entry.name.startswith(".")]
    if not entries or not all(entry.is_dir() for entry in entries):
        return False
    return any(
        Path(file).suffix.lower() in _SUFFIXES
        for _, _, files in os.walk(entries[0].path)
        for file in files
    )
