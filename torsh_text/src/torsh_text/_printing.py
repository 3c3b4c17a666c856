"""What the commands print."""

import json
import sys
from collections.abc import Iterable
from typing import Any


def print_table(
    rows: Iterable[tuple[str, Any]], title: str = "", *, whole_keys: bool = False
) -> None:
    """Print two columns, texts as they are; ``whole_keys`` breaks lines in the second only."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    table.add_column("", overflow="fold", no_wrap=whole_keys)
    table.add_column(title, overflow="fold")
    for key, value in rows:
        table.add_row(key, str(value))
    Console(markup=False, emoji=False).print(table)


def print_json(value: Any) -> None:
    """Print indented JSON."""
    print_line(json_text(value))


def json_text(value: Any) -> str:
    """Indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def rounded(score: float) -> float:
    """A score as records and JSON hold it: six places, about what float32 tells apart."""
    return round(score, 6)


def print_line(text: str) -> None:
    """Print a line as it is."""
    sys.stdout.write(text + "\n")
