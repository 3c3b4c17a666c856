"""What all augmentation policies share: what they take, and what decides the draws."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch import nn

from torsh_data.vision._engine import Drawn, apply_layers
from torsh_data.vision._images import as_batch, each_of, is_picture, refuse
from torsh_data.vision._keys import SomeKeys, as_keys
from torsh_data.vision._settings import as_series, check_finite, check_whole

if TYPE_CHECKING:
    from PIL.Image import Image

Interpolation = Literal["nearest", "bilinear"]
Fill = float | Sequence[float] | None
Images = TypeVar("Images", bound="torch.Tensor | Image | list[Any]")


class Policy(nn.Module):
    """Base of the policies: operations drawn for each image, whatever holds the images.

    A policy of your own needs `draw` alone, which says what happens to each image. The operations
    are those of torchvision on uint8 tensors; Pillow images get these too, and not Pillow's own,
    so that an image has one result. Floats in [0, 1] take the formulas that torchvision has for
    them, in float32.

    Args:
        interpolation: `"nearest"` or `"bilinear"`, for shear, translation and rotation.
        fill: Value of pixels from outside the image, one number or one per channel, in the images'
            units (0 to 255 for uint8, 0 to 1 for floats); 0 by default.

    Raises:
        TypeError: If `fill` holds something else than numbers.
        ValueError: If an argument is out of range.
    """

    def __init__(self, interpolation: Interpolation = "nearest", fill: Fill = None) -> None:
        super().__init__()
        if interpolation not in ("nearest", "bilinear"):
            raise ValueError(f"interpolation={interpolation!r}; use 'nearest' or 'bilinear'")
        if isinstance(fill, np.ndarray | torch.Tensor):
            fill = fill.tolist()
        if fill is None:
            values = ()
        elif isinstance(fill, Sequence) and not isinstance(fill, str):
            values = as_series("fill", fill)
        else:
            check_finite(fill=fill)
            values = (fill,)
        if not all(0 <= value <= 255 for value in values):
            raise ValueError(f"fill={fill!r} must be in [0, 255] for uint8, in [0, 1] for floats")
        self.interpolation = interpolation
        self.fill = fill

    def forward(
        self,
        images: Images,
        keys: SomeKeys = None,
        *,
        rng: np.random.Generator | None = None,
    ) -> Images:
        """Augment a batch, a list of images, or one image.

        An image's result depends on its key and its pixels alone: not on its place in the batch,
        the size of the batch, the device or what holds it. Two policies with the same keys draw
        from the same numbers.

        Args:
            images: A batch `(batch, channels, height, width)`, one image `(channels, height,
                width)`, a Pillow image of mode L or RGB, or a list of single images of any sizes.
                Tensors have 1 or 3 channels, are uint8 or floating point in [0, 1], on CPU or CUDA.
            keys: Whole numbers `(batch,)` as a tensor, array or list, or one number for one image;
                keep a tensor on the CPU, where policies are drawn. `StreamLoader` puts such keys
                into its batches.
            rng: Instead of keys, for one image in a data set's transform: the generator that
                `ShardedDataset` gives to the transform stands for its sample's key, so the result
                is that of the batch with `keys=batch["key"]`, if a `StreamLoader` reads the data
                set itself: in a `Subset`, a `ConcatDataset` or a mixture, samples have other
                numbers, and with them other keys. A NumPy `Philox` with a key of your own below
                2**64 stands for it likewise. From any other generator the next numbers are the
                keys. Without keys and rng, torch's global CPU generator draws them.

        Returns:
            New images of the same kind, shape, dtype and device.

        Raises:
            TypeError: If something is no image, its dtype is neither uint8 nor floating point, or
                keys are no whole numbers.
            ValueError: If a mode, a shape or a range is another than those above, or there are not
                as many keys as images.
        """
        if isinstance(images, torch.Tensor):
            batch = as_batch(images)
            done = self.augment(batch, as_keys(keys, rng, len(batch)))
            return cast("Images", done if images.ndim == 4 else done[0])
        many = isinstance(images, list)
        if not many and not is_picture(images):
            raise refuse(images)
        singles: list[Any] = list(images) if many else [images]
        numbers = as_keys(keys, rng, len(singles))
        results = each_of(singles, lambda batch, places: self.augment(batch, numbers[places]))
        return cast("Images", results if many else results[0])

    def draw(self, keys: torch.Tensor, height: int, width: int) -> Drawn:
        """The operations of images of one size.

        Args:
            keys: `(n,)` int64, on the CPU.
            height: Of the images, in pixels.
            width: Of the images, in pixels.

        Returns:
            A `Drawn`: `codes` `(layers, n)` int64, indices into `OPS`, and `magnitudes` `(layers,
            n)` float64.
        """
        raise NotImplementedError(f"{type(self).__name__} has no draw")

    def augment(self, batch: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Augment a valid batch.

        Args:
            batch: `(n, channels, height, width)`.
            keys: `(n,)` int64, on the CPU.

        Returns:
            A new batch.
        """
        out = batch.clone()
        drawn = self.draw(keys, *batch.shape[-2:])
        apply_layers(out, drawn, self._fill(batch), self.interpolation)
        return out

    def _fill(self, images: torch.Tensor) -> torch.Tensor | None:
        if self.fill is None:
            return None
        channels = images.shape[1]
        fill = torch.tensor(self.fill, dtype=torch.float32).reshape(-1)
        if len(fill) not in (1, channels):
            raise ValueError(f"fill={self.fill} has {len(fill)} values for {channels} channels")
        if images.is_floating_point() and fill.max() > 1:
            raise ValueError(f"fill={self.fill} must be in [0, 1] for images of {images.dtype}")
        return fill.expand(channels).to(images.device, non_blocking=True)


def check_bins(num_magnitude_bins: int) -> None:
    """Refuse a table that has no weakest and strongest."""
    check_whole(num_magnitude_bins=num_magnitude_bins)
    if num_magnitude_bins < 2:
        raise ValueError(f"num_magnitude_bins={num_magnitude_bins} must be at least 2")
