"""States of other packages continue here, and ours there, as an unbroken run would."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.optim.foreign_states import (
    OPTIONS,
    STATES,
    Holder,
    as_apex,
    assert_equal,
    copies,
    same,
    shares_memory,
    some_params,
    train,
)
from torsh_optim import LAMB, SGD, Adam, AdamW, AdvancedAdam, Lion
from torsh_optim._convert import state_from, state_to
from torsh_optim._optimizer import FusedOptimizer

# --- torch ---

TORCH: list[tuple[Callable[..., torch.optim.Optimizer], Callable[..., torch.optim.Optimizer]]] = [
    (lambda p: torch.optim.Adam(p, **OPTIONS), Adam),
    (lambda p: torch.optim.AdamW(p, **OPTIONS, amsgrad=True, maximize=True), AdamW),
    (lambda p: torch.optim.AdamW(p, **OPTIONS, foreach=True), AdvancedAdam),
]


@pytest.mark.parametrize(("there", "here"), TORCH, ids=["adam", "amsgrad", "advanced"])
def test_from_torch_continues(there: Any, here: Any) -> None:
    params, whole = some_params(), some_params()
    old, unbroken = there(params), there(whole)
    train(params, old, 3)
    new = here(params)
    new.load_state_dict(state_from(old, kind="torch"))
    train(params, new, 4, seed=1)
    train(whole, unbroken, 3)
    train(whole, unbroken, 4, seed=1)
    assert_equal(params, whole)
    assert all(new.state[p]["step"] == 7 for p in params)


@pytest.mark.parametrize(("there", "here"), TORCH, ids=["adam", "amsgrad", "advanced"])
def test_to_torch_continues(there: Any, here: Any) -> None:
    params, whole = some_params(), some_params()
    unbroken = there(whole)
    options = {k: v for k, v in unbroken.param_groups[0].items() if k in (*OPTIONS, "amsgrad")}
    old = here(params, **options, maximize=unbroken.param_groups[0]["maximize"])
    train(params, old, 3)
    state = state_to(old, kind="torch")
    # as strict as torch: the very keys, tensors of the same types
    train(whole, unbroken, 3)
    reference = unbroken.state_dict()
    assert state["param_groups"][0].keys() == reference["param_groups"][0].keys()
    for mine, theirs in zip(state["state"].values(), reference["state"].values(), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(mine[k].dtype == theirs[k].dtype for k in mine)
    new = there(params)
    new.load_state_dict(state)
    train(params, new, 4, seed=1)
    train(whole, unbroken, 4, seed=1)
    assert_equal(params, whole)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_from_torch(momentum: float) -> None:
    """torch's SGD counts no steps, and has no state without momentum."""
    params = some_params()
    old = torch.optim.SGD(params, lr=0.1, momentum=momentum, dampening=0.2, weight_decay=0.01)
    train(params, old, 2)
    state = state_from(old, kind="torch")
    group = state["param_groups"][0]
    assert (group["momentum"], group["dampening"], group["nesterov"]) == (momentum, 0.2, False)
    if not momentum:
        assert state["state"] == {}
        return
    for number, param in enumerate(params):
        assert state["state"][number]["step"] == 1
        assert torch.equal(
            state["state"][number]["momentum_buffer"], old.state[param]["momentum_buffer"]
        )
    whole = copies(params)
    new = SGD(whole, lr=1.0)
    new.load_state_dict(state)
    train(whole, new, 2, seed=1)
    train(params, old, 2, seed=1)
    assert_equal(whole, params)
    back = torch.optim.SGD(whole, lr=1.0)
    back.load_state_dict(state_to(new, kind="torch"))
    train(whole, back, 2, seed=2)
    train(params, old, 2, seed=2)
    assert_equal(whole, params)


