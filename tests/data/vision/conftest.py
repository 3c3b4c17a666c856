import numpy as np
import pytest
import torch

from torsh_data._rng import sample_keys
from torsh_data.vision._engine import apply_ops, warp_matrices
from torsh_data.vision._tables import CODES


def _pictures(channels=3, height=37, width=30):
    torch.manual_seed(5)
    size = (height, width)
    smooth = torch.nn.functional.interpolate(torch.rand(3, channels, 5, 5), size, mode="bicubic")
    smooth = smooth.mul(255).clamp(0, 255).to(torch.uint8)
    noise = torch.randint(0, 256, (3, channels, *size), dtype=torch.uint8)
    dark = torch.randint(3, 9, (1, channels, *size), dtype=torch.uint8)
    flat = torch.full((1, channels, *size), 77, dtype=torch.uint8)
    levels = torch.where(noise[:1] > 200, 255, 0).to(torch.uint8)
    return torch.cat([smooth, noise, dark, flat, levels])


@pytest.fixture
def pictures():
    """Nine smooth, noisy, dark, flat and two-level images."""
    return _pictures


@pytest.fixture
def keys():
    """Keys of the first samples of an epoch."""

    def make(count, epoch=0):
        return torch.from_numpy(sample_keys(0, epoch, np.arange(count)))

    return make


@pytest.fixture
def torchvision_op():
    """One operation of torchvision on each image of a batch, one by one."""
    transforms = pytest.importorskip("torchvision.transforms.v2")
    base = transforms._auto_augment._AutoAugmentBase()

    def run(images, name, magnitude, interpolation="nearest", fill=None):
        mode = transforms.InterpolationMode(interpolation)
        return torch.stack(
            [
                base._apply_image_or_video_transform(
                    image, name, magnitude, interpolation=mode, fill={torch.Tensor: fill}
                )
                for image in images
            ]
        )

    return run


@pytest.fixture
def step_by_step(torchvision_op):
    """Our operations one after the other, each held against torchvision's on the same input."""

    def run(image, steps):
        for name, power in steps:
            expected = torchvision_op(image[None], name, power)[0]
            mine = image[None].clone()
            codes, powers = torch.tensor([CODES[name]]), torch.tensor([power], dtype=torch.float64)
            apply_ops(mine, codes, powers, None, "nearest")
            image = mine[0]
            # floats: sums in another order; one bit decides where Posterize cuts
            close = 0 if image.dtype == torch.uint8 else 1e-5
            apart = (image.float() - expected.float()).abs() > close
            if name in ("ShearX", "ShearY", "Rotate"):
                apart &= ~_half_way(name, power, *image.shape[-2:])
            few = 1e-3 if close and name == "Posterize" else 0
            assert apart.float().mean() <= few, name
        return image

    return run


def _half_way(name, power, height, width):
    """Which pixels come from half-way between two, where the last bit of float32 decides.

    Coordinates up to 37 have a step of 4e-6 there, and a handful of roundings.
    """
    codes = torch.tensor([CODES[name]])
    matrix = warp_matrices(codes, torch.tensor([power]), height, width)[0].double()
    y = torch.arange(height)[:, None] - (height - 1) / 2
    x = torch.arange(width) - (width - 1) / 2
    steps = (height - 1) / 2, (width - 1) / 2
    near = torch.zeros(height, width, dtype=torch.bool)
    for row, to_corner in zip(matrix, reversed(steps), strict=True):
        source = row[0] * x + row[1] * y + row[2] + to_corner
        near |= (source - source.floor() - 0.5).abs() < 1e-4
    return near
