"""What a writer has finished, so that the next one can go on behind it.

Each part of a data set has a journal of its own, lines of JSON behind their XXH3: first the plan,
which says how the part is written, then each shard once it is on disk under its final name, at last
that the part is complete. A line that does not fit its checksum was being written when the writer
was killed; it and what follows count for nothing.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torsh_data._index import ShardEntry, hash_bytes, sync_folder

Plan: TypeAlias = dict[str, Any]

_NAME = re.compile(r"\.write_shards\.\d{5,}\.journal")
_FORMAT = {"format": "torsh-journal", "version": 1}
REMEDY = "; make the same call as before, or give resume=False to start over"


@dataclass(frozen=True)
class Record:
    """What a journal says."""

    plan: Plan
    shards: list[ShardEntry]
    complete: bool
    length: int
    """Bytes of the good lines."""


def journal_path(folder: Path, part: int) -> Path:
    """Where the journal of a part lies."""
    return folder / f".write_shards.{part:05d}.journal"


def find_journals(folder: Path) -> list[Path]:
    """All journals in a folder, in the order of their parts."""
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def read_journal(path: Path) -> Record | None:
    """What a journal says; None if there is none, or its writer was killed before it began."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    lines: list[dict[str, Any]] = []
    length = 0
    for line in content.splitlines(keepends=True):
        checksum, _, body = line.partition(b" ")
        if not line.endswith(b"\n") or hash_bytes(body).encode() != checksum:
            break
        lines.append(json.loads(body))
        length += len(line)
    if not lines:
        return None
    plan = lines[0]
    if {name: plan.pop(name, None) for name in _FORMAT} != _FORMAT:
        raise RuntimeError(f"{path} was left by another version of torsh-data{REMEDY}")
    shards = [ShardEntry(**line) for line in lines[1:] if "name" in line]
    return Record(plan, shards, "name" not in lines[-1] and len(lines) > 1, length)


def refuse_changes(folder: Path, begun: Plan, plan: Plan) -> None:
    """Raise if a folder's shards were begun with another plan."""
    for name, value in plan.items():
        if begun.get(name) != value:
            raise ValueError(
                f"{name}={value!r}, but the unfinished shards in {str(folder)!r} were written with "
                f"{name}={begun.get(name)!r}{REMEDY}"
            )


def refuse_damage(folder: Path, shards: list[ShardEntry]) -> None:
    """Raise if a finished shard is not what the journal says, by its size and footer."""
    for entry in shards:
        path = folder / entry.name
        size = path.stat().st_size if path.exists() else None
        if size != entry.bytes:
            found = "is missing" if size is None else f"has {size} bytes, not {entry.bytes}"
            raise RuntimeError(f"{path}, finished by a writer that was stopped, {found}{REMEDY}")
        with path.open("rb") as file:
            file.seek(entry.starts[-1])
            if hash_bytes(file.read()) != entry.tail:
                raise RuntimeError(
                    f"{path}, finished by a writer that was stopped, is damaged{REMEDY}"
                )


class Journal:
    """A journal open for appending."""

    def __init__(self, path: Path, plan: Plan) -> None:
        known = read_journal(path)
        self.shards = [] if known is None else known.shards
        self.complete = known is not None and known.complete
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, 0 if known is None else known.length)
        if known is None:
            self._append({**_FORMAT, **plan})
            sync_folder(path.parent)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def add(self, shard: ShardEntry) -> None:
        """Note a shard that has its final name and is on disk."""
        self._append(asdict(shard))
        self.shards.append(shard)

    def finish(self) -> None:
        """Note that the part has no more shards."""
        self._append({"rows": self.rows})
        self.complete = True

    def close(self) -> None:
        os.close(self._file)

    def _append(self, body: Mapping[str, Any]) -> None:
        line = json.dumps(body, separators=(",", ":")).encode() + b"\n"
        line = hash_bytes(line).encode() + b" " + line
        while line:
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)
