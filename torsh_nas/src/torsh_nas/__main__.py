"""The torsh-nas command."""

import importlib.util
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main() -> None:
    """Run the command line."""
    try:
        from tyro.extras import subcommand_cli_from_dict
    except ImportError:
        raise SystemExit(
            "torsh-nas needs its command-line extra: pip install 'torsh-nas[cli]'"
        ) from None
    subcommand_cli_from_dict({"doctor": doctor, "show": show}, prog="torsh-nas")


def doctor(*, json: bool = False) -> None:
    """Say what this machine has, where latencies can be measured and how steady the clock is.

    Args:
        json: Print JSON instead of a table.
    """
    report = _examine()
    if json:
        print(_to_json(report))
        return
    _table("torsh-nas doctor", ("what", "found"), [(k, str(v)) for k, v in report.items()])


def show(arch: Path, /, *, out: Path | None = None, cell: str | None = None) -> None:
    """Print the decisions of an architecture and, with --out, draw its cell.

    Args:
        arch: JSON file written by Architecture.to_json.
        out: Picture to write; the ending says the format, such as .svg or .png.
        cell: Label of the cell to draw; by default the first.
    """
    from torsh_nas import Architecture, plot_cell

    try:
        architecture = Architecture.from_json(arch)
        axes = None if out is None else plot_cell(architecture, cell=cell)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"torsh-nas show: {error}") from None
    _table(f"space {architecture.space_id}", ("choice", "option"), [*architecture.items()])
    if axes is not None and out is not None:
        cast("Figure", axes.figure).savefig(out)
        print(f"picture: {out}")


def _examine() -> dict[str, object]:
    import torch

    import torsh_nas
    from torsh_nas import DeviceInfo, measure

    timing = measure(torch.nn.Linear(256, 256), torch.ones(64, 256), min_time_s=0.1)
    spread = timing.iqr_ms / timing.ms
    steady = f"a 256 x 256 layer takes {timing.ms:.4f} ms, quartiles {100 * spread:.0f} % apart"
    if spread > 0.2:
        steady += "; the machine is busy: latency tables will be rough, stop other work first"
    cuda = torch.cuda.is_available()
    report: dict[str, object] = {
        "torsh_nas": torsh_nas.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cpu": DeviceInfo.of("cpu").name,
        "threads": torch.get_num_threads(),
        "cuda": DeviceInfo.of("cuda").name if cuda else "no device: latencies of the CPU only",
        "clock": steady,
    }
    for package in ("scipy", "numpy", "matplotlib", "tyro", "rich"):
        try:
            report[package] = version(package)
        except PackageNotFoundError:
            found = importlib.util.find_spec(package) is not None
            extra = {"matplotlib": "plot", "tyro": "cli", "rich": "cli"}.get(package)
            remedy = f"missing: pip install 'torsh-nas[{extra}]'" if extra else "missing"
            report[package] = "found" if found else remedy
    return report


def _to_json(report: dict[str, object]) -> str:
    return json.dumps(report, indent=2)


def _table(title: str, columns: tuple[str, str], rows: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
