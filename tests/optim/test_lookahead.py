"""Lookahead over any optimizer."""

import copy
import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from torsh_optim import SAGA, AdamW, Lookahead


def _run(opt: torch.optim.Optimizer, params: list[Tensor], steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        opt.step()


def _params(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes or ((3, 2), (4,))]


def test_five_unit_steps_go_half_the_way() -> None:
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = Lookahead(torch.optim.SGD([param], lr=1.0), k=5, alpha=0.5)
    path = []
    for _ in range(10):
        param.grad = -torch.ones_like(param)
        opt.step()
        path.append(param.item())
    assert path == [1, 2, 3, 4, 2.5, 3.5, 4.5, 5.5, 6.5, 5.0]


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: AdamW(ps, lr=0.1),
        lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
        lambda ps: torch.optim.RMSprop(ps, lr=0.1),
        lambda ps: torch.optim.Adagrad(ps, lr=0.1),
    ],
)
def test_equals_the_definition(make: Any) -> None:
    params = _params()
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    opt = Lookahead(make(params), k=3, alpha=0.3)
    plain = make(copies)
    slow = [p.detach().double() for p in copies]
    for step in range(1, 11):
        _run(opt, params, 1, seed=step)
        _run(plain, copies, 1, seed=step)
        if step % 3 == 0:
            slow = [s + 0.3 * (p.detach().double() - s) for s, p in zip(slow, copies, strict=True)]
            for param, value in zip(copies, slow, strict=True):
                param.data.copy_(value)
        for mine, theirs in zip(params, copies, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)  # float32 slow weights


def test_k_1_alpha_1_changes_nothing() -> None:
    params = _params()
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    _run(Lookahead(AdamW(params), k=1, alpha=1.0), params, 4)
    _run(AdamW(copies), copies, 4)
    for mine, theirs in zip(params, copies, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_starts_from_what_the_first_step_finds() -> None:
    """Weights loaded after construction count; those after the first step do not."""
    model = torch.nn.Linear(1, 1, bias=False)
    opt = Lookahead(torch.optim.SGD(model.parameters(), lr=1.0), k=2, alpha=0.5)
    model.load_state_dict({"weight": torch.tensor([[10.0]])})
    for _ in range(2):
        model.weight.grad = torch.tensor([[-1.0]])
        opt.step()
    assert model.weight.item() == 11.0


@pytest.mark.parametrize("pullback", ["none", "reset", "pullback"])
@pytest.mark.parametrize("make", [torch.optim.SGD, AdamW])
def test_pullback_by_hand(pullback: str, make: Any) -> None:
    param = torch.nn.Parameter(torch.zeros(1))
    options = {"momentum": 0.5} if make is torch.optim.SGD else {"betas": (0.5, 0.9)}
    opt = Lookahead(make([param], lr=0.1, **options), k=2, alpha=0.25, pullback=pullback)
    for _ in range(2):
        param.grad = torch.ones(1)
        opt.step()
    # SGD: b = 1, then 0.5 + 1; AdamW: m = 0.5, then 0.25 + 0.5
    key, momentum = ("momentum_buffer", 1.5) if make is torch.optim.SGD else ("exp_avg", 0.75)
    expected = {"none": momentum, "reset": 0.0, "pullback": 0.25 * momentum}[pullback]
    assert opt.state[param][key].item() == pytest.approx(expected, rel=1e-6)


def test_pullback_needs_a_momentum() -> None:
    param = torch.nn.Parameter(torch.zeros(1))
    opt = Lookahead(torch.optim.RMSprop([param]), k=1, pullback="reset")
    param.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"RMSprop keeps \['square_avg', 'step'\]; use pullback"):
        opt.step()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "k=0 must be an integer of at least 1"),
        ({"k": 2.5}, ValueError, "k=2.5 must be an integer"),
        ({"k": True}, ValueError, "k=True must be an integer"),
        ({"alpha": 0.0}, ValueError, r"alpha=0.0 must be in \(0, 1\]"),
        ({"alpha": 1.5}, ValueError, "alpha=1.5 must be in"),
        ({"pullback": "half"}, ValueError, "pullback='half' must be 'none', 'reset' or 'pullback'"),
        ({"optimizer": [1]}, TypeError, "must be a torch.optim.Optimizer, got list"),
    ],
)
def test_refused_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"optimizer": torch.optim.SGD(_params()), **arguments}
    with pytest.raises(error, match=message):
        Lookahead(**arguments)


