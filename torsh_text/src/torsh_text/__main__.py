"""The torsh-text command."""

import ast
import re
import shlex
import sys
import warnings
from inspect import Parameter, signature

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
        print_table(findings().items(), whole_keys=True)


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


def _as_options(message: str, names: list[str]) -> str:
    """Write arguments in a message, such as ``top_k=1``, as options of the command line."""

    def option(match: re.Match[str]) -> str:
        name, value = match[1].replace("_", "-"), ast.literal_eval(match[2])
        if isinstance(value, bool):
            return f"--{name}" if value else f"--no-{name}"
        parts = value if isinstance(value, list) else [value]
        return f"--{name} {shlex.join(map(str, parts))}"

    text = r"'(?:[^'\\]|\\.)*'"
    value = rf"{text}|\[{text}(?:, {text})*\]|-?\d+(?:\.\d+)?|True|False"
    return re.sub(rf"(?<![\w.])({'|'.join(names)})=({value})(?![\w(\[])", option, message)


def main() -> None:
    """Run the command line."""
    try:
        from tyro.extras import subcommand_cli_from_dict
    except ImportError:
        raise SystemExit(
            "torsh-text needs its command-line extra: pip install 'torsh-text[cli]'"
        ) from None
    command = _COMMANDS.get("".join(sys.argv[1:2]), doctor)
    taken = signature(command).parameters.values()
    names = [x.name for x in taken if x.kind is Parameter.KEYWORD_ONLY]
    warnings.simplefilter("always", UserWarning)  # else equal ones of later texts are not shown
    warnings.formatwarning = lambda message, *_, **__: (
        f"torsh-text: {_as_options(str(message), names)}\n"
    )
    try:
        subcommand_cli_from_dict(_COMMANDS, prog="torsh-text")
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        raise SystemExit(f"torsh-text: {_as_options(str(error), names)}") from error
    except KeyboardInterrupt as stop:
        raise SystemExit("; ".join(["torsh-text: interrupted", *map(str, stop.args)])) from None


if __name__ == "__main__":
    main()
