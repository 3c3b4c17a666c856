"""Pillow images, single tensors, batches and lists, all as batches of tensors."""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image

One: TypeAlias = "torch.Tensor | Image"

_KINDS = (
    "use a Pillow image, a tensor ([batch,] channels, height, width), or a list of images or of "
    "tensors (channels, height, width)"
)


def is_picture(value: object) -> bool:
    """Whether this is a Pillow image; Pillow is not imported for it."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(value, module.Image)


def as_batch(images: torch.Tensor) -> torch.Tensor:
    """The images as `(batch, channels, height, width)`, checked.

    Raises:
        TypeError: If they are neither uint8 nor floating point.
        ValueError: If there are not 1 or 3 channels, or floats are beyond [0, 1].
    """
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images has dtype {images.dtype}; use uint8, or floats in [0, 1]")
    if images.ndim not in (3, 4) or images.shape[-3] not in (1, 3):
        raise ValueError(
            f"images has shape {tuple(images.shape)}, expected ([batch,] channels, height, width) "
            "with 1 or 3 channels"
        )
    # on a GPU the check would wait for the device
    if images.is_floating_point() and not images.is_cuda and images.numel():
        low, high = images.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"images has values from {low.item():.3g} to {high.item():.3g}; floats must be in "
                "[0, 1], augment before normalizing"
            )
    return images if images.ndim == 4 else images[None]


def from_picture(picture: "Image") -> torch.Tensor:
    """A Pillow image of mode L or RGB as uint8 `(channels, height, width)`."""
    return from_pictures([picture])[0]


def from_pictures(pictures: "Sequence[Image]") -> torch.Tensor:
    """Pillow images of one size and mode, L or RGB, as uint8 `(n, channels, height, width)`."""
    one = pictures[0]
    if one.mode not in ("L", "RGB"):
        raise ValueError(
            f"images has a Pillow image of mode {one.mode!r}; use image.convert('RGB') or "
            "image.convert('L')"
        )
    out = np.empty((len(pictures), len(one.mode), one.height, one.width), dtype=np.uint8)
    for rows, picture in zip(out, pictures, strict=True):
        for row, band in zip(rows, one.mode, strict=True):
            # Pillow packs a channel ten times as fast as a copy with strides is
            content = np.frombuffer(picture.tobytes("raw", band), dtype=np.uint8)
            row[:] = content.reshape(row.shape)
    return torch.from_numpy(out)


def to_picture(image: torch.Tensor) -> "Image":
    """A Pillow image of uint8 `(channels, height, width)`, with 1 or 3 channels."""
    from PIL import Image

    size = (image.shape[2], image.shape[1])
    channels = [
        Image.frombuffer("L", size, channel, "raw", "L", 0, 1)
        for channel in image.contiguous().numpy()
    ]
    return channels[0] if len(channels) == 1 else Image.merge("RGB", channels)


def each_of(
    images: Sequence[One], run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> list[One]:
    """Run a function of batches on images that may differ in kind and size.

    Args:
        images: Pillow images and tensors `(channels, height, width)`.
        run: Gets images of one shape, dtype and device as a batch, and their places in `images`
            `(batch,)`; gives such a batch back.

    Returns:
        The results, each of the kind of its image.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for k, image in enumerate(images):
        if isinstance(image, torch.Tensor):
            if image.ndim != 3:
                raise ValueError(
                    f"images[{k}] has shape {tuple(image.shape)}; a list holds single images "
                    "(channels, height, width)"
                )
            kind = (image.shape, image.dtype, image.device)
        elif is_picture(image):
            kind = (image.size, image.mode)
        else:
            raise refuse(image, f"images[{k}]")
        groups.setdefault(kind, []).append(k)
    done: list[One] = list(images)
    for places in groups.values():
        drawn = is_picture(images[places[0]])
        same = cast("Any", [images[k] for k in places])
        batch = from_pictures(same) if drawn else as_batch(torch.stack(same))
        for k, result in zip(places, run(batch, torch.tensor(places)), strict=True):
            done[k] = to_picture(result) if drawn else result
    return done


def refuse(images: object, name: str = "images", kinds: str = _KINDS) -> TypeError:
    """What to raise for something that is no image.

    Args:
        images: What was given.
        name: How the caller knows it.
        kinds: What to use instead.
    """
    many = cast("Sequence[object]", images) if isinstance(images, (list, tuple)) else [images]
    first = many[0] if many else images
    if isinstance(first, bytes | bytearray | memoryview):
        place = name if first is images else f"{name}[0]"
        return TypeError(
            f"{place} is bytes, such as those of an image file; decode them where samples are "
            "read, in the data set's transform: ShardedDataset(..., transform=f) with "
            "torchvision.io.decode_image in f (tar files: decode='torch')"
        )
    return TypeError(f"{name} is a {type(images).__name__}; {kinds}")
