"""A picture of what an augmentation does."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_sheet(
    rows: Mapping[str, torch.Tensor],
    *,
    titles: Sequence[str] | None = None,
    columns: int = 12,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw images as a sheet: one named row for each stage, one column for each image.

    Args:
        rows: Name of a stage and its images `(batch, channels, height, width)`, 1 or 3 channels,
            uint8 or floating point in [0, 1]; all of the same height and width.
        titles: Text below each column, for instance its labels.
        columns: How many of the images to draw, at least 1.
        ax: Axes to draw on; a new figure by default.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is nothing to draw or sizes differ.

    Example:
        >>> stages = {"as stored": torch.rand(4, 1, 8, 8), "flipped": torch.rand(4, 1, 8, 8)}
        >>> [text.get_text() for text in plot_sheet(stages).get_yticklabels()]
        ['as stored', 'flipped']
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_sheet needs matplotlib: pip install 'torsh-data[plot]'") from error
    if not rows or columns < 1 or not all(len(images) for images in rows.values()):
        raise ValueError(f"rows={list(rows)}, columns={columns}: there is no image to draw")
    sizes = {tuple(images.shape[-2:]) for images in rows.values()}
    if len(sizes) > 1 or any(i.ndim != 4 or i.shape[1] not in (1, 3) for i in rows.values()):
        shapes = {name: tuple(images.shape) for name, images in rows.items()}
        raise ValueError(f"rows has shapes {shapes}; draw images of one size, 1 or 3 channels")
    height, width = sizes.pop()
    columns = min(columns, max(len(images) for images in rows.values()))
    gap = max(1, height // 16)
    sheet = torch.ones(len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3)
    for r, images in enumerate(rows.values()):
        for c, image in enumerate(images[:columns].detach().cpu()):
            shown = image.float() / 255 if image.dtype == torch.uint8 else image.float()
            y, x = r * (height + gap), c * (width + gap)
            pixels = shown.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0)
            sheet[y : y + height, x : x + width] = pixels
    if ax is None:
        ax = Figure(figsize=(0.8 * columns + 1.2, 0.85 * len(rows) + 0.3)).subplots()
    ax.imshow(sheet.numpy(), interpolation="nearest")
    ax.set_yticks([r * (height + gap) + height / 2 for r in range(len(rows))], list(rows))
    named = list(titles or [])[:columns]
    ax.set_xticks([c * (width + gap) + width / 2 for c in range(len(named))], named)
    ax.tick_params(length=0, labelsize=8)
    ax.spines[:].set_visible(False)
    return ax
