"""RandAugment."""

import torch

from torsh_data.vision._engine import Drawn, draw_layer
from torsh_data.vision._policy import Fill, Interpolation, Policy, check_bins
from torsh_data.vision._settings import check_whole
from torsh_data.vision._tables import RAND_AUGMENT


class RandAugment(Policy):
    """Apply `num_ops` random operations to each image, drawn anew for each image of a batch.

    Batched augmentation elsewhere draws one policy for the whole batch; here the images of a batch
    that drew the same kind of operation are computed together. Operations and magnitudes are those
    of `torchvision.transforms.v2.RandAugment` on uint8 tensors.

    With `keys` an image's result depends on its key and its pixels alone: not on its place in the
    batch, the size of the batch or the device. `StreamLoader` puts such keys into its batches.

    Args:
        num_ops: Operations per image, one after the other, in [0, 500].
        magnitude: Strength of all operations, in [0, num_magnitude_bins).
        num_magnitude_bins: How many strengths there are, at least 2.
        interpolation: `"nearest"` or `"bilinear"`, for shear, translation and rotation.
        fill: Value of pixels from outside the image, one number or one per channel, in the images'
            units (0 to 255 for uint8, 0 to 1 for floats); 0 by default.

    Raises:
        TypeError: If an argument is no number of its kind.
        ValueError: If an argument is out of range.

    Example:
        >>> images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).to(torch.uint8)
        >>> augment = RandAugment(num_ops=2, magnitude=9)
        >>> both = augment(images, keys=torch.tensor([11, 12]))
        >>> torch.equal(both[1], augment(images[1], keys=12))
        True

    Reference:
        Cubuk, Zoph, Shlens, Le, RandAugment: Practical automated data augmentation with a reduced
        search space, 2019, arXiv 1909.13719. As in torchvision, signed operations take either sign,
        and bilinear sampling beyond the border blends with `fill` (torchvision darkens such pixels
        twice when a `fill` is given).
    """

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: int = 9,
        num_magnitude_bins: int = 31,
        interpolation: Interpolation = "nearest",
        fill: Fill = None,
    ) -> None:
        super().__init__(interpolation, fill)
        check_whole(num_ops=num_ops, magnitude=magnitude)
        if not 0 <= num_ops <= 500:  # draws from 1000 on belong to others
            raise ValueError(f"num_ops={num_ops} must be at least 0, and at most 500")
        check_bins(num_magnitude_bins)
        if not 0 <= magnitude < num_magnitude_bins:
            raise ValueError(
                f"magnitude={magnitude} must be in [0, num_magnitude_bins={num_magnitude_bins})"
            )
        self.num_ops = num_ops
        self.magnitude = magnitude
        self.num_magnitude_bins = num_magnitude_bins

    def extra_repr(self) -> str:
        return (
            f"num_ops={self.num_ops}, magnitude={self.magnitude}, "
            f"num_magnitude_bins={self.num_magnitude_bins}, interpolation={self.interpolation!r}, "
            f"fill={self.fill}"
        )

    def draw(self, keys: torch.Tensor, height: int, width: int) -> Drawn:
        table = RAND_AUGMENT.magnitudes(self.num_magnitude_bins, height, width)
        layers = [
            draw_layer(RAND_AUGMENT, table, keys, 2 * layer, self.magnitude)
            for layer in range(self.num_ops)
        ]
        return Drawn.stack(layers, len(keys))
