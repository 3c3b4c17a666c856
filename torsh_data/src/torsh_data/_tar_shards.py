"""WebDataset tar files: members with one name and different suffixes make a sample."""

import io
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, TypeAlias, cast

import numpy as np
import pyarrow as pa
import torch

from torsh_data._columns import HOLDS_TENSORS, Value
from torsh_data._files import DataFile, RemoteFile
from torsh_data._image_file import image_size
from torsh_data._index import hash_bytes
from torsh_data._plan import Plan, sample_bytes
from torsh_data._shards import Block, Sample, Shard
from torsh_data._store import Store
from torsh_data._tar import read_members

Decode: TypeAlias = Literal["torch", "files", "bytes"]

KEY = "__key__"
_BLOCK_BYTES = 4 << 20
_MAX_PIXELS = 1 << 28
_PICKLES = {"pkl", "pickle", "pyd", "pth", "pt"}
_NUMBERS = {"cls", "cls2", "class", "count", "index", "inx", "id"}
_TEXTS = {"txt", "text", "transcript"}
_JSONS = {"json", "jsn"}
_IMAGES = {"jpg", "jpeg", "png"}


@dataclass
class TarShard(Shard):
    """A tar file; each member is read by itself, where it lies."""

    file: DataFile
    store: Store | None = None
    decode: Decode = "torch"

    def __post_init__(self) -> None:
        self.path = self.file.name
        self.is_remote = isinstance(self.file, RemoteFile)
        plan = Plan.of(self.file, self.store, "tar", self._look)
        arrays = plan.arrays
        self._names = plan.schema.names
        self._starts, self._sizes = arrays["starts"], arrays["sizes"]
        self._columns, self._samples = arrays["columns"], arrays["samples"]
        self._keys, self._key_ends = arrays["keys"], arrays["key_ends"]
        self._block_samples, self._block_ends = arrays["block_samples"], arrays["block_ends"]
        self.block_rows = np.diff(self._block_samples).tolist()
        self.nbytes = self.file.size
        name = PurePosixPath(self.path).name
        members = hash_bytes(self._sizes.tobytes() + self._keys.tobytes())
        self.identity = f"{name}:{len(self._samples) - 1}:{self.nbytes}:{members}:{plan.digest}"

    def _look(self) -> Plan:
        whole = self.file.whole().content
        content = memoryview(whole)
        columns: dict[str, int] = {}
        starts: list[int] = []
        sizes: list[int] = []
        numbers: list[int] = []
        samples: list[int] = []
        keys: list[bytes] = []
        headers: list[int] = []
        left_out: list[str] = []
        known: set[str] = set()
        closed: set[str] = set()
        last: str | None = None
        for member in read_members(content, self.path):
            key, suffix = _split(member.name)
            if not suffix:
                left_out.append(member.name)
                continue
            if key != last:
                if key in closed:
                    raise ValueError(
                        f"{self.path}: {member.name!r} is not beside the other members of its "
                        "sample; write the tar anew with the members of each sample together, "
                        "such as tar --sort=name does"
                    )
                closed.add(key)
                samples.append(len(starts))
                keys.append(key.encode("utf-8", "surrogateescape"))
                headers.append(member.header)
                known, last = set(), key
            if suffix in known:
                raise ValueError(f"{self.path}: sample {key!r} has two members {suffix!r}")
            known.add(suffix)
            starts.append(member.start)
            sizes.append(member.size)
            numbers.append(columns.setdefault(suffix, len(columns)))
        if left_out:
            warnings.warn(
                f"{self.path}: {len(left_out)} members are no part of a sample, such as "
                f"{left_out[0]!r}: names are key.suffix",
                stacklevel=2,
            )
        samples.append(len(starts))
        ends = [*headers[1:], starts[-1] + sizes[-1]] if starts else []
        block_samples, block_ends = [0], headers[:1]
        for number, end in enumerate(ends, 1):
            if end - block_ends[-1] >= _BLOCK_BYTES or number == len(ends):
                block_samples.append(number)
                block_ends.append(end)
        return Plan.make(
            pa.schema([(name, pa.binary()) for name in columns]),
            sample_bytes(whole),
            starts=starts,
            sizes=sizes,
            columns=numbers,
            samples=samples,
            keys=np.frombuffer(b"".join(keys), np.uint8),
            key_ends=np.cumsum([0, *map(len, keys)]),
            block_samples=block_samples,
            block_ends=block_ends,
        )

    def schema(self) -> pa.Schema:
        fields = [_field(name, self.decode) for name in self._names]
        return pa.schema([pa.field(KEY, pa.string(), nullable=False), *fields])

    def open(self, block: int, fields: Sequence[pa.Field]) -> Block:
        start, end = self._block_ends[block : block + 2].tolist()
        view = self.file.part(start, end)
        opened = _TarBlock(self, view.content, start, int(self._block_samples[block]), fields)
        opened.in_memory = view.content.size if view.in_memory else 0
        opened.leased = view.content.size
        return opened

    def prepare(self, block: int) -> None:
        start, end = self._block_ends[block : block + 2].tolist()
        self.file.prepare(start, end)

    def key(self, sample: int) -> str:
        """The name that a sample's members share."""
        start, end = self._key_ends[sample : sample + 2]
        return self._keys[start:end].tobytes().decode("utf-8", "surrogateescape")


