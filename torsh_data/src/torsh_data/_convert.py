"""Other formats to shards."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from torsh_data._claim import refuse_finished
from torsh_data._dataset import ShardedDataset
from torsh_data._feed import SampleFeed
from torsh_data._files import DataFile
from torsh_data._images import ImageTree, is_image_tree
from torsh_data._mds import MdsFolder, is_mds
from torsh_data._schemas import retyped
from torsh_data._shards import IndexedShard
from torsh_data._writer import Compression, Layout, write

_PICTURES = pa.schema(
    [
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
    ]
)
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def convert(
    source: Any,
    out: str | os.PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    schema: pa.Schema | None = None,
    classes: Sequence[str] | None = None,
    skip_broken: bool = False,
    shard_bytes: str | int = "256MB",
    block_bytes: str | int = "4MB",
    compression: Compression = None,
    shuffle_seed: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    num_workers: int = 0,
    resume: bool = True,
    progress: bool = False,
) -> None:
    r"""Write an existing data set as shards, sample by sample in bounded memory.

    Contents are kept as they are: pictures as the bytes of their files, numbers in their types. A
    conversion that is killed goes on behind its last finished shard when it is called again.

    Args:
        source: One of

            - a folder of folders of pictures: the columns are `image` (bytes) and `label` (the
              number of the folder in sorted order); the names are `metadata["classes"]`. The
              beginning and end of each file are checked before anything is written;
            - a `.csv` or `.tsv` file with a line of names. A column all of whose cells are whole
              numbers, numbers or true and false has that type; 00501, dates and all else stay text.
              Empty cells are null;
            - a folder that MosaicML Streaming wrote (MDS): pictures stay the bytes of their files,
              JSON stays text, arrays of one shape become tensors; pickles are refused;
            - a `datasets.Dataset`, or a folder that its `save_to_disk` wrote;
            - all else that `ShardedDataset` reads: Arrow, Parquet, WebDataset tar (pictures
              and arrays stay bytes), JSON lines, as a folder, pattern, list or URL.
        out: As for `write_shards`, like all that follows.
        columns: Names of the columns to keep; all by default.
        schema: Arrow types of the columns that are to have others than they would, such as
            `pa.schema([("zip", pa.string()), ("day", pa.date32())])`.
        classes: For folders of pictures: the names in the order of their labels, the sorted folders
            by default. Give the splits of a data set those of the first one, so that a folder that
            one of them lacks does not move the labels of the others.
        skip_broken: For folders of pictures: leave out, with a warning, files that are empty, cut
            short or no pictures, instead of refusing them.
        shard_bytes: Size at which a shard is closed.
        block_bytes: Size of a block.
        compression: Compress the blocks.
        shuffle_seed: Write the samples in a random order; not for CSV or compressed MDS. Worth it
            where classes lie together, if the data set will be read with a window much smaller
            than itself.
        metadata: Kept in the index as JSON.
        num_workers: Processes that read and write, each its share; not for CSV.
        resume: False discards the shards of a conversion that was stopped.
        progress: Show a bar once it takes more than two seconds.

    Raises:
        ValueError: As `write_shards`; also if the source is not the one that a stopped conversion
            had begun with, or a column is unknown.
        FileNotFoundError: If there is no such source.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "colours.csv").write_text("name,code\nred,3\nblue,5\n")
        >>> convert(folder / "colours.csv", folder / "shards")
        >>> ShardedDataset(folder / "shards")[1]
        {'name': 'blue', 'code': 5}
    """
    layout = Layout.of(shard_bytes, block_bytes, compression)
    refuse_finished(Path(out))
    if classes is not None or skip_broken:
        _refuse_all_but_pictures(source, classes)
    feed, identity, known = _open(source, columns, schema, shuffle_seed, classes, skip_broken)
    plan = {"shuffle_seed": shuffle_seed, "source": identity}
    kept = {**known, **(metadata or {})}
    write(feed, out, layout, plan, kept, num_workers, resume, progress)


def _open(
    source: Any,
    columns: Sequence[str] | None,
    schema: pa.Schema | None,
    shuffle_seed: int | None,
    classes: Sequence[str] | None,
    skip_broken: bool,
) -> tuple[SampleFeed, str, dict[str, Any]]:
    """The samples, what tells the source from another, and metadata that it comes with."""
    path = Path(source) if isinstance(source, (str, os.PathLike)) else None
    if path is not None and path.suffix.lower() in _DELIMITERS:
        if shuffle_seed is not None:
            raise TypeError(
                f"shuffle_seed={shuffle_seed} needs random access, and {str(path)!r} has none; "
                "convert it as it is, then convert the result with shuffle_seed"
            )
        from torsh_data._csv import TextTable

        table = TextTable(path, _DELIMITERS[path.suffix.lower()], columns, schema or pa.schema([]))
        status = path.stat()
        identity = f"{path.name}:{status.st_size}:{status.st_mtime_ns}"
        return SampleFeed(table, retyped(table.schema, schema), None), identity, {}
    if path is not None and path.is_dir():
        if is_image_tree(path):
            if columns is not None and set(columns) != {"image", "label"}:
                raise ValueError(f"columns={list(columns)}; pictures have 'image' and 'label'")
            tree = ImageTree(path, classes)
            tree.leave_out_broken(skip=skip_broken)
            feed = SampleFeed(tree, retyped(_PICTURES, schema), shuffle_seed)
            return feed, tree.fingerprint, {"classes": tree.classes}
        if is_mds(path):
            mds = MdsFolder(path, columns)
            if shuffle_seed is not None and mds.is_packed:
                raise TypeError(
                    f"shuffle_seed={shuffle_seed} needs random access, and {str(path)!r} is "
                    "compressed; convert it as it is, then convert the result with shuffle_seed"
                )
            feed = SampleFeed(mds, retyped(mds.schema, schema), shuffle_seed)
            return feed, mds.fingerprint, {}
    data = ShardedDataset(source, columns=columns, decode="files")
    return (
        SampleFeed(data, retyped(data.schema, schema), shuffle_seed),
        _version(data),
        data.metadata,
    )


def _version(data: ShardedDataset) -> str:
    """The fingerprint, and the times or server's versions of files that have no checksums."""
    digest = xxhash.xxh3_128(data.fingerprint.encode())
    for shard in data._shards:
        file = getattr(shard, "file", None)
        if isinstance(file, DataFile) and not isinstance(shard, IndexedShard):
            digest.update(file.identity.encode())
    return digest.hexdigest()


def _refuse_all_but_pictures(source: Any, classes: Sequence[str] | None) -> None:
    is_path = isinstance(source, (str, os.PathLike))
    if not is_path or not Path(source).is_dir() or not is_image_tree(Path(source)):
        option = "skip_broken=True" if classes is None else f"classes={list(classes)[:3]}"
        raise ValueError(f"{option} is for folders of pictures, which source={source!r} is not")
