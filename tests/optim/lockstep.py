"""Runs one problem through all implementations of an optimizer, and compares them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# sizes on both sides of a kernel's block of 1024 and of a vector of 16; none; a single number
SHAPES = ((5,), (1500,), (0,), (), (8, 4), (16,))
# The order of operations differs: a few units in the last place of weights of size one, added up.
FLOAT32 = {"rtol": 2e-6, "atol": 1e-6}


def compare_implementations(
    kind: type[Any],
    groups: list[dict[str, Any]],
    triton: Callable[[type[Any]], type[Any]],
    *,
    steps: int = 5,
    dtype: torch.dtype = torch.float32,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    device: str = "cpu",
    tolerance: dict[str, float] = FLOAT32,
    **common: Any,
) -> list[Any]:
    """Step kernel, default and loop with the same gradients, some of them missing.

    Args:
        kind: Class of the optimizer.
        groups: Options of each group; each group gets parameters of all shapes.
        triton: Gives the class through its kernels.
        steps: Number of steps.
        dtype: Element type of parameters and gradients.
        shapes: Of the parameters of each group.
        device: Of the kernel's parameters; the others stay on the CPU.
        tolerance: For parameters and states.
        common: Options of all groups.

    Returns:
        The optimizers: kernel, default, loop.
    """
    generator = torch.Generator().manual_seed(3)

    def numbers(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    first = [numbers(shape) for _ in groups for shape in shapes]
    copies = [
        [torch.nn.Parameter(t.to(d, copy=True)) for t in first] for d in (device, "cpu", "cpu")
    ]
    parts = [slice(i * len(shapes), (i + 1) * len(shapes)) for i in range(len(groups))]
    opts = [
        make([{**g, "params": mine[part]} for g, part in zip(groups, parts, strict=True)], **common)
        for make, mine in zip(
            (triton(kind), kind, lambda *args, **kw: kind(*args, fused=False, **kw)),
            copies,
            strict=True,
        )
    ]
    for step in range(steps):
        for i, tensors in enumerate(zip(*copies, strict=True)):
            grad = numbers(first[i].shape) * (1 + step) / 2
            missing = step in (1, 2) and i % len(shapes) == 1
            for tensor in tensors:
                tensor.grad = None if missing else grad.to(tensor.device, copy=True)
        for opt in opts:
            opt.step()
    assert [opts[0].implementation, opts[2].implementation] == ["triton", "reference"]
    assert opts[1].implementation != "reference"
    for opt, mine in zip(opts[:2], copies[:2], strict=True):
        for tensor, exact in zip(mine, copies[2], strict=True):
            label = f"{opt.implementation} {tuple(exact.shape)}: "
            _close(tensor, exact, tolerance, f"{label}parameter")
            state, wanted = opt.state[tensor], opts[2].state[exact]
            assert state.keys() == wanted.keys()
            for key, value in wanted.items():
                assert state[key].dtype == value.dtype
                _close(state[key], value, tolerance, label + key)
    return opts


def _close(mine: Tensor, exact: Tensor, tolerance: dict[str, float], what: str) -> None:
    torch.testing.assert_close(
        mine.detach().cpu(), exact.detach(), **tolerance, msg=lambda text: f"{what}: {text}"
    )
