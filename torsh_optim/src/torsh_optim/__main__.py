"""The torsh-optim command."""

import sys
from typing import Annotated

import torsh_optim
from torsh_optim._convert_command import convert
from torsh_optim._doctor import doctor
from torsh_optim._groups_command import groups


def main() -> None:
    """Run the command line."""
    if sys.argv[1:] == ["--version"]:
        print(f"torsh-optim {torsh_optim.__version__}")
        return
    try:
        import rich  # noqa: F401
        from tyro.conf import arg
        from tyro.extras import subcommand_cli_from_dict
    except ImportError:
        raise SystemExit(
            "torsh-optim needs its command-line extra: pip install 'torsh-optim[cli]'"
        ) from None
    hints, name = convert.__annotations__, "from_"  # `from` is no name in Python
    hints[name] = Annotated[hints[name], arg(name="from")]
    subcommand_cli_from_dict(
        {"groups": groups, "convert": convert, "doctor": doctor},
        prog="torsh-optim",
        description=f"{torsh_optim.__doc__}\n\n--version prints the version.",
        args=sys.argv[1:] or ["--help"],
    )


if __name__ == "__main__":
    main()
