import matplotlib as mpl
import pytest
import torch
from sklearn.decomposition import PCA

from torsh_text import TopicModel, plot_map, plot_topic_map, plot_topics
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


def test_maps_take_arrays():
    x, labels = torch.randn(5, 3), torch.tensor([0, 1, 0, -1, 1])
    drawn = [
        [group.get_offsets().tolist() for group in plot_map(rows, numbers).collections]
        for rows, numbers in ((x, labels), (x.numpy(), labels.numpy()))
    ]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 3
    for wrong in (x.numpy()[0], x[:0].numpy()):
        with pytest.raises(ValueError, match=r"embeddings .* expected \(rows, dim\)"):
            plot_map(wrong, [])
    x[1, 2] = float("inf")
    with pytest.raises(ValueError, match=r"embeddings\[1\] is not finite"):
        plot_map(x.numpy(), labels)


def _topics():
    docs = ["red apple", "green apple", "an apple", "fast car", "old car", ""]
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.0]])
    model = TopicModel(k=3).fit(docs, vectors=x)
    return model, x, model.transform(docs, vectors=x).labels


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_topic_map_names_colours_and_places_its_numbers(method):
    model, x, labels = _topics()
    labels[4] = -1
    ax = plot_topic_map(x, labels, model.topics, method=method)
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["noise", "0  apple, green, red", "1  car, fast, old", "2  topic 2"]
    assert [text.get_text() for text in ax.texts] == ["0", "1", "2"]
    apples = torch.as_tensor(ax.collections[1].get_offsets().data)
    middle = apples.sort(0).values[1]
    assert ax.texts[0].xy == pytest.approx(middle.tolist(), abs=1e-6)
    ax.figure.canvas.draw()


def test_topic_map_of_noise_alone():
    model, x, labels = _topics()
    ax = plot_topic_map(x, labels.fill_(-1), model.topics)
    assert not ax.texts
    assert len(ax.collections) == 1


def test_topic_bars_show_sizes_and_words():
    model, _, _ = _topics()
    ax = plot_topics(model.topics, words=2)
    assert [bar.get_width() for bar in ax.patches] == [3, 2, 1]
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["0  apple, green", "1  car, fast", "2  topic 2"]
    bottom, top = ax.get_ylim()
    assert bottom > top  # the largest is on top
    given = mpl.figure.Figure().add_subplot()
    assert plot_topics(model.topics, given) is given
    with pytest.raises(ValueError, match="topics is empty"):
        plot_topics([])
