"""The torsh-optim command."""

import json as json_format
from dataclasses import asdict

from torsh_optim import __version__
from torsh_optim._doctor import examine, versions


def doctor(*, json: bool = False, run: bool = True) -> None:
    """Say which implementation updates which parameters on this machine, and whether it is right.

    Args:
        json: Print JSON instead of a table.
        run: Take ten steps with each implementation and compare with the plain loop.
    """
    findings = examine(run=run)
    found = {"torsh-optim": __version__, **versions()}
    if json:
        print(json_format.dumps({"versions": found, "adamw": [asdict(f) for f in findings]}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("device", "dtype", "implementation", "error", "remedy", title="AdamW")
    for finding in findings:
        error = "" if finding.max_error is None else f"{finding.max_error:.1f} ulp"
        table.add_row(finding.device, finding.dtype, finding.implementation, error, finding.remedy)
    console = Console()
    console.print("  ".join(f"{name} {version}" for name, version in found.items()))
    console.print(table)


def main() -> None:
    """Run the command line."""
    try:
        from tyro.extras import subcommand_cli_from_dict
    except ImportError:
        raise SystemExit(
            "torsh-optim needs its command-line extra: pip install 'torsh-optim[cli]'"
        ) from None
    subcommand_cli_from_dict({"doctor": doctor}, prog="torsh-optim")


if __name__ == "__main__":
    main()
