"""SGD against torch's, and its implementations against each other."""

import copy
import itertools
from typing import Any

import pytest
import torch

from tests.optim.lockstep import FLOAT32, compare_implementations
from torsh_optim import SGD

GROUPS = [
    {"lr": 0.1},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"momentum": 0.5, "nesterov": True, "maximize": True},
    {"weight_decay": 0.2, "maximize": True, "warmup_steps": 3},
]
TORCH = [
    {"momentum": momentum, "dampening": dampening, "weight_decay": decay, "nesterov": nesterov}
    for momentum, dampening, decay, nesterov in itertools.product(
        (0.0, 0.9), (0.0, 0.4), (0.0, 0.1), (False, True)
    )
    if not nesterov or (momentum and not dampening)
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("common", [{}, {"max_grad_norm": 0.5}])
def test_implementations_agree(triton: Any, common: dict[str, Any], device: str) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    opts = compare_implementations(SGD, GROUPS, triton, device=device, lr=0.05, **common)
    assert opts[1].implementation == "cpu-fused"
    # one bucket for all groups, with and without momentum, coupled decay or warm-up
    assert len(opts[0]._plan.buckets) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(triton: Any, dtype: torch.dtype) -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    # a unit in the last place for each of three steps: the interpreter cuts bfloat16 off, and
    # torch's fused kernel rounds the momentum once more
    tolerance = {"rtol": 3 * 2**-7, "atol": 2**-7}
    groups = GROUPS[:2]
    compare_implementations(
        SGD, groups, triton, steps=3, dtype=dtype, shapes=((5,), (40,)), lr=0.05,
        tolerance=tolerance,
    )  # fmt: skip


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("fused", [None, False])
def test_equals_torch_in_double(fused: bool | None, maximize: bool) -> None:
    for options in TORCH:
        mine = torch.randn(7, 5, dtype=torch.float64).requires_grad_()
        theirs = mine.detach().clone().requires_grad_()
        ours = SGD([mine], lr=0.03, fused=fused, maximize=maximize, **options)
        torchs = torch.optim.SGD([theirs], lr=0.03, foreach=False, maximize=maximize, **options)
        for _ in range(6):
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad.clone()
            ours.step()
            torchs.step()
        # the same formula in another order of operations
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-14, msg=str(options))
        if options["momentum"]:
            torch.testing.assert_close(
                ours.state[mine]["momentum_buffer"],
                torchs.state[theirs]["momentum_buffer"],
                rtol=1e-13,
                atol=1e-14,
            )


def test_first_step_is_not_dampened_whenever_it_comes(implement: Any) -> None:
    """A parameter whose first gradient comes late starts its momentum with all of it."""
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    opt = implement(SGD)(params, lr=1.0, momentum=0.5, dampening=0.5)
    params[0].grad = torch.ones(3)
    opt.step()
    params[1].grad = torch.ones(3)
    opt.step()
    # 1, then 0.5 * 1 + 0.5; and 1 for the late one
    assert [p[0].item() for p in params] == [-2.0, -1.0]


def test_torchs_states_load_both_ways() -> None:
    """torch counts no steps, so a loaded momentum means that the first step is over."""
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    params = [torch.nn.Parameter(torch.arange(4.0)) for _ in range(3)]
    kinds = [torch.optim.SGD, SGD, torch.optim.SGD]
    opts = [kind([p], **options) for kind, p in zip(kinds, params, strict=True)]
    for step in range(6):
        for other in (1, 2):  # torch -> ours -> torch
            if step == 2 * other:
                state = copy.deepcopy(opts[other - 1].state_dict())  # torch shares the tensors
                opts[other].load_state_dict(state)
                params[other].data.copy_(params[other - 1])
        for param, opt in zip(params, opts, strict=True):
            param.grad = torch.cos(torch.arange(4.0) + step)
            opt.step()
    for param in params[1:]:
        torch.testing.assert_close(param, params[0], **FLOAT32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": -0.5}, "Invalid momentum value: -0.5; it must be at least 0"),
        ({"nesterov": True}, r"requires a momentum and zero dampening, got momentum=0.0"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "dampening=0.1"),
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
        ({"foreach": True}, "foreach=True is not supported by SGD"),
        ({"differentiable": True}, "differentiable=True is not supported by SGD"),
        ({"warmup_steps": 1.5}, r"warmup_steps=1.5 must be an integer"),
        ({"warmup_steps": True}, r"warmup_steps=True must be an integer"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm=0.0 must be above 0"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SGD([torch.nn.Parameter(torch.ones(1))], **options)


def test_momentum_switched_on_and_off(implement: Any) -> None:
    param = torch.nn.Parameter(torch.zeros(20))
    opt = implement(SGD)([param], lr=1.0)
    for momentum in (0.0, 0.5, 0.5, 0.0):
        opt.param_groups[0]["momentum"] = momentum
        param.grad = torch.ones(20)
        opt.step()
    # 1, then 0.5 * 0 + 1, then 0.5 * 1 + 1, then 1
    assert param[0].item() == -4.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_momentum_on_the_cpu(dtype: torch.dtype) -> None:
    """torch 2.11's fused kernel leaves garbage in it, from 16 elements on."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.rand(100, generator=generator).to(dtype))
    opt = SGD([weight], lr=1e-3, momentum=0.9)
    expected = torch.zeros(100, dtype=torch.float64)
    for _ in range(10):
        weight.grad = torch.randn(100, generator=generator).to(dtype)
        expected = 0.9 * expected + weight.grad.double()
        opt.step()
    momentum = opt.state[weight]["momentum_buffer"].double()
    # a rounding of numbers of size 8 in each step
    assert (momentum - expected).abs().max() < 10 * 8 * torch.finfo(dtype).eps / 2
