"""States of DeepSpeed, recorded from two of its ranks."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.optim.foreign_states import (
    CLOSE,
    OPTIONS,
    STATES,
    as_apex,
    assert_equal,
    same,
    some_params,
    train,
)
from torsh_optim import AdamW
from torsh_optim._convert import state_from, state_to


class _Address:
    """As DeepSpeed's fragment_address."""

    def __init__(self, numel: int, start: int) -> None:
        self.numel, self.start = numel, start


@pytest.fixture(scope="module")
def zero() -> dict[str, Any]:
    [path] = STATES.glob("deepspeed_*.pt")
    found: dict[str, Any] = torch.load(path, weights_only=True)
    for run in found.values():
        for shard in run["state"]:
            shard["param_slice_mappings"] = [
                {name: _Address(*address) for name, address in group.items()}
                for group in shard["param_slice_mappings"]
            ]
    return found


def _model(weights: dict[str, Tensor]) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    model.load_state_dict(weights)
    return model


def _groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [{"params": named[:2], "lr": 0.01}, {"params": named[2:], "lr": 0.02}]


def _epoch(model: torch.nn.Module, opt: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    for batch in batches:
        opt.zero_grad()
        model(batch).square().mean().backward()
        opt.step()


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_zero_of_two_ranks_continues(zero: dict[str, Any], stage: str) -> None:
    """Against torch on one process, which never saw DeepSpeed."""
    run = zero[stage]
    before = copy.deepcopy([s["base_optimizer_state"] for s in run["state"]])
    whole = _model(run["initial"])
    unbroken = torch.optim.AdamW(_groups(whole))
    _epoch(whole, unbroken, run["batches"])

    model = _model(run["trained"])
    opt = AdamW(_groups(model), lr=1.0)
    opt.load_state_dict(state_from(run["state"], kind="deepspeed", target=opt))
    assert same([s["base_optimizer_state"] for s in run["state"]], before)
    assert [g["lr"] for g in opt.param_groups] == [0.01, 0.02]
    theirs = dict(whole.named_parameters())
    for name, param in model.named_parameters():
        expected = unbroken.state[theirs[name]]
        assert opt.state[param]["step"] == expected["step"] == 3
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(opt.state[param][key], expected[key], **CLOSE)
    _epoch(model, opt, run["batches"])
    _epoch(whole, unbroken, run["batches"])
    assert_equal(list(model.parameters()), list(whole.parameters()))


def test_zero_from_files_and_elastic(zero: dict[str, Any]) -> None:
    """What lies in the files is found, and so are states without options."""
    run = zero["stage1"]
    model = _model(run["trained"])
    opt = AdamW(_groups(model))
    expected = state_from(run["state"], kind="deepspeed", target=opt)
    files = [{"optimizer_state_dict": shard, "ds_version": "0.19.8"} for shard in run["state"]]
    assert same(state_from(files, kind="deepspeed", target=opt), expected)
    elastic = []
    for shard in run["state"]:
        states = shard["base_optimizer_state"]["state"]
        lean = [
            {k: v[: v.numel() - pad] if v.dim() else v for k, v in values.items() if k != "step"}
            for values, pad in zip(states.values(), shard["group_paddings"], strict=True)
        ]
        step = {"base_optimizer_state": lean, "base_optimizer_state_step": 3}
        elastic.append({**shard, **step})
    found = state_from(elastic, kind="deepspeed", target=opt)
    assert same(found["state"], expected["state"])
    assert "lr" not in found["param_groups"][0]


def test_zero_warns_of_other_weights(zero: dict[str, Any]) -> None:
    run = zero["stage1"]
    opt = AdamW(_groups(_model(run["initial"])))
    with pytest.warns(UserWarning, match="4 of 4 parameters of target differ from the float32"):
        state_from(run["state"], kind="deepspeed", target=opt)


def test_flat_groups_without_zero() -> None:
    """16-bit runs without ZeRO keep one flat tensor for a group."""
    params, whole = some_params(), some_params()
    old, unbroken = torch.optim.AdamW(params, **OPTIONS), torch.optim.AdamW(whole, **OPTIONS)
    train(params, old, 3)
    flat = {
        key: torch.cat([old.state[p][key].view(-1) for p in params])
        for key in ("exp_avg", "exp_avg_sq")
    }
    group = {k: OPTIONS[k] for k in ("lr", "betas", "eps", "weight_decay")}
    state = {
        "optimizer_state_dict": {
            "state": {0: {"step": 3, **flat}},
            "param_groups": [{**group, "bias_correction": True, "params": [0]}],
        },
        "fp32_groups_flat": [torch.cat([p.detach().view(-1) for p in params])],
    }
    new = AdamW(params)
    new.load_state_dict(state_from(state, kind="deepspeed", target=new))
    train(params, new, 4, seed=1)
    train(whole, unbroken, 3)
    train(whole, unbroken, 4, seed=1)
    assert_equal(params, whole)
    with pytest.raises(
        ValueError, match="'fp32_groups_flat' holds flat tensors without the shapes"
    ):
        state_from(state, kind="deepspeed")
    with pytest.raises(ValueError, match=r"has 23 elements in a group whose parameters .* have 22"):
        state_from(state, kind="deepspeed", target=AdamW(params[:2]))
    two = AdamW([{"params": params[:1]}, {"params": params[1:]}])
    with pytest.raises(ValueError, match="has 1 parameter groups, target 2"):
        state_from(state, kind="deepspeed", target=two)


def test_fused_adam_of_deepspeed_counts_in_its_last_parameter() -> None:
    params = some_params()
    old = torch.optim.AdamW(params, **OPTIONS)
    train(params, old, 3)
    state = as_apex(old, 0)
    del state["param_groups"][0]["step"]
    for number, values in state["state"].items():
        values["step"] = 3 if number == 2 else 0
    found = state_from({"optimizer": state}, kind="deepspeed")
    assert [v["step"].item() for v in found["state"].values()] == [3, 3, 3]
    state["param_groups"][0]["amsgrad"] = False  # its CPUAdam counts in each
    found = state_from(state, kind="deepspeed")
    assert [v["step"].item() for v in found["state"].values()] == [0, 0, 3]


def test_to_deepspeed() -> None:
    params = some_params()
    opt = AdamW(params, **OPTIONS)
    train(params, opt, 3)
    state = state_to(opt, kind="deepspeed")
    assert state["state"][0]["step"] == 3
    assert type(state["state"][0]["step"]) is int
    assert state["param_groups"][0]["bias_correction"] is True
    back = state_from(state, kind="deepspeed")
    assert same(back["state"], opt.state_dict()["state"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(), r"partition_count=2, but source has 1 states"),
        (
            lambda s: s[1].pop("param_slice_mappings"),
            r"'param_slice_mappings' is missing .* rank 1",
        ),
        (
            lambda s: s[1]["base_optimizer_state"]["state"].pop(0),
            r"'exp_avg' of '0.weight' is missing in the state of rank 1",
        ),
        (
            lambda s: setattr(s[1]["param_slice_mappings"][0]["0.weight"], "start", 7),
            r"puts '0.weight' at 7:12 of 'exp_avg', which has 10 elements on rank 1",
        ),
        (
            lambda s: setattr(s[1]["param_slice_mappings"][0]["0.weight"], "numel", 4),
            r"slices of 'exp_avg' of '0.weight' have 14 elements .* shape \(3, 5\)",
        ),
        (lambda s: s[0].update(fp32_flat_groups=[]), r"zero_stage=3 .*ds_to_universal"),
        (
            lambda s: s[0]["base_optimizer_state"]["param_groups"][1].update(moe=True),
            r"group 1 has moe=True",
        ),
    ],
)
def test_damaged_shards_are_refused(zero: dict[str, Any], change: Any, message: str) -> None:
    shards = copy.deepcopy(zero["stage1"]["state"])
    change(shards)
    opt = AdamW(_groups(_model(zero["stage1"]["trained"])))
    with pytest.raises(ValueError, match=message):
        state_from(shards, kind="deepspeed", target=opt)


