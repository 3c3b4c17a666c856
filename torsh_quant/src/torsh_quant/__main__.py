"""The torsh-quant command."""

import json
import sys
from dataclasses import asdict

from torsh_quant import __version__
from torsh_quant._doctor import Diagnosis, diagnose


def doctor(*, json: bool = False) -> None:
    """Say what this machine has, which kernels run on it, and whether they are exact.

    Args:
        json: Print one JSON object instead of tables.
    """
    found = diagnose()
    if json:
        _print_json(found)
    else:
        _print_tables(found)
    if not all(found.self_check.values()):
        raise SystemExit(1)


def _print_json(found: Diagnosis) -> None:
    print(json.dumps({"torsh_quant": __version__, **asdict(found)}, indent=1))


def _print_tables(found: Diagnosis) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    console.print(f"torsh-quant {__version__}, {versions}")
    console.print(f"CPU: {found.cpu}, VNNI {'yes' if found.vnni else 'no'}")
    for name, value in found.capped.items():
        console.print(f"[yellow]{name}={value} keeps a library from using all of the CPU[/]")
    console.print(f"CUDA: {', '.join(found.devices) or 'none'}")
    checks = Table("integer kernel", "sums on full-range data", title="Self-check")
    for name, exact in found.self_check.items():
        checks.add_row(name, "[green]exact[/]" if exact else "[red]WRONG[/]")
    console.print(checks)
    paths = Table("device", "layer", "scheme", "kernel", "act bits", "gain", "why not more")
    for path in found.paths:
        bits = "float" if path.act_bits is None else str(path.act_bits)
        paths.add_row(
            path.device, path.layer, path.scheme, path.kernel, bits, path.gain, path.reason
        )
    console.print(paths)


def main() -> None:
    """Run the command line."""
    try:
        from tyro.extras import subcommand_cli_from_dict
    except ImportError:
        message = "torsh-quant needs its command-line extra: pip install 'torsh-quant[cli]'"
        raise SystemExit(message) from None
    subcommand_cli_from_dict(
        {"doctor": doctor}, prog="torsh-quant", description=sys.modules["torsh_quant"].__doc__
    )


if __name__ == "__main__":
    main()