def test_sgd_that_has_not_begun() -> None:
    old = torch.optim.SGD(some_params(), lr=0.1, momentum=0.9).state_dict()
    old["state"] = {0: {"momentum_buffer": None}}  # so in older versions of torch
    assert state_from(old, kind="torch")["state"] == {}
    begun = state_from(old, kind="torch")
    begun["state"] = {0: {"step": torch.tensor(0.0), "momentum_buffer": torch.zeros(3, 5)}}
    assert state_to(begun, kind="torch")["state"] == {}
    params = some_params()
    without_momentum = SGD(params, lr=0.1)
    train(params, without_momentum, 2)
    assert state_to(without_momentum, kind="torch")["state"] == {}


def test_nothing_is_shared_or_changed() -> None:
    params = some_params()
    old = torch.optim.AdamW(params, **OPTIONS, amsgrad=True)
    train(params, old, 2)
    source = old.state_dict()
    before = copy.deepcopy(source)
    converted = state_from(source, kind="torch", target=AdamW(params))
    assert same(source, before)
    assert not shares_memory(source, converted)
    again = copy.deepcopy(converted)
    back = state_to(converted, kind="torch")
    assert same(converted, again)
    assert not shares_memory(converted, back)
    assert same(back["state"], before["state"])


def test_notes_names_and_tensor_options_are_kept() -> None:
    params = some_params()
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    old = torch.optim.AdamW(named, lr=torch.tensor(0.5), betas=(0.5, 0.75))
    torch.optim.lr_scheduler.LinearLR(old, start_factor=0.5)
    train(params, old, 1)
    group = state_from(old, kind="torch")["param_groups"][0]
    assert group["param_names"] == ["p0", "p1", "p2"]
    assert group["initial_lr"] == 0.5
    assert isinstance(group["lr"], Tensor)
    assert group["lr"] == 0.25
    new = AdamW(reversed(named))
    new.load_state_dict(state_from(old, kind="torch"))
    for param in params:
        assert torch.equal(new.state[param]["exp_avg"], old.state[param]["exp_avg"])
    assert state_to(new, kind="bnb")["param_groups"][0]["lr"] == 0.25


def test_unknown_options_do_not_survive() -> None:
    """Whatever comes out is accepted as options of a group."""
    params = some_params()
    old = torch.optim.AdamW(params)
    train(params, old, 1)
    old.param_groups[0]["sparsity"] = 0.5
    old.param_groups[0]["_mine"] = 1
    with pytest.warns(UserWarning, match=r"left out: sparsity=0\.5$"):
        state = state_from(old, kind="torch")
    AdamW(some_params()).add_param_group({**state["param_groups"][0], "params": some_params()})


# --- apex and TransformerEngine ---


@pytest.mark.parametrize("kind", ["apex", "te"])
@pytest.mark.parametrize("step", [3, torch.tensor([3], dtype=torch.int32)])
@pytest.mark.parametrize(("there", "here"), [(torch.optim.AdamW, AdamW), (torch.optim.Adam, Adam)])
def test_from_apex_continues(kind: Any, step: Any, there: Any, here: Any) -> None:
    params, whole = some_params(), some_params()
    old, unbroken = there(params, **OPTIONS), there(whole, **OPTIONS)
    train(params, old, 3)
    new = here(params)  # adam_w_mode is not in the state: the class decides
    new.load_state_dict(state_from(as_apex(old, step), kind=kind))
    train(params, new, 4, seed=1)
    train(whole, unbroken, 3)
    train(whole, unbroken, 4, seed=1)
    assert_equal(params, whole)


def test_options_outside_of_the_groups_are_read_from_the_optimizer() -> None:
    old = torch.optim.Adam(some_params(), **OPTIONS)
    train(list(old.param_groups[0]["params"]), old, 1)
    state = as_apex(old, 1)
    assert "decoupled_weight_decay" not in state_from(state, kind="apex")["param_groups"][0]
    for mode in (0, 1):
        found = state_from(Holder(state, adam_w_mode=mode), kind="apex")  # type: ignore[arg-type]
        assert found["param_groups"][0]["decoupled_weight_decay"] is bool(mode)
    wrapped = Holder(state, optimizer=Holder(state, adam_w_mode=0))
    found = state_from(wrapped, kind="deepspeed")  # type: ignore[arg-type]
    assert found["param_groups"][0]["decoupled_weight_decay"] is False


