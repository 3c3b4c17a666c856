"""Small searchable models the tests share."""

import torch
from torch import Tensor, nn

import torsh_nas as nas


def op(name: str, channels: int, stride: int) -> nn.Module:
    if name == "skip":
        return nn.Identity() if stride == 1 else nn.AvgPool2d(stride)
    if name == "pool":
        return nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    size = int(name[-1])
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(channels, channels, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(channels, affine=False),
    )


class ChainNet(nn.Module):
    """Two choices that share a label and one of their own."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        names = ("conv3", "conv5", "skip")
        self.a = nas.Choice({name: op(name, channels, 1) for name in names}, label="block")
        self.b = nas.Choice({name: op(name, channels, 1) for name in names}, label="block")
        self.act = nas.Choice([nn.ReLU(), nn.Tanh()])
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.b(self.a(self.stem(x))))
        return self.head(x.mean((2, 3)))


class CellNet(nn.Module):
    """Two cells of different resolution that share all decisions."""

    def __init__(
        self,
        channels: int = 4,
        *,
        keep: int | None = 2,
        reduce: str = "concat",
        inputs: int = 1,
        op_names: tuple[str, ...] = ("conv3", "skip", "none"),
        nodes: int = 3,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels))

        def cell() -> nas.Cell:
            return nas.Cell(
                op,
                op_names,
                channels=channels,
                nodes=nodes,
                keep=keep,
                inputs=inputs,
                reduce=reduce,  # type: ignore[arg-type]
                label="cell",
            )

        width = channels * nodes if reduce == "concat" else channels
        self.first = cell()
        self.squeeze = nn.Conv2d(width, channels, 1)
        self.second = cell()
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.squeeze(self.first(*[x] * self.inputs))
        x = nn.functional.avg_pool2d(x, 2)
        return self.head(self.second(*[x] * self.inputs).mean((2, 3)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def warmed_up(model: nn.Module, side: int = 8) -> nn.Module:
    """Give the batch norms statistics that are not those of a new model."""
    model = model.double()
    model.train()
    with torch.no_grad():
        for seed in range(3):
            x = torch.randn(4, 1, side, side, generator=generator(seed), dtype=torch.float64)
            model(x)
    return model
