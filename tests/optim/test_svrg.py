"""SVRG against a loop written by hand, and as an optimizer."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torsh_optim import SAGA, AdamW
from torsh_optim._svrg import SVRG

N = 20


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (N,), generator=generator)


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def _full(model: nn.Module) -> Callable[[], Tensor]:
    x, y = _data()
    return lambda: F.cross_entropy(model(x), y)


def _batches(steps: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, N, (5,), generator=generator) for _ in range(steps)]


def _run(model: nn.Module, opt: SVRG, batches: list[Tensor], every: int | None = None) -> None:
    x, y = _data()
    for number, index in enumerate(batches):
        if every is not None and number % every == 0:
            opt.snapshot(_full(model))
        opt.step(lambda i=index: F.cross_entropy(model(x[i]), y[i]))


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
        lambda ps: torch.optim.AdamW(ps, lr=0.01),
        lambda ps: AdamW(ps, lr=0.01, weight_decay=0.1),
    ],
)
@pytest.mark.parametrize(("alpha", "schedule"), [(1.0, "constant"), (0.6, "linear")])
def test_equals_the_loop_written_by_hand(make: Any, alpha: float, schedule: Any) -> None:
    model = _model()
    twin = copy.deepcopy(model)
    total = 10 if schedule == "linear" else None
    opt = SVRG(make(model.parameters()), alpha=alpha, alpha_schedule=schedule, total_steps=total)
    _run(model, opt, _batches(14), every=4)

    x, y = _data()
    plain = make(twin.parameters())
    params = list(twin.parameters())
    for step, index in enumerate(_batches(14)):
        if step % 4 == 0:
            anchor = copy.deepcopy(twin)
            mu = torch.autograd.grad(F.cross_entropy(anchor(x), y), list(anchor.parameters()))
        strength = alpha * max(0.0, 1 - step / 10) if total else alpha
        grads = torch.autograd.grad(F.cross_entropy(twin(x[index]), y[index]), params)
        noisy = torch.autograd.grad(
            F.cross_entropy(anchor(x[index]), y[index]), list(anchor.parameters())
        )
        for param, g, at_anchor, full in zip(params, grads, noisy, mu, strict=True):
            param.grad = g - strength * (at_anchor - full)
        plain.step()
    for mine, theirs in zip(model.parameters(), params, strict=True):
        # float64; the correction is subtracted in another order of operations
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_alpha_zero_is_the_wrapped_optimizer() -> None:
    model = _model()
    twin = copy.deepcopy(model)
    x, y = _data()
    opt = SVRG(torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.0)
    assert not opt.snapshot_due
    _run(model, opt, _batches(3))
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    for index in _batches(3):
        plain.zero_grad()
        F.cross_entropy(twin(x[index]), y[index]).backward()
        plain.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_linear_alpha() -> None:
    model = _model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = SVRG(sgd, alpha=0.8, alpha_schedule="linear", total_steps=4)
    seen = []
    opt.snapshot(_full(model))
    for index in _batches(6):
        seen.append(opt.alpha)
        _run(model, opt, [index])
    assert seen == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0, 0.0])


def test_at_the_snapshot_every_batch_gives_the_full_gradient() -> None:
    model = _model()
    opt = SVRG(torch.optim.SGD(model.parameters(), lr=0.0))
    x, y = _data()
    exact = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    opt.snapshot(_full(model))
    for index in _batches(4):
        _run(model, opt, [index])
        for param, gradient in zip(model.parameters(), exact, strict=True):
            torch.testing.assert_close(param.grad, gradient, rtol=0, atol=1e-15)


def test_reaches_the_optimum_of_a_convex_problem() -> None:
    """With a constant rate, where SGD stops far away."""
    torch.manual_seed(0)
    x, y = _data()
    linear = nn.Linear(4, 3).double()

    def loss(i: Any) -> Tensor:
        penalty = 0.05 * sum(p.square().sum() for p in linear.parameters())
        return F.cross_entropy(linear(x[i]), y[i]) + penalty

    def gradient() -> float:
        found = torch.autograd.grad(loss(slice(None)), list(linear.parameters()))
        return max(g.abs().max().item() for g in found)

    opt = SVRG(torch.optim.SGD(linear.parameters(), lr=0.5))
    for step, index in enumerate(_batches(400)):
        if step % 10 == 0:
            opt.snapshot(lambda: loss(slice(None)))
        opt.step(lambda i=index: loss(i))
    assert gradient() < 1e-8
    sgd = SVRG(opt.base_optimizer, alpha=0.0)
    sgd.param_groups[0]["svrg_alpha"] = 0.0
    for index in _batches(100, seed=1):
        sgd.step(lambda i=index: loss(i))
    assert gradient() > 1e-4


def test_forms_of_closures() -> None:
    """Returning the loss, calling backward, and adding up batches."""
    first = _model()
    x, y = _data()
    results = []
    for form in range(3):
        model = copy.deepcopy(first)
        opt = SVRG(torch.optim.SGD(model.parameters(), lr=0.1))

        def loss(i: Any, model: nn.Module = model) -> Tensor:
            return F.cross_entropy(model(x[i]), y[i])

        def backward(i: Any, opt: SVRG = opt, loss: Any = loss) -> Tensor:
            opt.zero_grad()
            value = loss(i)
            value.backward()
            return value

        def parts(loss: Any = loss) -> float:
            total = 0.0
            for part in torch.arange(N).split(8):
                share = loss(part) * len(part) / N
                share.backward()
                total += share.detach().item()
            return total

        fulls = [lambda f=loss: f(slice(None)), lambda f=backward: f(slice(None)), parts]
        value = opt.snapshot(fulls[form])
        assert float(torch.as_tensor(value).detach()) == pytest.approx(
            loss(slice(None)).detach().item()
        )
        assert all(p.grad is None for p in model.parameters())
        evaluate = loss if form == 0 else backward
        assert opt.step(lambda f=evaluate: f([1, 2])).detach().item() == pytest.approx(
            F.cross_entropy(first(x[1:3]), y[1:3]).detach().item()
        )
        results.append(list(model.parameters()))
    for result in results[1:]:
        for mine, theirs in zip(results[0], result, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-15)


# --- randomness and statistics ---


def test_both_evaluations_have_the_same_dropout() -> None:
    """At the snapshot the batch's noise then cancels completely."""
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 3)).double()
    opt = SVRG(torch.optim.SGD(model.parameters(), lr=0.0))
    opt.snapshot(_full(model))
    mu = [opt.state_dict()["state"][k]["full_gradient"] for k in range(4)]
    for index in _batches(3):
        _run(model, opt, [index])
        for param, full in zip(model.parameters(), mu, strict=True):
            torch.testing.assert_close(param.grad, full, rtol=0, atol=1e-15)


