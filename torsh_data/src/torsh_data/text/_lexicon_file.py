"""The file of a compiled lexicon: a checked header and one compressed table.

    bytes  content
    8      TORSHLEX
    4      version, 1
    4      words in the table
    8      bytes of the table
    8      bytes of the table as compressed
    16     BLAKE2b of the 32 bytes before and of all that follows
    rest   the table, compressed with zlib

The table is UTF-8 text, a line for each word: `word TAB groups`. A group such as `n62:car,auto`
holds the synonyms of one sense, best first: the part of speech (n, v, a or r), the share of the
sense among the uses of the word in per cent, and the synonyms; `;` stands between groups.
Numbers are little-endian.
"""

import hashlib
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

from torsh_data._index import replace_file

_HEAD = struct.Struct("<8sIIQQ")
_DIGEST = 16
_MAGIC = b"TORSHLEX"
_VERSION = 1
_MOST_BYTES = 1 << 28


def write_table(path: Path, table: Mapping[str, str]) -> None:
    """Write the groups of each word, all of the file or nothing."""
    text = "".join(f"{word}\t{table[word]}\n" for word in sorted(table)).encode()
    packed = zlib.compress(text, 9)
    head = _HEAD.pack(_MAGIC, _VERSION, len(table), len(text), len(packed))
    replace_file(path, head + _digest(head, packed) + packed)


def read_table(path: Path) -> dict[str, str]:
    """Read and check a compiled lexicon: the groups of each word.

    Raises:
        RuntimeError: If the file is no lexicon, of another version, or damaged.
    """
    content = path.read_bytes()
    start = _HEAD.size + _DIGEST
    if not content.startswith(_MAGIC):
        raise RuntimeError(f"{path} is not a compiled lexicon")
    if len(content) < start:
        raise RuntimeError(f"{path} is damaged: it ends inside its header")
    head, packed = content[: _HEAD.size], content[start:]
    _, version, words, raw_bytes, packed_bytes = _HEAD.unpack(head)
    if version != _VERSION:
        raise RuntimeError(
            f"{path} has version {version}, this torsh-data reads version {_VERSION}; update it"
        )
    if len(packed) != packed_bytes:
        raise RuntimeError(
            f"{path} is damaged: {len(packed)} bytes follow the header, expected {packed_bytes}"
        )
    if _digest(head, packed) != content[_HEAD.size : start]:
        raise RuntimeError(f"{path} is damaged: its checksum is wrong")
    if raw_bytes > _MOST_BYTES:
        raise RuntimeError(f"{path}: a table of {raw_bytes} bytes is more than {_MOST_BYTES}")
    unpacker = zlib.decompressobj()
    try:
        raw = unpacker.decompress(packed, raw_bytes + 1)
        text = raw.decode()
    except (zlib.error, UnicodeDecodeError) as error:
        raise RuntimeError(f"{path} is damaged: {error}") from error
    # no list for each line: that takes five times as long
    cells = text.replace("\n", "\t").split("\t")
    counts = {text.count("\t"), text.count("\n"), len(cells) // 2}
    if len(raw) != raw_bytes or counts != {words}:
        raise RuntimeError(f"{path} is damaged: it does not hold the {words} words it announces")
    return dict(zip(cells[:-1:2], cells[1::2], strict=True))


def _digest(head: bytes, packed: bytes) -> bytes:
    return hashlib.blake2b(head + packed, digest_size=_DIGEST).digest()
