"""States of bitsandbytes, recorded from it: 32-bit, and 8-bit codes decoded and made."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.optim.foreign_states import (
    OPTIONS,
    STATES,
    Holder,
    assert_equal,
    copies,
    same,
    train,
)
from torsh_optim import SGD, Adam, AdamW, Lion
from torsh_optim._blockwise import block_decoded, block_encoded, dynamic_map
from torsh_optim._convert import state_from, state_to


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    [path] = STATES.glob("bitsandbytes_*.pt")
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def _continued(opt: torch.optim.Optimizer, params: list[Any], gradients: Any) -> None:
    for of_step in gradients:
        for param, grad in zip(params, of_step, strict=True):
            param.grad = grad.clone()
        opt.step()


@pytest.mark.parametrize("nested", [True, False])
def test_adam_of_bitsandbytes_continues(recorded: dict[str, Any], nested: bool) -> None:
    """bitsandbytes decays the weights directly in its Adam, too."""
    saved = recorded["adam"]
    state = copy.deepcopy(saved["state_dict"])
    if not nested:  # versions before 0.49
        for values in state["state"].values():
            values.update(values.pop("__bnb_optimizer_quant_state__"))
    params = copies(saved["before"])
    opt = Adam(params)
    opt.load_state_dict(state_from(state, kind="bnb"))
    assert opt.param_groups[0]["weight_decay"] == 0.1
    _continued(opt, params, recorded["gradients"])
    assert_equal(params, saved["after"])


@pytest.mark.parametrize(("name", "kind"), [("lion", Lion), ("sgd", SGD)])
def test_one_moment_of_bitsandbytes_continues(
    recorded: dict[str, Any], name: str, kind: Any
) -> None:
    saved = recorded[name]
    params = copies(saved["before"])
    opt = kind(params, lr=1.0)
    state = state_from(saved["state_dict"], kind="bnb", target=opt)
    assert "eps" not in state["param_groups"][0]
    opt.load_state_dict(state)
    assert opt.state[params[0]]["step"] == 3
    _continued(opt, params, recorded["gradients"])
    assert_equal(params, saved["after"])


def test_codes_decode_as_in_bitsandbytes(recorded: dict[str, Any]) -> None:
    target = Lion(copies(recorded["adam"]["before"]))
    for name, keys, options in (
        ("adamw8bit", ("exp_avg", "exp_avg_sq"), {}),
        ("lion8bit", ("exp_avg",), {"target": target}),
    ):
        saved = recorded[name]
        before = copy.deepcopy(saved["state_dict"])
        state = state_from(saved["state_dict"], kind="bnb", **options)
        assert same(saved["state_dict"], before)
        for number, decoded in saved["decoded"].items():
            assert state["state"][number]["step"] == 3
            for key, expected in zip(keys, decoded, strict=True):
                assert state["state"][number][key].dtype == torch.float32
                assert torch.equal(state["state"][number][key], expected)


def test_codes_are_those_of_bitsandbytes(
    recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The maps, the nearest levels, the scales; a whole block of a partial one, and zeros."""
    monkeypatch.setattr("torsh_optim._foreign_moments._MIN_8BIT_SIZE", 1)
    signed, unsigned = recorded["signed"], recorded["unsigned"]
    entry = {"step": 4, "exp_avg": signed["values"], "exp_avg_sq": unsigned["values"]}
    group = {**OPTIONS, "params": [0]}
    state = state_to({"state": {0: entry}, "param_groups": [group]}, kind="bnb", bits=8)
    for i, expected in ((1, signed), (2, unsigned)):
        values = state["state"][0]
        assert torch.equal(values[f"qmap{i}"], expected["map"])
        assert torch.equal(values[f"state{i}"], expected["codes"])
        torch.testing.assert_close(values[f"absmax{i}"], expected["absmax"], rtol=0, atol=0)
    back = state_from(state, kind="bnb")["state"][0]
    # between two levels below 0.1: neighbours in the last decade are 0.9 / 64 of the block apart
    for key, expected in (("exp_avg", signed), ("exp_avg_sq", unsigned)):
        spread = 0.9 / (64 if key == "exp_avg" else 128) / 2
        scale = expected["absmax"].repeat_interleave(256)[:300]
        assert ((back[key] - expected["values"]).abs() <= spread * scale * 1.0001).all()


def test_empty_and_small_tensors_stay_float32_in_bitsandbytes() -> None:
    shapes = ((0, 4), (4095,), (64, 64))
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    opt = AdamW(params, **OPTIONS)
    train(params, opt, 2)
    state = state_to(opt, kind="bnb", bits=8)
    assert [v["state1"].dtype for v in state["state"].values()] == [
        torch.float32, torch.float32, torch.uint8
    ]  # fmt: skip
    assert state["state"][2]["absmax2"].shape == (16,)
    assert type(state["state"][2]["step"]) is int
    back = state_from(state, kind="bnb")
    assert torch.equal(back["state"][1]["exp_avg"], opt.state[params[1]]["exp_avg"])
    # steps with the coarse moments go nearly the same way
    other = AdamW(params)
    other.load_state_dict(back)
    error = (back["state"][2]["exp_avg"] - opt.state[params[2]]["exp_avg"]).norm()
    assert error < 0.02 * opt.state[params[2]]["exp_avg"].norm()  # measured 0.008


