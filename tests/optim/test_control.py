"""What the norm of all gradients decides: clipping, unscaling, skipping; for every class."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from torsh_optim import LAMB, SGD, Adam, AdamW, AdvancedAdam, Lion

KINDS: list[tuple[type[Any], dict[str, Any]]] = [
    (AdamW, {"amsgrad": True}),
    (SGD, {"momentum": 0.9, "dampening": 0.5}),
    (Lion, {}),
    (LAMB, {}),
    (AdvancedAdam, {"cautious": True, "ema_decay": 0.9}),
    (AdvancedAdam, {"adaptive_lr": True, "lr": 1.0}),
]
NAMES = ["adamw", "sgd", "lion", "lamb", "cautious", "adaptive"]
# of numpy, in Triton's interpreter
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
kinds = pytest.mark.parametrize(("kind", "options"), KINDS, ids=NAMES)


def _params() -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(5)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, device="cpu").to(torch.ones(0)))
        for shape in ((32,), (4, 4))
    ]


def _set_grads(params: list[Tensor], factor: float, step: int = 0) -> None:
    for i, param in enumerate(params):
        index = torch.arange(param.numel(), dtype=torch.float32).reshape(param.shape)
        param.grad = factor * torch.cos(index + i + step)


def _snapshot(params: list[Tensor], opt: Any) -> list[Tensor]:
    values = [t for p in params for t in opt.state[p].values()]
    return [t.detach().clone() for t in [*params, *values]]


def _all_equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


@kinds
def test_clips_as_torch_does(kind: Any, options: dict[str, Any], implement: Any) -> None:
    """Over norms above and below the limit; a step without gradients in between."""
    mine, theirs = _params(), _params()
    groups = [[{"params": ps[:1]}, {"params": ps[1:]}] for ps in (mine, theirs)]
    opt = implement(kind)(groups[0], **{"lr": 0.05, **options}, max_grad_norm=1.0)
    plain = kind(groups[1], fused=False, **{"lr": 0.05, **options, "max_grad_norm": None})
    for step, factor in enumerate((3.0, 0.01, 0.0, 50.0)):
        _set_grads(mine, factor, step)
        _set_grads(theirs, factor, step)
        if step == 1:
            mine[1].grad = theirs[1].grad = None
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        opt.step()
        plain.step()
        assert opt.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        assert opt.grad_norm.shape == ()
    assert opt.skipped_steps.item() == 0
    for a, b in zip(mine, theirs, strict=True):
        # as in lockstep.py; torch clips the gradients, which rounds them once more
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@kinds
def test_infinite_limit_measures_and_never_clips(
    kind: Any, options: dict[str, Any], implement: Any
) -> None:
    mine, theirs = _params(), _params()
    opt = implement(kind)(mine, **{"lr": 0.05, **options}, max_grad_norm=math.inf)
    plain = kind(theirs, fused=False, **{"lr": 0.05, **options, "max_grad_norm": None})
    assert opt.grad_norm is None
    for params, each in ((mine, opt), (theirs, plain)):
        _set_grads(params, 100.0)
        each.step()
    wanted = math.sqrt(sum(float(p.grad.double().square().sum()) for p in theirs))
    assert opt.grad_norm.item() == pytest.approx(wanted, rel=1e-6)
    assert plain.grad_norm is None
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "options", "value"),
    [
        *((*kind, math.nan) for kind in KINDS),
        (*KINDS[1], math.inf),
        (*KINDS[1], -math.inf),
    ],
    ids=[*(f"{name}-nan" for name in NAMES), "sgd-inf", "sgd-minus-inf"],
)
def test_step_that_is_not_finite_is_left_out(
    kind: Any, options: dict[str, Any], value: float, implement: Any
) -> None:
    """Nothing changes, neither weights nor states nor step counters; later steps go on."""
    params, twins = _params(), _params()
    opt = implement(kind)(params, **{"lr": 0.05, **options}, max_grad_norm=1.0)
    twin = implement(kind)(twins, **{"lr": 0.05, **options}, max_grad_norm=1.0)
    for step in range(4):
        if step in (0, 2):
            _set_grads(params, 2.0, step)
            params[1].grad[1, 2] = value  # in the first step there is no state yet
            before = _snapshot(params, opt)
            opt.step()
            after = _snapshot(params, opt)
            assert step == 0 or _all_equal(before, after)
            assert not math.isfinite(opt.grad_norm.item())
            assert opt.skipped_steps.item() == (1 if step == 0 else 2)
            assert all(opt.state[p]["step"].item() == step // 2 for p in params)
        else:
            for each, other in ((params, opt), (twins, twin)):
                _set_grads(each, 2.0, step)
                other.step()
    assert _all_equal(_snapshot(params, opt), _snapshot(twins, twin))
    assert twin.skipped_steps.item() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("max_grad_norm", [1.0, math.inf])
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_without_skipping_it_is_torchs_clip(
    kind: Any, max_grad_norm: float, value: float, implement: Any
) -> None:
    mine, theirs = _params(), _params()
    opt = implement(kind)(mine, lr=0.05, max_grad_norm=max_grad_norm, skip_nonfinite=False)
    plain = getattr(torch.optim, kind.__name__)(theirs, lr=0.05)
    for params in (mine, theirs):
        _set_grads(params, 2.0)
        params[1].grad[1, 2] = value
    torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm)
    opt.step()
    plain.step()
    assert opt.skipped_steps.item() == 0
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*updates a parameter:UserWarning")
def test_norm_is_over_all_buckets(implement: Any) -> None:
    """Element types, layouts and implementations that need calls of their own share one norm."""
    holes = torch.ones(4, 6)[:, ::2]
    params = [
        torch.nn.Parameter(torch.ones(9)),
        torch.nn.Parameter(torch.ones(9, dtype=torch.bfloat16)),
        holes.requires_grad_(),
        torch.nn.Parameter(torch.ones(2, dtype=torch.complex64)),
    ]
    opt = implement(SGD)([{"params": [p]} for p in params], lr=1.0, max_grad_norm=1.0)
    params[0].grad = torch.full((9,), 2.0)  # norm 6
    params[1].grad = torch.full((9,), 1.0, dtype=torch.bfloat16)  # 3
    params[2].grad = torch.full((4, 3), 1.0)  # sqrt(12)
    params[3].grad = torch.full((2,), 3 + 4j)  # 5 sqrt(2)
    opt.step()
    norm = math.sqrt(36 + 9 + 12 + 50)
    assert opt.grad_norm.item() == pytest.approx(norm, rel=1e-6)
    torch.testing.assert_close(params[0].detach(), torch.full((9,), 1 - 2 / norm))
    torch.testing.assert_close(params[2].detach(), torch.full((4, 3), 1 - 1 / norm))
    torch.testing.assert_close(params[3].detach(), torch.full((2,), 1 - (3 + 4j) / norm))
    # torch's fused kernel rounds the clipped gradient to bfloat16 too
    wanted = torch.full((9,), 1 - 1 / norm)
    torch.testing.assert_close(params[1].detach().float(), wanted, rtol=2**-7, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_of_16_bit_gradients_is_float32(implement: Any, dtype: torch.dtype) -> None:
    """Neither rounded to three digits nor above the largest float16."""
    param = torch.nn.Parameter(torch.ones(301, dtype=dtype))
    opt = implement(SGD)([param], lr=1.0, max_grad_norm=1.0)
    param.grad = torch.full((301,), 5120.0, dtype=dtype)
    opt.step()
    assert opt.grad_norm.item() == pytest.approx(5120 * math.sqrt(301), rel=1e-6)
    assert opt.skipped_steps.item() == 0


def test_gradients_survive_where_torch_does_not_scale_them() -> None:
    """The loop and the chunked update leave gradients alone; torch's CPU kernel writes them."""
    for opt_of in (
        lambda p: SGD([p], max_grad_norm=1.0, fused=False),
        lambda p: Lion([p], max_grad_norm=1.0),
        lambda p: LAMB([p], bias_correction=False),
    ):
        param = torch.nn.Parameter(torch.ones(4))
        param.grad = torch.full((4,), 8.0)
        opt_of(param).step()
        assert param.grad.tolist() == [8.0] * 4