def test_from_apex_says_what_is_lost() -> None:
    old = torch.optim.Adam(some_params(), **OPTIONS)
    train(list(old.param_groups[0]["params"]), old, 1)
    state = as_apex(old, 1)
    state["param_groups"][0]["bias_correction"] = False
    with pytest.warns(UserWarning, match=r"apex state, which are left out: bias_correction=False"):
        found = state_from(state, kind="apex")
    assert "bias_correction" not in found["param_groups"][0]


def test_lamb_of_apex() -> None:
    old = torch.optim.Adam(some_params(), **OPTIONS)
    train(list(old.param_groups[0]["params"]), old, 2)
    state = as_apex(old, 2)
    state["param_groups"][0] |= {
        "grad_averaging": False, "max_grad_norm": 0.5, "bias_correction": False
    }  # fmt: skip
    holder = Holder(state, adam_w_mode=0, use_nvlamb=True)
    with pytest.warns(UserWarning, match=r"adam_w_mode=False$"):
        found = state_from(holder, kind="apex")  # type: ignore[arg-type]
    group = found["param_groups"][0]
    assert (group["max_grad_norm"], group["bias_correction"]) == (0.5, False)
    assert group["always_adapt"] is True
    assert group["grad_averaging"] is False
    opt = LAMB(some_params())
    opt.load_state_dict(found)
    assert all(group[key] == opt.param_groups[0][key] for key in group if key != "params")
    assert found["state"][1]["step"] == 2
    with pytest.warns(
        UserWarning, match=r"always_adapt=True .* use_nvlamb=True.*max_grad_norm=0\.5 "
    ):
        back = state_to(found, kind="apex")
    assert back["param_groups"][0]["grad_averaging"] is False
    assert back["param_groups"][0]["max_grad_norm"] == 0.5
    assert back["param_groups"][0]["bias_correction"] is False
    assert back["param_groups"][0]["step"] == 2
    assert same(back["state"], state["state"])


@pytest.mark.parametrize("kind", ["apex", "te"])
def test_to_apex_and_back_is_exact(kind: Any) -> None:
    params = some_params()
    opt = AdamW(params, **OPTIONS)
    train(params, opt, 3)
    state = state_to(opt, kind=kind)
    group = state["param_groups"][0]
    assert {k: v for k, v in group.items() if k != "params"} == {
        **OPTIONS, "bias_correction": True, "step": 3
    }  # fmt: skip
    assert type(group["step"]) is int
    assert all(values.keys() == {"exp_avg", "exp_avg_sq"} for values in state["state"].values())
    back = state_from(state, kind=kind)
    assert same(back["state"], opt.state_dict()["state"])


def test_to_apex_warns_of_coupled_decay_and_of_options() -> None:
    params = some_params()
    opt = Adam(params, **OPTIONS, max_grad_norm=1.0, warmup_steps=5)
    train(params, opt, 1)
    with pytest.warns(
        UserWarning, match=r"adam_w_mode=False\).*max_grad_norm=1\.0.*warmup_steps=5"
    ):
        state_to(opt, kind="apex")
    state_to(Adam(params), kind="apex")  # without decay there is nothing to say


def test_lamb_without_clipping_goes_to_apex() -> None:
    group = {**OPTIONS, "trust_clip": None, "max_grad_norm": None, "params": []}
    with pytest.warns(UserWarning, match=r"left out: max_grad_norm=inf \(construct"):
        state = state_to({"state": {}, "param_groups": [group]}, kind="apex")
    assert state["param_groups"][0]["max_grad_norm"] == math.inf
    group["max_grad_norm"] = 1.0  # its default
    state_to({"state": {}, "param_groups": [group]}, kind="apex")


def test_capturable_apex_keeps_its_rate_in_a_tensor() -> None:
    old = torch.optim.AdamW(some_params(), **OPTIONS)
    train(list(old.param_groups[0]["params"]), old, 1)
    state = as_apex(old, torch.tensor([1], dtype=torch.int32))
    state["param_groups"][0]["lr"] = torch.tensor(0.5)
    group = state_from(state, kind="apex")["param_groups"][0]
    assert type(group["lr"]) is float
    assert group["lr"] == 0.5


