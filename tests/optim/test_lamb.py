"""LAMB against its formula, timm's and kozistr's, and its implementations against each other."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.optim.lockstep import SHAPES, compare_implementations
from tests.optim.recorded import STEPS, peers, set_small_grads, small_params
from torsh_optim import LAMB

GROUPS = [
    {"weight_decay": 0.1},
    {"weight_decay": 0.0, "betas": (0.5, 0.9), "bias_correction": False},
    {"weight_decay": 0.0, "always_adapt": True, "maximize": True, "trust_clip": 0.5},
    {"grad_averaging": False, "warmup_steps": 3, "eps": 1e-3},
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_implementations_agree(triton: Any, max_grad_norm: float | None, device: str) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    # one tensor with more partial sums than one pass of the reducing kernel takes would be slow
    # here; it is tested on a GPU
    shapes = ((5,), (1500,), (0,), (), (8, 4))
    if device == "cuda":
        shapes = (*SHAPES, (1_100_003,))
    opts = compare_implementations(
        LAMB, GROUPS, triton, device=device, lr=0.02, shapes=shapes, max_grad_norm=max_grad_norm
    )
    assert opts[1].implementation == "cpu-chunked+cpu-fused"
    assert len(opts[0]._plan.buckets) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(triton: Any, dtype: torch.dtype) -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    # a unit in the last place for each of two steps: the interpreter cuts bfloat16 off; clipped
    # gradients would give second moments that vanish in float16
    compare_implementations(
        LAMB, GROUPS[:2], triton, steps=2, dtype=dtype, shapes=((5,), (40,)), lr=0.02, eps=1e-3,
        max_grad_norm=None, tolerance={"rtol": 2 * 2**-7, "atol": 2**-8},
    )  # fmt: skip


def _lamb(params: list[Tensor], states: list[tuple[Tensor, Tensor]], step: int, **o: Any) -> None:
    """Algorithm 2 of the paper, after a clip of the whole gradient, in float64."""
    grads = [p.grad for p in params]
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
    clip = min(1.0, o["max_grad_norm"] / norm) if o["max_grad_norm"] and norm else 1.0
    beta1, beta2 = o["betas"]
    for p, g, (m, v) in zip(params, grads, states, strict=True):
        g = g * clip
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g**2)
        r = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + o["eps"])
        u = r + o["weight_decay"] * p.detach()
        p_norm, u_norm = float(p.detach().norm()), float(u.norm())
        trust = p_norm / u_norm if p_norm > 0 and u_norm > 0 else 1.0
        if o["weight_decay"] == 0.0 and not o["always_adapt"]:
            trust = 1.0
        trust = min(trust, o["trust_clip"] or math.inf)
        p.data.sub_(o["lr"] * trust * u)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_decay": 0.0},
        {"weight_decay": 0.0, "always_adapt": True},
        {"trust_clip": 0.7, "max_grad_norm": None},
        {"max_grad_norm": 100.0},
    ],
    ids=str,
)
def test_equals_the_formula(changes: dict[str, Any], fused: bool | None) -> None:
    options: dict[str, Any] = {
        "lr": 0.03, "betas": (0.7, 0.9), "eps": 1e-6, "weight_decay": 0.2, "max_grad_norm": 1.0,
        "trust_clip": None, "always_adapt": False, **changes,
    }  # fmt: skip
    mine, exact = small_params(), small_params()
    opt = LAMB(mine, **options, fused=fused)
    states = [(torch.zeros_like(p), torch.zeros_like(p)) for p in exact]
    for step in range(STEPS):
        for params in (mine, exact):
            set_small_grads(params, step)
        opt.step()
        _lamb(exact, states, step + 1, **options)
    # the clip divides by the norm + 1e-6, as torch's does, and its factor is kept as float32
    tolerance = 2e-6 if options["max_grad_norm"] == 1.0 else 1e-12
    for p, e in zip(mine, exact, strict=True):
        torch.testing.assert_close(p, e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("default", {}),
        ("no_decay", {"weight_decay": 0.0}),
        ("always_adapt", {"weight_decay": 0.0, "always_adapt": True}),
        ("trust_clip", {"trust_clip": 1.0, "max_grad_norm": None, "weight_decay": 0.1}),
        ("raw", {"bias_correction": False, "grad_averaging": False, "max_grad_norm": None}),
    ],
)
def test_equals_timm(name: str, options: dict[str, Any]) -> None:
    """Numbers of timm 1.0.31, whose LAMB follows NVIDIA's; its trust_clip=True means 1."""
    params = small_params()
    opt = LAMB(params, lr=0.05, betas=(0.8, 0.95), **options)
    for step in range(STEPS):
        set_small_grads(params, step)
        opt.step()
    found = torch.cat([p.detach().flatten() for p in params])
    theirs = torch.tensor(peers()["timm_lamb"][name], dtype=torch.float64)
    # as in test_equals_the_formula: the clip
    tolerance = 1e-12 if "max_grad_norm" in options else 1e-7
    torch.testing.assert_close(found, theirs, rtol=tolerance, atol=tolerance)


