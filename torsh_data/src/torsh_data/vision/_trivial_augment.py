"""TrivialAugment."""

import torch

from torsh_data._rng import uniform
from torsh_data.vision._engine import Drawn, draw_layer
from torsh_data.vision._policy import Fill, Interpolation, Policy, check_bins
from torsh_data.vision._tables import TRIVIAL_AUGMENT


class TrivialAugmentWide(Policy):
    """Apply one operation of random strength to each image, drawn anew for each image of a batch.

    There is nothing to tune. Operations and magnitudes are those of
    `torchvision.transforms.v2.TrivialAugmentWide` on uint8 tensors; what decides the draws is said
    at `Policy`.

    Args:
        num_magnitude_bins: How many strengths there are, at least 2.
        interpolation: `"nearest"` or `"bilinear"`, for shear, translation and rotation.
        fill: Value of pixels from outside the image, one number or one per channel, in the images'
            units (0 to 255 for uint8, 0 to 1 for floats); 0 by default. Translation is by up to 32
            pixels, so an image of that size can leave its frame.

    Raises:
        TypeError: If an argument is no number of its kind.
        ValueError: If an argument is out of range.

    Example:
        >>> images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).to(torch.uint8)
        >>> augment = TrivialAugmentWide()
        >>> both = augment(images, keys=torch.tensor([11, 12]))
        >>> torch.equal(both[1], augment(images[1], keys=12))
        True

    Reference:
        Mueller, Hutter, TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation, 2021,
        arXiv 2103.10158.
    """

    def __init__(
        self,
        num_magnitude_bins: int = 31,
        interpolation: Interpolation = "nearest",
        fill: Fill = None,
    ) -> None:
        super().__init__(interpolation, fill)
        check_bins(num_magnitude_bins)
        self.num_magnitude_bins = num_magnitude_bins

    def extra_repr(self) -> str:
        return (
            f"num_magnitude_bins={self.num_magnitude_bins}, interpolation={self.interpolation!r}, "
            f"fill={self.fill}"
        )

    def draw(self, keys: torch.Tensor, height: int, width: int) -> Drawn:
        bins = self.num_magnitude_bins
        table = TRIVIAL_AUGMENT.magnitudes(bins, height, width)
        magnitude = (uniform(keys, 2) * bins).long()
        return Drawn.stack([draw_layer(TRIVIAL_AUGMENT, table, keys, 0, magnitude)], len(keys))
