"""A small convolution net, trained once a session on scikit-learn's digits."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from torsh_quant._statistics import Collector, Statistics


@dataclass(frozen=True)
class Digits:
    net: nn.Module
    images: Tensor
    labels: Tensor

    def accuracy(self, net: nn.Module) -> float:
        with torch.no_grad():
            return (net(self.images).argmax(1) == self.labels).float().mean().item()


def digits_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


@pytest.fixture(scope="session")
def digits() -> Digits:
    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels))
    train, test = order[:1200], order[1200:]
    net = digits_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
    for _ in range(9):
        for rows in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
    return Digits(net.eval(), images[test], labels[test])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def correlated() -> Callable[..., tuple[Tensor, Statistics, Tensor]]:
    """Makes a weight, and inputs whose columns hang together, with their moments."""

    def case(out: int = 24, columns: int = 48) -> tuple[Tensor, Statistics, Tensor]:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(out, columns, generator=generator)
        mixing = torch.randn(12, columns, generator=generator)
        x = torch.randn(500, 12, generator=generator) @ mixing
        x += 0.2 * torch.randn(500, columns, generator=generator)
        collector = Collector(nn.Linear(columns, out))
        collector.observe(x)
        return weight, collector.statistics(), x

    return case
