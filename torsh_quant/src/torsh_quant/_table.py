"""Plain text tables."""

from collections.abc import Sequence


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align cells in columns, numbers to the right.

    Example:
        >>> print(text_table(["layer", "bytes"], [["fc", "96"], ["head", "1024"]]))
        layer  bytes
        fc        96
        head    1024
    """
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [
        bool(rows) and all(cell[:1].isdigit() or cell in ("", "-") for cell in column[1:])
        for column in columns
    ]
    lines = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in (head, *rows)
    ]
    return "\n".join(lines)
