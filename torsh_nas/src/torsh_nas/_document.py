"""JSON files that say what they are and notice when they were damaged."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def canonical(content: object) -> str:
    """Return the one JSON text of ``content`` that fingerprints are taken from."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def fingerprint(content: object) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of ``content`` as JSON."""
    return hashlib.sha256(canonical(content).encode()).hexdigest()[:16]


def dump_document(kind: str, version: int, content: Mapping[str, object]) -> str:
    """Return ``content`` as JSON under a header of format name, version and checksum."""
    header = {"format": kind, "version": version, "checksum": fingerprint(content)}
    return json.dumps({**header, **content}, indent=2, ensure_ascii=False) + "\n"


def parse_document(text: str, kind: str, version: int) -> dict[str, object]:
    """Return the content that :func:`dump_document` was given.

    Raises:
        ValueError: Not JSON, another format, another version or a wrong checksum.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a {kind} file: not valid JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != kind:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise ValueError(f"not a {kind} file: its format is {found!r}")
    if document.get("version") != version:
        raise ValueError(
            f"{kind} version {document.get('version')!r} cannot be read; "
            f"this torsh_nas reads version {version}"
        )
    content = {k: v for k, v in document.items() if k not in ("format", "version", "checksum")}
    if document.get("checksum") != fingerprint(content):
        raise ValueError(
            f"the checksum of this {kind} file does not match: it was damaged or edited by hand"
        )
    return content


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file that is, after a crash at any moment, either the old one or the new one."""
    target = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
