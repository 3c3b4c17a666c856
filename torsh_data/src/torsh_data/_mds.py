"""Folders that MosaicML Streaming wrote, for reading alone and without its package.

A shard is the number of its samples `n`, `n + 1` places in the file (all uint32), a copy of the
settings, and the samples. A sample is the sizes (uint32) of those of its columns whose size is not
fixed, then its values, column by column. `index.json` beside the shards knows all else.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import xxhash
from torch.utils.data import Dataset

from torsh_data._columns import Value, infer_schema
from torsh_data._index import INDEX_NAME
from torsh_data._mapping import map_file

_Decoder: TypeAlias = Callable[[memoryview], Value]

_NUMBERS = {
    **{f"int{bits}": f"<i{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"<u{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
    "int": "<i8",
}
_ARRAY_KINDS = {
    **{bits: f"<u{bits // 8}" for bits in (8, 16, 32, 64)},
    **{bits + 1: f"<i{bits // 8}" for bits in (8, 16, 32, 64)},
    **{bits + 2: f"<f{bits // 8}" for bits in (16, 32, 64)},
}
_PACKINGS = {"zstd": "zstd", "gz": "gzip", "br": "brotli", "snappy": "snappy"}
_LIMIT = 1 << 32  # places are uint32


def is_mds(folder: Path) -> bool:
    """Whether a folder's index is of MosaicML Streaming's shards."""
    try:
        shards = json.loads((folder / INDEX_NAME).read_bytes())["shards"]
        return bool(shards[0]["format"] == "mds")
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return False


@dataclass(frozen=True)
class _Shard:
    path: Path
    packed: Path
    packing: str | None
    samples: int
    size: int
    packed_size: int
    hashes: dict[str, str]
    packed_hashes: dict[str, str]
    columns: list[tuple[str, str, int | None]]


class MdsFolder(Dataset[dict[str, Value]]):
    """The samples of a folder, in order.

    Args:
        folder: Has an `index.json`.
        columns: Those to read; all by default.

    Raises:
        ValueError: If a column is unknown or cannot be read safely.
        RuntimeError: If a file is damaged or not of this format.
    """

    def __init__(self, folder: Path, columns: Sequence[str] | None) -> None:
        content = (folder / INDEX_NAME).read_bytes()
        try:
            self._shards = [_shard(folder, entry) for entry in json.loads(content)["shards"]]
        except (ValueError, TypeError, KeyError) as error:
            raise RuntimeError(f"{folder / INDEX_NAME} cannot be read: {error}") from error
        known = [name for name, _, _ in self._shards[0].columns]
        unknown = [name for name in columns or [] if name not in known]
        if unknown:
            raise ValueError(f"columns: no column {unknown[0]!r}; there are {known}")
        self._wanted = list(known if columns is None else columns)
        self._decoders = {
            (name, encoding): _decoder(name, encoding, folder)
            for shard in self._shards
            for name, encoding, _ in shard.columns
            if name in self._wanted
        }
        self._ends = np.cumsum([shard.samples for shard in self._shards])
        if not len(self):
            raise ValueError(f"{folder} has shards, but no samples")
        self.is_packed = any(not shard.path.exists() for shard in self._shards)
        self.fingerprint = xxhash.xxh3_128_hexdigest(content)
        self._open: tuple[int, pa.Buffer] | None = None
        self.schema = infer_schema(self[0])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Value]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a data set of {len(self)}")
        number = int(np.searchsorted(self._ends, index, "right"))
        shard = self._shards[number]
        if self._open is None or self._open[0] != number:
            self._open = number, _content(shard)
        row = index - int(self._ends[number]) + shard.samples
        try:
            return self._sample(shard, memoryview(self._open[1]), row)
        except (ValueError, IndexError) as error:
            raise RuntimeError(f"{shard.path}: sample {row} is damaged: {error}") from error

    def _sample(self, shard: _Shard, content: memoryview, row: int) -> dict[str, Value]:
        begin, end = np.frombuffer(content, "<u4", 2, 4 * (1 + row)).tolist()
        open_sizes = sum(size is None for _, _, size in shard.columns)
        told = iter(np.frombuffer(content, "<u4", open_sizes, begin).tolist())
        sizes = [next(told) if size is None else size for _, _, size in shard.columns]
        places = list(accumulate(sizes, initial=begin + 4 * open_sizes))
        if places[-1] != end or end > len(content):
            raise ValueError(f"its columns end at byte {places[-1]}, the sample at {end}")
        sample = {
            name: self._decoders[name, encoding](content[first:last])
            for (name, encoding, _), first, last in zip(
                shard.columns, places[:-1], places[1:], strict=True
            )
            if name in self._wanted
        }
        return {name: sample[name] for name in self._wanted}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}


def _shard(folder: Path, entry: dict[str, Any]) -> _Shard:
    if entry["format"] != "mds" or entry["version"] != 2:
        raise ValueError(f"a shard is {entry['format']} of version {entry['version']}, not mds 2")
    raw, packed = entry["raw_data"], entry["zip_data"] or {"basename": "", "bytes": 0, "hashes": {}}
    for name in (raw["basename"], packed["basename"]):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{name!r} is not a file in the folder")
    return _Shard(
        path=folder / raw["basename"],
        packed=folder / packed["basename"],
        packing=entry["compression"] and entry["compression"].partition(":")[0],
        samples=int(entry["samples"]),
        size=int(raw["bytes"]),
        packed_size=int(packed["bytes"]),
        hashes=raw["hashes"],
        packed_hashes=packed["hashes"],
        columns=list(
            zip(
                entry["column_names"],
                entry["column_encodings"],
                (size or None for size in entry["column_sizes"]),
                strict=True,
            )
        ),
    )


def _content(shard: _Shard) -> pa.Buffer:
    if shard.path.exists():
        content = _checked(shard.path, shard.size, shard.hashes)
    elif shard.packing is None or not shard.packed.exists():
        raise FileNotFoundError(f"{shard.path} is missing; {INDEX_NAME} beside it lists it")
    elif shard.packing not in _PACKINGS:
        raise ValueError(
            f"{shard.packed} is packed as {shard.packing!r}; reads {', '.join(_PACKINGS)}: unpack "
            f"it to {shard.path.name}"
        )
    else:
        packed = _checked(shard.packed, shard.packed_size, shard.packed_hashes)
        if not 0 <= shard.size < _LIMIT:
            raise RuntimeError(
                f"{shard.packed} says it holds {shard.size} bytes, which is too much"
            )
        try:
            content = pa.Codec(_PACKINGS[shard.packing]).decompress(packed, shard.size)
        except OSError as error:
            raise RuntimeError(f"{shard.packed} is damaged: {error}") from error
    if content.size < 8 + 4 * shard.samples or (
        int.from_bytes(content[:4].to_pybytes(), "little") != shard.samples
    ):
        raise RuntimeError(f"{shard.path} does not hold the {shard.samples} samples of its index")
    return content


def _checked(path: Path, size: int, hashes: dict[str, str]) -> pa.Buffer:
    content = map_file(path).buffer()
    if content.size != size:
        raise RuntimeError(
            f"{path} has {content.size} bytes, {INDEX_NAME} says {size}; copy it anew"
        )
    for name, expected in hashes.items():
        make: Any = getattr(xxhash, name, None) or getattr(hashlib, name, None)
        if make is not None and make(memoryview(content)).hexdigest() != expected:
            raise RuntimeError(f"{path} is damaged: its {name} is not {expected}; copy it anew")
    return content


def _decoder(name: str, encoding: str, folder: Path) -> _Decoder:
    kind, _, details = encoding.partition(":")
    if kind in _NUMBERS:
        dtype = np.dtype(_NUMBERS[kind])
        return lambda data: np.frombuffer(data, dtype, 1)[0].item()
    if kind in ("str", "json"):
        return lambda data: str(data, "utf-8")
    if kind in ("bytes", "jpeg", "png"):
        return bytes
    if kind == "str_int":
        return lambda data: int(str(data, "utf-8"))
    if kind == "str_float":
        return lambda data: float(str(data, "utf-8"))
    if kind == "ndarray":
        dtype_name, _, shape = details.partition(":")
        fixed = [int(size) for size in shape.split(",")] if shape else None
        return lambda data: _array(data, _NUMBERS[dtype_name] if dtype_name else None, fixed)
    why = "is not read"
    if kind == "pkl":
        why = "is a pickle, which can run any program when it is read"
    raise ValueError(
        f"{folder}: column {name!r}, encoded as {encoding!r}, {why}; leave it out with columns="
    )


def _array(data: memoryview, dtype: str | None, shape: list[int] | None) -> np.ndarray[Any, Any]:
    place = 0
    if dtype is None:
        if data[0] not in _ARRAY_KINDS:
            raise ValueError(f"an array of kind {data[0]}")
        dtype, place = _ARRAY_KINDS[data[0]], 1
    if shape is None:
        axes, width = data[place] >> 2, 1 << (data[place] & 3)
        shape = np.frombuffer(data, f"<u{width}", axes, place + 1).tolist()
        place += 1 + axes * width
    return np.frombuffer(data, dtype, math.prod(shape), place).reshape(shape)
