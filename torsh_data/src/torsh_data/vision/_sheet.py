"""Pictures of what augmentation does."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from torsh_data.vision._images import as_batch, from_picture, is_picture
from torsh_data.vision._keys import SomeKeys, as_keys
from torsh_data.vision._policy import Policy
from torsh_data.vision._settings import check_whole

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
        TypeError: If `columns` is no whole number.
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
    check_whole(columns=columns)
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
            shown = _unit(image)
            y, x = r * (height + gap), c * (width + gap)
            pixels = shown.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0)
            sheet[y : y + height, x : x + width] = pixels
    if ax is None:
        size = (0.8 * columns * max(1.0, width / height) + 1.2, 0.85 * len(rows) + 0.3)
        ax = Figure(figsize=size).subplots()
    ax.imshow(sheet.numpy(), interpolation="nearest")
    ax.set_yticks([r * (height + gap) + height / 2 for r in range(len(rows))], list(rows))
    named = list(titles or [])[:columns]
    ax.set_xticks([c * (width + gap) + width / 2 for c in range(len(named))], named)
    ax.tick_params(length=0, labelsize=8)
    ax.spines[:].set_visible(False)
    return ax


def augmentation_sheet(
    images: torch.Tensor | Sequence[Any],
    policies: Mapping[str, Policy] | Sequence[Policy] | Policy,
    keys: SomeKeys = None,
    *,
    titles: Sequence[str] | None = None,
    columns: int = 8,
    size: int | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw what policies make of some images: the images, then a row for each policy.

    Args:
        images: A batch `(batch, channels, height, width)`, or a sequence (also a data set) of
            tensors `(channels, height, width)`, Pillow images, or bytes of JPEG or PNG files, each
            of any size. The first `columns` are read.
        policies: One or several, or a mapping of the names of rows to policies; without names,
            those of the classes are taken.
        keys: Whole numbers `(n,)` as a tensor, array or list, one for each image that is drawn or
            for more; 0, 1, 2 ... by default, so that a sheet can be drawn again.
        titles: Text below each column, for instance its labels.
        columns: How many of the images to draw, at least 1.
        size: Images are scaled until their longer side has this many pixels, and then augmented; by
            default up to 128, for smaller images as they are.
        ax: Axes to draw on; a new figure by default.

    Returns:
        The axes; `axes.figure.savefig(path)` writes the picture.

    Raises:
        ImportError: If matplotlib is missing, or Pillow is and there are files to decode.
        TypeError: If `columns` or `size` is no whole number, or something is no image or no policy.
        ValueError: If there is no image, `size` is below 1, or there are fewer keys than images.

    Example:
        >>> from torsh_data.vision import AutoAugment, RandAugment
        >>> images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
        >>> axes = augmentation_sheet(images, [RandAugment(), AutoAugment()])
        >>> [text.get_text() for text in axes.get_yticklabels()]
        ['as stored', 'RandAugment', 'AutoAugment']
    """
    if isinstance(policies, Mapping):
        named = dict(policies)
    else:
        several = [policies] if isinstance(policies, Policy) else policies
        named = {type(policy).__name__: policy for policy in several}
        if len(named) < len(several):
            raise ValueError("policies has two of one class; give them names, in a mapping")
    for policy in named.values():
        if not isinstance(policy, Policy):
            raise TypeError(f"policies has {policy!r}; use policies such as RandAugment()")
    check_whole(columns=columns, **({} if size is None else {"size": size}))
    if size is not None and size < 1:
        raise ValueError(f"size={size} must be at least 1")
    count = min(columns, len(images))
    if count < 1:
        raise ValueError(f"columns={columns} of {len(images)} images: there is no image to draw")
    side = 128 if size is None else size
    shown = [_scaled(_decoded(images[k]), side, enlarge=size is not None) for k in range(count)]
    some: Any = range(count) if keys is None else keys
    numbers = as_keys([some] if np.ndim(some) == 0 else some[:count], None, count)
    stages: dict[str, Callable[[list[torch.Tensor], torch.Tensor], list[torch.Tensor]]] = {
        "as stored": lambda some, _: some,
        **named,
    }
    rows = {name: _framed(run(shown, numbers)) for name, run in stages.items()}
    return plot_sheet(rows, titles=titles, columns=columns, ax=ax)


def _unit(image: torch.Tensor) -> torch.Tensor:
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()


def _decoded(image: object) -> torch.Tensor:
    if isinstance(image, bytes | bytearray | memoryview):
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError(
                "files need Pillow to be decoded: pip install 'torsh-data[vision]'"
            ) from error
        image = Image.open(io.BytesIO(image)).convert("RGB")
    if is_picture(image):
        return from_picture(cast("Any", image))
    if not isinstance(image, torch.Tensor):
        raise TypeError(
            f"images holds a {type(image).__name__}; use tensors (channels, height, width), Pillow "
            "images or bytes of image files"
        )
    if image.ndim != 3:
        raise ValueError(f"images holds a tensor of shape {tuple(image.shape)}, expected 3 numbers")
    return as_batch(image)[0].detach().cpu()


def _scaled(image: torch.Tensor, side: int, *, enlarge: bool) -> torch.Tensor:
    longest = max(image.shape[-2:])
    if longest == side or (longest < side and not enlarge):
        return image
    shape = [max(1, round(length * side / longest)) for length in image.shape[-2:]]
    small = torch.nn.functional.interpolate(
        _unit(image)[None], shape, mode="bilinear", antialias=True, align_corners=False
    )[0].clamp(0, 1)
    return (small * 255).round().to(torch.uint8) if image.dtype == torch.uint8 else small


def _framed(images: list[torch.Tensor]) -> torch.Tensor:
    """All in the middle of white frames of one size."""
    height, width = (max(image.shape[d] for image in images) for d in (1, 2))
    frames = torch.ones(len(images), 3, height, width)
    for frame, image in zip(frames, images, strict=True):
        y, x = (height - image.shape[1]) // 2, (width - image.shape[2]) // 2
        frame[:, y : y + image.shape[1], x : x + image.shape[2]] = _unit(image)
    return frames
