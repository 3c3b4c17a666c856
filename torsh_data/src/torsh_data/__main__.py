"""The torsh-data command."""

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

import torsh_data
from torsh_data._dataset import ShardedDataset
from torsh_data._index import INDEX_NAME, read_index
from torsh_data._loader import StreamLoader
from torsh_data._order import Order, effective_batch
from torsh_data._rng import sample_keys
from torsh_data._sizes import format_bytes


def doctor(*, json: bool = False) -> None:
    """Say what this machine has, and which paths will run.

    Args:
        json: Print JSON instead of a table.
    """
    facts: dict[str, str | int | None] = {"torsh_data": torsh_data.__version__}
    facts["python"] = sys.version.split()[0]
    for name in (
        "torch", "numpy", "pyarrow", "xxhash", "fsspec", "datasets", "matplotlib", "torchvision",
        "transformers",
    ):  # fmt: skip
        facts[name] = _version(name)
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
    if json:
        _print_json({**facts, "advice": advice})
    else:
        _print_table("This machine", facts)
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
    plan = StreamLoader(data, min(batch_size, len(data)), window=window, rank=0, world_size=1)
    rows = int(plan.state_dict()["window"])
    order = Order(len(data), 0, rows, data.block_rows)
    facts: dict[str, str | int | None] = {
        "rows": len(data),
        "shards": len(data.files),
        "size": format_bytes(data.nbytes),
        "rows_per_block": data.block_rows,
        "fingerprint": data.fingerprint,
        "window_rows": rows,
        f"a_batch_of_{plan.batch_size}_is_worth": round(effective_batch(order, plan.batch_size)),
    }
    columns = {f"column {field.name}": str(field.type) for field in data.schema}
    if json:
        _print_json({**facts, "bytes": data.nbytes, "columns": columns, "files": data.files})
    else:
        _print_table(path, {**facts, **columns})


def verify(path: str) -> None:
    """Check every byte against the checksums; the exit code is 1 if anything is damaged.

    Args:
        path: A folder of shards with its index.
    """
    from rich.progress import track

    index = Path(path) / INDEX_NAME
    try:
        total = sum(len(shard.xxh3) + 1 for shard in read_index(index).shards)
        data = ShardedDataset(path, verify="never")
    except (OSError, RuntimeError) as error:
        raise SystemExit(str(error)) from None
    found = [
        damage
        for _, damage in track(
            data.check(), "Checking", total=total, disable=not sys.stdout.isatty()
        )
        if damage is not None
    ]
    for damage in found:
        print(damage)
    if found:
        raise SystemExit(1)
    print(f"{total} blocks, {format_bytes(data.nbytes)}: all as written")


def convert(
    source: str,
    out: str,
    /,
    *,
    columns: tuple[str, ...] = (),
    shuffle_seed: int | None = None,
    num_workers: int = 0,
    compression: Literal["lz4", "zstd"] | None = None,
    shard_bytes: str = "256MB",
    block_bytes: str = "4MB",
    restart: bool = False,
) -> None:
    """Write any data set as shards; the same command goes on after a kill.

    Args:
        source: Folder of class folders with pictures, a CSV or TSV file, or a folder, file, glob
            pattern or URL of Arrow, Parquet, WebDataset tar or JSON lines.
        out: Folder to write to.
        columns: Columns to keep; all by default.
        shuffle_seed: Mix the samples while writing.
        num_workers: Processes that write parts side by side.
        compression: Compress the blocks.
        shard_bytes: Size at which a shard is closed.
        block_bytes: Size of a block, the unit of checksums and shuffling.
        restart: Begin anew instead of going on after a kill.
    """
    _converted(
        source,
        out,
        columns=list(columns) or None,
        shuffle_seed=shuffle_seed,
        num_workers=num_workers,
        compression=compression,
        shard_bytes=shard_bytes,
        block_bytes=block_bytes,
        resume=not restart,
    )


def write(
    out: str,
    files: tuple[str, ...],
    /,
    *,
    shuffle_seed: int | None = None,
    num_workers: int = 0,
    compression: Literal["lz4", "zstd"] | None = None,
    restart: bool = False,
) -> None:
    """Join files of one format into one data set of shards; goes on after a kill.

    Args:
        out: Folder to write to.
        files: Files or URLs: Arrow, Parquet, WebDataset tar or JSON lines.
        shuffle_seed: Mix the samples while writing.
        num_workers: Processes that write parts side by side.
        compression: Compress the blocks.
        restart: Begin anew instead of going on after a kill.
    """
    if not files:
        raise SystemExit("torsh-data: files is empty; name what to write")
    _converted(
        list(files),
        out,
        shuffle_seed=shuffle_seed,
        num_workers=num_workers,
        compression=compression,
        resume=not restart,
    )


def sheet(
    source: str,
    out: Path,
    /,
    *,
    column: str = "image",
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
        source: A data set with pictures: anything that convert reads but class folders and CSV.
        out: The picture, such as sheet.png or sheet.svg.
        column: Column with the pictures: tensors, or the bytes of JPEG or PNG files.
        samples: How many samples to draw.
        seed: Chooses samples and policies' draws.
        policies: What to draw.
    """
    import numpy as np

    from torsh_data import vision

    data = _complain(ShardedDataset, source)
    if column not in data.columns:
        raise SystemExit(f"torsh-data: no column {column!r}; there are {data.columns}")
    chosen = np.random.default_rng(seed).choice(len(data), min(samples, len(data)), replace=False)
    images = [data[int(n)][column] for n in np.sort(chosen)]
    axes = _complain(
        vision.augmentation_sheet,
        images,
        {name: getattr(vision, name)() for name in policies},
        torch.from_numpy(sample_keys(seed, 0, np.sort(chosen))),
        columns=samples,
    )
    axes.figure.savefig(out, bbox_inches="tight")
    print(f"{len(images)} samples in {out}")


def _converted(source: str | list[str], out: str, **options: Any) -> None:
    _complain(torsh_data.convert, source, out, progress=sys.stdout.isatty(), **options)
    written = ShardedDataset(out)
    print(f"{len(written):,} samples in {len(written.files)} shards in {out}")


def _complain(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call, with errors of the input as one line."""
    try:
        return call(*args, **options)
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise SystemExit(f"torsh-data: {error}") from error


def _version(name: str) -> str | None:
    try:
        module = importlib.import_module(name)
    except (ImportError, RuntimeError):  # a torchvision that does not fit torch raises the latter
        return None
    return str(getattr(module, "__version__", None) or module.VERSION)


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
