"""The scanned digits of scikit-learn and the net that reads them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn


@dataclass(frozen=True)
class Digits:
    """1,437 training and 360 test images, uint8 ``(1, 16, 16)``, with labels 0 to 9."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits() -> Digits:
    """Load the 1,797 scans, enlarge 8 x 8 to 16 x 16 pixels and split them, always the same way."""
    scans, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(scans).float().view(-1, 1, 8, 8) / 16
    large = F.interpolate(pixels, size=16, mode="bilinear", align_corners=False)
    images = (large * 255).round().to(torch.uint8)
    train, test = train_test_split(
        torch.arange(len(images)), test_size=360, stratify=labels, random_state=0
    )
    labels = torch.from_numpy(labels)
    return Digits(images[train], labels[train], images[test], labels[test])


def to_float(images: Tensor) -> Tensor:
    """Scale uint8 pixels to floats of about mean 0 and deviation 1."""
    return images.float().div_(255).sub_(0.3).div_(0.35)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of ``images`` that ``model`` labels right, in evaluation mode."""
    model.eval()
    return (model(to_float(images)).argmax(1) == labels).float().mean().item()
