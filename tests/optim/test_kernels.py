"""The kernel against the reference, and what it compiles to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torsh_optim import AdamW

SHAPES = [(1,), (15,), (16,), (17,), (1023,), (1024,), (1025,), (0,), (), (3, 4, 5, 2), (40, 33)]
# Kernel and reference round each operation in another order; over ten steps of size lr that stays
# within a few float32 units of weights of size one.
FLOAT32 = {"rtol": 1e-6, "atol": 2e-7}
# Up to a unit of bfloat16 (2**-7) in each of three steps: Triton's interpreter, unlike the device,
# cuts bits off instead of rounding. Steps are as large as the weights, so errors would show.
BFLOAT16 = {"rtol": 3 * 2**-7, "atol": 2**-11}
BFLOAT16_MOMENTS = {"rtol": 3 * 2**-7, "atol": 2**-8}  # of gradients of size one, with cancellation


def _groups(tensors: list[Tensor]) -> list[dict[str, object]]:
    return [
        {"params": tensors[:4], "lr": 0.01},
        {"params": tensors[4:8], "weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-6},
        {"params": tensors[8:], "maximize": True},
    ]


def _train(opts: list[torch.optim.Optimizer], copies: list[list[Tensor]], steps: int = 10) -> None:
    for step in range(steps):
        for versions in zip(*copies, strict=True):
            grad = torch.randn(versions[0].shape) / (1 + step)
            for tensor in versions:
                tensor.grad = grad.to(tensor.dtype, copy=True).to(tensor.device)
        for opt in opts:
            opt.step()


def _copies(tensors: list[Tensor], count: int, device: str = "cpu") -> list[list[Tensor]]:
    return [[torch.nn.Parameter(t.to(device, copy=True)) for t in tensors] for _ in range(count)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_reference(
    triton_adamw: type[AdamW], dtype: torch.dtype, amsgrad: bool, device: str
) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    scale = 1.0 if dtype == torch.float32 else 0.01
    mine, theirs = _copies([(scale * torch.randn(s)).to(dtype) for s in SHAPES], 2, device)
    ours = triton_adamw(_groups(mine), amsgrad=amsgrad, eps=1e-6)
    reference = AdamW(_groups(theirs), amsgrad=amsgrad, eps=1e-6, fused=False)
    assert (ours.implementation, reference.implementation) == ("triton", "reference")
    _train([ours, reference], [mine, theirs], steps=10 if dtype == torch.float32 else 3)
    is_float32 = dtype == torch.float32
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **(FLOAT32 if is_float32 else BFLOAT16))
        for key, value in reference.state[b].items():
            tolerance = FLOAT32 if is_float32 else BFLOAT16_MOMENTS
            torch.testing.assert_close(ours.state[a][key], value, **tolerance)


def test_equals_torchs_fused_kernel(triton_adamw: type[AdamW]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mine, theirs = _copies([torch.randn(s) for s in SHAPES], 2, device)
    ours = triton_adamw(_groups(mine))
    torchs = torch.optim.AdamW(_groups(theirs), fused=True)
    _train([ours, torchs], [mine, theirs])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **FLOAT32)


@pytest.mark.parametrize("which", ["param", "grad", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("size", [5, 16, 1024, 1300])
def test_unaligned_views(triton_adamw: type[AdamW], which: str, size: int) -> None:
    """An address that is not a multiple of 16 bytes takes the path of single elements."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def shifted(tensor: Tensor) -> Tensor:
        view = torch.empty(size + 1, device=device)[1:]
        assert view.data_ptr() % 16
        return view.copy_(tensor)

    start, grad = torch.randn(2, size, device=device)
    mine = torch.nn.Parameter(shifted(start) if which == "param" else start.clone())
    theirs = torch.nn.Parameter(start.clone())
    ours, reference = triton_adamw([mine]), AdamW([theirs], fused=False)
    for opt, param in ((ours, mine), (reference, theirs)):
        param.grad = grad.clone()
        opt.step()
    if which == "grad":
        mine.grad = shifted(grad)
    elif which != "param":
        ours.state[mine][which] = shifted(ours.state[mine][which])
    ours.step()
    reference.step()
    torch.testing.assert_close(mine, theirs, **FLOAT32)
    for key, value in reference.state[theirs].items():
        torch.testing.assert_close(ours.state[mine][key], value, **FLOAT32)


def test_float32_moments_of_bfloat16_weights(triton_adamw: type[AdamW]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mine, theirs = _copies([0.01 * torch.randn(37).bfloat16()], 2, device)
    ours, reference = triton_adamw(mine, lr=0.01), AdamW(theirs, lr=0.01, fused=False)
    state = {
        "state": {
            0: {"step": torch.tensor(4.0), "exp_avg": torch.randn(37), "exp_avg_sq": torch.rand(37)}
        },
        "param_groups": ours.state_dict()["param_groups"],
    }
    for opt in (ours, reference):
        opt.load_state_dict(state)
    _train([ours, reference], [mine, theirs], steps=3)
    assert ours.state[mine[0]]["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(mine[0], theirs[0], **BFLOAT16)
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(
            ours.state[mine[0]][key], reference.state[theirs[0]][key], **FLOAT32
        )


def test_nan_stays_visible(triton_adamw: type[AdamW]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    param = torch.nn.Parameter(torch.zeros(32, device=device))
    opt = triton_adamw([param], amsgrad=True)
    param.grad = torch.ones(32, device=device)
    param.grad[3] = torch.nan
    opt.step()
    for tensor in (param, *(opt.state[param][k] for k in ("exp_avg_sq", "max_exp_avg_sq"))):
        assert tensor.isnan().nonzero().tolist() == [[3]]


def test_compiles_to_wide_accesses_without_spills() -> None:
    """Every array is read and written 16 bytes at a time; checked without a GPU, for sm_90."""
    pytest.importorskip("triton")
    program = Path(__file__).with_name("compile_kernels.py")
    source = program.parents[2] / "torsh_optim" / "src"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(source), env.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(program)], env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    kinds = json.loads(run.stdout.splitlines()[-1])
    assert len(kinds) == 32
    for kind in kinds:
        assert kind["loads"] == kind["expected_loads"] > 0, kind
        assert kind["stores"] == kind["expected_stores"], kind
        assert kind["spills"] == [0, 0], kind