def test_novograd_of_apex_is_refused() -> None:
    group = {**OPTIONS, "grad_averaging": False, "norm_type": 2, "step": 1, "params": []}
    with pytest.raises(ValueError, match="no optimizer here continues one of apex"):
        state_from({"state": {}, "param_groups": [group]}, kind="apex")


def test_te_master_weights() -> None:
    params = some_params()
    old = torch.optim.AdamW(params, **OPTIONS)
    train(params, old, 2)
    state = as_apex(old, 2)
    for number, param in enumerate(params):
        state["state"][number]["master_param"] = param.detach().clone()
    with pytest.warns(UserWarning, match="master_param"):
        found = state_from(state, kind="te")
    assert all(
        values.keys() == {"step", "exp_avg", "exp_avg_sq"} for values in found["state"].values()
    )
    state_from(state, kind="te", target=AdamW(params))  # they are the parameters: no warning
    with torch.no_grad():
        params[1][0] += 1
    with pytest.warns(UserWarning, match="master_param"):
        state_from(state, kind="te", target=AdamW(params))
    with torch.no_grad():
        for param in params:
            param.zero_()
    for values in state["state"].values():  # low halves, beside bfloat16 parameters
        values["master_param"] = torch.zeros_like(values["exp_avg"], dtype=torch.int16)
    with pytest.warns(UserWarning, match="master_param"):
        state_from(state, kind="te", target=AdamW(params))


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8])
def test_te_moments_without_scale_are_refused(dtype: torch.dtype) -> None:
    old = torch.optim.AdamW(some_params())
    train(list(old.param_groups[0]["params"]), old, 1)
    state = as_apex(old, 1)
    state["state"][1]["exp_avg"] = torch.zeros(7, dtype=dtype)
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 1 is .*(scale|floating)"):
        state_from(state, kind="te")


# --- what is refused ---


def _adam_state() -> dict[str, Any]:
    params = some_params()
    opt = AdamW(params, **OPTIONS)
    train(params, opt, 2)
    return opt.state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("state"), r"'state' is missing in the state dict, which has \['param_g"),
        (lambda s: s.pop("param_groups"), r"'param_groups' is missing"),
        (lambda s: s["param_groups"][0].pop("params"), r"'params' is missing in parameter group 0"),
        (lambda s: s["state"].update(step=3), r"entry 'step' that is in no parameter group"),
        (lambda s: s["state"][1].pop("exp_avg_sq"), r"'exp_avg_sq' of parameter 1 is missing"),
        (lambda s: s["state"][1].pop("step"), r"'step' of parameter 1 is missing"),
        (lambda s: s["state"][1].update(step=1.5), r"'step' of parameter 1 is 1\.5"),
        (lambda s: s["state"][1].update(step=-1), r"'step' of parameter 1 is -1"),
        (
            lambda s: s["state"][1]["exp_avg"][3].fill_(torch.nan),
            r"'exp_avg' of parameter 1 has 1 ",
        ),
        (lambda s: s["state"][0]["exp_avg_sq"].neg_(), r"'exp_avg_sq' of parameter 0 has negative"),
        (
            lambda s: s["state"][0].update(exp_avg_sq=torch.zeros(4)),
            r"'exp_avg_sq' of parameter 0 has shape \(4,\), but 'exp_avg' \(3, 5\)",
        ),
        (
            lambda s: s["state"][0].update(exp_inf=torch.zeros(3, 5)),
            r"'exp_inf' of parameter 0 is no",
        ),
        (
            lambda s: s["param_groups"][0].pop("amsgrad"),
            r"no optimizer here continues one of torch",
        ),
    ],
)
def test_damaged_states_are_refused(change: Any, message: str) -> None:
    state = _adam_state()
    change(state)
    with pytest.raises(ValueError, match=message):
        state_from(state, kind="torch")


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.RAdam,
        torch.optim.NAdam,
        torch.optim.Adamax,
        torch.optim.RMSprop,
        torch.optim.ASGD,
    ],
)
def test_other_optimizers_of_torch_are_refused(make: Any) -> None:
    params = some_params()
    old = make(params)
    train(params, old, 1)
    with pytest.raises(ValueError, match=r"no optimizer here continues one of torch\.optim with"):
        state_from(old, kind="torch")