def test_limit_can_be_changed_between_steps(implement: Any) -> None:
    param = torch.nn.Parameter(torch.zeros(4))
    opt = implement(SGD)([param], lr=1.0)
    moved = []
    for limit in (None, 1.0, 2.0, math.inf, None, 1.0):
        opt.param_groups[0]["max_grad_norm"] = limit
        before = param.detach().clone()
        param.grad = torch.full((4,), 3.0)
        opt.step()
        moved.append((before - param.detach()).norm().item())
    assert moved == pytest.approx([6.0, 1.0, 2.0, 6.0, 6.0, 1.0], rel=1e-5)
    assert opt.state[param]["step"].item() == 6


def test_one_limit_for_all_groups() -> None:
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "max_grad_norm": 2.0}]
    with pytest.raises(ValueError, match=r"max_grad_norm=2.0 in a parameter group, 1.0 in others"):
        AdamW(groups, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"max_grad_norm=nan must be above 0; math.inf measures"):
        AdamW(params, max_grad_norm=math.nan)


def test_copies_count_for_themselves(implement: Any) -> None:
    param = torch.nn.Parameter(torch.ones(4))
    opt = implement(AdamW)([param], max_grad_norm=1.0)
    param.grad = torch.ones(4)
    opt.step()
    other, other_opt = copy.deepcopy((param, opt))
    other.grad = torch.ones(4)
    other_opt.step()
    assert opt.state[param]["step"].item() == 1
    assert other_opt.state[other]["step"].item() == 2
    assert opt.grad_norm.item() == other_opt.grad_norm.item() == 2.0


