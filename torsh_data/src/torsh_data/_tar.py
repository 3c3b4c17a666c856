"""The members of a tar file: one pass over its headers, which are bounds-checked and never trusted.

Reads what tar programs write: ustar, GNU long names and POSIX extended (PAX) headers.

Reference:
    IEEE Std 1003.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual,
    "Basic Tar Format".
"""

from collections.abc import Iterator
from typing import NamedTuple

_BLOCK = 512
_LONG_NAME = 1 << 20  # no path of a file system is longer
_REGULAR = (b"0", b"\0", b"7")
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
    b"M": "a part of a file that continues another tar",
}


class Member(NamedTuple):
    """A regular file in a tar file; `header` is where the first header that describes it begins."""

    name: str
    header: int
    start: int
    size: int


def read_members(data: memoryview, path: str) -> Iterator[Member]:
    """The regular files of a tar file, in order; folders are passed over.

    Args:
        data: The whole tar file.
        path: What errors call it.

    Raises:
        RuntimeError: If the file is cut short or damaged.
        ValueError: If a member is a link, a device or a sparse file.
    """
    place = first = 0
    defaults: dict[str, str] = {}
    extended: dict[str, str] = {}
    while True:
        header = bytes(data[place : place + _BLOCK])
        if len(header) < _BLOCK:
            raise RuntimeError(f"{path} has no end mark at byte {place}: it was cut short")
        if not any(header):
            return
        if _number(header[148:156], path, place) != sum(header) - sum(header[148:156]) + 8 * 32:
            raise RuntimeError(f"{path}: the header at byte {place} is damaged")
        kind = header[156:157]
        size = _number(header[124:136], path, place)
        if kind in _REGULAR and "size" in extended:
            size = _decimal(extended["size"], path, place)
        start = place + _BLOCK
        if kind not in _KINDS and start + size > len(data):
            raise RuntimeError(
                f"{path} has {len(data)} bytes, but the member at byte {place} ends at "
                f"{start + size}: it was cut short"
            )
        following = start + -(-size // _BLOCK) * _BLOCK
        if kind in (b"x", b"g", b"L", b"K"):
            if size > _LONG_NAME:
                raise RuntimeError(f"{path}: the header at byte {place} is {size} bytes long")
            content = bytes(data[start : start + size])
            if kind == b"g":
                defaults |= _records(content, path, place)
            elif kind == b"x":
                extended = {**defaults, **_records(content, path, place)}
            elif kind == b"L":
                extended = {**extended, "path": _text(content)}
            place = following
            continue
        extended = extended or defaults
        name = extended.get("path") or _plain_name(header)
        if kind in _KINDS or any(key.startswith("GNU.sparse") for key in extended):
            what = _KINDS.get(kind, _KINDS[b"S"])
            raise ValueError(f"{path}: {name!r} is {what}; samples are made of regular files")
        if kind in _REGULAR and not name.endswith("/"):
            yield Member(name, first, start, size)
        elif kind != b"5" and kind not in _REGULAR:
            raise ValueError(
                f"{path}: {name!r} is of type {kind!r}; samples are made of regular files"
            )
        place = first = following
        extended = {}


def _plain_name(header: bytes) -> str:
    name = header[:100]
    if header[257:263] == b"ustar\0" and header[345]:
        return _text(header[345:500]) + "/" + _text(name)
    return _text(name)


def _text(content: bytes) -> str:
    return content.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _number(content: bytes, path: str, place: int) -> int:
    if content[0] == 0x80:  # GNU: binary, for what octal digits cannot hold
        return int.from_bytes(content[1:], "big")
    digits = content.split(b"\0", 1)[0].strip()
    try:
        number = int(digits or b"0", 8)
    except ValueError:
        number = -1
    if number < 0:
        raise RuntimeError(f"{path}: the header at byte {place} is damaged")
    return number


def _decimal(text: str, path: str, place: int) -> int:
    if not (text.isascii() and text.isdigit()):
        raise RuntimeError(f"{path}: the header before byte {place} has the size {text!r}")
    return int(text)


def _records(content: bytes, path: str, place: int) -> dict[str, str]:
    """The `length keyword=value` records of an extended header."""
    records: dict[str, str] = {}
    rest = content
    while rest and rest[0]:
        digits, _, _ = rest.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        record = rest[len(digits) + 1 : length]
        keyword, equals, value = record.partition(b"=")
        if not equals or length > len(rest) or record[-1:] != b"\n":
            raise RuntimeError(f"{path}: the extended header at byte {place} is damaged")
        records[keyword.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        rest = rest[length:]
    return records