class _TarBlock(Block):
    def __init__(
        self,
        shard: TarShard,
        content: pa.Buffer,
        start: int,
        first: int,
        fields: Sequence[pa.Field],
    ) -> None:
        self._shard, self._content, self._start, self._first = shard, content, start, first
        self._wanted: list[tuple[str, Callable[[bytes], Value]]] = [
            (field.name, _decoder(field.name, shard.decode)) for field in fields
        ]
        self._numbers = {name: number for number, name in enumerate(shard._names)}

    def sample(self, row: int) -> Sample:
        shard = self._shard
        number = self._first + row
        first, end = shard._samples[number : number + 2].tolist()
        members = dict(zip(shard._columns[first:end].tolist(), range(first, end), strict=True))
        sample: Sample = {}
        for name, decode in self._wanted:
            if name == KEY:
                sample[name] = shard.key(number)
                continue
            member = members.get(self._numbers.get(name, -1))
            if member is None:
                sample[name] = None
                continue
            start = int(shard._starts[member]) - self._start
            content = self._content[start : start + int(shard._sizes[member])].to_pybytes()
            try:
                sample[name] = decode(content)
            except (ValueError, RuntimeError, EOFError) as error:
                raise ValueError(
                    f"{shard.path}: {shard.key(number)}.{name} cannot be decoded: {error}"
                ) from error
        return sample


def _split(name: str) -> tuple[str, str]:
    """Key and suffix: all that is behind the first dot of the last part of the path."""
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return folder + slash + stem, suffix.lower() if stem else ""


def _field(name: str, decode: Decode) -> pa.Field:
    last = name.rpartition(".")[2]
    if decode != "bytes":
        if last in _NUMBERS:
            return pa.field(name, pa.int64())
        if last in _TEXTS:
            return pa.field(name, pa.string())
        if last in _JSONS:
            return pa.field(name, pa.json_())
        if decode == "torch" and (last == "npy" or last in _IMAGES):
            return pa.field(name, pa.binary(), metadata=HOLDS_TENSORS)
    return pa.field(name, pa.binary())


def refuse_pickles(names: Sequence[str], path: str) -> None:
    """Raise if one of the chosen columns is a pickle, which runs code when it is read."""
    for name in names:
        if name.rpartition(".")[2] in _PICKLES:
            others = [other for other in names if other.rpartition(".")[2] not in _PICKLES]
            raise ValueError(
                f"{path}: column {name!r} is a pickle, which can run any program when it is read; "
                f"leave it out with columns={others}, or take its bytes with decode='bytes'"
            )


def _decoder(name: str, decode: Decode) -> Callable[[bytes], Value]:
    last = name.rpartition(".")[2]
    if decode == "bytes":
        return bytes
    if last in _NUMBERS:
        return int
    if last in _TEXTS:
        return lambda content: content.decode("utf-8")
    if last in _JSONS:
        return json.loads
    if decode == "files":
        return bytes
    if last == "npy":
        return _read_npy
    if last in _IMAGES:
        return _read_image
    return bytes


def _read_npy(content: bytes) -> torch.Tensor:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
        version, np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read(file)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize > len(content) - file.tell():
        raise ValueError(f"an array of {dtype} of shape {shape} is not in {len(content)} bytes")
    file.seek(0)
    return torch.from_numpy(np.load(file, allow_pickle=False))


def _read_image(content: bytes) -> torch.Tensor:
    try:
        from torchvision.io import ImageReadMode, decode_image
    except ImportError as error:
        raise ImportError(
            "images are decoded by torchvision: pip install 'torsh-data[vision]', or take the "
            "bytes with decode='bytes'"
        ) from error
    height, width = image_size(content)
    if height * width > _MAX_PIXELS:
        raise ValueError(f"an image of {height} x {width} pixels is too large")
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return cast("torch.Tensor", decode_image(data, ImageReadMode.RGB))