def test_what_has_no_counterpart_is_refused() -> None:
    params = some_params()
    amsgrad = AdamW(params, amsgrad=True)
    train(params, amsgrad, 1)
    for kind in ("apex", "te", "bnb", "deepspeed"):
        with pytest.raises(ValueError, match=r"amsgrad=True in group 0 has no counterpart in"):
            state_to(amsgrad, kind=kind)
    switched_off = amsgrad.state_dict()
    switched_off["param_groups"][0]["amsgrad"] = False
    with pytest.raises(ValueError, match=r"'max_exp_avg_sq' of parameter 0 has no place in apex"):
        state_to(switched_off, kind="apex")
    with pytest.raises(ValueError, match=r"decoupled_weight_decay=False in group 0"):
        state_to(Adam(params, **OPTIONS), kind="bnb")
    lion = Lion(params)
    for kind in ("torch", "apex", "te"):
        with pytest.raises(ValueError, match=r"has nothing that continues lion exactly"):
            state_to(lion, kind=kind)
    sgd = {"lr": 1.0, "momentum": 0.0, "nesterov": True, "params": []}
    with pytest.raises(ValueError, match=r"nesterov=True in group 0"):
        state_to({"state": {}, "param_groups": [sgd]}, kind="bnb")
    with pytest.raises(ValueError, match=r"momentum=0 in group 0"):
        state_to({"state": {}, "param_groups": [{**sgd, "nesterov": False}]}, kind="bnb")


def test_uneven_steps_are_refused_by_packages_that_count_in_the_group() -> None:
    params = some_params()
    opt = AdamW(params)
    train(params, opt, 1)
    train(params[:1], opt, 1)
    params[1].grad = params[2].grad = None
    opt.step()
    with pytest.raises(ValueError, match=r"parameters of group 0 have 'step' \[2, 3\]"):
        state_to(opt, kind="te")
    assert state_to(opt, kind="bnb")["state"][0]["step"] == 3


def test_wrong_arguments() -> None:
    state = _adam_state()
    with pytest.raises(ValueError, match=r"kind='tensorflow' is unknown; it is one of torch, apex"):
        state_from(state, kind="tensorflow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"kind='tensorflow'"):
        state_to(state, kind="tensorflow")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"optimizer or its state dict, got str; read a file yourself"
    ):
        state_from("state.pt", kind="torch")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got PosixPath"):
        state_to(STATES, kind="torch")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got str"):
        state_from("state.pt", kind="deepspeed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bits=8 for kind='torch'"):
        state_to(state, kind="torch", bits=8)
    with pytest.raises(ValueError, match=r"bits=4 for kind='bnb'"):
        state_to(state, kind="bnb", bits=4)  # type: ignore[arg-type]
    sgd = torch.optim.SGD(some_params(), lr=1.0)
    with pytest.raises(ValueError, match=r"source is a state of adam, but target is a SGD"):
        state_from(state, kind="torch", target=sgd)
    with pytest.raises(ValueError, match=r"no Adam, LAMB, Lion or SGD of this package has"):
        state_to({"state": {}, "param_groups": [{"lr": 1.0, "params": []}]}, kind="torch")


def test_target_limits_the_options() -> None:
    """Options that the target does not have are left out, with a warning where they matter."""
    params = some_params()
    opt = AdamW(params, **OPTIONS)
    train(params, opt, 1)
    state = state_to(opt, kind="torch")
    target = FusedOptimizer.__new__(AdamW)
    target.defaults = {"lr": 1.0, "betas": (0.9, 0.999), "eps": 1e-8}
    target.param_groups = []
    with pytest.warns(UserWarning, match=r"left out: weight_decay=0\.1$"):
        found = state_from(state, kind="torch", target=target)
    assert "maximize" not in found["param_groups"][0]