def test_optimizers_that_need_the_samples_are_refused() -> None:
    with pytest.raises(TypeError, match=r"SAGA needs index=, .* Lookahead cannot pass them on"):
        Lookahead(SAGA(_params(), 0.1, 8))


def test_no_nesting() -> None:
    with pytest.raises(ValueError, match="is a Lookahead already"):
        Lookahead(Lookahead(torch.optim.SGD(_params())))


# --- the contract of an optimizer ---


def test_shares_groups_and_state() -> None:
    params = _params()
    base = AdamW(params)
    opt = Lookahead(base)
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.param_groups is base.param_groups
    assert opt.state is base.state
    base.load_state_dict(base.state_dict())
    assert opt.param_groups is base.param_groups
    assert opt.state is base.state
    assert "lookahead_k: 5" in repr(opt)


def test_scheduler_drives_the_wrapped_optimizer() -> None:
    params = _params()
    base = AdamW(params, lr=1.0)
    opt = Lookahead(base)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    _run(opt, params, 1)
    scheduler.step()
    assert base.param_groups[0]["lr"] == 0.5
    torch.optim.lr_scheduler.ReduceLROnPlateau(opt)


def test_all_kinds_of_hooks() -> None:
    params = _params()
    opt = Lookahead(AdamW(params))
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("step pre"))
    opt.register_step_post_hook(lambda *_: seen.append("step post"))
    opt.register_state_dict_pre_hook(lambda *_: seen.append("save pre"))
    opt.register_state_dict_post_hook(lambda *_: seen.append("save post"))
    opt.register_load_state_dict_pre_hook(lambda *_: seen.append("load pre"))
    opt.register_load_state_dict_post_hook(lambda *_: seen.append("load post"))
    _run(opt, params, 1)
    opt.load_state_dict(opt.state_dict())
    assert seen == ["step pre", "step post", "save pre", "save post", "load pre", "load post"]


def test_closure_and_zero_grad() -> None:
    param = torch.nn.Parameter(torch.full((1,), 3.0))
    opt = Lookahead(torch.optim.SGD([param], lr=0.1), k=1, alpha=0.5)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 9.0
    assert param.item() == pytest.approx(3.0 - 0.5 * 0.6)
    opt.zero_grad()
    assert param.grad is None


@pytest.mark.parametrize("make", [AdamW, torch.optim.SGD])
@pytest.mark.parametrize("stop", [0, 3, 5])
def test_resume_is_exact(make: Any, stop: int) -> None:
    params = _params()
    opt = Lookahead(make(params, lr=0.1), k=4, pullback="none")
    _run(opt, params, stop)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = Lookahead(make(copies, lr=0.1), k=2)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0]["lookahead_k"] == 4
    assert other.param_groups[0]["lookahead_step"] == stop
    _run(opt, params, 6, seed=1)
    _run(other, copies, 6, seed=1)
    for mine, theirs in zip(params, copies, strict=True):
        assert torch.equal(mine, theirs)


def test_state_of_the_wrapped_optimizer_alone_can_be_loaded() -> None:
    params = _params()
    base = AdamW(params)
    _run(base, params, 3)
    saved = base.state_dict()
    before = copy.deepcopy(saved)
    opt = Lookahead(AdamW(params), k=2, alpha=0.5)
    opt.load_state_dict(saved)
    assert opt.state[params[0]]["step"] == 3
    assert opt.param_groups[0]["lookahead_step"] == 0
    assert saved["param_groups"] == before["param_groups"]
    _run(opt, params, 2)


def test_slow_weights_of_another_shape_are_refused() -> None:
    params = _params()
    opt = Lookahead(torch.optim.SGD(params))
    _run(opt, params, 1)
    saved = opt.state_dict()
    saved["state"][1]["slow"] = torch.zeros(9)
    with pytest.raises(
        ValueError, match=r"'slow' of parameter 1 .* shape \(9,\), the param.* \(4,"
    ):
        opt.load_state_dict(saved)