def test_generators_go_on_as_after_one_evaluation() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).double()
    x, y = _data()
    opt = SVRG(torch.optim.SGD(model.parameters(), lr=0.1))
    opt.snapshot(_full(model))
    torch.manual_seed(5)
    opt.step(lambda: F.cross_entropy(model(x), y))
    found = torch.rand(3)
    torch.manual_seed(5)
    model(x)
    assert torch.equal(found, torch.rand(3))


class _Replacing(nn.Module):
    """Counts in a buffer by putting a new tensor there."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch 2.11's compiler
@pytest.mark.parametrize("compiled", [False, True])
def test_statistics_do_not_leak(compiled: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), _Replacing(), nn.Linear(6, 3))
    model.double()
    twin = copy.deepcopy(model)
    x, y = _data()
    opt = SVRG(torch.optim.SGD(model.parameters(), lr=0.3))
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    if compiled:
        model.compile(backend=backend, dynamic=True)
        F.cross_entropy(model(x), y).backward()
        twin(x)
    before = len(graphs)
    opt.snapshot(_full(model))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(twin.named_buffers())[name])
    for index in _batches(4):
        twin.load_state_dict(model.state_dict())
        twin(x[index])
        _run(model, opt, [index])
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, dict(twin.named_buffers())[name])
    assert int(model[1].num_batches_tracked) == 4 + compiled
    assert len(graphs) == before  # the compiler has seen no hooks


def test_an_error_in_the_closure_leaves_the_weights() -> None:
    model = _model()
    before = copy.deepcopy(model.state_dict())
    opt = SVRG(torch.optim.SGD(model.parameters(), lr=0.1))
    opt.snapshot(_full(model))
    model[0].weight.data.add_(1)
    moved = copy.deepcopy(model.state_dict())
    calls = []

    def closure() -> Tensor:
        calls.append(model[0].weight.detach().clone())
        if len(calls) == 2:
            raise KeyError("second")
        torch.rand(7)
        return model(torch.zeros(1, 4).double()).sum()

    torch.manual_seed(5)
    with pytest.raises(KeyError, match="second"):
        opt.step(closure)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    torch.rand(7)
    assert torch.equal(drawn, torch.rand(3))  # as after the first evaluation
    assert torch.equal(calls[0], moved["0.weight"])
    assert torch.equal(calls[1], before["0.weight"])
    assert torch.equal(model[0].weight, moved["0.weight"])
    assert opt.param_groups[0]["svrg_step"] == 0


def test_parameters_missing_from_a_batch_or_from_all() -> None:
    a, b, c = (nn.Parameter(torch.ones((), dtype=torch.float64)) for _ in range(3))
    opt = SVRG(torch.optim.SGD([a, b, c], lr=0.0))
    opt.snapshot(lambda: (a**2 + 3 * b**2) / 2)  # two samples, one with a, one with b
    opt.step(lambda: a**2)
    # a: 2 - (2 - 1); b: 0 - (0 - 3); c is in no sample
    assert (a.grad.item(), b.grad.item(), c.grad) == (1.0, 3.0, None)


# --- when a snapshot is needed ---


def test_snapshots_become_due() -> None:
    model = _model()
    opt = SVRG(torch.optim.SGD(model.parameters(), lr=0.1), snapshot_every=2)
    assert opt.snapshot_due
    with pytest.raises(RuntimeError, match=r"there is no snapshot; call snapshot\(full_grad_clos"):
        _run(model, opt, _batches(1))
    opt.snapshot(_full(model))
    assert not opt.snapshot_due
    _run(model, opt, _batches(2))
    assert opt.snapshot_due
    with pytest.raises(
        RuntimeError, match=r"the snapshot is 2 steps old \(svrg_snapshot_every=2\)"
    ):
        _run(model, opt, _batches(1))
    opt.snapshot(_full(model))
    _run(model, opt, _batches(2))


def test_group_added_later_needs_a_snapshot() -> None:
    model = _model()
    opt = SVRG(torch.optim.SGD(model[0].parameters(), lr=0.1), alpha=0.5)
    opt.snapshot(_full(model))
    _run(model, opt, _batches(1))
    opt.add_param_group({"params": model[2].parameters()})
    assert opt.param_groups[1]["svrg_step"] == 1
    with pytest.raises(RuntimeError, match="parameters were added after the snapshot"):
        _run(model, opt, _batches(1))
    opt.snapshot(_full(model))
    _run(model, opt, _batches(1))


def test_empty_full_gradient_is_refused() -> None:
    model = _model()
    opt = SVRG(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="full_grad_closure left no gradient"):
        opt.snapshot(lambda: 1.0)


def test_step_without_closure() -> None:
    model = _model()
    opt = SVRG(AdamW(model.parameters()))
    with pytest.raises(ValueError, match=r"SVRG\.step needs a closure"):
        opt.step()
    opt.param_groups[0]["lr"] = 0.0
    assert opt.step() is None
    assert opt.param_groups[0]["svrg_step"] == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 1.5}, ValueError, r"^alpha=1.5 must be in \[0, 1\]"),
        ({"alpha": True}, ValueError, "alpha=True must be"),
        ({"alpha_schedule": "cosine"}, ValueError, "alpha_schedule='cosine' must be 'constant' or"),
        ({"alpha_schedule": "linear"}, ValueError, "'linear' needs total_steps"),
        ({"total_steps": 5}, ValueError, "total_steps=5 is for alpha_schedule='linear'"),
        ({"snapshot_every": 0}, ValueError, "snapshot_every=0 must be at least 1"),
        ({"snapshot_every": 1.5}, ValueError, "snapshot_every=1.5 must be an integer or None"),
        ({"optimizer": 3}, TypeError, "must be a torch.optim.Optimizer, got int"),
        ({"optimizer": torch.optim.LBFGS([nn.Parameter(torch.zeros(1))])}, ValueError, "LBFGS ev"),
        (
            {"optimizer": SVRG(torch.optim.SGD([nn.Parameter(torch.zeros(1))]))},
            ValueError,
            "is an SVRG already",
        ),
    ],
)
def test_refused_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"optimizer": torch.optim.SGD(_model().parameters()), **options}
    with pytest.raises(error, match=message):
        SVRG(**options)


# --- the contract of an optimizer, and continuing ---


def _continue(run: Callable[[nn.Module, SVRG], tuple[nn.Module, SVRG]], make: Any) -> None:
    model = _model()
    opt = SVRG(make(model.parameters(), lr=0.05), alpha=0.7, alpha_schedule="linear", total_steps=9)
    _run(model, opt, _batches(4), every=3)
    twin, other = run(model, opt)
    for m, o in ((model, opt), (twin, other)):
        _run(m, o, _batches(3, seed=1))  # with the snapshot from before
        o.snapshot(_full(m))
        _run(m, o, _batches(2, seed=2))
        assert o.param_groups[0]["svrg_step"] == 9
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("make", [AdamW, torch.optim.SGD, torch.optim.AdamW])
def test_resume_is_exact(make: Any) -> None:
    def resume(model: nn.Module, opt: SVRG) -> tuple[nn.Module, SVRG]:
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        twin = _model()
        twin.load_state_dict(saved["model"])
        other = SVRG(make(twin.parameters(), lr=1.0))
        other.load_state_dict(saved["opt"])
        assert other.param_groups[0]["svrg_alpha"] == 0.7
        return twin, other

    _continue(resume, make)


@pytest.mark.parametrize("make", [AdamW, torch.optim.SGD])
def test_copies_go_on_alone(make: Any) -> None:
    _continue(lambda model, opt: copy.deepcopy((model, opt)), make)
    _continue(lambda model, opt: pickle.loads(pickle.dumps((model, opt))), make)


@pytest.mark.parametrize("make", [AdamW, torch.optim.SGD])
def test_distributed_checkpoint_format(make: Any) -> None:
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def resume(model: nn.Module, opt: SVRG) -> tuple[nn.Module, SVRG]:
        saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
        twin = copy.deepcopy(model)
        other = SVRG(make(twin.parameters(), lr=0.05))
        set_optimizer_state_dict(twin, other, saved)
        return twin, other

    _continue(resume, make)


def test_state_of_the_wrapped_optimizer_alone_can_be_loaded() -> None:
    model = _model()
    base = AdamW(model.parameters())
    F.cross_entropy(model(_data()[0]), _data()[1]).backward()
    base.step()
    opt = SVRG(AdamW(model.parameters()))
    opt.snapshot(_full(model))
    opt.load_state_dict(base.state_dict())
    assert opt.state[model[0].weight]["step"] == 1
    assert opt.snapshot_due


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def damage(saved: dict[str, Any]) -> None:
        saved["param_groups"][0][key] = value

    return damage


def _shape(saved: dict[str, Any]) -> None:
    saved["state"][1]["snapshot"] = torch.zeros(9)


def _missing(saved: dict[str, Any]) -> None:
    del saved["state"][0]["full_gradient"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_shape, r"'snapshot' of parameter 1 in the loaded state is \(9,\), but .* \(6,\)"),
        (_missing, "'full_gradient' of parameter 0 in the loaded state is None"),
        (_set("svrg_alpha", 2), "loaded alpha=2 must be in"),
        (_set("svrg_step", -1), "loaded svrg_step=-1 must be an integer of at least 0"),
        (_set("svrg_snapshot_every", "x"), "loaded snapshot_every='x' must be an integer or None"),
    ],
)
@pytest.mark.parametrize("make", [AdamW, torch.optim.SGD])
def test_damaged_states_are_refused(
    make: Any, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    model = _model()
    opt = SVRG(make(model.parameters()))
    opt.snapshot(_full(model))
    _run(model, opt, _batches(1))
    saved = copy.deepcopy(opt.state_dict())
    damage(saved)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    assert opt.state_dict()["param_groups"] == before["param_groups"]


def test_shares_groups_and_state() -> None:
    base = AdamW(_model().parameters())
    opt = SVRG(base)
    assert opt.param_groups is base.param_groups
    assert opt.state is base.state
    assert "svrg_alpha: 1.0" in repr(opt)


def test_schedulers_and_all_kinds_of_hooks() -> None:
    model = _model()
    base = AdamW(model.parameters(), lr=1.0)
    opt = SVRG(base)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("step pre"))
    opt.register_step_post_hook(lambda *_: seen.append("step post"))
    opt.register_state_dict_pre_hook(lambda *_: seen.append("save pre"))
    opt.register_state_dict_post_hook(lambda *_: seen.append("save post"))
    opt.register_load_state_dict_pre_hook(lambda *_: seen.append("load pre"))
    opt.register_load_state_dict_post_hook(lambda *_: seen.append("load post"))
    _run(model, opt, _batches(1), every=1)
    scheduler.step()
    assert base.param_groups[0]["lr"] == 0.5
    opt.load_state_dict(opt.state_dict())
    assert seen == ["step pre", "step post", "save pre", "save post", "load pre", "load post"]


def test_model_moved_after_the_snapshot() -> None:
    linear = nn.Linear(4, 3)
    x, y = _data()
    opt = SVRG(torch.optim.SGD(linear.parameters(), lr=0.1))
    opt.snapshot(lambda: F.cross_entropy(linear(x.float()), y))
    linear.double()
    opt.step(lambda: F.cross_entropy(linear(x), y))
    assert opt.state_dict()["state"][0]["snapshot"].dtype == torch.float64


@pytest.mark.gpu
def test_cuda_equals_cpu_and_dropout_is_the_same() -> None:
    model = _model()
    twin = copy.deepcopy(model).cuda()
    opt = SVRG(torch.optim.SGD(model.parameters(), lr=0.1))
    other = SVRG(torch.optim.SGD(twin.parameters(), lr=0.1))
    x, y = (t.cuda() for t in _data())
    opt.snapshot(_full(model))
    other.snapshot(lambda: F.cross_entropy(twin(x), y))
    for index in _batches(5):
        _run(model, opt, [index])
        other.step(lambda i=index: F.cross_entropy(twin(x[i]), y[i]))
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.cpu(), rtol=0, atol=1e-10)  # order of sums

    net = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 3)).double().cuda()
    svrg = SVRG(torch.optim.SGD(net.parameters(), lr=0.0))
    svrg.snapshot(lambda: F.cross_entropy(net(x), y))
    svrg.step(lambda: F.cross_entropy(net(x[:5]), y[:5]))
    full = svrg.state_dict()["state"][0]["full_gradient"]
    torch.testing.assert_close(net[0].weight.grad, full, rtol=0, atol=1e-14)


def test_saga_is_refused() -> None:
    saga = SAGA([torch.nn.Parameter(torch.zeros(2))], lr=0.1, num_samples=3)
    with pytest.raises(
        TypeError, match="SAGA needs index=, the numbers of the samples, in each step"
    ):
        SVRG(saga)
