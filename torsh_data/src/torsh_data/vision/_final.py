"""The last pass over a batch: flip, normalize, erase, mix and convert.

Everything random is drawn before, as a few numbers for each image, so that this is one function of
plain tensors: the definition for whatever computes it in a single pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torsh_data.vision._erase import erase_noise
from torsh_data.vision._mix import Mixture, inside, mix_images


@dataclass(frozen=True)
class FinalPlan:
    """What happens to each of `n` images, on the CPU; None is nothing.

    Attributes:
        flip: Which are mirrored `(n,)`, bool.
        erase: Which box is erased, (top, bottom, left, right) `(n, 4)`, int64.
        noise: Keys of the noise that fills the boxes `(n,)`, int64; None fills with the value.
        mixture: What each gets from another.
    """

    flip: torch.Tensor | None = None
    erase: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    mixture: Mixture | None = None


def final_pass(
    images: torch.Tensor,
    plan: FinalPlan,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    erase_value: float,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> torch.Tensor:
    """Make a model's input of a batch.

    Every step rounds to float32 on its own, so results do not depend on the device.

    Args:
        images: `(n, channels, height, width)`, uint8 or floating point in [0, 1].
        plan: What was drawn for each image.
        mean: Of each channel, as a share of the range.
        std: Of each channel, as a share of the range.
        erase_value: What fills the boxes, after normalizing.
        dtype: Of the result.
        memory_format: Of the result.

    Returns:
        `(n, channels, height, width)`.
    """
    device = images.device
    if plan.flip is not None:
        turned = plan.flip.to(device, non_blocking=True).view(-1, 1, 1, 1)
        images = torch.where(turned, images.flip(3), images)
    bound = 255.0 if images.dtype == torch.uint8 else 1.0
    # difference and quotient leave nothing to a fused multiply-add
    moments = torch.tensor([mean, std], dtype=torch.float64).mul(bound).float()
    center, spread = moments.to(device, non_blocking=True).view(2, 1, -1, 1, 1)
    values = (images.float() - center) / spread
    if plan.erase is not None:
        values = _erase(values, plan.erase, plan.noise, erase_value)
    if plan.mixture is not None:
        values = mix_images(values, plan.mixture)
    return values.to(dtype).contiguous(memory_format=memory_format)


def _erase(
    values: torch.Tensor, box: torch.Tensor, noise: torch.Tensor | None, value: float
) -> torch.Tensor:
    if noise is None:
        return values.masked_fill(inside(box, values), value)
    rows = ((box[:, 1] > box[:, 0]) & (box[:, 3] > box[:, 2])).nonzero()[:, 0]
    if not len(rows):
        return values
    here = rows.to(values.device, non_blocking=True)
    some = values.index_select(0, here)
    filled = torch.where(inside(box[rows], some), erase_noise(noise[rows], some), some)
    return values.index_copy(0, here, filled)
