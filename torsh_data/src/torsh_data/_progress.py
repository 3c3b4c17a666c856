"""A bar for what takes long."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

_PATIENCE = 2.0


@contextmanager
def progress_bar(
    shown: bool, total: int | None, *, doing: str = "Writing", unit: str = "samples"
) -> Generator[Callable[[int], None]]:
    """A function to call with the rows that are done; the bar appears after two seconds."""
    if not shown:
        yield lambda rows: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    except ImportError:
        raise ImportError("progress=True needs rich: pip install 'torsh-data[cli]'") from None
    console = Console()
    bar = Progress(
        doing,
        BarColumn(),
        MofNCompleteColumn(),
        unit,
        TimeRemainingColumn(),
        transient=True,
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=total)
    begin = time.monotonic()
    started = False

    def advance(rows: int) -> None:
        nonlocal started
        bar.advance(task, rows)
        if not started and time.monotonic() - begin > _PATIENCE:
            started = True
            bar.start()

    try:
        yield advance
    finally:
        if started:
            bar.stop()
