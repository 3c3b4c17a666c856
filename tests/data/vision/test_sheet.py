import sys

import pytest
import torch

from torsh_data import vision


def test_each_image_is_drawn_at_its_place():
    gray = torch.linspace(0, 1, 3).view(3, 1, 1, 1).expand(-1, 1, 8, 8)
    color = (gray.repeat(1, 3, 1, 1) * 255).to(torch.uint8)
    ax = vision.plot_sheet({"a": gray, "b": color}, titles=["x", "y", "z"], columns=2)
    drawn = ax.images[0].get_array()
    assert drawn.shape == (17, 17, 3)
    assert drawn[4, 4].tolist() == [0, 0, 0]
    assert drawn[4, 12].tolist() == [0.5, 0.5, 0.5]
    assert drawn[8].min() == 1  # the gap
    assert [t.get_text() for t in ax.get_xticklabels()] == ["x", "y"]


def test_axes_of_the_caller_are_used():
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    assert vision.plot_sheet({"a": torch.zeros(1, 3, 4, 4)}, ax=ax) is ax


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ({}, {}, "there is no image to draw"),
        ({"a": torch.zeros(0, 1, 4, 4)}, {}, "there is no image to draw"),
        ({"a": torch.zeros(1, 1, 4, 4)}, {"columns": 0}, "columns=0"),
        ({"a": torch.zeros(1, 2, 4, 4)}, {}, "draw images of one size, 1 or 3 channels"),
        (
            {"a": torch.zeros(1, 1, 4, 4), "b": torch.zeros(1, 1, 5, 4)},
            {},
            r"rows has shapes {'a': \(1, 1, 4, 4\)",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        vision.plot_sheet(rows, **options)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'torsh-data\[plot\]'"):
        vision.plot_sheet({"a": torch.zeros(1, 1, 4, 4)})