@kinds
@pytest.mark.parametrize("default", ["meta", torch.float64])
def test_defaults_of_torch_do_not_matter(
    kind: Any, options: dict[str, Any], default: Any, implement: Any
) -> None:
    """The default device and the default type are for the user's tensors."""
    runs = []
    for changed in (False, True):
        params = _params()
        opt = implement(kind)(params, **options, max_grad_norm=1.0)
        for step in range(2):
            _set_grads(params, 2.0, step)
            before = torch.get_default_device(), torch.get_default_dtype()
            if changed and default == "meta":
                torch.set_default_device("meta")
            elif changed:
                torch.set_default_dtype(default)
            try:
                opt.step()
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
                _ = opt.grad_norm, opt.skipped_steps, opt.last_lr(), opt.implementation
            finally:
                torch.set_default_device(before[0])
                torch.set_default_dtype(before[1])
        runs.append(_snapshot(params, opt))
    assert [t.dtype for t in runs[0]] == [t.dtype for t in runs[1]]
    assert _all_equal(*runs)


# --- GradScaler ---


@kinds
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(
    kind: Any,
    options: dict[str, Any],
    max_grad_norm: float | None,
    unscale: bool,
    implement: Any,
) -> None:
    """Both stages of a scaler: it hands its scale over, or has unscaled; a step is not finite."""
    device = torch.ones(0).device.type
    mine, theirs = _params(), _params()
    options = {"lr": 0.05, **options}
    opt = implement(kind)(mine, **{**options, "max_grad_norm": max_grad_norm})
    plain = kind(theirs, fused=False, **{**options, "max_grad_norm": None})
    assert opt._step_supports_amp_scaling == (max_grad_norm is not None)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    for step, factor in enumerate((1.0, math.inf, 0.01)):
        opt.zero_grad()
        loss = sum((p * torch.full_like(p, factor)).sum() for p in mine)
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(opt)
        before = _snapshot(mine, opt)
        scaler.step(opt)
        scaler.update()
        if step == 1:
            assert _all_equal(before, _snapshot(mine, opt))
            continue
        for param in theirs:
            param.grad = torch.full_like(param, factor)
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm or math.inf)
        plain.step()
        if max_grad_norm is not None:
            assert opt.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    assert scaler.get_scale() == 512.0
    assert opt.skipped_steps.item() == (max_grad_norm is not None)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)  # as in test_clips_as_torch_does


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf_is_obeyed_as_by_torchs_fused_step(found: float, implement: Any) -> None:
    """A scaler in its second stage hands over what it has found, and no scale."""
    param = torch.nn.Parameter(torch.ones(5))
    opt = implement(AdamW)([param], max_grad_norm=math.inf)
    param.grad = torch.ones(5)
    opt.grad_scale, opt.found_inf = None, torch.tensor(found)
    opt.step()
    del opt.grad_scale, opt.found_inf
    assert opt.state[param]["step"].item() == 1 - found
    assert (param.detach() == 1).all().item() == bool(found)
    assert opt.skipped_steps.item() == found


