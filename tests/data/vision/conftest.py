import numpy as np
import pytest
import torch

from torsh_data._rng import sample_keys


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
