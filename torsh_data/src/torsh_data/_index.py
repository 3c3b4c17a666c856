"""`index.json`: what a data set's folder holds, written last and checked first.

The file is JSON. `checksum` is the XXH3 of everything else in it, so damage to the index is found
like damage to a shard. For each shard it lists the size in rows and bytes, and for each block of
the shard its rows, where it begins, and the XXH3 of its bytes (the first block's include the file's
head); `tail` is the XXH3 of what follows the last block, so every byte of a shard is covered.
`metadata` is the user's own. Version 1 had none, and is still read.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

INDEX_NAME = "index.json"
MARK = b"torsh.shard"  # in the schema's metadata: a shard that needs an index beside it
FORMAT = "torsh-shards"
VERSION = 2


@dataclass(frozen=True)
class ShardEntry:
    """One shard: `starts` has one more entry than there are blocks, the end of the last."""

    name: str
    rows: int
    bytes: int
    block_rows: list[int]
    starts: list[int]
    xxh3: list[str]
    tail: str


@dataclass(frozen=True)
class Index:
    """The contents of `index.json`."""

    rows: int
    bytes: int
    schema: dict[str, str]
    compression: str | None
    shards: list[ShardEntry]
    metadata: dict[str, Any] = field(default_factory=dict)


def hash_bytes(data: bytes | memoryview) -> str:
    """The XXH3 (64 bits) of `data` in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(data)


def write_index(folder: Path, index: Index) -> None:
    """Write the index of a finished data set, all of it or nothing."""
    body: dict[str, Any] = {"format": FORMAT, "version": VERSION, **asdict(index)}
    body["checksum"] = hash_bytes(_canonical(body))
    replace_file(folder / INDEX_NAME, (json.dumps(body) + "\n").encode())


def read_index(path: Path) -> Index:
    """Read and check an index."""
    try:
        body = json.loads(path.read_bytes())
        expected = body.pop("checksum")
        name, version = body.pop("format"), body.pop("version")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise RuntimeError(f"{path} is not an index of shards, or is damaged: {error}") from error
    if name != FORMAT:
        raise RuntimeError(f"{path} has format {name!r}, expected {FORMAT!r}")
    if version not in range(1, VERSION + 1):
        raise RuntimeError(
            f"{path} has version {version}, this torsh-data reads up to {VERSION}; update it"
        )
    found = hash_bytes(_canonical({"format": name, "version": version, **body}))
    if found != expected:
        raise RuntimeError(f"{path} is damaged: its checksum is {found}, it says {expected}")
    shards = [ShardEntry(**shard) for shard in body.pop("shards")]
    return Index(shards=shards, **body)


def checked_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """The user's metadata as it will be read back."""
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(f"metadata={metadata!r} must be a mapping")
    try:
        return json.loads(json.dumps(dict(metadata or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata is kept as JSON, which cannot hold it: {error}") from error


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that its name only ever shows all of the content."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Rename a synced file to its final name, and make the name survive a power cut."""
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
