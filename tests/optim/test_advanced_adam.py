"""AdvancedAdam: what it adds to Adam, against formulas, torch and prodigyopt."""

import contextlib
import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.optim.lockstep import compare_implementations
from tests.optim.recorded import peers, train_logistic
from torsh_optim import Adam, AdamW, AdvancedAdam

GROUPS = [
    {"cautious": True, "weight_decay": 0.1, "ema_decay": 0.8},
    {"cautious": True, "weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True},
    {"decay": "absolute", "weight_decay": 0.01, "lr": 0.05, "amsgrad": True},
    {"warmup_steps": 3, "ema_decay": 0.5, "amsgrad": True, "betas": (0.5, 0.9)},
]
ADAPTIVE = [
    {"weight_decay": 0.1, "ema_decay": 0.8},
    {"weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True, "amsgrad": True},
    {"lr": 0.0},
]
SMALL = ((5,), (1100,), (0,), ())


def _param(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("common", [{}, {"max_grad_norm": 0.5}])
def test_implementations_agree(triton: Any, common: dict[str, Any], device: str) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    opts = compare_implementations(
        AdvancedAdam, GROUPS, triton, device=device, lr=0.02, shapes=SMALL, steps=4, **common
    )
    assert opts[1].implementation == "cpu-chunked+cpu-fused"
    assert len(opts[0]._plan.buckets) == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("common", [{}, {"max_grad_norm": 0.5, "warmup_steps": 3}])
def test_adaptive_implementations_agree(triton: Any, common: dict[str, Any], device: str) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    opts = compare_implementations(
        AdvancedAdam, ADAPTIVE, triton, device=device, shapes=SMALL, steps=4, adaptive_lr=True,
        **common,
    )  # fmt: skip
    assert len(opts[0]._plan.buckets) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(triton: Any, dtype: torch.dtype) -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    # a unit in the last place for each of three steps: the interpreter cuts bfloat16 off
    compare_implementations(
        AdvancedAdam, GROUPS[2:], triton, steps=3, dtype=dtype, shapes=((5,), (40,)), lr=0.02,
        eps=1e-3, tolerance={"rtol": 3 * 2**-7, "atol": 2**-7},
    )  # fmt: skip


# --- cautious ---


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("coupled", [False, True])
def test_cautious_formula(coupled: bool, fused: bool | None) -> None:
    """The authors' program: https://github.com/kyleliang919/C-Optim."""
    lr, beta1, beta2, eps, decay = 0.05, 0.8, 0.9, 1e-6, 0.1
    param = _param(9, 5)
    opt = AdvancedAdam(
        [param], lr, (beta1, beta2), eps, decay, cautious=True,
        decoupled_weight_decay=not coupled, fused=fused,
    )  # fmt: skip
    p, m, v = param.detach().clone(), torch.zeros(9, 5).double(), torch.zeros(9, 5).double()
    for step in range(1, 9):
        param.grad = torch.randn_like(param)
        opt.step()
        g = param.grad + decay * p if coupled else param.grad
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        mask = (m * g > 0).double()
        mask = mask / mask.mean().clamp(min=1e-3)
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        p = p - lr * update * mask - (0.0 if coupled else lr * decay * p)
        assert 0 < int((mask == 0).sum()) < 45 or step == 1
    torch.testing.assert_close(param.detach(), p, rtol=1e-12, atol=1e-13)


def test_cautious_has_a_least_mean(implement: Any) -> None:
    """One element of 2000 agrees: a mean of 1 / 2000 would make its step twice as long."""
    param = torch.nn.Parameter(torch.zeros(2000))
    opt = implement(AdvancedAdam)([param], lr=1.0, betas=(0.9, 0.9), cautious=True)
    param.grad = torch.ones(2000)
    opt.step()
    before = param.detach().clone()
    param.grad = torch.full((2000,), -0.01)
    param.grad[7] = 1.0
    opt.step()
    moved = (param.detach() - before).cpu()
    # Adam's own step is 1, and is divided by 1e-3
    assert moved[7].item() == pytest.approx(-1000.0, rel=1e-4)
    assert moved[:7].abs().max().item() == 0.0


# --- Prodigy ---


@pytest.mark.parametrize("through", ["default", "reference"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", {"weight_decay": 0.0}),
        ("decoupled", {"weight_decay": 0.1}),
        ("coupled", {"weight_decay": 0.01, "decoupled_weight_decay": False}),
        ("safeguard", {"weight_decay": 0.1, "warmup_steps": 10}),
    ],
)
def test_adaptive_lr_equals_prodigyopt(name: str, options: dict[str, Any], through: str) -> None:
    """Numbers of prodigyopt 1.1.2 on logistic regression over digits.

    The estimate grows from 1e-6 to 0.1 in about twenty steps. ``eps`` is 0, since prodigyopt
    multiplies it by the estimate after the step, and this by the one before it, which all tensors
    know without waiting for each other. The safeguarded warm-up is a scheduler there.
    """
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((61, 10), (10,))]
    fused = False if through == "reference" else None
    opt = AdvancedAdam(weights, adaptive_lr=True, eps=0.0, fused=fused, **options)
    estimates: list[float] = []
    losses = train_logistic(
        weights, opt, 40, lambda: estimates.append(opt.state[weights[1]]["d"].item())
    )
    theirs = peers()["prodigy"][name]
    assert theirs["estimates"][-1] > 1e4 * theirs["estimates"][0]
    # sums over 610 float32 numbers, passed on from estimate to weights to loss forty times
    assert estimates == pytest.approx(theirs["estimates"], rel=1e-4)
    assert losses == pytest.approx(theirs["losses"], rel=2e-3)


def test_adaptive_estimate_is_one_for_all(implement: Any) -> None:
    params = [torch.nn.Parameter(torch.zeros(20)), torch.nn.Parameter(torch.ones(3))]
    opt = implement(AdvancedAdam)(params, adaptive_lr=True)
    assert opt.last_lr() == [1e-6]
    for _ in range(4):
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()
    estimates = {opt.state[param]["d"].item() for param in params}
    assert len(estimates) == 1
    assert estimates.pop() > 1e-6
    assert opt.last_lr() == [opt.state[params[0]]["d"].item()]


def test_adaptive_frozen_group_does_not_count(implement: Any) -> None:
    """A group with learning rate 0 takes no part in the estimate, with warm-up neither."""
    results = []
    for frozen in (False, True):
        params = [torch.nn.Parameter(torch.zeros(20)), torch.nn.Parameter(torch.ones(50))]
        groups: list[dict[str, Any]] = [{"params": params[:1]}]
        if frozen:
            groups.append({"params": params[1:], "lr": 0.0})
        opt = implement(AdvancedAdam)(groups, adaptive_lr=True, warmup_steps=2)
        for _ in range(5):
            for param in params:
                param.grad = torch.ones_like(param)
            opt.step()
        assert params[1].tolist() == [1.0] * 50
        results.append(opt.state[params[0]]["d"].item())
    assert results[0] > 1e-6
    assert results[1] == pytest.approx(results[0], rel=1e-6)


def test_adaptive_step_with_rate_zero_and_no_gradients_changes_nothing(implement: Any) -> None:
    """As torch.distributed.checkpoint takes one to create the state."""
    param = torch.nn.Parameter(torch.ones(20))
    opt = implement(AdvancedAdam)([param], lr=0.0, adaptive_lr=True, warmup_steps=3)
    param.grad = torch.zeros(20)
    opt.step()
    assert param.tolist() == [1.0] * 20
    assert opt.state[param]["d"].item() == pytest.approx(1e-6)
    assert opt.state[param]["d_numerator"].item() == 0.0


def test_adaptive_state_resumes_exactly(implement: Any) -> None:
    def problem() -> tuple[Tensor, Any]:
        param = torch.nn.Parameter(torch.linspace(-1, 1, 40))
        return param, implement(AdvancedAdam)([param], adaptive_lr=True, ema_decay=0.9)

    def steps(param: Tensor, opt: Any, count: int) -> None:
        for _ in range(count):
            param.grad = 2 * param.detach() + 1
            opt.step()

    param, opt = problem()
    steps(param, opt, 6)
    state, weights = copy.deepcopy(opt.state_dict()), param.detach().clone()
    steps(param, opt, 6)
    other, fresh = problem()
    other.data.copy_(weights)
    fresh.load_state_dict(state)
    steps(other, fresh, 6)
    assert torch.equal(param, other)
    for key, value in opt.state[param].items():
        assert torch.equal(fresh.state[other][key], value), key


def test_adaptive_refuses() -> None:
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"estimates one step size, but the groups have lr \[0.5,"):
        AdvancedAdam([{"params": params[:1], "lr": 0.5}, {"params": params[1:]}], adaptive_lr=True)
    opt = AdvancedAdam(params[:1], adaptive_lr=True)
    with pytest.raises(ValueError, match="estimates one step size"):
        opt.add_param_group({"params": params[1:], "lr": 0.5})
    assert len(opt.param_groups) == 1
    with pytest.warns(UserWarning, match=r"lr=0.001 makes them smaller still; lr=1.0 is meant"):
        AdvancedAdam(params, lr=1e-3, adaptive_lr=True)
    with pytest.raises(ValueError, match="adaptive_lr and cautious cannot be used together"):
        AdvancedAdam(params, adaptive_lr=True, cautious=True)
    with pytest.raises(ValueError, match="adaptive_lr=True in a parameter group, False in others"):
        AdvancedAdam([{"params": params[:1]}, {"params": params[1:], "adaptive_lr": True}], lr=1.0)
    for dtype in (torch.float16, torch.bfloat16):
        half = torch.nn.Parameter(torch.ones(1, dtype=dtype))
        half.grad = torch.ones_like(half)
        with pytest.raises(
            RuntimeError, match=r"takes float32 parameters.* would round to nothing"
        ):
            AdvancedAdam([half], adaptive_lr=True).step()


# --- averages, decay, warm-up ---


def test_ema_of_16_bit_weights_moves() -> None:
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    opt = AdvancedAdam([weight], lr=0.0, ema_decay=0.999)
    weight.grad = torch.zeros_like(weight)
    opt.step()
    with torch.no_grad():
        weight.fill_(2.0)
    for _ in range(1000):
        opt.step()
    ema = opt.state[weight]["ema"]
    assert ema.dtype == torch.float32
    torch.testing.assert_close(ema, torch.full((3,), 2.0 - 0.999**1000), rtol=1e-4, atol=0)


def test_ema_weights_come_and_go() -> None:
    first, still = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    opt = AdvancedAdam([first, still], lr=1.0, ema_decay=0.5)
    nothing = opt.ema_weights()
    with pytest.raises(RuntimeError, match="no parameter has an average yet; set ema_decay"):
        nothing.__enter__()
    first.grad = -torch.ones(2)
    opt.step()
    with contextlib.suppress(KeyError), opt.ema_weights():  # they come back after an error, too
        torch.testing.assert_close(first.detach(), torch.full((2,), 0.5))
        raise KeyError
    torch.testing.assert_close(first.detach(), torch.ones(2))
    assert torch.equal(still, torch.zeros(2))


@pytest.mark.parametrize("cautious", [False, True])
def test_ema_equals_torchs_averaged_model(cautious: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    average.update_parameters(model)  # the first call copies: both begin as the weights
    opt = AdvancedAdam(model.parameters(), lr=0.05, ema_decay=0.9, cautious=cautious)
    for _ in range(7):
        opt.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        opt.step()
        average.update_parameters(model)
    for param, kept in zip(model.parameters(), average.module.parameters(), strict=True):
        torch.testing.assert_close(opt.state[param]["ema"], kept.detach())


@pytest.mark.parametrize("option", ["amsgrad", "ema_decay"])
def test_option_switched_off_leaves_its_state(implement: Any, option: str) -> None:
    """What is off has no effect, and its state waits as it was."""
    key, on, off = {
        "amsgrad": ("max_exp_avg_sq", True, False),
        "ema_decay": ("ema", 0.5, None),
    }[option]
    params = [torch.nn.Parameter(torch.ones(20)) for _ in range(2)]
    opt = implement(AdvancedAdam)([params[0]], lr=0.1, **{option: on})
    plain = implement(AdvancedAdam)([params[1]], lr=0.1)
    for step in range(4):
        if step == 1:  # the first step is the same with and without
            opt.param_groups[0][option] = off
            kept = opt.state[params[0]][key].clone()
        for param in params:
            param.grad = torch.full((20,), 1.0 if step == 0 else 0.01)
        opt.step()
        plain.step()
    assert torch.equal(*params)
    assert torch.equal(opt.state[params[0]][key], kept)


def test_absolute_decay_follows_the_schedule_not_the_rate(implement: Any) -> None:
    """Zero gradients: only the decay moves, by 0.1 times the rate as a part of the first."""
    params = [torch.nn.Parameter(torch.ones(20)) for _ in range(2)]
    groups = [{"params": params[:1], "lr": 1e-3}, {"params": params[1:], "lr": 0.5}]
    opt = implement(AdvancedAdam)(groups, decay="absolute", weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 / (1 + step))
    for _ in range(4):
        for param in params:
            param.grad = torch.zeros(20)
        opt.step()
        scheduler.step()
    expected = math.prod(1 - 0.1 / (1 + step) for step in range(4))
    for param in params:
        torch.testing.assert_close(param.detach(), torch.full((20,), expected))


def test_absolute_decay_is_resumed_with_its_first_rate() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    opt = AdvancedAdam([param], lr=0.5, decay="absolute", weight_decay=0.1)
    opt.param_groups[0]["lr"] = 0.25
    other = torch.nn.Parameter(torch.ones(3))
    resumed = AdvancedAdam([other], lr=0.01, decay="absolute", weight_decay=0.1)
    resumed.load_state_dict(opt.state_dict())
    other.grad = torch.zeros(3)
    resumed.step()
    torch.testing.assert_close(other.detach(), torch.full((3,), 0.95))


@pytest.mark.parametrize(
    "schedule",
    [
        lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.9**step),
        lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 12),  # computes from the last
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(
            opt, 0.1, total_steps=12, cycle_momentum=False
        ),
        lambda opt: torch.optim.lr_scheduler.SequentialLR(
            opt,
            [
                torch.optim.lr_scheduler.ConstantLR(opt, 0.5),
                torch.optim.lr_scheduler.ExponentialLR(opt, 0.9),
            ],
            [3],
        ),
    ],
)
def test_warmup_times_schedule(schedule: Any) -> None:
    """Steps and rates are those of a plain optimizer with the same schedule, times the ramp."""
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    warm = AdvancedAdam([params[0]], lr=0.2, warmup_steps=5)
    plain = AdvancedAdam([params[1]], lr=0.2)
    schedulers = [schedule(warm), schedule(plain)]
    for step in range(10):
        before = params[0].detach().clone()
        expected = min(1.0, (step + 1) / 5) * plain.param_groups[0]["lr"]
        assert warm.param_groups[0]["lr"] == plain.param_groups[0]["lr"]  # no scheduler sees it
        for param, opt, scheduler in zip(params, (warm, plain), schedulers, strict=True):
            param.grad = torch.ones(3)
            opt.step()
            scheduler.step()
        # a constant gradient makes each step of Adam as long as the rate; float32 sums
        moved = (before - params[0].detach()).tolist()
        assert moved == pytest.approx([expected] * 3, rel=1e-4, abs=1e-6)


