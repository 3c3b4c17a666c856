"""Adam, and AdamW, against torch's in float64; Adam's implementations against each other."""

import itertools
from typing import Any

import pytest
import torch

from tests.optim.lockstep import compare_implementations
from torsh_optim import Adam, AdamW

GROUPS = [
    {"weight_decay": 0.1},
    {"amsgrad": True, "maximize": True, "betas": (0.5, 0.9)},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "eps": 1e-4},
    {"betas": (0.0, 0.0), "warmup_steps": 3},
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("common", [{}, {"max_grad_norm": 0.5}])
def test_implementations_agree(triton: Any, common: dict[str, Any], device: str) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    opts = compare_implementations(
        Adam, GROUPS, triton, device=device, lr=0.02, shapes=((5,), (1500,), (0,), ()), **common
    )
    assert opts[1].implementation == "cpu-fused"
    assert len(opts[0]._plan.buckets) == 1


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(("ours", "torchs"), [(Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)])
def test_equals_torch_in_double(ours: Any, torchs: Any, fused: bool | None) -> None:
    for decay, amsgrad, maximize in itertools.product((0.0, 0.2), (False, True), (False, True)):
        options = {"weight_decay": decay, "amsgrad": amsgrad, "maximize": maximize, "lr": 0.02}
        options |= {"betas": (0.7, 0.9), "eps": 1e-4}
        mine = torch.randn(7, 5, dtype=torch.float64).requires_grad_()
        theirs = mine.detach().clone().requires_grad_()
        opts = [ours([mine], **options, fused=fused), torchs([theirs], **options, foreach=False)]
        for step in range(8):
            mine.grad = torch.randn_like(mine) / (1 + step)  # so that AMSGrad's maximum matters
            theirs.grad = mine.grad.clone()
            for opt in opts:
                opt.step()
        # the same formula in another order of operations
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13, msg=str(options))
        for key, value in opts[1].state[theirs].items():
            torch.testing.assert_close(opts[0].state[mine][key], value, check_dtype=False)


def test_decoupled_adam_is_adamw(implement: Any) -> None:
    params = [torch.nn.Parameter(torch.ones(33)) for _ in range(2)]
    opts = [
        implement(Adam)([params[0]], lr=0.1, weight_decay=0.3, decoupled_weight_decay=True),
        implement(AdamW)([params[1]], lr=0.1, weight_decay=0.3),
    ]
    for param, opt in zip(params, opts, strict=True):
        param.grad = torch.linspace(-1, 1, 33)
        opt.step()
    assert torch.equal(*params)


@pytest.mark.parametrize(("kind", "decay"), [(Adam, 0.0), (AdamW, 1e-2)])
def test_torchs_defaults(kind: Any, decay: float) -> None:
    param = [torch.nn.Parameter(torch.ones(1))]
    theirs = getattr(torch.optim, kind.__name__)(param).defaults
    ours = kind(param).defaults
    assert ours["weight_decay"] == decay
    assert {key: ours[key] for key in theirs} == theirs


def test_usual_mistakes_are_named() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(
        TypeError, match=r"params is a Linear; pass its parameters: Adam\(model.par"
    ):
        Adam(model)  # pyrefly: ignore[bad-argument-type]
    for option in ({"lr": "1e-3"}, {"eps": "1e-8"}, {"weight_decay": "0.1"}, {"lr": True}):
        key, value = next(iter(option.items()))
        with pytest.raises(TypeError, match=f"{key}={value!r} is a .*, not a number"):
            Adam(model.parameters(), **option)  # pyrefly: ignore[bad-argument-type]


def test_options_in_a_list_can_be_changed(implement: Any) -> None:
    results = []
    for betas in ([0.9, 0.999], (0.9, 0.999)):
        param = torch.nn.Parameter(torch.ones(3))
        opt = implement(Adam)([{"params": [param], "betas": betas}], lr=0.1)
        for _ in range(2):
            param.grad = torch.full_like(param, 2.0)
            opt.step()
            opt.param_groups[0]["betas"] = [0.1, 0.9]
        results.append(param.detach().clone())
    assert torch.equal(*results)
