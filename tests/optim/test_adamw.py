"""AdamW as a drop-in for torch.optim.AdamW."""

import copy
import io
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from torsh_optim import AdamW


def _linear_problem(seed: int = 0) -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    return model, torch.randn(32, 6)


def _train(model: torch.nn.Module, data: Tensor, opt: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        (model(data).squeeze(1) - data.sum(1)).square().mean().backward()
        opt.step()


# --- torch's own tables of inputs ---


@pytest.fixture(scope="module")
def tables() -> Any:
    """torch's tables of optimizer inputs, which need expecttest to be imported."""
    pytest.importorskip("expecttest")
    import torch.testing._internal.common_optimizers

    return torch.testing._internal.common_optimizers


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torchs_inputs_give_torchs_results(adamw: type[AdamW], device: str, tables: Any) -> None:
    if adamw.__name__ == "TritonAdamW" and device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    for case in tables.optim_inputs_func_adamw(device=device):
        if case.kwargs.get("capturable"):
            continue
        model, data = _linear_problem()
        model, data = model.to(device), data.to(device)
        twin = copy.deepcopy(model)
        _train(model, data, adamw(model.parameters(), **case.kwargs), 8)
        _train(twin, data, torch.optim.AdamW(twin.parameters(), **case.kwargs), 8)
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            # order of operations, passed on through eight gradients
            torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-6, msg=case.desc)


def test_torchs_error_inputs(tables: Any) -> None:
    refused = []
    for case in tables.optim_error_inputs_func_adamw(device="cpu", dtype=torch.float32):
        given = case.optimizer_error_input
        if "foreach" in given.kwargs:  # torch refuses a combination, AdamW foreach=True itself
            refused.append(given)
            continue
        assert case.error_on is tables.OptimizerErrorEnum.CONSTRUCTION_ERROR
        params = given.params
        if params is None:
            params = [torch.nn.Parameter(torch.randn(2, 3))]
        if issubclass(case.error_type, Warning):
            with pytest.warns(case.error_type, match=case.error_regex):
                AdamW(params, **given.kwargs)
        else:
            with pytest.raises(case.error_type, match=case.error_regex):
                AdamW(params, **given.kwargs)
    assert len(refused) == 2
    for given in refused:
        with pytest.raises(ValueError, match="foreach=True is not supported"):
            AdamW([torch.nn.Parameter(torch.ones(1))], **given.kwargs)


# --- options ---


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0; it must be at least 0"),
        ({"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
        ({"eps": -1e-8}, ValueError, "Invalid epsilon value: -1e-08"),
        ({"betas": (0.9, 1.0)}, ValueError, "Invalid beta parameter at index 1: 1.0"),
        ({"betas": (0.9,)}, ValueError, "betas must be either both floats or both Tensors"),
        ({"betas": (torch.ones(2), torch.ones(2))}, ValueError, "must be 1-element"),
        ({"weight_decay": -0.1}, ValueError, "Invalid weight_decay value: -0.1"),
        ({"capturable": True}, ValueError, "cannot be captured in a CUDA graph yet"),
        ({"differentiable": True}, ValueError, "use torch.optim to differentiate"),
        ({"foreach": True}, ValueError, "foreach=True is not supported by AdamW; leave it out"),
        ({"foreach": True, "fused": True}, RuntimeError, "cannot be `True` together"),
    ],
)
def test_refused_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdamW([torch.nn.Parameter(torch.ones(1))], **options)


def test_group_options_are_checked_too() -> None:
    param = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="Invalid learning rate: -2"):
        AdamW([{"params": [param], "lr": -2}])
    with pytest.raises(
        ValueError,
        match=r"unknown option 'weigth_decay' in a parameter group of "
        r"AdamW; did you mean 'weight_decay'\?",
    ):
        AdamW([{"params": [param], "weigth_decay": 0.1}])
    with pytest.raises(ValueError, match="decoupled_weight_decay=False is Adam"):
        AdamW([{"params": [param], "decoupled_weight_decay": False}])
    AdamW([{"params": [param], "name": "backbone", "lr_scale": 0.5, "_mine": object()}])


def test_duplicates_are_updated_once() -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = AdamW([param, torch.nn.Parameter(torch.ones(1)), param], lr=0.1, weight_decay=0)
    param.grad = torch.ones(3)
    opt.step()
    torch.testing.assert_close(param.detach(), torch.full((3,), -0.1))
    assert opt.state[param]["step"] == 1


def test_fused_true_is_a_promise() -> None:
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"fused=True, but a parameter of shape \(3,\) cannot"):
        AdamW([param], fused=True).step()
    with pytest.warns(UserWarning, match="one by one, which is slow: no fused kernel takes comp"):
        AdamW([param]).step()
    quiet = AdamW([param], fused=False)
    quiet.step()
    assert quiet.implementation == "reference"