def test_slow_weights_go_by_name_where_the_wrapped_optimizer_does() -> None:
    first, second = (torch.nn.Parameter(torch.full((1,), value)) for value in (0.0, 100.0))
    opt = Lookahead(AdamW([("a", first), ("b", second)]), k=3, pullback="pullback")
    _run(opt, [first, second], 4)
    saved = opt.state_dict()
    turned = Lookahead(AdamW([("b", second), ("a", first)]), k=3)
    turned.load_state_dict(saved)
    found = turned.state_dict()["state"]
    for number, original in ((0, 1), (1, 0)):
        for key in ("slow", "slow_momentum", "exp_avg"):
            assert torch.equal(found[number][key], saved["state"][original][key])
    assert found[0]["slow"].item() > 99


def test_slow_weights_go_by_position_where_the_wrapped_optimizer_does() -> None:
    first, second = (torch.nn.Parameter(torch.full((1,), value)) for value in (0.0, 100.0))
    saved = Lookahead(torch.optim.SGD([("a", first), ("b", second)], momentum=0.9), k=3)
    _run(saved, [first, second], 1)
    turned = Lookahead(torch.optim.SGD([("b", second), ("a", first)], momentum=0.9), k=3)
    turned.load_state_dict(saved.state_dict())
    found, expected = turned.state_dict()["state"], saved.state_dict()["state"]
    for key in ("slow", "momentum_buffer"):
        assert torch.equal(found[0][key], expected[0][key])


def _drop_slow(saved: dict[str, Any]) -> None:
    del saved["state"][1]["slow"]


def _slow(value: Any) -> Callable[[dict[str, Any]], None]:
    def damage(saved: dict[str, Any]) -> None:
        saved["state"][1]["slow"] = value

    return damage


