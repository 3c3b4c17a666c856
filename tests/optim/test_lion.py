"""Lion against its formula, lion-pytorch, and its implementations against each other."""

from typing import Any

import pytest
import torch

from tests.optim.lockstep import compare_implementations
from tests.optim.recorded import STEPS, peers, set_small_grads, small_params
from torsh_optim import Lion

GROUPS = [
    {"lr": 0.01, "weight_decay": 0.5},
    {"betas": (0.5, 0.8), "maximize": True},
    {"warmup_steps": 3, "betas": (0.0, 0.0)},
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("common", [{}, {"max_grad_norm": 0.5}])
def test_implementations_agree(triton: Any, common: dict[str, Any], device: str) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    opts = compare_implementations(Lion, GROUPS, triton, device=device, lr=0.02, **common)
    assert opts[1].implementation == "cpu-chunked"
    assert len(opts[0]._plan.buckets) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(triton: Any, dtype: torch.dtype) -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    # one step: later, a bit of the momentum that the interpreter has cut off can turn a sign
    compare_implementations(
        Lion, GROUPS[:2], triton, steps=1, dtype=dtype, shapes=((5,), (40,)), lr=0.02,
        tolerance={"rtol": 2**-7, "atol": 2**-9},
    )  # fmt: skip


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("maximize", [False, True])
def test_equals_the_formula(maximize: bool, fused: bool | None) -> None:
    lr, beta1, beta2, decay = 0.02, 0.7, 0.95, 0.3
    param = torch.randn(9, 4, dtype=torch.float64).requires_grad_()
    opt = Lion([param], lr, (beta1, beta2), decay, maximize=maximize, fused=fused)
    p, m = param.detach().clone(), torch.zeros_like(param)
    for _ in range(8):
        param.grad = torch.randn_like(param)
        opt.step()
        g = -param.grad if maximize else param.grad
        p = p - lr * (torch.sign(beta1 * m + (1 - beta1) * g) + decay * p)
        m = beta2 * m + (1 - beta2) * g
    # order of operations
    torch.testing.assert_close(param.detach(), p, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(opt.state[param]["exp_avg"], m, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("fused", [None, False])
def test_equals_lion_pytorch(fused: bool | None) -> None:
    """Numbers of lion-pytorch 0.2.5."""
    params = small_params()
    opt = Lion(params, lr=0.05, betas=(0.8, 0.95), weight_decay=0.1, fused=fused)
    for step in range(STEPS):
        set_small_grads(params, step)
        opt.step()
    found = torch.cat([p.detach().flatten() for p in params])
    theirs = torch.tensor(peers()["lion"], dtype=torch.float64)
    torch.testing.assert_close(found, theirs, rtol=1e-13, atol=1e-14)


def test_zero_gradient_moves_nothing_but_decay(implement: Any) -> None:
    param = torch.nn.Parameter(torch.ones(17))
    opt = implement(Lion)([param], lr=0.1, weight_decay=0.5)
    param.grad = torch.zeros(17)
    opt.step()
    torch.testing.assert_close(param.detach(), torch.full((17,), 0.95))


def test_nan_stays_visible(implement: Any) -> None:
    param = torch.nn.Parameter(torch.ones(17))
    opt = implement(Lion)([param], lr=0.1)
    param.grad = torch.ones(17)
    param.grad[3] = torch.nan
    opt.step()
    seen = [param.detach().isnan(), opt.state[param]["exp_avg"].isnan()]
    assert [found.nonzero().flatten().tolist() for found in seen] == [[3], [3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"Invalid beta parameter at index 1: 1.0; it must be in \[0, 1\)"),
        ({"betas": (0.9,)}, r"betas=\(0.9,\) must be two numbers"),
        ({"betas": 0.9}, r"betas=0.9 must be two numbers"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lion([torch.nn.Parameter(torch.ones(1))], **options)