def test_last_lr_is_after_warmup() -> None:
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    opt = AdvancedAdam(
        [{"params": params[:1]}, {"params": params[1:], "warmup_steps": 2}], lr=1.0, warmup_steps=4
    )
    seen = [opt.last_lr()]
    for _ in range(3):
        for param in params:
            param.grad = torch.ones(3)
        opt.step()
        seen.append(opt.last_lr())
    assert seen == [[0.25, 0.5], [0.25, 0.5], [0.5, 1.0], [0.75, 1.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "lr2"}, "decay='lr2' must be 'lr' or 'absolute'"),
        ({"decay": "absolute", "decoupled_weight_decay": False}, "needs decoupled_weight_decay"),
        ({"decay": "absolute", "lr": 0.0}, "begin with a rate above 0"),
        ({"ema_decay": 1.0}, r"ema_decay=1.0 must be in \(0, 1\), or None"),
        ({"eps": math.nan}, "Invalid epsilon value: nan"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be an integer of at least 0"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdvancedAdam([torch.nn.Parameter(torch.ones(1))], **options)


def test_defaults_are_those_of_adam_and_adamw() -> None:
    """Without its options the three are one."""
    results = []
    for kind, options in (
        (AdvancedAdam, {"weight_decay": 0.1}),
        (AdamW, {"weight_decay": 0.1}),
        (Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ):
        param = torch.nn.Parameter(torch.ones(9))
        opt = kind([param], **options)
        for _ in range(3):
            param.grad = torch.linspace(-1, 1, 9)
            opt.step()
        results.append(param.detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
