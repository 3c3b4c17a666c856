"""Optimizers and small models that the tests of sharded training have in common."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torsh_optim import LAMB, SGD, Adam, AdamW, AdvancedAdam, Lion

# Adam's eps is large so that gradients which differ by the order in which processes add them up
# give updates that do not: lr * 1e-8 / eps.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (AdamW, {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}),
    "adamw-clip": (
        AdamW,
        {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.2, "warmup_steps": 2},
    ),
    "adam-amsgrad": (Adam, {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1, "amsgrad": True}),
    "cautious": (
        AdvancedAdam,
        {
            "lr": 1e-2,
            "eps": 1e-3,
            "weight_decay": 0.1,
            "decay": "absolute",
            "max_grad_norm": 0.2,
            "cautious": True,
            "ema_decay": 0.9,
        },
    ),
    "adaptive": (
        AdvancedAdam,
        {"adaptive_lr": True, "eps": 1e-3, "max_grad_norm": 0.2, "weight_decay": 0.1},
    ),
    "lamb": (LAMB, {"lr": 1e-2, "eps": 1e-3, "max_grad_norm": 0.2}),
    "lamb-chunked": (LAMB, {"lr": 1e-2, "eps": 1e-3, "bias_correction": False}),
    "lion": (Lion, {"lr": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.2}),
    "sgd": (SGD, {"lr": 1e-1, "momentum": 0.9, "nesterov": True, "max_grad_norm": 0.2}),
}
STEPS = 3
KERNELS = [
    pytest.param(False, id="cpu"),
    pytest.param(
        True,
        id="triton",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests run the kernels"),
    ),
]


def model() -> nn.Module:
    """Rows that two processes divide unevenly, and single rows, which leave one with nothing."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))


def one_row() -> nn.Module:
    """All tensors have one row: the second process has nothing at all."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 1))


def even() -> nn.Module:
    """Tensor parallelism divides features evenly only."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))


def batch(step: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(step)
    x = torch.randn(8, 5, generator=made)
    return x, x.sum(1, keepdim=True).tanh() + 0.1 * torch.randn(8, 1, generator=made)


def device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def optimizer_of(net: nn.Module, case: str, *, kernels: bool = False) -> Any:
    """Two groups, so that processes have several sums to agree on."""
    kind, options = CASES[case]
    if kernels:
        kind = type(f"Triton{kind.__name__}", (kind,), {"_implementations": ("triton",)})
    matrices = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    if case == "sgd":
        groups[1]["momentum"] = 0.5
    return kind(groups, **options)


def backward(net: nn.Module, step: int, rank: int, world: int) -> None:
    x, y = (part.chunk(world)[rank].to(next(net.parameters()).device) for part in batch(step))
    (net(x) - y).square().mean().backward()


def sharded(net: nn.Module, mesh: Any = None) -> nn.Module:
    mesh = init_device_mesh(device().type, (dist.get_world_size(),)) if mesh is None else mesh
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights(net: nn.Module) -> Tensor:
    return torch.cat([whole(p.detach()).flatten() for p in net.parameters()])