def test_implementation_says_what_runs() -> None:
    real, double = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3).double())
    other = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    holes = torch.nn.Parameter(torch.ones(3, 4)[:, ::2])
    assert AdamW([real, double]).implementation == "cpu-fused"
    assert AdamW([real, other]).implementation == "cpu-fused+reference"
    assert AdamW([holes]).implementation == "reference"
    assert AdamW([real], fused=False).implementation == "reference"


def test_implementation_looks_at_state_and_gradients() -> None:
    """Loaded float32 moments of 16-bit weights, or moments in another layout, go one by one."""

    class WithoutTriton(AdamW):
        _implementations = ("cpu-fused", "reference")

    param = torch.nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16))
    opt = WithoutTriton([param])
    assert opt.implementation == "cpu-fused"
    param.grad = torch.ones_like(param)
    opt.step()
    for key in ("exp_avg", "exp_avg_sq"):
        opt.state[param][key] = opt.state[param][key].float()
    assert opt.implementation == "reference"
    with pytest.warns(UserWarning, match="one by one, which is slow: no fused kernel takes bf"):
        opt.step()
    for key in ("exp_avg", "exp_avg_sq"):
        opt.state[param][key] = opt.state[param][key].bfloat16().t()
    assert opt.implementation == "reference"
    with pytest.warns(UserWarning, match="its state has another memory layout"):
        opt.step()
    opt.state.clear()
    assert opt.implementation == "cpu-fused"
    opt.step()


def test_repr_shows_the_options() -> None:
    text = repr(AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.25))
    assert text.startswith("AdamW (\nParameter Group 0\n")
    assert "    lr: 0.25\n" in text


# --- kinds of tensors ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:AdamW updates a parameter:UserWarning")
def test_element_types(dtype: torch.dtype) -> None:
    mine = torch.nn.Parameter(torch.randn(9, 3).to(dtype))
    theirs = torch.nn.Parameter(mine.detach().clone())
    low = dtype == torch.bfloat16
    ours = AdamW([mine], lr=0.01, amsgrad=True)
    torchs = torch.optim.AdamW([theirs], lr=0.01, amsgrad=True, **({"fused": True} if low else {}))
    for _ in range(5):
        mine.grad = torch.randn(9, 3).to(dtype)
        theirs.grad = mine.grad.clone()
        ours.step()
        torchs.step()
    assert ours.state[mine]["exp_avg"].dtype == dtype
    torch.testing.assert_close(mine, theirs)


@pytest.mark.filterwarnings("ignore:.*it does not fill a block of memory:UserWarning")
def test_leaf_with_holes_is_right() -> None:
    base = torch.randn(4, 6)
    view = base[:, ::2].detach().requires_grad_()
    twin = torch.nn.Parameter(view.detach().clone())
    opt = AdamW([view], lr=0.1)
    torchs = torch.optim.AdamW([twin], lr=0.1)
    untouched = base[:, 1::2].clone()
    for _ in range(3):
        view.grad = torch.randn(4, 3)
        twin.grad = view.grad.clone()
        opt.step()
        torchs.step()
    torch.testing.assert_close(view, twin)
    assert torch.equal(base[:, 1::2], untouched)


