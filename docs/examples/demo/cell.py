"""Search a small convolutional cell under a latency budget measured on this machine."""

import time

import torch
import torch.nn.functional as F
import torsh_nas as nas
from digits import digits, to_float
from matplotlib.figure import Figure
from report import Section, Table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CHANNELS = 16


def conv(kernel: int, groups: int = 1) -> nn.Sequential:
    """ReLU, convolution and normalisation that keep the shape."""
    layers = [nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=kernel // 2, groups=groups, bias=False)]
    if groups > 1:
        layers.append(nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False))
    return nn.Sequential(nn.ReLU(), *layers, nn.BatchNorm2d(CHANNELS))


def edge() -> dict[str, nn.Module]:
    """The candidates for one edge of the cell."""
    return {
        "conv 3x3": conv(3),
        "separable 3x3": conv(3, groups=CHANNELS),
        "separable 5x5": conv(5, groups=CHANNELS),
        "average": nn.AvgPool2d(3, 1, 1),
        "skip": nn.Identity(),
    }


class Reader(nn.Module):
    """A stem, two equal cells of which every edge is a choice, and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, CHANNELS, 3, 2, 1, bias=False), nn.BatchNorm2d(CHANNELS)
        )
        self.cells = nn.ModuleList(
            nas.Cell(edge, nodes=2, inputs=1, label="cell") for _ in range(2)
        )
        self.head = nn.Linear(CHANNELS, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for cell in self.cells:
            x = cell(x)
        return self.head(F.relu(x).mean((2, 3)))
