"""States of every version of the format load, and training goes on as it would have."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.optim.recorded import OWN, TORCH, batches, small_model, train_small, two_groups
from torsh_optim import AdvancedAdam
from torsh_optim._checkpoint import FORMAT

STATES = Path(__file__).parent / "states"
# The files say what another processor may have added up in another order, over three steps.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

CASES = [
    *((f"{name}_v{FORMAT}.pt", make) for name, make in OWN.items()),
    ("adamw_v1.pt", OWN["adamw"]),
    ("lookahead_v1.pt", OWN["lookahead"]),
]


def _load(file: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(STATES / file, weights_only=True)
    return found


def _goes_on(model: torch.nn.Module, opt: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["optimizer"])
    for mine, theirs in zip(
        opt.state_dict()["state"].values(), saved["optimizer"]["state"].values(), strict=True
    ):
        for key, value in theirs.items():
            assert torch.equal(mine[key], value), key
            assert mine[key].dtype == value.dtype, key
    train_small(model, opt, batches(10)[7:])
    for name, value in saved["after"].items():
        torch.testing.assert_close(model.state_dict()[name], value, **CLOSE, msg=name)


@pytest.mark.parametrize(("file", "make"), CASES, ids=[file for file, _ in CASES])
def test_goes_on_as_saved(file: str, make: Any) -> None:
    """The options come from the file too: the new optimizer begins with other ones."""
    model = small_model()
    opt = make(model)
    for group in opt.param_groups:
        group["lr"] = 0.5
    saved = _load(file)
    _goes_on(model, opt, saved)
    assert [group["lr"] for group in opt.param_groups] == [
        group["lr"] for group in saved["optimizer"]["param_groups"]
    ]


@pytest.mark.parametrize("name", TORCH)
def test_goes_on_from_torch(name: str) -> None:
    model = small_model()
    make, kind = TORCH[name]
    groups = make(model).param_groups
    opt = kind(
        [
            {
                **{key: group[key] for key in ("momentum", "amsgrad") if key in group},
                "params": list(zip(group["param_names"], group["params"], strict=True)),
            }
            for group in groups
        ]
    )
    _goes_on(model, opt, _load(f"{name}_v0.pt"))
    assert all(group["torsh_version"] == FORMAT for group in opt.param_groups)


def test_options_that_a_state_does_not_have_are_kept() -> None:
    """The first format knew neither; what the optimizer was built with holds."""
    model = small_model()
    opt = AdvancedAdam(two_groups(model), ema_decay=0.9, max_grad_norm=1e6)
    _goes_on(model, opt, _load("adamw_v1.pt"))
    assert [(g["ema_decay"], g["max_grad_norm"]) for g in opt.param_groups] == [(0.9, 1e6)] * 2
    assert all("ema" in state for state in opt.state.values())


def test_newer_format_is_refused() -> None:
    model = small_model()
    saved = _load("adamw_v1.pt")["optimizer"]
    saved["param_groups"][0]["torsh_version"] = FORMAT + 1
    with pytest.raises(ValueError, match=rf"torsh_version={FORMAT + 1} .* is newer than {FORMAT}"):
        OWN["adamw"](model).load_state_dict(saved)


def test_every_class_has_a_file() -> None:
    """A new optimizer, or a new format, needs files of its own."""
    import torsh_optim

    kinds = {type(make(small_model())).__name__ for make in OWN.values()}
    # SAGA and SVRG keep no state dictionaries of this format; their tests have files of their own
    wanted = {
        name
        for name in torsh_optim.__all__
        if isinstance(kind := getattr(torsh_optim, name), type)
        and issubclass(kind, torch.optim.Optimizer)
    }
    assert wanted - kinds <= {"SAGA", "SVRG"}
    for name in OWN:
        assert (STATES / f"{name}_v{FORMAT}.pt").exists()
