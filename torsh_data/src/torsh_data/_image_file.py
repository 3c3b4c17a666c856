"""What the bytes of an image file say without being decoded: its size, and whether they are all.

Reference:
    ITU-T T.81, "JPEG", annex B; W3C, "Portable Network Graphics", section 5.
"""

import struct
from pathlib import Path

_PNG = b"\x89PNG\r\n\x1a\n"
_OTHERS = (
    b"BM",
    b"GIF8",
    b"II*\0",
    b"MM\0*",
    b"II+\0",
    b"MM\0+",
    *(b"P%d" % n for n in range(1, 8)),
)
_HEAD = 32 << 10
_TAIL = 4 << 10


def image_size(content: bytes) -> tuple[int, int]:
    """Height and width of a JPEG or PNG image.

    Raises:
        ValueError: If it is neither.
    """
    if content[:8] == _PNG and len(content) >= 24:
        width, height = struct.unpack(">II", content[16:24])
        return height, width
    place = _frame(content)
    height, width = struct.unpack(">HH", content[place + 5 : place + 9])
    return height, width


def _frame(content: bytes) -> int:
    """Where the frame header of a JPEG image is: behind all notes, a preview among them."""
    place = 2
    while content[:2] == b"\xff\xd8" and place + 9 <= len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return place
        if marker == 0xFF or 0xD0 <= marker <= 0xD9 or marker == 0x01:
            place += 1 if marker == 0xFF else 2
            continue
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    raise ValueError("not a JPEG or PNG image")


def find_fault(path: Path) -> str | None:
    """Why a file cannot be an image, from its beginning and end; None if it seems to be one.

    Damage between the two is only found by decoding.
    """
    with path.open("rb", buffering=0) as file:
        head = file.read(_HEAD)
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL))
        tail = head if size <= _HEAD else file.read()
    fault = _look(head, tail, size)
    if fault is not None and size > _HEAD:  # long notes before the image, or more behind it
        content = path.read_bytes()
        fault = _look(content, content, size)
    return fault


def looks_whole(content: bytes) -> bool:
    """Whether bytes are an image file as far as its beginning and end say."""
    return _look(content, content, len(content)) is None


def _look(head: bytes, tail: bytes, size: int) -> str | None:
    if not head:
        return "is empty"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "is cut short" if int.from_bytes(head[4:8], "little") + 8 > size else None
    if head.startswith(_OTHERS) and size > 8:
        return None
    try:
        is_empty = 0 in image_size(head)
        frame = 0 if head[:8] == _PNG else _frame(head)
    except ValueError:
        return "is not an image"
    end = b"IEND\xaeB`\x82" if head[:8] == _PNG else b"\xff\xd9"
    if tail.find(end, frame if tail is head else 0) < 0:
        return "is cut short"
    return "has no pixels" if is_empty else None