def test_shards_need_a_target_with_names(zero: dict[str, Any]) -> None:
    run = zero["stage1"]
    model = _model(run["trained"])
    with pytest.raises(ValueError, match=r"pass target=optimizer"):
        state_from(run["state"], kind="deepspeed")
    with pytest.raises(ValueError, match=r"build it from model.named_parameters\(\)"):
        state_from(run["state"], kind="deepspeed", target=AdamW(model.parameters()))
    other = [(f"net.{name}", p) for name, p in model.named_parameters()]
    with pytest.raises(ValueError, match=r"has parameter '0.weight', target has \['net.0.bias'"):
        state_from(run["state"], kind="deepspeed", target=AdamW(other))
    plain = torch.optim.AdamW(model.parameters()).state_dict()
    with pytest.raises(ValueError, match="source has 2 states, but the first is not partitioned"):
        state_from([plain, plain], kind="deepspeed")
    with pytest.raises(ValueError, match="source is an empty list"):
        state_from([], kind="deepspeed")


def test_groups_that_are_not_flat() -> None:
    """16-bit runs with an optimizer that is not fused keep float32 weights one by one."""
    params = some_params()
    old = torch.optim.AdamW(params, **OPTIONS)
    train(params, old, 3)
    weights = [[p.detach().clone() for p in params]]
    state = {"optimizer": {"optimizer_state_dict": old.state_dict(), "fp32_groups": weights}}
    opt = AdamW(params)
    found = state_from(state, kind="deepspeed", target=opt)
    assert same(found, state_from(old, kind="torch", target=opt))
    with torch.no_grad():
        weights[0][1][0] += 1
    with pytest.warns(UserWarning, match="1 of 3 parameters of target differ from the float32"):
        state_from(state, kind="deepspeed", target=opt)
