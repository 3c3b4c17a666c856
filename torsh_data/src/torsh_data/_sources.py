"""What a `source` means: which files, where they lie and which reader each of them gets."""

import glob
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import pyarrow as pa

from torsh_data._answers import ask
from torsh_data._arrow_shards import ArrowShard
from torsh_data._braces import expand
from torsh_data._files import DataFile, LocalFile, Remote, RemoteFile
from torsh_data._hf import HubShard, is_hub_dataset, is_saved, load_saved
from torsh_data._index import INDEX_NAME, ShardEntry, read_index
from torsh_data._jsonl_shards import JsonlShard
from torsh_data._nothing import REMEDIES, explain, refuse_samples
from torsh_data._parquet_shards import ParquetShard
from torsh_data._shards import IndexedShard, Shard, Verify
from torsh_data._store import Sink, Store
from torsh_data._tar_shards import Decode, TarShard

if TYPE_CHECKING:
    from datasets import Dataset as HubDataset

Location: TypeAlias = "str | os.PathLike[str]"
Source: TypeAlias = "Location | Iterable[Location] | HubDataset"

_FORMATS = ".arrow, .parquet, .tar or .jsonl"
_READERS: dict[str, Callable[..., Shard]] = {
    ".arrow": ArrowShard,
    ".parquet": ParquetShard,
    ".tar": TarShard,
    ".jsonl": JsonlShard,
    ".ndjson": JsonlShard,
}
_PACKED = {".gz": "gzip", ".zst": "zstd"}
# What fsspec's file systems call the version of a file, the surest first.
_VERSIONS = (
    *("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Digest", "xet_hash", "blob_id"),
    *("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "modified", "created"),
)
_TOGETHER = 16  # files that are asked for at a time


@dataclass(frozen=True)
class Reading:
    """How the files are read, and what their indexes say about the data set besides."""

    verify: Verify
    decode: Decode
    refuse_unknown: bool
    storage_options: Mapping[str, Any]
    make_store: Callable[[], Store]
    has_store: bool
    metadata: dict[str, Any] = field(default_factory=dict)


def open_source(source: Source, reading: Reading) -> tuple[list[Shard], Store | None]:
    """The shards of a source, and the store that they go through if they need one."""
    if isinstance(source, (str, os.PathLike)) and not is_url(source) and is_saved(Path(source)):
        source = load_saved(Path(source))
    if is_hub_dataset(source):
        return [HubShard(source)], None
    is_list = not isinstance(source, str) and not hasattr(source, "__fspath__")
    if is_list:
        refuse_samples(source)
    locations: list[Location] = list(cast("Any", source)) if is_list else _expanded(source)
    if locations and all(is_url(location) for location in locations):
        return _open_remote([str(url) for url in locations], reading)
    mixed = [location for location in locations if is_url(location)]
    if mixed:
        raise ValueError(f"source has URLs such as {mixed[0]!r} beside paths; give only one kind")
    paths = [path for place in locations for path in _find_local(Path(place), is_list=is_list)]
    if not paths:
        raise explain(source, _FORMATS)
    return _open_local(paths, reading)


def _expanded(source: Any) -> list[Location]:
    if not isinstance(source, str) or Path(source).exists():
        return [source]
    return list(expand(source))


def is_url(location: Location) -> bool:
    """Whether a location is a URL, and not of a file on this machine."""
    return isinstance(location, str) and "://" in location and not location.startswith("file://")


def _format(name: str) -> tuple[str, str | None]:
    """A file's format by its suffix, and how it is packed."""
    path = PurePosixPath(name)
    packed = _PACKED.get(path.suffix)
    kind = (path.with_suffix("") if packed else path).suffix
    if kind not in _READERS or (packed and _READERS[kind] is not JsonlShard):
        remedy = REMEDIES.get(path.suffix.lower(), "")
        raise ValueError(
            f"{name}: reads {_FORMATS} files only (.jsonl also as .gz or .zst){remedy}"
        )
    return kind, packed


def _is_readable(name: str) -> bool:
    try:
        _format(name)
    except ValueError:
        return False
    return True


def _entries(path: "Path | _RemoteIndex", metadata: dict[str, Any]) -> dict[str, ShardEntry]:
    index = read_index(cast("Path", path))
    metadata.update(index.metadata)
    entries = index.shards
    for entry in entries:
        if "/" in entry.name or entry.name in ("", ".", ".."):
            raise RuntimeError(f"{path} lists {entry.name!r}, which is not a file beside it")
    return {entry.name: entry for entry in entries}


def _find_local(path: Path, *, is_list: bool) -> list[Path]:
    text = str(path).removeprefix("file:") if str(path).startswith("file:") else str(path)
    path = Path(text)
    if path.is_dir():
        if (path / INDEX_NAME).exists():
            return [path / name for name in _entries(path / INDEX_NAME, {})]
        return sorted(p for p in path.iterdir() if _is_readable(p.name))
    if path.is_file():
        return [path]
    found = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
    if not found and is_list and not glob.has_magic(str(path)):
        return [path]  # that it is missing is said with what an index knows of it
    if not found:
        raise explain(str(path), _FORMATS)
    return found


def _open_local(paths: list[Path], reading: Reading) -> tuple[list[Shard], Store | None]:
    entries: dict[Path, ShardEntry] = {}
    for folder in dict.fromkeys(path.parent for path in paths):
        if (folder / INDEX_NAME).exists():
            found = _entries(folder / INDEX_NAME, reading.metadata)
            entries |= {folder / name: entry for name, entry in found.items()}
    kinds = [_format(str(path)) for path in paths]
    store = reading.make_store() if reading.has_store else None
    shards: list[Shard] = []
    for path, (_, packed) in zip(paths, kinds, strict=True):
        entry = entries.get(path)
        if not path.exists():
            listed = "" if entry is None else _listed(entry)
            raise FileNotFoundError(f"{path} is missing{listed}")
        if packed and store is None:
            raise ValueError(
                f"{path} is compressed and has no random access; give cache_dir= to unpack it to"
            )
        shards.append(_open_file(LocalFile(path), entry, reading, store))
    return shards, store


def _listed(entry: ShardEntry) -> str:
    return f": {INDEX_NAME} beside it lists it with {entry.rows} rows, {entry.bytes} bytes"


def _open_file(
    file: DataFile,
    entry: ShardEntry | None,
    reading: Reading,
    store: Store | None,
    schema: pa.Schema | None = None,
) -> Shard:
    if entry is not None:
        return IndexedShard(file, entry, reading.verify, schema)
    kind, packed = _format(file.name)
    if packed:
        file = _UnpackedFile(file, cast("Store", store), packed)
    if kind == ".tar":
        return TarShard(file, store, reading.decode)
    if _READERS[kind] is JsonlShard:
        return JsonlShard(file, store, reading.refuse_unknown)
    return _READERS[kind](file, store)


class _UnpackedFile(DataFile):
    """A compressed file, unpacked into the store."""

    def __init__(self, packed: DataFile, store: Store, compression: str) -> None:
        self._packed, self._store, self._compression = packed, store, compression
        self.name = packed.name
        self.identity = f"{packed.identity}:unpacked"
        self.size = self.whole().content.size

    def whole(self) -> Any:
        return self._store.view(self.identity, self._unpack, self._packed.size * 4)

    def _unpack(self, sink: Sink) -> None:
        with pa.BufferReader(self._packed.whole().content) as raw:
            try:
                with pa.CompressedInputStream(raw, self._compression) as file:
                    while chunk := file.read(8 << 20):
                        sink.write(chunk)
            except OSError as error:
                raise RuntimeError(f"{self.name} is damaged: {error}") from error

    def part(self, start: int, end: int, check: Any = None) -> Any:
        del check
        view = self.whole()
        return view._replace(content=view.content[start:end])

    def open(self) -> Any:
        return pa.BufferReader(self.whole().content)


class _RemoteIndex:
    """An index that came from a URL, as far as reading it goes."""

    def __init__(self, name: str, content: str) -> None:
        self._name, self._content = name, content

    def read_bytes(self) -> bytes:
        return self._content.encode(errors="surrogateescape")

    def __str__(self) -> str:
        return self._name


def _open_remote(urls: list[str], reading: Reading) -> tuple[list[Shard], Store]:
    store = reading.make_store()
    shards: list[Shard] = []
    for url in urls:
        remote = Remote(url, reading.storage_options)
        path = remote.path.rstrip("/")
        options = sorted(reading.storage_options.items())
        answer = ask(store, f"{url} {options}", partial(_look, remote, path, url))
        listing: Mapping[str, Mapping[str, Any]] = answer.get("files", {})
        schema: pa.Schema | None = None
        if "index" in answer:
            index = _RemoteIndex(remote.name(f"{path}/{INDEX_NAME}"), answer["index"])
            entries = _entries(index, reading.metadata)
            if not entries:
                raise explain(url, _FORMATS)
            for name, entry in entries.items():
                version = f"{entry.tail}:{entry.xxh3[0] if entry.xxh3 else ''}"
                file = RemoteFile(remote, store, f"{path}/{name}", entry.bytes, version)
                shard = IndexedShard(file, entry, reading.verify, schema)
                schema = shard.schema() if schema is None else schema
                shards.append(shard)
            continue
        with ThreadPoolExecutor(_TOGETHER) as pool:
            open_one = partial(_open_listed, remote, store, reading)
            shards += pool.map(open_one, listing.items())
    return shards, store


def _look(remote: Remote, path: str, url: str) -> dict[str, Any]:
    """A folder's index, or the files of a folder, a pattern or one file with what is known."""
    system = remote.system
    if path.endswith(f"/{INDEX_NAME}"):
        raise ValueError(f"source={url!r} is an index; give the folder that it is in")
    if any(sign in path for sign in "*?["):
        found = remote.retry(lambda: system.glob(path, detail=True), url)
    elif _is_readable(path):
        found = {path: remote.retry(lambda: system.info(path), url)}
    else:
        index = f"{path}/{INDEX_NAME}"
        try:
            content = remote.retry(lambda: system.cat_file(index), remote.name(index))
        except FileNotFoundError:
            pass
        else:
            return {"index": cast("bytes", content).decode(errors="surrogateescape")}
        listed = remote.retry(lambda: system.ls(path, detail=True), url)
        found = {str(info["name"]): info for info in listed if info.get("type") != "directory"}
    names = sorted(filter(_is_readable, found))
    if not names:
        raise explain(url, _FORMATS)
    with ThreadPoolExecutor(_TOGETHER) as pool:
        known = pool.map(partial(_size_and_version, remote), names, [found[n] for n in names])
        return {"files": dict(zip(names, known, strict=True))}


def _size_and_version(remote: Remote, path: str, info: Mapping[str, Any]) -> dict[str, Any]:
    name = remote.name(path)
    if info.get("size") is None:
        info = remote.retry(lambda: remote.system.info(path), name)
    if info.get("size") is None:
        raise ValueError(f"{name}: the server does not tell the size of the file")
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
    return {"size": int(info["size"]), "version": version}


def _open_listed(
    remote: Remote, store: Store, reading: Reading, found: tuple[str, Mapping[str, Any]]
) -> Shard:
    path, known = found
    name = remote.name(path)
    if not known["version"]:
        warnings.warn(
            f"{name}: the server tells no version of the file (no ETag, no time of its last "
            "change), so what the cache has of it is taken for the same as long as its size is; "
            "give changed files another name",
            stacklevel=2,
        )
    file = RemoteFile(remote, store, path, known["size"], known["version"])
    return _open_file(file, None, reading, store)