def test_to_bitsandbytes_has_its_layout(recorded: dict[str, Any]) -> None:
    """What goes out has the keys and types of what bitsandbytes saved, and comes back the same."""
    for name, target in (("adam", AdamW), ("lion", Lion), ("sgd", SGD)):
        saved = copy.deepcopy(recorded[name]["state_dict"])
        params = copies(recorded[name]["before"])
        ours = state_from(saved, kind="bnb", target=target(params))
        back = state_to(ours, kind="bnb")
        for values in saved["state"].values():
            values.update(values.pop("__bnb_optimizer_quant_state__"))
        assert same(back["state"], saved["state"])
        assert same(back["param_groups"][0], saved["param_groups"][0])


def test_lamb_of_bitsandbytes_says_what_is_lost(recorded: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=r"bitsandbytes state, which are left out: max_unorm"):
        state_from(recorded["lamb"]["state_dict"], kind="bnb")


def test_arguments_of_bitsandbytes_that_are_lost(recorded: dict[str, Any]) -> None:
    args = Holder({}, percentile_clipping=5, min_8bit_size=4096, max_unorm=0.0, skip_zeros=False)
    holder = Holder(recorded["adam"]["state_dict"], args=args, optimizer_name="adam")
    with pytest.warns(UserWarning, match=r"left out: percentile_clipping$"):
        state_from(holder, kind="bnb")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("qmap1", lambda x: x[:16], r"'qmap1' of parameter 0 has shape \(16,\), not \(256,\)"),
        ("absmax2", lambda x: x[:1], r"'absmax2' of parameter 0 has shape \(1,\), not \(2,\)"),
        ("absmax1", lambda x: None, r"'absmax1' of parameter 0 is missing beside the 8-bit"),
        ("qmap2", lambda x: None, r"'qmap2' of parameter 0 is missing beside the 8-bit"),
        ("state2", lambda x: None, r"'state2' of parameter 0 is missing"),
        ("state1", lambda x: x.t(), r"'state1' of parameter 0 has strides \(1, 50\)"),
        ("state2", lambda x: x[:3], r"'absmax2' of parameter 0 has shape \(2,\), not \(1,\)"),
        ("absmax1", lambda x: x * torch.nan, r"'absmax1' of parameter 0 has 2 elements"),
    ],
)
def test_damaged_codes_are_refused(
    recorded: dict[str, Any], key: str, change: Any, message: str
) -> None:
    state = copy.deepcopy(recorded["adamw8bit"]["state_dict"])
    codes = state["state"][0]["__bnb_optimizer_quant_state__"]
    changed = change(codes.pop(key))
    if changed is not None:
        codes[key] = changed
    with pytest.raises(ValueError, match=message):
        state_from(state, kind="bnb")


def test_one_moment_of_bitsandbytes_is_ambiguous(recorded: dict[str, Any]) -> None:
    for name in ("lion", "sgd", "rmsprop"):
        with pytest.raises(ValueError, match="whether it is Lion's, SGD's or RMSprop's"):
            state_from(recorded[name]["state_dict"], kind="bnb")
    named = Holder(recorded["lion"]["state_dict"], optimizer_name="lion")
    assert state_from(named, kind="bnb")["state"][0]["step"] == 3  # type: ignore[arg-type]
    other = Holder(recorded["rmsprop"]["state_dict"], optimizer_name="rmsprop")
    with pytest.raises(ValueError, match="continues 'rmsprop' of bitsandbytes"):
        state_from(other, kind="bnb")  # type: ignore[arg-type]
    mixed = copy.deepcopy(recorded["adam"]["state_dict"])
    mixed["param_groups"][0]["betas"] = (0.9, 0.999, 0.9999)
    with pytest.raises(ValueError, match="continues 'ademamix' of bitsandbytes"):
        state_from(mixed, kind="bnb")


@given(
    size=st.integers(0, 600),
    exponent=st.integers(-30, 30),
    signed=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=30)
def test_codes_are_the_nearest_levels(size: int, exponent: int, signed: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator) * 2.0**exponent
    values = values if signed else values.abs()
    levels = dynamic_map(signed=signed)
    assert levels.shape == (256,)
    assert (levels.diff() > 0).all()
    codes, absmax = block_encoded(values, levels)
    decoded = block_decoded(codes, absmax, levels)
    assert decoded.shape == values.shape
    for start in range(0, size, 256):
        block = values[start : start + 256].double()
        scale = block.abs().max()
        assert absmax[start // 256] == scale
        nearest = (block[:, None] - levels.double() * scale).abs().min(dim=1).values
        error = (decoded[start : start + 256].double() - block).abs()
        assert (error <= nearest + 1e-6 * scale).all()  # ties, and the product in float32
