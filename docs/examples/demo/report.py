"""What a step of the demo hands back, and the page made of all of them."""

import io
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import matplotlib as mpl
from matplotlib.figure import Figure

mpl.use("svg")
mpl.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text: small, sharp and searchable
        "svg.hashsalt": "torsh",  # same numbers, same file
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": mpl.cycler(
            color=["#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed"]
        ),
    }
)


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading; the first column is the label."""

    columns: list[str]
    rows: list[list[str]]


@dataclass
class Section:
    """The outcome of one step: a verdict in one line, then what supports it."""

    verdict: str
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)  # caption, SVG

    def add_figure(self, caption: str, figure: Figure) -> None:
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        svg = buffer.getvalue()
        self.figures.append((caption, svg[svg.index("<svg") :]))


def write_report(path: Path, **content: object) -> None:
    """Render the page to ``path`` in one piece: no scripts, no links to other files."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    source = Path(__file__).with_name("report.html.jinja").read_text()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(environment.from_string(source).render(**content))
    partial.replace(path)
