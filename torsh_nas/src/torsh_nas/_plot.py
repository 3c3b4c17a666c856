"""Pictures of cells and of the course of a search."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torsh_nas._cell import NONE, Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#3366aa", "#cc7711", "#338844", "#aa3366", "#6644aa", "#887722", "#227788", "#884422")
_INK = "#333333"


def plot_cell(
    arch: "Mapping[str, str] | Cell", ax: "Axes | None" = None, *, cell: str | None = None
) -> "Axes":
    """Draw the edges that an architecture keeps in a cell.

    Inputs stand left, the output right, data flows to the right. Each colour is an operation;
    edges decided as ``"none"`` are left out. A :class:`Cell` itself is drawn with all edges it
    could have, in grey.

    Args:
        arch: An architecture whose labels are edges ``"cell/source->target"``, or a
            :class:`Cell`.
        ax: Axes to draw on; a new figure by default.
        cell: Label of the cell to draw; by default the first in ``arch``.

    Returns:
        The axes; ``ax.figure.savefig("cell.svg")`` writes the picture.

    Raises:
        ValueError: No edges, or none of that cell.
        ImportError: matplotlib is missing.

    Example:
        >>> from torsh_nas import plot_cell
        >>> ax = plot_cell({"c/0->1": "conv", "c/0->2": "none", "c/1->2": "skip"})
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['conv', 'skip']
    """
    title, edges = _edges(arch, cell)
    sources = {source for source, _ in edges}
    targets = {target for _, target in edges}
    inputs, nodes = sorted(sources - targets), sorted(targets)
    positions = {i: (0.0, 0.5 * (len(inputs) - 1) - k) for k, i in enumerate(inputs)}
    positions |= {n: (1.4 * (k + 1), 0.0) for k, n in enumerate(nodes)}
    output = (1.4 * (len(nodes) + 1), 0.0)
    axes = _axes(ax, (1.6 * (len(nodes) + 2), 1.4 + 0.7 * len(nodes)))
    names = list(dict.fromkeys(op for op in edges.values() if op not in (None, NONE)))
    colours = {name: _COLOURS[k % len(_COLOURS)] for k, name in enumerate(names)}
    for (source, target), op in edges.items():
        if op != NONE:
            colour = "#999999" if op is None else colours[op]
            below = source in inputs and positions[source][1] < 0
            _arrow(axes, positions[source], positions[target], colour, below=below)
    for node in nodes:
        _arrow(axes, positions[node], output, "#cccccc", below=True, width=1.2)
    for number, place in positions.items():
        _disc(axes, place, f"in {number}" if number in inputs else str(number))
    _disc(axes, output, "out")
    for name in names:
        axes.plot([], [], color=colours[name], linewidth=2.4, label=_literal(name))
    if names:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, frameon=False)
    axes.set_title(_literal(title), fontsize=10, color=_INK)
    axes.set_xlim(-0.6, output[0] + 0.6)
    reach = 0.53 * (len(nodes) - 1) + 0.5 * len(inputs) + 0.1
    axes.set_ylim(-reach, reach)
    axes.set_axis_off()
    return axes


def plot_history(history: Sequence[Mapping[str, Any]], ax: "Axes | None" = None) -> "Axes":
    """Draw the losses of a search over its epochs.

    With a latency penalty the expected latency is drawn too, on an axis of its own at the right.

    Args:
        history: :attr:`Result.history`, or the rows of ``log.jsonl`` after the first.
        ax: Axes to draw on; a new figure by default.

    Raises:
        ValueError: The history is empty.
        ImportError: matplotlib is missing.

    Example:
        >>> from torsh_nas import plot_history
        >>> ax = plot_history([{"epoch": 0, "train_loss": 2.0, "val_loss": 2.5}])
        >>> ax.get_ylabel()
        'loss'
    """
    if not history:
        raise ValueError("history is empty: run at least one epoch of Search.fit")
    axes = _axes(ax, (5.0, 3.2))
    from matplotlib.ticker import MaxNLocator

    for key, label, colour in (
        ("train_loss", "training loss (weights)", _COLOURS[0]),
        ("val_loss", "validation loss (architecture)", _COLOURS[1]),
    ):
        rows = [row for row in history if key in row]
        if rows:
            x, y = [row["epoch"] + 1 for row in rows], [row[key] for row in rows]
            axes.plot(x, y, color=colour, marker="o", markersize=3, label=label)
    rows = [row for row in history if "expected_ms" in row]
    handles, labels = axes.get_legend_handles_labels()
    if rows:
        right = axes.twinx()
        x, y = [row["epoch"] + 1 for row in rows], [row["expected_ms"] for row in rows]
        handles += right.plot(x, y, color=_COLOURS[2], linestyle="--")
        labels += ["expected latency"]
        right.set_ylabel("ms")
        right.set_ylim(bottom=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(handles, labels, frameon=False)
    return axes


def _edges(
    arch: Mapping[str, str] | Cell, label: str | None
) -> tuple[str, dict[tuple[int, int], str | None]]:
    """Return the label of the cell and its operation by edge, ``None`` where it is open."""
    if isinstance(arch, Cell):
        ends = (key.split("_") for key in arch.edges)
        return arch.label or "cell", {(int(s), int(t)): None for s, t in ends}
    cells: dict[str, dict[tuple[int, int], str | None]] = {}
    for choice, option in arch.items():
        name, _, ends = choice.rpartition("/")
        source, arrow, target = ends.partition("->")
        if arrow and source.isdigit() and target.isdigit():
            cells.setdefault(name, {})[int(source), int(target)] = option
    if not cells:
        raise ValueError(f"this architecture has no cell to draw; its choices are {list(arch)}")
    if label is None:
        label = next(iter(cells))
    if label not in cells:
        raise ValueError(f"cell={label!r} is not in the architecture; use one of {list(cells)}")
    return label, cells[label]


def _axes(ax: "Axes | None", size: tuple[float, float]) -> "Axes":
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plotting needs matplotlib: pip install 'torsh-nas[plot]'") from None
    # A figure without pyplot: nothing global is opened that somebody would have to close.
    return Figure(figsize=size, layout="constrained").add_subplot()


def _arrow(
    ax: "Axes",
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str,
    *,
    below: bool,
    width: float = 2.0,
) -> None:
    from matplotlib.patches import FancyArrowPatch

    # Straight to the next node, in an arc over (or under) those between.
    skipped = round((end[0] - start[0]) / 1.4) - 1
    rise = 0.75 * skipped / (skipped + 1)
    style = f"arc3,rad={rise if below else -rise}"
    patch = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=11, connectionstyle=style, color=colour,
        linewidth=width, shrinkA=12, shrinkB=13, zorder=1,
    )  # fmt: skip
    ax.add_patch(patch)


def _disc(ax: "Axes", place: tuple[float, float], text: str) -> None:
    ax.scatter(*place, s=460, facecolor="white", edgecolor=_INK, linewidth=1.2, zorder=2)
    ax.text(*place, text, ha="center", va="center", fontsize=8.5, color=_INK, zorder=3)


def _literal(text: str) -> str:
    """Keep a name from being read as a formula or, with a leading underscore, left out."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text
