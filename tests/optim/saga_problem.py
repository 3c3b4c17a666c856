"""A small classification problem for SAGA, and SAGA with a dense table to compare with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torsh_optim._saga import SAGA

N = 23
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int8]
KINDS = ["scalar", "factored", "full"]


def linear_net() -> nn.Module:
    return nn.Linear(5, 3).double()


def unbiased_net() -> nn.Module:
    return nn.Linear(5, 3, bias=False).double()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def cnn() -> nn.Module:
    net = nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(6, 3))
    return net.double()


MODELS = {"scalar": linear_net, "factored": mlp, "full": cnn}


def make_data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 5, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (N,), generator=generator)


def make_batches(epochs: int, size: int = 4, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        part for _ in range(epochs) for part in torch.randperm(N, generator=generator).split(size)
    ]


def run_saga(model: nn.Module, opt: SAGA, batches: list[Tensor], reduction: str = "none") -> None:
    x, y = make_data()
    for index in batches:
        opt.step(
            lambda i=index: F.cross_entropy(model(x[i]), y[i], reduction=reduction), index=index
        )


def _round(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounding of one row, written from its definition."""
    if dtype != torch.int8:
        return values.to(dtype).double()
    scale = (values.abs().max() / 127).float().double()
    return (values / scale).round() * scale if scale > 0 else values * 0


class DenseSAGA:
    """SAGA with the gradient of every sample in float64, one sample at a time."""

    def __init__(self, model: nn.Module, lr: float, kind: str, dtype: torch.dtype, wd: float = 0.0):
        self.model, self.lr, self.kind, self.dtype, self.wd = model, lr, kind, dtype, wd
        self.params = list(model.parameters())
        self.table = [[torch.zeros_like(p) for p in self.params] for _ in range(N)]

    def gradient(self, i: int) -> tuple[list[Tensor], list[Tensor]]:
        """The gradient of a sample, and what the table stores for it."""
        x, y = make_data()
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        layers = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        handles = []
        if self.kind != "full":
            for layer in layers:
                handles.append(layer.register_forward_hook(
                    lambda _, a, out: (inputs.append(a[0]), outputs.append(out))[0]
                ))  # fmt: skip
        loss = F.cross_entropy(self.model(x[i : i + 1]), y[i : i + 1])
        for handle in handles:
            handle.remove()
        found = torch.autograd.grad(loss, [*self.params, *outputs])
        exact = [g.detach() for g in found[: len(self.params)]]
        if self.kind == "full":
            return exact, [_round(g.flatten(), self.dtype).view_as(g) for g in exact]
        stored = []
        for a, delta in zip(inputs, found[len(self.params) :], strict=True):
            d = _round(delta[0], self.dtype)
            v = a[0].detach() if self.kind == "scalar" else _round(a[0].detach(), self.dtype)
            stored += [torch.outer(d, v), d]
        return exact, stored

    @torch.no_grad()
    def step(self, index: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            new = [self.gradient(i) for i in index.tolist()]
        estimates = []
        for k, param in enumerate(self.params):
            fresh = torch.stack([exact[k] for exact, _ in new]).mean(0)
            old = torch.stack([self.table[i][k] for i in index.tolist()]).mean(0)
            mean = torch.stack([row[k] for row in self.table]).mean(0)
            estimates.append(fresh - old + mean)
            param.sub_(self.lr * (estimates[-1] + self.wd * param))
        for i, (_, stored) in zip(index.tolist(), new, strict=True):
            self.table[i] = stored
        return estimates

    def mean(self) -> list[Tensor]:
        return [
            torch.stack([row[k] for row in self.table]).mean(0) for k in range(len(self.params))
        ]