def test_found_inf_holds_without_skipping_too(implement: Any) -> None:
    """skip_nonfinite=False lets bad gradients through, not what the scaler forbids."""
    param = torch.nn.Parameter(torch.ones(5))
    opt = implement(AdamW)([param], max_grad_norm=1.0, skip_nonfinite=False)
    param.grad = torch.full((5,), math.inf)
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    opt.step()
    assert param.tolist() == [1.0] * 5


@pytest.mark.gpu
@kinds
def test_steps_with_a_norm_do_not_synchronise(
    kind: Any, options: dict[str, Any], forbid_synchronisation: Any
) -> None:
    params = [torch.nn.Parameter(torch.randn(100 * i + 1, device="cuda")) for i in range(5)]
    opt = kind(params, **options, max_grad_norm=1.0)
    for param in params:
        param.grad = torch.randn_like(param)
    for _ in range(8):
        opt.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with forbid_synchronisation():
        for _ in range(8):
            opt.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
def test_norm_is_the_same_in_each_run() -> None:
    """Sums in a fixed order: no atomics."""
    param = torch.nn.Parameter(torch.randn(3_000_001, device="cuda"))
    param.grad = torch.randn_like(param)
    opt = AdamW([param], max_grad_norm=1.0)
    norms = set()
    for _ in range(10):
        opt.step()
        norms.add(opt.grad_norm.item())
    assert len(norms) == 1
    exact = param.grad.double().norm().item()
    assert norms.pop() == pytest.approx(exact, rel=1e-6)


def test_gradients_are_not_changed(implement: Any) -> None:
    for kind, options in ((AdamW, {}), (SGD, {"momentum": 0.9}), (LAMB, {}), (Lion, {})):
        param = torch.nn.Parameter(torch.ones(5))
        opt = implement(kind)([param], max_grad_norm=0.1, **options)
        grad = torch.full((5,), 3.0, device=param.device)
        param.grad = grad.clone()
        for _ in range(2):
            opt.step()
        assert torch.equal(param.grad, grad), kind
        torch.testing.assert_close(opt.grad_norm, grad.norm())


def test_one_norm_for_all_groups() -> None:
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    opt = SGD([{"params": params[:1]}, {"params": params[1:]}], lr=1.0, max_grad_norm=1.0)
    for param in params:
        param.grad = torch.ones(1)
    opt.step()
    opt.param_groups[0]["max_grad_norm"] = None
    with pytest.raises(ValueError, match=r"max_grad_norm differs between parameter groups: \[None"):
        opt.step()
    saved = opt.state_dict()
    with pytest.raises(ValueError, match="max_grad_norm differs between"):
        SGD([{"params": params[:1]}, {"params": params[1:]}]).load_state_dict(saved)
