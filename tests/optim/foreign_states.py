"""Runs of torch.optim, and their states in the layouts of packages that need a GPU."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STATES = Path(__file__).parent / "states"
OPTIONS: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
# Rounding of a few float32 steps in another order of operations
CLOSE = {"rtol": 2e-6, "atol": 1e-6}


def some_params() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 5), (7,), ())
    ]


def train(
    params: list[torch.nn.Parameter], opt: torch.optim.Optimizer, count: int, seed: int = 0
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        opt.step()


def copies(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def assert_equal(params: list[torch.nn.Parameter], expected: list[Any]) -> None:
    for mine, theirs in zip(params, expected, strict=True):
        torch.testing.assert_close(mine.detach(), theirs.detach(), **CLOSE)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [t for x in items if isinstance(x, Tensor | dict | list | tuple) for t in tensors(x)]


def shares_memory(left: Any, right: Any) -> bool:
    mine = {t.untyped_storage().data_ptr() for t in tensors(left) if t.numel()}
    return bool(mine & {t.untyped_storage().data_ptr() for t in tensors(right) if t.numel()})


def as_apex(opt: torch.optim.Optimizer, step: Any) -> dict[str, Any]:
    """The layout of apex and TransformerEngine: the step in the group, few options."""
    state = copy.deepcopy(opt.state_dict())
    for values in state["state"].values():
        del values["step"]
    keys = ("lr", "betas", "eps", "weight_decay", "params")
    state["param_groups"] = [
        {**{k: g[k] for k in keys}, "bias_correction": True, "step": step}
        for g in state["param_groups"]
    ]
    return state


class Holder:
    """An optimizer object with what apex and DeepSpeed keep outside of the groups."""

    def __init__(self, state: dict[str, Any], **attributes: Any) -> None:
        self._state = state
        self.__dict__.update(attributes)

    def state_dict(self) -> dict[str, Any]:
        return self._state
