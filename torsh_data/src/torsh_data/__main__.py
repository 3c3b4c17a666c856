"""The torsh-data command."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch

import torsh_data
from torsh_data._cache_folder import abandoned
from torsh_data._dataset import ShardedDataset
from torsh_data._image_file import looks_whole
from torsh_data._images import ImageTree, is_image_tree
from torsh_data._loader import StreamLoader
from torsh_data._order import Order, effective_batch
from torsh_data._rng import sample_keys
from torsh_data._shards import IndexedShard
from torsh_data._sizes import format_bytes

_OPTIONS = {
    "resume=False": "--restart",
    "skip_broken=True": "--skip-broken",
    "convert(source, out)": "torsh-data convert SOURCE OUT",
    "num_workers=": "--num-workers ",
    "shuffle_seed=": "--shuffle-seed ",
    "with classes= from the first": "with --classes-from the first's shards",
    "name them: convert(": "name them in Python: torsh_data.convert(",
}
"""What errors advise in Python, and here."""

_PARTS = {  # what to install, and what for
    "s3fs": ("s3fs", "s3:// URLs"),
    "gcsfs": ("gcsfs", "gs:// URLs"),
    "adlfs": ("adlfs", "abfs:// and az:// URLs"),
    "aiohttp": ("'torsh-data[remote]'", "http:// and https:// URLs"),
    "huggingface_hub": ("huggingface_hub", "hf:// URLs"),
    "datasets": ("datasets", "Hugging Face data sets"),
    "torchvision": ("'torsh-data[vision]'", "pictures"),
    "PIL": ("'torsh-data[vision]'", "pictures as PIL images"),
    "matplotlib": ("'torsh-data[plot]'", "plot_sheet"),
    "transformers": ("'torsh-data[text]'", "BackTranslator"),
    "lightning": ("lightning", "Lightning's Trainer"),
    "accelerate": ("accelerate", "accelerate's loops"),
}


def doctor(*, json: bool = False) -> None:
    """Say what this machine has, and which paths will run.

    Args:
        json: Print JSON instead of a table.
    """
    facts: dict[str, str | int | None] = {"torsh_data": torsh_data.__version__}
    facts["python"] = sys.version.split()[0]
    facts["torch"] = torch.__version__
    for name in ("numpy", "pyarrow", "xxhash", "fsspec"):
        facts[name] = _version(name)
    parts = {name: _version(name) for name in _PARTS}
    facts |= parts
    facts["cpus"] = len(os.sched_getaffinity(0))
    shared = os.statvfs("/dev/shm")  # noqa: S108  # where workers hand over their batches
    facts["shared_memory"] = format_bytes(shared.f_frsize * shared.f_blocks)
    facts["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    facts["augmentation"] = "batched torch operations on the images' own device"
    advice = []
    if facts["matplotlib"] is None:
        advice.append("no pictures (plot_sheet): pip install 'torsh-data[plot]'")
    if shared.f_frsize * shared.f_blocks < 2**30:
        advice.append("less than 1 GiB of /dev/shm limits batches from workers: enlarge it")
    dead = abandoned(Path("/dev/shm"))  # noqa: S108
    if dead:
        advice.append(
            f"{format_bytes(sum(dead.values()))} of /dev/shm belong to SampleCaches whose "
            "processes were killed: the next SampleCache removes them"
        )
    if json:
        _print_json({**facts, "advice": advice})
    else:
        missing = {n: f"missing: pip install {_PARTS[n][0]}" for n, v in parts.items() if v is None}
        shown = {n: v for n, v in facts.items() if n not in parts}
        _print_table("This machine", shown)
        _print_table(
            "Optional parts",
            {f"{name}: {_PARTS[name][1]}": missing.get(name, parts[name]) for name in parts},
        )
        for line in advice:
            print(line)


def inspect(path: str, *, batch_size: int = 256, window: str = "2GB", json: bool = False) -> None:
    """Show what a data set holds, and how well it will be shuffled.

    Args:
        path: A folder of shards, a file, or a glob pattern.
        batch_size: Samples in a batch, for the measure of the shuffle.
        window: Window of the shuffle, as for StreamLoader.
        json: Print JSON instead of a table.
    """
    data = _complain(ShardedDataset, path)
    size = min(batch_size, len(data))
    plan = _complain(StreamLoader, data, size, window=window, rank=0, world_size=1)
    rows = int(plan.state_dict()["window"])
    order = Order(len(data), 0, rows, data.block_rows)
    worth = effective_batch(order, plan.batch_size)
    facts: dict[str, str | int | None] = {
        "rows": len(data),
        "shards": len(data.files),
        "size": format_bytes(data.nbytes),
        "rows_per_block": data.block_rows,
        "fingerprint": data.fingerprint,
        "window_rows": rows,
        f"a_batch_of_{plan.batch_size}_is_worth": min(round(worth), plan.batch_size),
    }
    classes = data.metadata.get("classes")
    if classes is not None:
        facts["classes"] = _describe_classes(classes)
    columns = {f"column {field.name}": str(field.type) for field in data.schema}
    if json:
        _print_json({**facts, "bytes": data.nbytes, "columns": columns, "files": data.files})
    else:
        _print_table(path, {**facts, **columns})
        print(
            "A batch is worth the number of samples drawn from the whole data set that would be as "
            "mixed, if stored in sorted order; enlarge --window if it is much smaller than the "
            "batch."
        )


def verify(path: str) -> None:
    """Check every byte against the checksums; the exit code is 1 if anything is damaged.

    Args:
        path: A folder of shards with its index, or its URL.
    """
    from rich.progress import track

    data = _complain(ShardedDataset, path, verify="never")
    total = sum(shard.blocks + 1 for shard in data._shards if isinstance(shard, IndexedShard))
    if not total:
        raise SystemExit(
            f"torsh-data: {path} has no checksums to check; only shards that write_shards or "
            "convert wrote have"
        )
    shown = track(data.check(), "Checking", total=total, disable=not sys.stdout.isatty())
    found = _complain(lambda: [damage for _, damage in shown if damage is not None])
    for damage in found:
        print(damage)
    if found:
        raise SystemExit(1)
    print(f"{total} blocks, {format_bytes(data.nbytes)}: all as written")


def convert(
    paths: tuple[str, ...],
    /,
    *,
    columns: tuple[str, ...] = (),
    types: tuple[str, ...] = (),
    classes_from: str | None = None,
    skip_broken: bool = False,
    shuffle_seed: int | None = None,
    num_workers: int = 0,
    compression: Literal["lz4", "zstd"] | None = None,
    shard_bytes: str = "256MB",
    block_bytes: str = "4MB",
    restart: bool = False,
) -> None:
    """Write any data set as shards; the same command goes on after a kill.

    Args:
        paths: SOURCE [SOURCE ...] OUT: what to convert and the folder to write to. A source is a
            folder of class folders with pictures, a CSV or TSV file, a data set saved by Hugging
            Face datasets or MosaicML Streaming, or one or more folders, files, glob patterns or
            URLs of Arrow, Parquet, WebDataset tar or JSON lines.
        columns: Columns to keep; all by default.
        types: Arrow types of columns, such as zip=string label=int8; found by default.
        classes_from: Data set, such as the shards of the training split, whose classes number the
            labels of these folders of pictures; by default the sorted folders do.
        skip_broken: Leave out files that are empty, cut short or no pictures, with a warning.
        shuffle_seed: Mix the samples while writing.
        num_workers: Processes that write parts side by side.
        compression: Compress the blocks.
        shard_bytes: Size at which a shard is closed.
        block_bytes: Size of a block, the unit of checksums and shuffling.
        restart: Begin anew instead of going on after a kill; a finished data set is not replaced.
    """
    if len(paths) < 2:
        raise SystemExit("torsh-data: convert needs a source and a folder to write to")
    *sources, out = paths
    classes = None
    if classes_from is not None:
        classes = _complain(ShardedDataset, classes_from).metadata.get("classes")
        if classes is None:
            raise SystemExit(f"torsh-data: --classes-from: {classes_from!r} names no classes")
    _complain(
        torsh_data.convert,
        sources[0] if len(sources) == 1 else sources,
        out,
        columns=list(columns) or None,
        schema=_complain(_schema, types),
        classes=classes,
        skip_broken=skip_broken,
        shuffle_seed=shuffle_seed,
        num_workers=num_workers,
        compression=compression,
        shard_bytes=shard_bytes,
        block_bytes=block_bytes,
        resume=not restart,
        progress=sys.stdout.isatty(),
    )
    written = ShardedDataset(out)
    print(f"{len(written):,} samples in {len(written.files)} shards in {out}")
    if "classes" in written.metadata:
        print(_describe_classes(written.metadata["classes"]))


def write(
    out: str,
    /,
    *,
    types: tuple[str, ...] = (),
    shuffle_seed: int | None = None,
    compression: Literal["lz4", "zstd"] | None = None,
    shard_bytes: str = "256MB",
    block_bytes: str = "4MB",
    restart: bool = False,
) -> None:
    """Write JSON lines that another program pipes in as shards; goes on after a kill.

    Args:
        out: Folder to write to.
        types: Arrow types of all columns, such as text=string label=int8; those of the first line
            by default.
        shuffle_seed: Mix the samples while writing, for which the input is held in memory.
        compression: Compress the blocks.
        shard_bytes: Size at which a shard is closed.
        block_bytes: Size of a block, the unit of checksums and shuffling.
        restart: Begin anew instead of going on after a kill; a finished data set is not replaced.
    """
    if sys.stdin.isatty():
        raise SystemExit(
            "torsh-data: write reads JSON lines from another program, such as "
            "zcat x.jsonl.gz | torsh-data write OUT; for files use torsh-data convert"
        )
    lines = _json_lines(sys.stdin)
    _complain(
        torsh_data.write_shards,
        lines if shuffle_seed is None else _complain(list, lines),
        out,
        schema=_complain(_schema, types),
        shuffle_seed=shuffle_seed,
        compression=compression,
        shard_bytes=shard_bytes,
        block_bytes=block_bytes,
        resume=not restart,
        progress=sys.stdout.isatty(),
    )
    written = ShardedDataset(out)
    print(f"{len(written):,} samples in {len(written.files)} shards in {out}")


def _json_lines(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            sample = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if not isinstance(sample, dict):
            raise ValueError(f"line {number} is a {type(sample).__name__}; a line is an object")
        yield sample


def sheet(
    source: str,
    out: Path,
    /,
    *,
    column: str | None = None,
    samples: int = 8,
    seed: int = 0,
    policies: tuple[Literal["RandAugment", "AutoAugment", "TrivialAugmentWide", "AugMix"], ...] = (
        "RandAugment",
        "AutoAugment",
        "TrivialAugmentWide",
        "AugMix",
    ),
) -> None:
    """Draw samples and what augmentation makes of them.

    Args:
        source: A data set with pictures: class folders, or what convert reads besides but CSV.
        out: The picture, such as sheet.png or sheet.svg.
        column: Column with the pictures: tensors, or the bytes of JPEG or PNG files; the only one
            that has such by default.
        samples: How many samples to draw.
        seed: Chooses samples and policies' draws.
        policies: What to draw.
    """
    import numpy as np

    from torsh_data import vision

    is_tree = Path(source).is_dir() and is_image_tree(Path(source))
    data = _complain(ImageTree, Path(source)) if is_tree else _complain(ShardedDataset, source)
    column = _picture_column(_complain(lambda: data[0]), column)
    chosen = np.random.default_rng(seed).choice(len(data), min(samples, len(data)), replace=False)
    images = _complain(lambda: [data[int(n)][column] for n in np.sort(chosen)])
    axes = _complain(
        vision.augmentation_sheet,
        images,
        {name: getattr(vision, name)() for name in policies},
        torch.from_numpy(sample_keys(seed, 0, np.sort(chosen))),
        columns=samples,
    )
    _complain(axes.figure.savefig, out, bbox_inches="tight")
    print(f"{len(images)} samples in {out}")


def _picture_column(sample: dict[str, Any], column: str | None) -> str:
    if column is None:
        found = [name for name, value in sample.items() if _is_picture(value)]
        if len(found) != 1:
            held = f"pictures are in {found}" if found else f"no pictures among {list(sample)}"
            raise SystemExit(f"torsh-data: {held}; choose one with --column")
        return found[0]
    if column not in sample:
        raise SystemExit(f"torsh-data: no column {column!r}; there are {list(sample)}")
    return column


def _is_picture(value: Any) -> bool:
    if isinstance(value, bytes):
        return looks_whole(value)
    return isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[0] in (1, 3)


def _schema(types: tuple[str, ...]) -> pa.Schema | None:
    fields = []
    for text in types:
        name, equals, kind = text.partition("=")
        if not (name and equals):
            raise ValueError(f"--types {text!r}; write NAME=TYPE, such as zip=string")
        try:
            fields.append((name, pa.type_for_alias(kind)))
        except ValueError:
            raise ValueError(
                f"--types {text!r}: no type {kind!r}; such as string, int64, double, bool, date32"
            ) from None
    return pa.schema(fields) if fields else None


def _describe_classes(classes: Any) -> str:
    names = list(classes)
    shown = ", ".join(map(str, names[:12])) + (", ..." if len(names) > 12 else "")
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'}: {shown}"


def _complain(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call, with errors of the input as one line that names this command's options."""
    try:
        return call(*args, **options)
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        text = "; ".join([str(error), *getattr(error, "__notes__", [])])
        for option, ours in _OPTIONS.items():
            text = text.replace(option, ours)
        raise SystemExit(f"torsh-data: {text}") from error


def _version(name: str) -> str | None:
    try:  # not imported: some of them take seconds
        return version({"PIL": "pillow"}.get(name, name))
    except PackageNotFoundError:
        return None


def _print_json(facts: dict[str, object]) -> None:
    print(json.dumps(facts))


def _print_table(title: str, facts: dict[str, str | int | None]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "", title=title, show_header=False)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), "not installed" if value is None else str(value))
    Console().print(table)


def main() -> None:
    """Run the command line."""
    if sys.argv[1:] == ["--version"]:
        print(f"torsh-data {torsh_data.__version__}")
        return
    try:
        from tyro.conf import PositionalRequiredArgs
        from tyro.extras import subcommand_cli_from_dict
    except ImportError:
        extra = "pip install 'torsh-data[cli]'"
        raise SystemExit(f"torsh-data needs its command-line extra: {extra}") from None
    commands = {
        "doctor": doctor,
        "inspect": inspect,
        "verify": verify,
        "convert": convert,
        "write": write,
        "sheet": sheet,
    }
    subcommand_cli_from_dict(commands, prog="torsh-data", config=(PositionalRequiredArgs,))


if __name__ == "__main__":
    main()
