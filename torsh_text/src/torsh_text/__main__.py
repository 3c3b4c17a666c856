"""The torsh-text command."""

import warnings

from ._classify_command import classify
from ._record_commands import detect, ner, paraphrase, summarize
from ._vector_commands import cluster, duplicates, embed, search, topics


def doctor(*, json: bool = False) -> None:
    """Say what this machine has, which attention will run and which default models are here.

    Args:
        json: Print JSON instead of a table.
    """
    from ._doctor import findings
    from ._printing import print_json, print_table

    if json:
        print_json(findings())
    else:
        print_table(findings().items())


_COMMANDS = {
    "doctor": doctor,
    "embed": embed,
    "search": search,
    "classify": classify,
    "ner": ner,
    "summarize": summarize,
    "detect": detect,
    "topics": topics,
    "cluster": cluster,
    "duplicates": duplicates,
    "paraphrase": paraphrase,
}


def main() -> None:
    """Run the command line."""
    try:
        from tyro.extras import subcommand_cli_from_dict
    except ImportError:
        raise SystemExit(
            "torsh-text needs its command-line extra: pip install 'torsh-text[cli]'"
        ) from None
    warnings.formatwarning = lambda message, *_, **__: f"torsh-text: {message}\n"
    try:
        subcommand_cli_from_dict(_COMMANDS, prog="torsh-text")
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        raise SystemExit(f"torsh-text: {error}") from error
    except KeyboardInterrupt as stop:
        raise SystemExit("; ".join(["torsh-text: interrupted", *map(str, stop.args)])) from None


if __name__ == "__main__":
    main()