def test_sparse_gradients_are_refused(adamw: type[AdamW]) -> None:
    table = torch.nn.Embedding(10, 4, sparse=True)
    opt = adamw(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        opt.step()
    table.weight.grad = torch.zeros(10, 4)
    opt.step()
    table.weight.grad = None
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        opt.step()
    assert opt.state[table.weight]["step"] == 1


def test_resized_parameter_names_the_state() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    opt = AdamW([param])
    opt.step()
    param.grad = None
    param.data = torch.ones(5)
    param.grad = torch.ones(5)
    with pytest.raises(
        RuntimeError, match=r"state 'exp_avg' has shape \(3,\), its parameter \(5,\)"
    ):
        opt.step()


# --- what is built around optimizers ---


def test_tensor_rate_and_betas_are_read_in_each_step(adamw: type[AdamW]) -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    rate = torch.tensor([0.1])
    betas = (torch.tensor(0.5, device="cpu"), torch.tensor([0.5], device="cpu"))
    opt = adamw([param], lr=rate, betas=betas, weight_decay=0)
    param.grad = torch.ones(3)
    opt.step()
    rate.fill_(0.3)
    opt.step()
    torch.testing.assert_close(param.detach(), torch.full((3,), -0.4))


@pytest.mark.parametrize(
    "schedule",
    [
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=12),
        lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 12),
        lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: step / 10),
    ],
)
def test_schedulers(schedule: Any) -> None:
    model, data = _linear_problem()
    twin = copy.deepcopy(model)
    for net, opt in (
        (model, AdamW(model.parameters(), lr=0.01)),
        (twin, torch.optim.AdamW(twin.parameters(), lr=0.01)),
    ):
        scheduler = schedule(opt)
        for _ in range(12):
            _train(net, data, opt, 1)
            scheduler.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_default_device_does_not_matter(adamw: type[AdamW], default: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    opt = adamw(params, lr=0.1, weight_decay=0)
    for param in params:
        param.grad = torch.ones_like(param)
    with torch.device(default):
        opt.step()
        params[1].grad = None
        opt.step()
        opt.load_state_dict(opt.state_dict())
        opt.step()
    assert [param.tolist()[0] for param in params] == pytest.approx([-0.3, -0.1])


def test_hooks_and_closure(adamw: type[AdamW]) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    opt = adamw([param])
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Tensor:
        opt.zero_grad()
        loss = param.square().sum()
        loss.backward()
        seen.append("closure")
        return loss

    assert opt.step(closure).item() == 2.0
    assert seen == ["before", "closure", "after"]


def test_grad_scaler_skips_and_unscales() -> None:
    param = torch.nn.Parameter(torch.zeros(4))
    opt = AdamW([param], lr=0.1, weight_decay=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((param * torch.tensor([1.0, torch.inf, 1.0, 1.0])).sum()).backward()
    scaler.step(opt)
    scaler.update()
    assert not opt.state
    assert scaler.get_scale() == 512.0
    opt.zero_grad()
    scaler.scale(param.sum()).backward()
    scaler.step(opt)
    assert param.grad is not None
    assert param.grad.tolist() == [1.0] * 4
    torch.testing.assert_close(param.detach(), torch.full((4,), -0.1))


@pytest.mark.gpu
@pytest.mark.parametrize("clip", [False, True])
def test_grad_scaler_on_cuda(clip: bool) -> None:
    param = torch.nn.Parameter(torch.zeros(4, device="cuda"))
    opt = AdamW([param], lr=0.1, weight_decay=0)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for factor in (torch.inf, 1.0):
        opt.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        if clip:
            scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_([param], 1.0)
        scaler.step(opt)
        scaler.update()
    # the step with the infinite gradient is skipped; AdamW's first step is lr, clipped or not
    torch.testing.assert_close(param.detach(), torch.full_like(param, -0.1))


def test_deepcopy_goes_on_alone(adamw: type[AdamW]) -> None:
    model, data = _linear_problem()
    opt = adamw(model.parameters(), lr=0.01)
    _train(model, data, opt, 2)
    other, other_opt = copy.deepcopy((model, opt))
    _train(other, data, other_opt, 3)
    assert opt.state[model[0].weight]["step"] == 2
    _train(model, data, opt, 3)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_added_group_is_updated(adamw: type[AdamW]) -> None:
    first, second = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    opt = adamw([first], lr=0.1, weight_decay=0)
    for param in (first, second):
        param.grad = torch.ones(3)
    opt.step()
    opt.add_param_group({"params": [second], "lr": 0.5})
    opt.step()
    torch.testing.assert_close(first.detach(), torch.full((3,), -0.2))
    torch.testing.assert_close(second.detach(), torch.full((3,), -0.5))


def test_switching_amsgrad_on(adamw: type[AdamW]) -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    opt = adamw([param])
    for amsgrad in (False, True):
        opt.param_groups[0]["amsgrad"] = amsgrad
        param.grad = torch.ones(3)
        opt.step()
    state = opt.state[param]
    torch.testing.assert_close(state["max_exp_avg_sq"], state["exp_avg_sq"])


@pytest.mark.slow
def test_compiled_training_step() -> None:
    model, data = _linear_problem()
    twin = copy.deepcopy(model)
    opt, twin_opt = AdamW(model.parameters()), AdamW(twin.parameters())
    compiled = torch.compile(lambda: _train(model, data, opt, 1), backend="eager")
    for _ in range(3):
        compiled()
    _train(twin, data, twin_opt, 3)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_importing_leaves_triton_alone() -> None:
    import subprocess
    import sys

    code = (
        "import torch, sys; before = set(sys.modules); import torsh_optim; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=re.sub("tests.optim.*", "torsh_optim/src", __file__),
    )
    assert run.stdout.strip() == "['torsh_optim']"


def test_training_digits_follows_torch() -> None:
    """A hundred steps on real images: the same losses as torch's AdamW, to rounding."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    losses: dict[str, list[float]] = {}
    for name, make in (("ours", AdamW), ("torch", torch.optim.AdamW)):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
        opt = make(net.parameters(), lr=1e-2, weight_decay=0.05)
        losses[name] = []
        for step in range(100):
            batch = torch.arange(64) + 64 * step
            batch %= len(labels)
            loss = torch.nn.functional.cross_entropy(net(images[batch]), labels[batch])
            opt.zero_grad()
            loss.backward()
            opt.step()
            losses[name].append(loss.item())
    assert losses["ours"][-1] < 0.3
    assert losses["ours"] == pytest.approx(losses["torch"], rel=1e-3)


def test_pickled_state_is_plain_tensors() -> None:
    model, data = _linear_problem()
    opt = AdamW(model.named_parameters(), lr=torch.tensor(0.1))
    _train(model, data, opt, 2)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other, _ = _linear_problem(1)
    fresh = AdamW(other.named_parameters())
    fresh.load_state_dict(loaded)
    assert fresh.state_dict()["param_groups"] == opt.state_dict()["param_groups"]
    for mine, theirs in zip(fresh.state.values(), opt.state.values(), strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(mine[key], theirs[key])
