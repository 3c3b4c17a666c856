import io
import xml.etree.ElementTree as ET

import pytest
from matplotlib.figure import Figure

import torsh_nas as nas
from tests.nas.nets import CellNet, generator

ARCH = {"n/0->1": "a & b", "n/0->2": "none", "n/1->2": "$x$", "r/0->1": "c"}


def svg(axes: object) -> str:
    buffer = io.StringIO()
    axes.figure.savefig(buffer, format="svg")  # type: ignore[attr-defined]
    text = buffer.getvalue()
    ET.fromstring(text)
    return text


def test_draws_kept_edges_only() -> None:
    axes = nas.plot_cell(ARCH)
    colours = [patch.get_edgecolor() for patch in axes.patches]
    # Two kept edges in colours of their own, two grey ones to the output.
    assert len(colours) == 4
    assert len(set(colours)) == 3
    assert axes.get_title() == "n"
    assert svg(axes)
    assert len(nas.plot_cell(ARCH, cell="r").patches) == 2


def test_draws_on_given_axes_and_opens_no_window() -> None:
    from matplotlib import pyplot

    given = Figure().add_subplot()
    space = nas.space(CellNet(inputs=2))
    assert nas.plot_cell(space.sample(generator()), ax=given) is given
    assert svg(given)
    assert pyplot.get_fignums() == []


def test_draws_an_open_cell() -> None:
    axes = nas.plot_cell(CellNet().first)
    assert len(axes.patches) == 6 + 3
    assert axes.get_legend() is None


def test_history_with_latency() -> None:
    rows = [
        {"epoch": k, "train_loss": 2.0 - k, "val_loss": 2.1 - k, "expected_ms": 9.0 - k}
        for k in range(2)
    ]
    axes = nas.plot_history(rows)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [
        "training loss (weights)", "validation loss (architecture)", "expected latency",
    ]  # fmt: skip
    assert axes.lines[0].get_ydata().tolist() == [2.0, 1.0]
    assert svg(axes)


def test_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(ValueError, match=r"no cell to draw; its choices are \['a'\]"):
        nas.plot_cell({"a": "x"})
    with pytest.raises(ValueError, match="cell='x' is not in the architecture"):
        nas.plot_cell(ARCH, cell="x")
    with pytest.raises(ValueError, match="history is empty"):
        nas.plot_history([])
