"""Random erasing: where, and with what."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from torsh_data._rng import Keys, uniform
from torsh_data.vision._ops import divided

# Draws of a key, between those of the policies and of AugMix; four for each attempt at a box.
_APPLY, _NOISE, _BOX = 1006, 1007, 1010
_ATTEMPTS = 10


def erase_boxes(
    keys: Keys,
    prob: float,
    scale: Sequence[float],
    ratio: Sequence[float],
    height: int,
    width: int,
) -> npt.NDArray[np.int64]:
    """One box for each key, in the way of torchvision's RandomErasing.

    Args:
        keys: `(n,)` int64.
        prob: Share of the images that get one.
        scale: Least and greatest share of the image that a box covers.
        ratio: Least and greatest height divided by width; its logarithm is uniform.
        height: Of the images, in pixels.
        width: Of the images, in pixels.

    Returns:
        (top, bottom, left, right) `(n, 4)`; no pixels for images that get none, and for those where
        none of ten boxes fits.
    """
    box = np.zeros((len(keys), 4), dtype=np.int64)
    waiting = np.flatnonzero(uniform(keys, _APPLY) < prob)
    low, high = np.log(ratio[0]), np.log(ratio[1])
    for attempt in range(_ATTEMPTS):
        chosen = keys[waiting]
        area, aspect, y, x = (uniform(chosen, _BOX + 4 * attempt + k) for k in range(4))
        area = height * width * (scale[0] + area * (scale[1] - scale[0]))
        aspect = np.exp(low + aspect * (high - low))
        tall = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        wide = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (tall < height) & (wide < width)
        top = (y * (height - tall + 1)).astype(np.int64)
        left = (x * (width - wide + 1)).astype(np.int64)
        found = np.stack([top, top + tall, left, left + wide], axis=1)
        box[waiting[fits]] = found[fits]
        waiting = waiting[~fits]
    return box


def erase_noise(keys: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Noise of mean 0 and standard deviation 1 for each value of `images`, float32.

    The sum of four uniform numbers, in integers until the last step: the same on every device,
    which logarithms and cosines of exact normal noise are not. It ends at 3.5.

    Args:
        keys: `(n,)` int64, on the CPU.
        images: `(n, channels, height, width)`; their shape and device count.
    """
    start = (uniform(keys, _NOISE) * 2.0**53).long().to(images.device, non_blocking=True)
    places = torch.arange(images[0].numel(), device=images.device)
    bits = (uniform(start[:, None] + places, 0) * 2.0**53).long()
    total = sum(bits >> shift & 0x1FFF for shift in (0, 13, 26, 39)) - 2 * 0x1FFF
    deviation = (4 * (2.0**26 - 1) / 12) ** 0.5  # of four numbers from 0 to 2**13 - 1
    return divided(torch.as_tensor(total).float(), deviation).view(images.shape)
