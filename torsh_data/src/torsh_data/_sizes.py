"""Sizes as people write them: `"256MB"`, `"4MiB"`, or a plain number of bytes."""

import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]i?)?b\s*", re.IGNORECASE)


def parse_bytes(value: str | int, name: str) -> int:
    """The number of bytes that `value` means; `name` is the argument to name in errors.

    Example:
        >>> parse_bytes("256MB", "shard_bytes"), parse_bytes("4 KiB", "block_bytes")
        (256000000, 4096)
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        match = _PATTERN.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise ValueError(f"{name}={value!r} is not a size; write '256MB', '4MiB' or bytes")
        size = int(float(match[1]) * (_UNITS | _BINARY)[(match[2] or "").lower()])
    if size < 1:
        raise ValueError(f"{name}={value!r} must be at least one byte")
    return size


def format_bytes(size: int) -> str:
    """`size` in the largest decimal unit that leaves at least one.

    Example:
        >>> format_bytes(1_310_720), format_bytes(12)
        ('1.31 MB', '12 B')
    """
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"
