"""Files of tensors, compressed without loss and checked chunk by chunk."""

import ctypes
import json
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# preamble | compressed chunks, one after the other | JSON index
# The preamble says where the index is; each of the three parts has its own CRC-32.
FORMAT = "torsh-saga-table"
VERSION = 1
_MAGIC = b"TORSHSGA"
_FIELDS = struct.Struct("<8sIQQI")  # magic, version, offset and length of the index, its CRC
_CHECK = struct.Struct("<I")  # CRC of the fields
_START = _FIELDS.size + _CHECK.size
_CHUNK_BYTES = 1 << 22
_MOST_EXPANSION = 1032  # of deflate
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int8)
}


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors to a file that appears only when it is complete and on disk.

    Before compression the first bytes of all numbers of a chunk are put together, then the second
    ones and so on: signs and exponents of neighbours are alike, and compress.

    Args:
        path: The file; replaced if there is one.
        tensors: float64, float32, bfloat16 or int8, on any device.
        facts: Put beside them; JSON.
    """
    unfinished = path.with_name(f"{path.name}.tmp")
    with unfinished.open("wb") as file:
        file.write(bytes(_START))
        entries = {}
        for name, tensor in tensors.items():
            chunks = []
            flat = tensor.detach().cpu().contiguous().view(-1)
            for part in flat.split(_CHUNK_BYTES // flat.element_size()) if flat.numel() else ():
                compressed = zlib.compress(_bytes(_planes(part)), 6)
                chunks.append([part.nbytes, len(compressed), zlib.crc32(compressed)])
                file.write(compressed)
            entries[name] = {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "chunks": chunks,
            }
        index = json.dumps({"format": FORMAT, "facts": facts, "tensors": entries}).encode()
        offset = file.tell()
        file.write(index)
        fields = _FIELDS.pack(_MAGIC, VERSION, offset, len(index), zlib.crc32(index))
        file.seek(0)
        file.write(fields + _CHECK.pack(zlib.crc32(fields)))
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the new name last
    finally:
        os.close(folder)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of ``write_tensors``; nothing is allocated before its sizes are plausible.

    Args:
        path: The file.

    Returns:
        The tensors on the CPU, and the facts.

    Raises:
        ValueError: The file is of another kind, truncated or damaged; the message names the part.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(_START)
        fields = start[: _FIELDS.size]
        if len(start) < _START or not start.startswith(_MAGIC):
            raise ValueError(f"{path} is not a {FORMAT} file")
        if zlib.crc32(fields) != _CHECK.unpack(start[_FIELDS.size :])[0]:
            raise ValueError(f"{path}: the preamble is damaged (CRC); use an older copy")
        _, version, offset, length, index_crc = _FIELDS.unpack(fields)
        if version != VERSION:
            raise ValueError(
                f"{path} has version {version}, this torsh-optim reads {VERSION}; update it"
            )
        if offset + length != size:
            raise ValueError(
                f"{path} has {size:,} bytes in place of {offset + length:,}: it is truncated or "
                "not complete; use an older copy"
            )
        file.seek(offset)
        raw_index = file.read(length)
        if zlib.crc32(raw_index) != index_crc:
            raise ValueError(f"{path}: the index is damaged (CRC); use an older copy")
        index = _parse(path, raw_index, offset)
        file.seek(_START)
        tensors = {}
        for name, entry in index["tensors"].items():
            dtype = _DTYPES[entry["dtype"]]
            tensor = torch.empty(entry["shape"], dtype=dtype)
            parts = tensor.view(-1).split(_CHUNK_BYTES // dtype.itemsize)
            for number, (raw, packed, crc) in enumerate(entry["chunks"]):
                where = f"{path}: chunk {number} of {name!r}"
                compressed = file.read(packed)
                if zlib.crc32(compressed) != crc:
                    raise ValueError(f"{where} is damaged (CRC); use an older copy")
                content = _inflate(compressed, raw, where)
                planes = torch.frombuffer(content, dtype=torch.uint8)
                parts[number].view(torch.uint8).copy_(planes.view(dtype.itemsize, -1).T.reshape(-1))
            tensors[name] = tensor
    return tensors, index["facts"]


def _parse(path: Path, raw: bytes, end: int) -> dict[str, Any]:
    """Check that an index describes what lies between the preamble and itself."""
    try:
        index: dict[str, Any] = json.loads(raw)
        if index["format"] != FORMAT or not isinstance(index["facts"], dict):
            raise ValueError(f"format {index['format']!r}")
        position = _START
        for name, entry in index["tensors"].items():
            total = math.prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize
            full, rest = divmod(total, _CHUNK_BYTES)
            expected = [_CHUNK_BYTES] * full + [rest] * (rest > 0)
            if min(entry["shape"], default=0) < 0 or expected != [c[0] for c in entry["chunks"]]:
                raise ValueError(f"the chunks of {name!r} do not make up {entry['shape']}")
            for raw_bytes, packed, _ in entry["chunks"]:
                if packed < 1 or raw_bytes > packed * _MOST_EXPANSION + 64:
                    raise ValueError(f"{packed} bytes of {name!r} cannot hold {raw_bytes}")
                position += packed
        if position != end:
            raise ValueError(f"chunks end at {position}, the index begins at {end}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: the index is not valid ({error}); use an older copy") from error
    return index


def _inflate(compressed: bytes, size: int, where: str) -> bytearray:
    machine = zlib.decompressobj()
    try:
        content = bytearray(machine.decompress(compressed, size))
        if len(content) == size and not machine.eof:  # the checksum after the last byte
            content += machine.decompress(machine.unconsumed_tail, 1)
    except zlib.error as error:
        raise ValueError(f"{where} cannot be decompressed ({error}); use an older copy") from error
    if len(content) != size or not machine.eof or machine.unused_data:
        raise ValueError(f"{where} does not hold {size} bytes; use an older copy")
    return content


def _planes(part: Tensor) -> Tensor:
    """Bytes of numbers, all the first ones first."""
    return part.view(torch.uint8).view(-1, part.element_size()).T.contiguous()


def _bytes(tensor: Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
