import matplotlib as mpl
import pytest
import torch
from sklearn.decomposition import PCA

from torsh_text import plot_map
from torsh_text._plot import principal_plane

mpl.use("Agg")


def test_plane_is_that_of_sklearn():
    x = torch.randn(50, 7) * torch.arange(1.0, 8.0)
    mine = principal_plane(x)
    theirs = torch.from_numpy(PCA(2, svd_solver="full").fit_transform(x.double().numpy())).float()
    # directions have no sign of their own
    torch.testing.assert_close(mine.abs(), theirs.abs(), atol=1e-3, rtol=1e-3)


def test_plane_does_not_flip():
    x = torch.randn(20, 5)
    torch.testing.assert_close(principal_plane(x.flip(0)).flip(0), principal_plane(x))


@pytest.mark.parametrize("rows", [1, 2])
def test_plane_of_few_rows(rows):
    assert principal_plane(torch.randn(rows, 1)).shape == (rows, 2)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_every_row_is_drawn_in_its_colour(method):
    x, labels = torch.randn(30, 6), torch.tensor([0, 1, -1] * 10)
    ax = plot_map(x, labels, names=["cats", "dogs"], method=method)
    drawn = [len(group.get_offsets()) for group in ax.collections]
    assert drawn == [10, 10, 10]
    legend = ax.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["noise", "cats", "dogs"]
    colours = {tuple(group.get_facecolor()[0]) for group in ax.collections}
    assert len(colours) == 3
    ax.figure.canvas.draw()


def test_draws_on_given_axes():
    ax = mpl.figure.Figure().add_subplot()
    assert plot_map(torch.randn(3, 4), [0, 0, 1], ax=ax) is ax
    points = ax.collections[0].get_offsets()
    assert points.shape == (2, 2)


def test_refuses_what_does_not_fit():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="2 labels"):
        plot_map(x, [0, 1])
    with pytest.raises(ValueError, match="names has 1 entries, labels go up to 1"):
        plot_map(x, [0, 1, 1], names=["one"])
    with pytest.raises(ValueError, match="method='umap'"):
        plot_map(x, [0, 1, 1], method="umap")
