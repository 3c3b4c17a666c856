"""Other formats to shards."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from torsh_data._claim import refuse_finished
from torsh_data._dataset import ShardedDataset
from torsh_data._feed import SampleFeed
from torsh_data._images import ImageTree, is_image_tree
from torsh_data._writer import Compression, Layout, write

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def convert(
    source: Any,
    out: str | os.PathLike[str],
    *,
    columns: Sequence[str] | None = None,
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
              number of the folder in sorted order); the names are `metadata["classes"]`;
            - a `.csv` or `.tsv` file with a line of names; types come from the first megabyte;
            - a `datasets.Dataset`, or a folder that its `save_to_disk` wrote;
            - all else that `ShardedDataset` reads: Arrow, Parquet, WebDataset tar (members stay
              bytes), JSON lines, as a folder, pattern, list or URL.
        out: As for `write_shards`, like all that follows.
        columns: Names of the columns to keep; all by default.
        shard_bytes: Size at which a shard is closed.
        block_bytes: Size of a block.
        compression: Compress the blocks.
        shuffle_seed: Write the samples in a random order; not for CSV. Worth it where classes lie
            together, if the data set will be read with a window much smaller than itself.
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
    feed, identity, known = _open(source, columns, shuffle_seed)
    plan = {"shuffle_seed": shuffle_seed, "source": identity}
    kept = {**known, **(metadata or {})}
    write(feed, out, layout, plan, kept, num_workers, resume, progress)


def _open(
    source: Any, columns: Sequence[str] | None, shuffle_seed: int | None
) -> tuple[SampleFeed, str, dict[str, Any]]:
    """The samples, what tells the source from another, and metadata that it comes with."""
    path = Path(source) if isinstance(source, (str, os.PathLike)) else None
    if path is not None and path.suffix.lower() in _DELIMITERS:
        if shuffle_seed is not None:
            raise TypeError(
                f"shuffle_seed={shuffle_seed} needs random access, and {str(path)!r} has none; "
                "convert it as it is, then convert the result with shuffle_seed"
            )
        read, schema = _rows_of(path, columns)
        return SampleFeed(read, schema, None), f"{path.name}:{path.stat().st_size}", {}
    if path is not None and path.is_dir():
        if is_image_tree(path):
            if columns is not None and set(columns) != {"image", "label"}:
                raise ValueError(f"columns={list(columns)}; pictures have 'image' and 'label'")
            tree = ImageTree(path)
            feed = SampleFeed(tree, None, shuffle_seed)
            return feed, tree.fingerprint, {"classes": tree.classes}
        if (path / "dataset_info.json").exists() and (path / "state.json").exists():
            source = _load_saved(path)
    data = ShardedDataset(source, columns=columns, decode="bytes")
    return SampleFeed(data, data.schema, shuffle_seed), data.fingerprint, {}


def _load_saved(path: Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"source={str(path)!r} was saved by Hugging Face datasets: pip install datasets"
        ) from None
    return datasets.load_from_disk(str(path))


def _rows_of(
    path: Path, columns: Sequence[str] | None
) -> tuple[Callable[[int], Iterator[dict[str, Any]]], pa.Schema]:
    from pyarrow import csv

    parse = csv.ParseOptions(delimiter=_DELIMITERS[path.suffix.lower()], newlines_in_values=True)

    def stream() -> csv.CSVStreamingReader:
        return csv.open_csv(path, parse_options=parse)

    with stream() as reader:
        schema = reader.schema
    unknown = [name for name in columns or [] if name not in schema.names]
    if unknown:
        raise ValueError(f"columns: no column {unknown[0]!r}; there are {schema.names}")
    names = list(columns or schema.names)

    def read(start: int) -> Iterator[dict[str, Any]]:
        with stream() as reader:
            for batch in reader:
                if start < batch.num_rows:
                    yield from batch.select(names).slice(start).to_pylist()
                start = max(0, start - batch.num_rows)

    return read, pa.schema([schema.field(name) for name in names])
