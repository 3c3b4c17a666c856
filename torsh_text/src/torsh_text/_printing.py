"""What the commands print."""

import json
import sys
from collections.abc import Iterable
from typing import Any


def print_table(rows: Iterable[tuple[str, Any]], title: str = "") -> None:
    """Print two columns, texts as they are."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", title, title_justify="left", box=None)
    for key, value in rows:
        table.add_row(key, str(value))
    Console(markup=False, emoji=False).print(table)


def print_json(value: Any) -> None:
    """Print indented JSON."""
    print_line(json_text(value))


def json_text(value: Any) -> str:
    """Indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def print_line(text: str) -> None:
    """Print a line as it is."""
    sys.stdout.write(text + "\n")