def _option(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def damage(saved: dict[str, Any]) -> None:
        saved["param_groups"][0][f"lookahead_{key}"] = value

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_slow, "'slow' of parameter 'b' is missing .* lookahead_step=2"),
        (_slow([1.0]), "'slow' of parameter 'b' .* is a list, not a tensor"),
        (_slow(torch.zeros(4, dtype=torch.int64)), "'slow' of parameter 'b' .* is torch.int64"),
        (_slow(torch.zeros(4, dtype=torch.complex64)), "'slow' of parameter 'b' .* torch.complex"),
        (_option("k", 0), "lookahead_k=0 must be an integer of at least 1"),
        (_option("alpha", 1.5), r"lookahead_alpha=1.5 must be in \(0, 1\]"),
        (_option("alpha", "half"), "lookahead_alpha='half' must be in"),
        (_option("pullback", "half"), "lookahead_pullback='half' must be 'none'"),
        (_option("step", -1), "lookahead_step=-1 must be an integer of at least 0"),
    ],
)
@pytest.mark.parametrize("make", [AdamW, torch.optim.SGD])
def test_damaged_states_are_refused(
    make: Any, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    params = _params()
    opt = Lookahead(make([("a", params[0]), ("b", params[1])]), k=4)
    _run(opt, params, 2)
    saved = copy.deepcopy(opt.state_dict())
    damage(saved)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    assert opt.state_dict()["param_groups"] == before["param_groups"]  # and nothing was loaded


def test_other_names_are_said_once() -> None:
    params = _params()
    opt = Lookahead(AdamW([("a", params[0]), ("b", params[1])]))
    _run(opt, params, 1)
    other = Lookahead(AdamW([("c", params[0]), ("d", params[1])]))
    with pytest.warns(UserWarning, match="matched by position") as seen:
        other.load_state_dict(opt.state_dict())
    assert len(seen) == 1


def test_deepcopy_goes_on_alone() -> None:
    params = _params()
    opt = Lookahead(AdamW(params, lr=0.1), k=3, pullback="pullback")
    _run(opt, params, 4)
    copies, other = copy.deepcopy((params, opt))
    _run(other, copies, 5, seed=1)
    assert opt.param_groups[0]["lookahead_step"] == 4
    _run(opt, params, 5, seed=1)
    for mine, theirs in zip(params, copies, strict=True):
        assert torch.equal(mine, theirs)


def test_group_added_later_has_its_own_count() -> None:
    params = _params((1,))
    opt = Lookahead(torch.optim.SGD(params, lr=1.0), k=2, alpha=0.5)
    params[0].data.zero_()
    params[0].grad = -torch.ones(1)
    opt.step()
    late = torch.nn.Parameter(torch.full((1,), 10.0))
    opt.add_param_group({"params": [late]})
    late.grad = -torch.ones(1)
    opt.step()
    assert [group["lookahead_step"] for group in opt.param_groups] == [2, 1]
    assert (params[0].item(), late.item()) == (1.0, 11.0)
    opt.step()
    assert late.item() == 11.0  # from 10 half of the way to 12


def test_step_with_rate_zero_does_not_count() -> None:
    """As distributed checkpoints take one, with zero gradients, to create state."""
    params = _params()
    before = [p.detach().clone() for p in params]
    opt = Lookahead(AdamW(params, lr=0.1), k=1, alpha=0.5)
    for lr in (0.0, torch.tensor(0.0)):
        opt.param_groups[0]["lr"] = lr
        for param in params:
            param.grad = torch.zeros_like(param)
        opt.step(closure=None)
    assert opt.param_groups[0]["lookahead_step"] == 0
    for param, start in zip(params, before, strict=True):
        assert torch.equal(param, start)


@pytest.mark.parametrize("make", [AdamW, torch.optim.SGD])
def test_distributed_checkpoint_format(make: Any) -> None:
    """Through torch.distributed.checkpoint's state dictionaries, by parameter name."""
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model = torch.nn.Linear(3, 2)
    opt = Lookahead(make(model.parameters(), lr=0.1), k=4)
    _run(opt, list(model.parameters()), 3)
    saved = get_optimizer_state_dict(model, opt)
    twin = copy.deepcopy(model)
    other = Lookahead(make(twin.parameters(), lr=0.1), k=4)
    fresh = get_optimizer_state_dict(twin, other)  # this is where the step with rate 0 happens
    assert set(fresh["state"]["weight"]) == set(saved["state"]["weight"])
    set_optimizer_state_dict(twin, other, copy.deepcopy(saved))
    _run(opt, list(model.parameters()), 5, seed=1)
    _run(other, list(twin.parameters()), 5, seed=1)
    assert torch.equal(model.weight, twin.weight)


def test_grad_scaler_takes_the_wrapper() -> None:
    param = torch.nn.Parameter(torch.zeros(2))
    opt = Lookahead(torch.optim.AdamW([param], lr=0.1, weight_decay=0, fused=True), k=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(param.sum()).backward()
    scaler.step(opt)
    torch.testing.assert_close(param.detach(), torch.full((2,), -0.05))


def test_model_moved_after_steps() -> None:
    linear = torch.nn.Linear(2, 2)
    opt = Lookahead(torch.optim.SGD(linear.parameters(), lr=0.1), k=2)
    _run(opt, list(linear.parameters()), 1)
    linear.double()
    opt.zero_grad()
    _run(opt, list(linear.parameters()), 1)
    assert opt.state_dict()["state"][0]["slow"].dtype == torch.float64


@pytest.mark.parametrize("pullback", ["none", "reset", "pullback"])
def test_parameters_without_gradient_stay(pullback: Any) -> None:
    params = _params()
    still = params[1].detach().clone()
    groups = [{"params": params[:1]}, {"params": params[1:]}, {"params": []}]
    opt = Lookahead(AdamW(groups), k=2, pullback=pullback)
    for _ in range(4):
        params[0].grad = torch.ones_like(params[0])
        opt.step()
    assert torch.equal(params[1], still)


@pytest.mark.gpu
def test_synchronises_weights_not_the_device(
    forbid_synchronisation: Callable[[], AbstractContextManager[None]],
) -> None:
    params = [torch.nn.Parameter(torch.zeros(100, device="cuda")) for _ in range(3)]
    opt = Lookahead(AdamW(params, lr=0.1, weight_decay=0), k=2, pullback="pullback")
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(4):
        opt.step()
    torch.cuda.synchronize()
    with forbid_synchronisation():
        for _ in range(4):
            opt.step()


def test_tells_what_the_wrapped_optimizer_tells() -> None:
    params = _params()
    opt = Lookahead(AdamW(params, lr=0.1, max_grad_norm=1.0))
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    assert opt.grad_norm is not None
    assert opt.last_lr() == [0.1]
    assert opt.implementation == "cpu-fused"
    with pytest.raises(AttributeError, match="grad_norms"):
        _ = opt.grad_norms
    assert copy.deepcopy(opt).last_lr() == [0.1]
