"""Results on disk, one checked line each, so that a run that was killed goes on where it was.

A line is the XXH3 of some JSON and this JSON: `{"key": ..., "found": [[text, finished], ...]}`.
Lines are only ever appended, all those of a batch by one write. What a kill or a bad disk leaves
of a line is skipped and made anew.
"""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import xxhash

Found: TypeAlias = list[tuple[str, bool]]


class TranslationCache:
    """The results of one pair of models with one set of settings.

    Args:
        folder: Made if it is not there.
        fingerprint: Of models and settings; names the file.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"back-translation-1-{fingerprint}.jsonl"
        self._found: dict[str, Found] = {}
        self._size = 0

    def refresh(self) -> None:
        """Read what was added since, by this process or another."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._size)
            content = file.read()
        self._size += len(content)
        damaged = 0
        for line in filter(None, content.split(b"\n")):
            entry = _parse(line)
            if entry is None:
                damaged += 1
            else:
                self._found[entry[0]] = entry[1]
        if damaged:
            warnings.warn(
                f"{self.path}: {damaged} damaged lines were skipped; their texts are translated "
                "again",
                stacklevel=3,
            )

    def get(self, key: str) -> Found | None:
        """The result of a key, if there is one."""
        return self._found.get(key)

    def add(self, results: Mapping[str, Found]) -> None:
        """Remember results, on disk before this returns."""
        self._found.update(results)
        lines: list[bytes] = []
        for key, found in results.items():
            body = json.dumps({"key": key, "found": found}, separators=(",", ":")).encode()
            lines.append(xxhash.xxh3_64_hexdigest(body).encode() + b" " + body + b"\n")
        # an empty line first ends what a killed process may have left of one
        content = b"\n" + b"".join(lines)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            while content:
                content = content[os.write(descriptor, content) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _parse(line: bytes) -> tuple[str, Found] | None:
    digest, _, body = line.partition(b" ")
    if xxhash.xxh3_64_hexdigest(body).encode() != digest:
        return None
    entry = json.loads(body)
    return entry["key"], [(str(text), bool(finished)) for text, finished in entry["found"]]
