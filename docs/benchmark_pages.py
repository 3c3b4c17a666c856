"""Make a page of the manual from each committed benchmark result."""

import json
from pathlib import Path
from typing import Any


def write_benchmark_pages(folder: Path) -> None:
    """Write ``<result>.md`` beside each ``<result>.json`` in ``folder``."""
    for result in sorted(folder.glob("*.json")):
        content = json.loads(result.read_text())
        title = result.stem.replace("_", " ")
        facts, tables = [], []
        for name, value in content.items():
            if _is_table(value):
                tables += [f"## {name}", _table(value)]
            elif isinstance(value, dict) and any(map(_is_table, value.values())):
                for part, rows in value.items():
                    if _is_table(rows):
                        tables += [f"## {part}", _table(rows)]
            else:
                facts.append(f"- **{name}**: {_cell(value)}")
        page = [f"# {title}", f"Made from `{result.name}`.", "\n".join(facts), *tables]
        result.with_suffix(".md").write_text("\n\n".join(page) + "\n")


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(r, dict) for r in value)


def _table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    body = [[row.get(name) for name in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *body]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case float():
            return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        case dict():
            return ", ".join(f"{name} {_cell(part)}" for name, part in value.items())
        case list():
            return ", ".join(map(_cell, value))
    return str(value).replace("|", "\\|")