def test_equals_pytorch_optimizer() -> None:
    """Numbers of pytorch-optimizer 4.1.0, without its bias correction of the first moment.

    It always adapts and adds 1e-6 to the norm of the update; its limit of 10 on the norm of the
    weights is not reached.
    """
    params = small_params()
    opt = LAMB(
        params, lr=0.05, betas=(0.8, 0.95), weight_decay=0.1, bias_correction=False,
        max_grad_norm=None,
    )  # fmt: skip
    for step in range(STEPS):
        set_small_grads(params, step)
        opt.step()
    found = torch.cat([p.detach().flatten() for p in params])
    theirs = torch.tensor(peers()["pytorch_optimizer_lamb"], dtype=torch.float64)
    torch.testing.assert_close(found, theirs, rtol=1e-6, atol=1e-6)


def test_norm_of_zero_means_no_adaptation(implement: Any) -> None:
    """Zero weights take the step of Adam; zero weights and gradients none."""
    params = [torch.nn.Parameter(torch.zeros(20)), torch.nn.Parameter(torch.zeros(20))]
    params.append(torch.nn.Parameter(torch.full((4,), 2.0)))
    opt = implement(LAMB)(params, lr=0.1, weight_decay=0.5, max_grad_norm=None)
    params[0].grad = torch.full((20,), 3.0)
    params[1].grad, params[2].grad = torch.zeros(20), torch.zeros(4)
    opt.step()
    torch.testing.assert_close(params[0].detach(), torch.full((20,), -0.1))
    assert params[1].tolist() == [0.0] * 20
    # the update is the decay alone, 0.5 * 2, so the ratio is 2: the weights shrink by lr
    torch.testing.assert_close(params[2].detach(), torch.full((4,), 1.8))


def test_trust_clip_holds_without_a_ratio_too(implement: Any) -> None:
    """As in timm: where the norms give no ratio it is 1, and then limited like any other."""
    params = [torch.nn.Parameter(torch.zeros(20)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}]
    opt = implement(LAMB)(groups, lr=0.1, trust_clip=0.5, max_grad_norm=None)
    for param in params:
        param.grad = torch.ones(20)
    opt.step()
    torch.testing.assert_close(params[0].detach(), torch.full((20,), -0.05))
    torch.testing.assert_close(params[1].detach(), torch.full((20,), -0.1))  # does not adapt


def test_clips_by_default() -> None:
    """Adam hardly sees the size of gradients, so it shows in the moments."""
    param = torch.nn.Parameter(torch.ones(4))
    opt = LAMB([param])
    param.grad = torch.full((4,), 50.0)
    opt.step()
    assert opt.grad_norm is not None
    assert opt.grad_norm.item() == 100.0
    torch.testing.assert_close(opt.state[param]["exp_avg"], torch.full((4,), 0.05))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_clip": 0.0}, "trust_clip=0.0 must be above 0, or None"),
        ({"eps": -1.0}, "Invalid epsilon value: -1.0"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0 must be above 0"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAMB([torch.nn.Parameter(torch.ones(1))], **options)
