"""The torsh-data command."""

import importlib
import json
import os
import sys
from pathlib import Path

import torch

import torsh_data
from torsh_data._dataset import ShardedDataset
from torsh_data._index import INDEX_NAME, read_index
from torsh_data._loader import StreamLoader
from torsh_data._order import Order, effective_batch
from torsh_data._sizes import format_bytes


def doctor(*, json: bool = False) -> None:
    """Say what this machine has, and which paths will run.

    Args:
        json: Print JSON instead of a table.
    """
    facts: dict[str, str | int | None] = {"torsh_data": torsh_data.__version__}
    facts["python"] = sys.version.split()[0]
    for name in ("torch", "numpy", "pyarrow", "xxhash", "matplotlib", "torchvision"):
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
    data = ShardedDataset(path)
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
    commands = {"doctor": doctor, "inspect": inspect, "verify": verify}
    subcommand_cli_from_dict(commands, prog="torsh-data", config=(PositionalRequiredArgs,))


if __name__ == "__main__":
    main()
