"""The torsh-dist command."""

import json as json_format
from dataclasses import asdict

from torsh_dist import __version__
from torsh_dist._doctor import examine


def doctor(*, json: bool = False, run: bool = True) -> None:
    """Say which devices, backends and network names a job on this machine would use.

    Args:
        json: Print JSON instead of a table.
        run: Start two processes that average a tensor with each other.
    """
    findings = examine(run=run)
    if json:
        report = {"torsh-dist": __version__, "findings": [asdict(one) for one in findings]}
        print(json_format.dumps(report, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", "found", "remedy", title=f"torsh-dist {__version__}")
    for one in findings:
        table.add_row(one.what, one.found, one.remedy)
    Console().print(table)


def main() -> None:
    """Run the command line."""
    try:
        from tyro.extras import subcommand_cli_from_dict
    except ImportError:
        raise SystemExit(
            "torsh-dist needs its command-line extra: pip install 'torsh-dist[cli]'"
        ) from None
    subcommand_cli_from_dict({"doctor": doctor}, prog="torsh-dist")


if __name__ == "__main__":
    main()
