"""Pictures of clusters and topics."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ._cluster import finite_rows
from ._topic import Topic

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def principal_plane(x: Tensor) -> Tensor:
    """Project rows on their two widest directions ``(rows, 2)``.

    Signs are fixed (the largest entry of each direction is positive), so maps do not flip.

    Example:
        >>> principal_plane(torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]]))[:, 0].tolist()
        [-2.0, 0.0, 2.0]
    """
    x = x.detach().double().cpu()
    x = x - x.mean(0)
    directions = torch.zeros(2, x.shape[1], dtype=x.dtype)
    found = torch.linalg.svd(x, full_matrices=False).Vh[:2]
    directions[: len(found)] = found
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return (x @ (directions * torch.where(largest < 0, -1.0, 1.0)).T).float()


def plot_map(
    embeddings: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[int],
    names: Sequence[str] | None = None,
    ax: "Axes | None" = None,
    *,
    method: Literal["pca", "tsne"] = "pca",
    seed: int = 0,
) -> "Axes":
    """Draw vectors as points in the plane, coloured by cluster.

    Args:
        embeddings: ``(rows, dim)``, a tensor or a numpy array, at least one row.
        labels: Cluster of each row; negative is noise, drawn grey.
        names: Legend entry of cluster 0, 1, ...; None for the numbers.
        ax: Where to draw; None for a new figure.
        method: ``"pca"`` keeps large distances, ``"tsne"`` (scikit-learn) keeps neighbours.
        seed: Seed of t-SNE.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib, or scikit-learn for t-SNE, is missing.
    """
    x, numbers = finite_rows(embeddings, "embeddings"), torch.as_tensor(labels).cpu()
    if len(x) == 0 or len(numbers) != len(x):
        raise ValueError(
            f"embeddings of shape {tuple(x.shape)} and {len(numbers)} labels; expected (rows, dim)"
            " with at least one row and a label for each"
        )
    if method not in ("pca", "tsne"):
        raise ValueError(f"method={method!r} is neither 'pca' nor 'tsne'")
    clusters = sorted({int(n) for n in numbers if n >= 0})
    if names is not None and clusters and len(names) <= clusters[-1]:
        raise ValueError(f"names has {len(names)} entries, labels go up to {clusters[-1]}")
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot_map needs matplotlib: pip install 'torsh-text[plot]'") from None
    points = principal_plane(x) if method == "pca" else _t_sne(x, seed)
    if ax is None:
        ax = Figure(figsize=(7, 5), layout="constrained").add_subplot()
    palette = colormaps["tab20" if len(clusters) > 10 else "tab10"]
    noise = numbers < 0
    if bool(noise.any()):
        ax.scatter(*points[noise].T.tolist(), s=8, color="0.8", label="noise")
    for position, label in enumerate(clusters):
        ax.scatter(
            *points[numbers == label].T.tolist(),
            s=14,
            color=palette(position % palette.N),
            label=names[label] if names is not None else str(label),
        )
    ax.set(xticks=[], yticks=[])
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
    return ax


def plot_topic_map(
    vectors: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[int],
    topics: Sequence[Topic],
    ax: "Axes | None" = None,
    *,
    method: Literal["pca", "tsne"] = "pca",
    seed: int = 0,
) -> "Axes":
    """Draw documents as points, coloured by topic; each topic's number stands among its points.

    Args:
        vectors: Vectors of the documents ``(documents, dim)``, at least one.
        labels: Their topics, such as ``model.transform(...).labels``; negative for none.
        topics: ``model.topics``; the legend shows their numbers and first words.
        ax: Where to draw; None for a new figure.
        method: As for :func:`plot_map`.
        seed: Seed of t-SNE.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib, or scikit-learn for t-SNE, is missing.
    """
    names = [f"{topic.id}  {topic.name}" for topic in topics]
    ax = plot_map(vectors, labels, names, ax, method=method, seed=seed)
    numbers = torch.as_tensor(labels)
    drawn = [group for group in ax.collections if group.get_label() != "noise"]
    shown = sorted({int(n) for n in numbers if n >= 0})
    for number, group in zip(shown, drawn[len(drawn) - len(shown) :], strict=True):
        x, y = np.median(np.asarray(group.get_offsets(), dtype=float), axis=0).tolist()
        ax.annotate(
            str(number),
            (x, y),
            ha="center",
            va="center",
            weight="bold",
            bbox={"boxstyle": "circle", "fc": "white", "ec": "0.6", "alpha": 0.8},
        )
    return ax


def plot_topics(topics: Sequence[Topic], ax: "Axes | None" = None, *, words: int = 5) -> "Axes":
    """Draw a bar for each topic: its length is the number of documents, its label the words.

    Args:
        topics: ``model.topics``, at least one; the first is drawn on top.
        ax: Where to draw; None for a new figure.
        words: Words in each label, at most.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is missing.
    """
    if not isinstance(topics, Sequence):
        raise TypeError(f"topics is a {type(topics).__name__}; pass model.topics")
    if not topics:
        raise ValueError("topics is empty; there is nothing to draw")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot_topics needs matplotlib: pip install 'torsh-text[plot]'") from None
    if ax is None:
        height = 1.0 + 0.3 * len(topics)
        ax = Figure(figsize=(7, height), layout="constrained").add_subplot()
    places = range(len(topics))
    bars = ax.barh(places, [topic.size for topic in topics], color="tab:blue")
    ax.bar_label(bars, padding=3, fontsize="small")
    labels = [f"{t.id}  {', '.join(t.words[:words]) or t.name}" for t in topics]
    ax.set_yticks(places, labels=labels)
    ax.invert_yaxis()
    ax.set_xlabel("documents")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return ax


def _t_sne(x: Tensor, seed: int) -> Tensor:
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise ImportError(
            "method='tsne' needs scikit-learn: pip install 'torsh-text[topics]'"
        ) from None
    rows: Any = x.detach().float().cpu().numpy()
    if len(rows) < 4:
        return principal_plane(x)
    perplexity = min(30.0, (len(rows) - 1) / 3)
    points = TSNE(perplexity=perplexity, random_state=seed, init="pca").fit_transform(rows)
    return torch.from_numpy(points)
