"""SAGA against a dense table of every sample's gradient, and against scikit-learn's optimum."""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torsh_optim._adam import AdamW
from torsh_optim._saga import SAGA

N = 23
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int8]
KINDS = ["scalar", "factored", "full"]


def _linear() -> nn.Module:
    return nn.Linear(5, 3).double()


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def _conv() -> nn.Module:
    net = nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(6, 3))
    return net.double()


MODELS = {"scalar": _linear, "factored": _mlp, "full": _conv}


def _data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 5, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (N,), generator=generator)


def _batches(epochs: int, size: int = 4, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        part for _ in range(epochs) for part in torch.randperm(N, generator=generator).split(size)
    ]


def _run(model: nn.Module, opt: SAGA, batches: list[Tensor], reduction: str = "none") -> None:
    x, y = _data()
    for index in batches:
        opt.step(
            lambda i=index: F.cross_entropy(model(x[i]), y[i], reduction=reduction), index=index
        )


def _round(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounding of one row, written from its definition."""
    if dtype != torch.int8:
        return values.to(dtype).double()
    scale = (values.abs().max() / 127).float().double()
    return (values / scale).round() * scale if scale > 0 else values * 0


class DenseSAGA:
    """SAGA with the gradient of every sample in float64, one sample at a time."""

    def __init__(self, model: nn.Module, lr: float, kind: str, dtype: torch.dtype, wd: float = 0.0):
        self.model, self.lr, self.kind, self.dtype, self.wd = model, lr, kind, dtype, wd
        self.params = list(model.parameters())
        self.table = [[torch.zeros_like(p) for p in self.params] for _ in range(N)]

    def gradient(self, i: int) -> tuple[list[Tensor], list[Tensor]]:
        """The gradient of a sample, and what the table stores for it."""
        x, y = _data()
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        layers = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        handles = []
        if self.kind != "full":
            for layer in layers:
                handles.append(layer.register_forward_hook(
                    lambda _, a, out: (inputs.append(a[0]), outputs.append(out))[0]
                ))  # fmt: skip
        loss = F.cross_entropy(self.model(x[i : i + 1]), y[i : i + 1])
        for handle in handles:
            handle.remove()
        found = torch.autograd.grad(loss, [*self.params, *outputs])
        exact = [g.detach() for g in found[: len(self.params)]]
        if self.kind == "full":
            return exact, [_round(g.flatten(), self.dtype).view_as(g) for g in exact]
        stored = []
        for a, delta in zip(inputs, found[len(self.params) :], strict=True):
            d = _round(delta[0], self.dtype)
            v = a[0].detach() if self.kind == "scalar" else _round(a[0].detach(), self.dtype)
            stored += [torch.outer(d, v), d]
        return exact, stored

    @torch.no_grad()
    def step(self, index: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            new = [self.gradient(i) for i in index.tolist()]
        estimates = []
        for k, param in enumerate(self.params):
            fresh = torch.stack([exact[k] for exact, _ in new]).mean(0)
            old = torch.stack([self.table[i][k] for i in index.tolist()]).mean(0)
            mean = torch.stack([row[k] for row in self.table]).mean(0)
            estimates.append(fresh - old + mean)
            param.sub_(self.lr * (estimates[-1] + self.wd * param))
        for i, (_, stored) in zip(index.tolist(), new, strict=True):
            self.table[i] = stored
        return estimates

    def mean(self) -> list[Tensor]:
        return [
            torch.stack([row[k] for row in self.table]).mean(0) for k in range(len(self.params))
        ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_dense_table(kind: str, dtype: torch.dtype) -> None:
    model = MODELS[kind]()
    twin = copy.deepcopy(model)
    opt = SAGA(model.parameters(), 0.2, N, table=kind, table_dtype=dtype, weight_decay=0.01)
    dense = DenseSAGA(twin, 0.2, kind, dtype, wd=0.01)
    for step, index in enumerate(_batches(3)):
        _run(model, opt, [index])
        estimates = dense.step(index)
        params = list(model.parameters())
        # float64 on both sides, but sums of other orders: rounding errors of a few 1e-16 a step
        # (and a number at the middle between two codes may be rounded to the other one)
        for param, reference, estimate in zip(params, dense.params, estimates, strict=True):
            torch.testing.assert_close(param, reference, rtol=0, atol=1e-12, msg=f"step {step}")
            torch.testing.assert_close(param.grad, estimate, rtol=0, atol=1e-12)
    for param, mean in zip(model.parameters(), dense.mean(), strict=True):
        torch.testing.assert_close(opt.state[param]["gradient_mean"], mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["scalar", "factored"])
def test_all_tables_agree_for_linear_layers(kind: str) -> None:
    first = MODELS[kind]()
    models = [first, copy.deepcopy(first), copy.deepcopy(first)]
    for model, table in zip(models, [kind, "full", "factored"], strict=True):
        opt = SAGA(model.parameters(), 0.2, N, table=table, table_dtype=torch.float64)
        _run(model, opt, _batches(2))
    for other in models[1:]:
        for mine, theirs in zip(first.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_estimate_is_unbiased(kind: str, dtype: torch.dtype) -> None:
    """Its mean over all samples is the gradient, from any state and however rounded."""
    model = MODELS[kind]()
    opt = SAGA(model.parameters(), 0.2, N, table=kind, table_dtype=dtype)
    _run(model, opt, _batches(2)[:8])  # some samples twice, some once
    opt.param_groups[0]["lr"] = 0.0
    x, y = _data()
    exact = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    total = [torch.zeros_like(p) for p in model.parameters()]
    spread = 0.0
    for i in range(N):
        twin, other = copy.deepcopy((model, opt))
        _run(twin, other, [torch.tensor([i])])
        for k, param in enumerate(twin.parameters()):
            total[k] += param.grad / N
            spread += (param.grad - exact[k]).square().sum().item()
    assert spread > 1e-6  # single estimates do differ
    for mean, gradient in zip(total, exact, strict=True):
        torch.testing.assert_close(mean, gradient, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_sample_twice_in_a_batch_counts_once_in_the_table(kind: str) -> None:
    model = MODELS[kind]()
    twin = copy.deepcopy(model)
    opt = SAGA(model.parameters(), 0.2, N, table=kind, table_dtype=torch.int8)
    dense = DenseSAGA(twin, 0.2, kind, torch.int8)
    for index in ([3, 3, 5], [5, 3, 5, 3], [7, 3], [7, 7]):
        _run(model, opt, [torch.tensor(index)])
        dense.step(torch.tensor(index))
    for param, reference, mean in zip(model.parameters(), dense.params, dense.mean(), strict=True):
        torch.testing.assert_close(param, reference, rtol=0, atol=1e-12)
        torch.testing.assert_close(opt.state[param]["gradient_mean"], mean, rtol=0, atol=1e-12)


def test_factored_stores_inputs_that_change() -> None:
    """With noisy inputs the mean is still that of what is stored."""
    model = _linear()
    opt = SAGA(model.parameters(), 0.1, N, table="factored")
    x, y = _data()
    for index in _batches(3):
        noisy = x[index] + torch.randn(len(index), 5)
        opt.step(lambda i=index, v=noisy: F.cross_entropy(model(v), y[i]), index=index)
    state = opt.state[model.weight]
    mean = state["output_grad"].double().T @ state["input"].double() / N
    torch.testing.assert_close(state["gradient_mean"], mean, rtol=0, atol=1e-14)


# --- optima ---


def _digits() -> tuple[Tensor, Tensor]:
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(data.data / 16)
    return x - x.mean(0), torch.tensor(data.target)


def _objective(linear: nn.Linear, x: Tensor, y: Tensor, l2: float = 0.0, l1: float = 0.0) -> float:
    with torch.no_grad():
        penalty = 0.5 * l2 * linear.weight.square().sum() + l1 * linear.weight.abs().sum()
        return float(F.cross_entropy(linear(x), y) + penalty)


def _fitted(estimator: Any, x: Tensor, y: Tensor) -> nn.Linear:
    estimator.fit(x.numpy(), y.numpy())
    linear = nn.Linear(x.shape[1], len(estimator.classes_)).double()
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(estimator.coef_))
        linear.bias.copy_(torch.tensor(estimator.intercept_))
    return linear


def _train(opt: SAGA, linear: nn.Linear, x: Tensor, y: Tensor, epochs: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for index in torch.randperm(len(y), generator=generator).split(batch):
            opt.step(lambda i=index: F.cross_entropy(linear(x[i]), y[i]), index=index)


@functools.cache
def _ridge_optimum(l2: float) -> nn.Linear:
    from sklearn.linear_model import LogisticRegression

    x, y = _digits()
    solver = LogisticRegression(C=1 / (l2 * len(y)), solver="newton-cg", tol=1e-12, max_iter=1000)
    return _fitted(solver, x, y)


@pytest.mark.parametrize(
    ("dtype", "floor", "table_bytes"),
    [
        (torch.float64, (0.0, 1e-12), 1797 * 88),  # with a checksum of 8 bytes
        (torch.float32, (0.0, 1e-12), 1797 * 48),
        (torch.bfloat16, (1e-10, 1e-6), 1797 * 28),
        (torch.int8, (1e-9, 1e-5), 1797 * 22),
    ],
)
def test_reaches_the_optimum_of_scikit_learn(
    dtype: torch.dtype, floor: tuple[float, float], table_bytes: int
) -> None:
    x, y = _digits()
    l2 = 0.01
    reference = _ridge_optimum(l2)
    linear = nn.Linear(64, 10).double()
    groups = [{"params": [linear.weight], "weight_decay": l2}, {"params": [linear.bias]}]
    opt = SAGA(groups, lr=1.0, num_samples=len(y), table_dtype=dtype)
    _train(opt, linear, x, y, epochs=25, batch=32)
    gap = _objective(linear, x, y, l2) - _objective(reference, x, y, l2)
    assert opt.table_bytes == table_bytes
    assert gap > -1e-12
    assert floor[0] <= gap + 1e-12
    assert gap < floor[1]


def test_l1_reaches_the_optimum_of_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression

    x, y = _digits()
    l1 = 0.02
    reference = _fitted(
        LogisticRegression(
            l1_ratio=1, C=1 / (l1 * len(y)), solver="saga", tol=1e-12, max_iter=1000, random_state=0
        ),
        x,
        y,
    )
    linear = nn.Linear(64, 10).double()
    groups = [{"params": [linear.weight], "l1": l1}, {"params": [linear.bias]}]
    opt = SAGA(groups, lr=1.0, num_samples=len(y))
    _train(opt, linear, x, y, epochs=120, batch=32)
    gap = _objective(linear, x, y, l1=l1) - _objective(reference, x, y, l1=l1)
    assert abs(gap) < 1e-12
    assert torch.equal(linear.weight == 0, reference.weight == 0)
    assert 100 < int((linear.weight == 0).sum()) < 640


# --- what a step takes ---


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (_linear, "scalar"),
        (lambda: nn.Sequential(nn.Dropout(0.0), nn.Linear(5, 3)).double(), "scalar"),
        (_mlp, "factored"),
        (_conv, "full"),
    ],
)
def test_auto_picks_the_smallest_that_fits(make: Callable[[], nn.Module], kind: str) -> None:
    model = make()
    opt = SAGA(model.parameters(), 0.1, N)
    assert opt.param_groups[0]["table"] == "auto"
    assert opt.table_bytes == 0
    _run(model, opt, _batches(1))
    assert opt.param_groups[0]["table"] == kind
    numbers = {
        "scalar": 3,
        "factored": 5 + 7 + 7 + 3,
        "full": sum(p.numel() for p in model.parameters()),
    }
    assert opt.table_bytes == N * (4 * numbers[kind] + 8 * (kind == "scalar"))


def test_a_layer_behind_a_trained_one_is_not_scalar() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(5, dtype=torch.float64))
            self.linear = nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(input=x * self.scale)

    model = Scaled()
    only_layer = SAGA(model.linear.parameters(), 0.1, N)
    _run(model, only_layer, _batches(1)[:1])
    assert only_layer.param_groups[0]["table"] == "factored"
    everything = SAGA(model.parameters(), 0.1, N)
    _run(model, everything, _batches(1)[:1])
    assert everything.param_groups[0]["table"] == "full"


@pytest.mark.parametrize("kind", KINDS)
def test_forms_of_the_loss(kind: str) -> None:
    """Mean or losses, with or without backward in the closure: the same step."""
    first = MODELS[kind]()
    x, y = _data()
    forms: list[Callable[[nn.Module, SAGA, list[int]], Tensor]] = [
        lambda model, opt, i: F.cross_entropy(model(x[i]), y[i]),
        lambda model, opt, i: F.cross_entropy(model(x[i]), y[i], reduction="none"),
        lambda model, opt, i: _backward(opt, F.cross_entropy(model(x[i]), y[i])),
    ]
    results = []
    for form in forms:
        model = copy.deepcopy(first)
        opt = SAGA(model.parameters(), 0.3, N, table=kind)
        for i in (4, 9, 4):
            loss = opt.step(lambda f=form, m=model, o=opt, j=i: f(m, o, [j]), index=i)
            assert loss.shape in ((), (1,))
        results.append(list(model.parameters()))
    for result in results[1:]:
        for mine, theirs in zip(results[0], result, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-15)


def _backward(opt: SAGA, loss: Tensor) -> Tensor:
    opt.zero_grad()
    loss.backward()
    return loss


def test_fixed_minibatches_share_a_row() -> None:
    """A minibatch is a sample of the mean of minibatch losses."""
    model = _conv()
    x, y = _data()
    parts = torch.arange(20).split(5)
    opt = SAGA(model.parameters(), 0.05, num_samples=4)
    for k in [0, 1, 2, 3] * 3:
        opt.step(lambda i=parts[k]: F.cross_entropy(model(x[i]), y[i]), index=k)
    assert opt.state[next(model.parameters())]["gradient"].shape == (4, 6)
    opt.param_groups[0]["lr"] = 0.0
    estimates: list[list[Tensor]] = []
    for k in range(4):
        twin, other = copy.deepcopy((model, opt))
        other.step(lambda m=twin, i=parts[k]: F.cross_entropy(m(x[i]), y[i]), index=[k])
        estimates.append([p.grad for p in twin.parameters()])
    exact = torch.autograd.grad(F.cross_entropy(model(x[:20]), y[:20]), list(model.parameters()))
    for mean, gradient in zip(zip(*estimates, strict=True), exact, strict=True):
        torch.testing.assert_close(torch.stack(mean).mean(0), gradient, rtol=0, atol=1e-14)


def test_penalties_in_the_loss_stay_exact() -> None:
    model = _linear()
    twin = copy.deepcopy(model)
    x, y = _data()
    inside = SAGA(model.parameters(), 0.2, N)
    outside = SAGA(twin.parameters(), 0.2, N, weight_decay=0.3)
    for index in _batches(2):
        inside.step(
            lambda i=index: (
                F.cross_entropy(model(x[i]), y[i])
                + 0.15 * sum(p.square().sum() for p in model.parameters())
            ),
            index=index,
        )
    _run(twin, outside, _batches(2), "mean")
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("index", [[1, 4], (1, 4), range(1, 7, 3), torch.tensor([1, 4]).int()])
def test_kinds_of_index(index: Any) -> None:
    model = _linear()
    twin = copy.deepcopy(model)
    x, y = _data()
    opt = SAGA(model.parameters(), 0.2, N)
    opt.step(lambda: F.cross_entropy(model(x[[1, 4]]), y[[1, 4]]), index=index)
    _run(twin, SAGA(twin.parameters(), 0.2, N), [torch.tensor([1, 4])])
    assert torch.equal(model.weight, twin.weight)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters_stay(frozen: str) -> None:
    model = _linear()
    getattr(model, frozen).requires_grad_(False)
    before = getattr(model, frozen).clone()
    everything, twin = copy.deepcopy((model, model))
    moving = "bias" if frozen == "weight" else "weight"
    a = SAGA(everything.parameters(), 0.2, N)
    b = SAGA([getattr(twin, moving)], 0.2, N)
    _run(everything, a, _batches(2))
    _run(twin, b, _batches(2))
    assert torch.equal(getattr(everything, frozen), before)
    assert torch.equal(getattr(everything, moving), getattr(twin, moving))


def test_groups_have_their_own_options() -> None:
    model = _linear()
    groups = [{"params": [model.weight], "lr": 0.0}, {"params": [model.bias], "l1": 1e3}]
    before = model.weight.detach().clone()
    _run(model, SAGA(groups, 0.2, N), _batches(1))
    assert torch.equal(model.weight, before)
    assert model.bias.tolist() == [0, 0, 0]  # the proximal step of a huge l1


def test_proximal_step_by_hand() -> None:
    linear = nn.Linear(4, 1, bias=False).double()
    nn.init.zeros_(linear.weight)
    x = torch.tensor([[1.0, -3.0, 0.5, 0.0]], dtype=torch.float64)
    opt = SAGA(linear.parameters(), 0.5, 1, l1=0.8)
    opt.step(lambda: -linear(x).sum(), index=0)  # to 0.5 x, then 0.4 towards zero
    expected = torch.tensor([[0.1, -1.1, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(linear.weight.detach(), expected, rtol=0, atol=1e-15)


def test_group_added_later_begins_with_zeros() -> None:
    model = _mlp()
    opt = SAGA(model[2].parameters(), 0.1, N)
    _run(model, opt, _batches(1))
    assert opt.param_groups[0]["table"] == "factored"
    opt.add_param_group({"params": model[0].parameters(), "lr": 0.05})
    _run(model, opt, _batches(1)[:1])
    assert [group["table"] for group in opt.param_groups] == ["factored"] * 2
    assert int(opt.state[model[0].weight]["output_grad"].any(1).sum()) == 4


def test_nothing_stays_on_the_model() -> None:
    from torch.nn.modules import module

    model = _linear()
    _run(model, SAGA(model.parameters(), 0.1, N), _batches(1))
    assert not model._forward_hooks
    for name in dir(module):
        if name.startswith("_global_") and "hooks" in name:
            assert not getattr(module, name), name


def test_other_calls_without_gradient_do_not_count() -> None:
    model = _linear()
    x, y = _data()

    def closure() -> Tensor:
        with torch.no_grad():
            model(x)
        return F.cross_entropy(model(x[:2]), y[:2])

    opt = SAGA(model.parameters(), 0.1, N)
    opt.step(closure, index=[0, 1])
    assert opt.param_groups[0]["table"] == "scalar"


def test_float32_models_and_tensor_rates() -> None:
    model = _linear().float()
    x, y = _data()
    opt = SAGA(model.parameters(), torch.tensor(0.2), N)
    twin = copy.deepcopy(model).double()
    _run(twin, SAGA(twin.parameters(), 0.2, N), _batches(3))
    for i in _batches(3):
        opt.step(lambda i=i: F.cross_entropy(model(x[i].float()), y[i]), index=i)
    assert opt.state[model.weight]["gradient_mean"].dtype == torch.float64
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)


# --- what a step refuses ---


def test_index_is_not_optional() -> None:
    model = _linear()
    opt = SAGA(model.parameters(), 0.1, N)
    with pytest.raises(ValueError, match=r"needs index=, .* from 0 to 22: .* plain SGD"):
        opt.step(lambda: model(torch.zeros(1, 5).double()).sum())
    with pytest.raises(ValueError, match="needs a closure"):
        opt.step()
    with pytest.raises(ValueError, match="needs a closure"):
        opt.step(index=[1])


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([], ValueError, "index is empty"),
        ([0, N], IndexError, r"index has 23, but samples are numbered from 0 to 22"),
        ([-1], IndexError, "index has -1"),
        (torch.tensor([0.0]), TypeError, "index must hold integers, got torch.float32"),
        (torch.tensor([True]), TypeError, r"is a mask of torch.bool, .* give mask.nonzero\(\)"),
        ([True, False], TypeError, r"is a mask of torch.bool, .* give mask.nonzero\(\)"),
        (torch.zeros(2).bool().numpy(), TypeError, "is a mask of torch.bool"),
        (torch.tensor([[0]]), ValueError, r"shape \(batch,\), got \(1, 1\)"),
        ([0.5], TypeError, "'float' object cannot be interpreted as an integer"),
        ([0, 1, 2], RuntimeError, r"index has 3 numbers, but Linear.* got 2 rows"),
    ],
)
def test_refused_index(index: Any, error: type[Exception], message: str) -> None:
    model = _linear()
    x, y = _data()
    opt = SAGA(model.parameters(), 0.1, N)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        opt.step(lambda: F.cross_entropy(model(x[:2]), y[:2]), index=index)
    assert not opt.state
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def _shared() -> nn.Module:
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.Tanh(), layer).double()


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    model[2].weight = model[0].weight
    return model.double()


def _sequence() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Linear(1, 3), nn.Flatten()).double()


@pytest.mark.parametrize(
    ("make", "table", "message"),
    [
        (_mlp, "scalar", r"scalar table does not fit: 2 linear layers are called; use table='fac"),
        (_conv, "factored", r"belongs to a Conv1d, which is no nn.Linear; use table='full'"),
        (_shared, "factored", "is called more than once, so its calls share weights"),
        (_tied, "factored", "a parameter is shared by two modules, the second a Linear"),
        (_sequence, "factored", r"has shape \(2, 5, 1\), not \(batch, features\)"),
        (
            _conv,
            "full",
            r"the full table .*needs the gradient of each of the 2 samples; return the ",
        ),
        (_conv, "auto", r"table \(auto chose it: .* Conv1d, which is no nn.Linear\) needs the gra"),
    ],
)
def test_models_that_do_not_fit(make: Callable[[], nn.Module], table: Any, message: str) -> None:
    model = make()
    opt = SAGA(model.parameters(), 0.1, N, table=table)
    with pytest.raises(RuntimeError, match=message):
        _run(model, opt, [torch.tensor([0, 1])], "mean")
    assert not opt.state
    assert opt.param_groups[0]["table"] == table


@pytest.mark.parametrize("make", [_shared, _tied, _sequence])
def test_full_takes_what_the_others_refuse(make: Callable[[], nn.Module]) -> None:
    model = make()
    twin = copy.deepcopy(model)
    opt = SAGA(model.parameters(), 0.1, N, table_dtype=torch.float64)
    dense = DenseSAGA(twin, 0.1, "full", torch.float64)
    for index in _batches(2):
        _run(model, opt, [index])
        dense.step(index)
    assert opt.param_groups[0]["table"] == "full"
    for param, reference in zip(model.parameters(), dense.params, strict=True):
        torch.testing.assert_close(param, reference, rtol=0, atol=1e-12)


def test_parameters_used_by_hand_are_said() -> None:
    weight = nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
    x, y = _data()
    opt = SAGA([weight], 0.1, N, table="factored")
    with pytest.raises(RuntimeError, match="1 of the parameters are not used by calling a module"):
        opt.step(lambda: F.cross_entropy(F.linear(x[:1], weight), y[:1]), index=0)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda out: out, r"mean loss or the losses \(batch,\), got \(2, 3\)"),
        (lambda out: 1.0, "got float"),
        (lambda out: out.flatten(), "the closure returned 6 losses for 2 numbers"),
    ],
)
def test_refused_losses(loss: Callable[[Tensor], Any], message: str) -> None:
    model = _linear()
    opt = SAGA(model.parameters(), 0.1, N)
    with pytest.raises(RuntimeError, match=message):
        opt.step(lambda: loss(model(torch.zeros(2, 5).double())), index=[0, 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_nonfinite_gradients_change_nothing(kind: str, dtype: torch.dtype) -> None:
    model = MODELS[kind]()
    opt = SAGA(model.parameters(), 0.1, N, table=kind, table_dtype=dtype)
    _run(model, opt, _batches(1))
    before = copy.deepcopy((model.state_dict(), opt.state_dict()["state"]))
    x, y = _data()
    bad = torch.tensor([1.0, float("nan")], dtype=torch.float64)
    with pytest.raises(RuntimeError, match="not finite; nothing was stored or changed"):
        opt.step(lambda: F.cross_entropy(model(x[:2]), y[:2], reduction="none") * bad, index=[0, 1])
    after = (model.state_dict(), opt.state_dict()["state"])
    for old, new in ((before[0], after[0]), *((before[1][k], after[1][k]) for k in before[1])):
        for key in old:
            assert torch.equal(old[key], new[key])


# --- inputs of the scalar table, which must stay the same ---

_CHANGED = r"the input of sample \d+ is another one than at its last visit, .* table='factored'"


def _unbiased() -> nn.Module:
    return nn.Linear(5, 3, bias=False).double()


def _backbone() -> nn.Module:
    frozen = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 5)).requires_grad_(False)
    return nn.Sequential(frozen, nn.Dropout(0.3), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("table", ["auto", "scalar"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(5, 3)).double(),
        lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(5, 3, bias=False)).double(),
        _backbone,
    ],
)
def test_random_layers_before_the_linear_one_are_refused(make: Any, table: Any) -> None:
    torch.manual_seed(0)
    model = make()
    trained = [param for param in model.parameters() if param.requires_grad]
    opt = SAGA(trained, 0.1, N, table=table)
    with pytest.raises(RuntimeError, match=_CHANGED):
        _run(model, opt, _batches(2))
    model.eval()
    _run(model, SAGA(trained, 0.1, N, table=table), _batches(2))
    model.train()
    _run(model, SAGA(trained, 0.1, N, table="factored"), _batches(2))


@pytest.mark.parametrize("noise", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("make", [_linear, _unbiased])
def test_noise_is_refused_and_changes_nothing(make: Any, noise: float) -> None:
    model = make()
    opt = SAGA(model.parameters(), 0.1, N)
    _run(model, opt, _batches(1))
    before = copy.deepcopy((model.state_dict(), opt.state_dict()["state"]))
    x, y = _data()
    bad = x[3:6].clone()
    bad[1, 4] += noise
    with pytest.raises(RuntimeError, match="the input of sample 4 is another one"):
        opt.step(lambda: F.cross_entropy(model(bad), y[3:6]), index=[3, 4, 5])
    after = (model.state_dict(), opt.state_dict()["state"])
    for old, new in ((before[0], after[0]), *((before[1][k], after[1][k]) for k in before[1])):
        for key in old:
            assert torch.equal(old[key], new[key])
    _run(model, opt, _batches(1))  # it can go on


def test_two_inputs_of_a_sample_in_one_batch_are_refused() -> None:
    model = _linear()
    x, y = _data()
    opt = SAGA(model.parameters(), 0.1, N)
    with pytest.raises(RuntimeError, match="the input of sample 7 is another one"):
        opt.step(lambda: F.cross_entropy(model(x[[2, 3, 4]]), y[[2, 3, 4]]), index=[7, 1, 7])
    assert not opt.state
    for _ in range(2):
        opt.step(lambda: F.cross_entropy(model(x[[7, 1, 7]]), y[[7, 1, 7]]), index=[7, 1, 7])


def test_an_input_that_was_zero_is_not_unseen() -> None:
    model = _linear()
    x, y = _data()
    opt = SAGA(model.parameters(), 0.1, N)
    for _ in range(2):
        opt.step(lambda: F.cross_entropy(model(0 * x[:1]), y[:1]), index=0)
    with pytest.raises(RuntimeError, match=_CHANGED):
        opt.step(lambda: F.cross_entropy(model(x[:1]), y[:1]), index=0)


def test_small_changes_do_not_add_up() -> None:
    model = _linear()
    x, y = _data()
    opt = SAGA(model.parameters(), 0.0, N)

    def step(change: float) -> None:
        grown = x[:1].abs() * (1 + change)  # of one sign, so the sum grows as much
        opt.step(lambda: F.cross_entropy(model(grown), y[:1]), index=0)

    for k in (0, 1, 2):  # taken as rounding
        step(3e-13 * k)
    with pytest.raises(RuntimeError, match=_CHANGED):
        step(3e-13 * 4)


def test_inputs_do_not_matter_to_a_bias() -> None:
    model = _linear()
    x, y = _data()
    opt = SAGA([model.bias], 0.1, N, table="scalar", max_table_bytes=N * 12)
    for index in _batches(2):
        noisy = x[index] + torch.randn(len(index), 5)
        opt.step(lambda i=index, v=noisy: F.cross_entropy(model(v), y[i]), index=index)
    assert opt.table_bytes == N * 12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [_linear, _unbiased, lambda: _backbone().eval()])
def test_fixed_inputs_are_never_refused(make: Any, dtype: torch.dtype) -> None:
    """In other orders, in batches of other sizes and compositions, also behind fixed layers."""
    torch.manual_seed(0)
    model = make().to(dtype)
    trained = [param for param in model.parameters() if param.requires_grad]
    opt = SAGA(trained, 0.05, N)
    x, y = _data()
    x = x.to(dtype)
    for seed, size in enumerate((1, 4, 7, N, 2, 16)):
        for i in _batches(1, size, seed):
            opt.step(lambda i=i: F.cross_entropy(model(x[i]), y[i], reduction="none"), index=i)
    assert opt.param_groups[0]["table"] == "scalar"
    assert bool((opt.state[trained[0]]["input_sum"] != 0).all())


def test_inputs_under_autocast_are_never_refused() -> None:
    model = _linear().float()
    opt = SAGA(model.parameters(), 0.05, N)
    x, y = _data()
    for i in _batches(3):
        with torch.autocast("cpu", torch.bfloat16):
            opt.step(lambda i=i: F.cross_entropy(model(x[i].float()), y[i]), index=i)
    assert opt.param_groups[0]["table"] == "scalar"


@pytest.mark.parametrize("way", ["state", "file"])
def test_checksums_are_saved(way: str, tmp_path: Path) -> None:
    model = _unbiased()
    opt = SAGA(model.parameters(), 0.1, N)
    _run(model, opt, _batches(1)[:3])
    other = SAGA(model.parameters(), 0.1, N)
    if way == "state":
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
    else:
        opt.save_table(tmp_path / "table")
        other.load_table(tmp_path / "table")
    sums = other.state[model.weight]["input_sum"]
    assert torch.equal(sums, opt.state[model.weight]["input_sum"])
    assert int((sums == 0).sum()) == N - 12  # those not seen yet
    assert other.table_bytes == opt.table_bytes == N * (3 * 4 + 8)
    x, y = _data()
    seen = int(_batches(1)[0][0])
    with pytest.raises(RuntimeError, match=f"the input of sample {seen} is another one"):
        other.step(lambda: F.cross_entropy(model(-x[[seen]]), y[[seen]]), index=seen)
    _run(model, other, _batches(2))


@pytest.mark.parametrize("way", ["state", "file"])
def test_version_1_had_no_checksums(way: str, tmp_path: Path) -> None:
    model = _linear()
    opt = SAGA(model.parameters(), 0.1, N)
    _run(model, opt, _batches(1))
    del opt.state[model.weight]["input_sum"]
    other = SAGA(model.parameters(), 0.1, N)
    if way == "state":
        saved = copy.deepcopy(opt.state_dict())
        saved["param_groups"][0]["torsh_version"] = 1
        other.load_state_dict(saved)
    else:
        opt.save_table(tmp_path / "table")
        other.load_table(tmp_path / "table")
    assert other.param_groups[0]["torsh_version"] == 2
    _run(model, other, [torch.tensor([4])])
    assert other.state[model.weight]["input_sum"].nonzero().tolist() == [[4]]
    x, y = _data()
    with pytest.raises(RuntimeError, match="the input of sample 4 is another one"):
        other.step(lambda: F.cross_entropy(model(x[[5]]), y[[5]]), index=4)


def test_large_tables_are_refused_with_their_bytes() -> None:
    """The full table at once, the others before anything is allocated."""
    model = _mlp()
    with pytest.raises(
        ValueError, match=r"full table needs 6,600,000,000 bytes \(25,000,000 samples of 66 numbe"
    ):
        SAGA(model.parameters(), 0.1, 25_000_000, table="full")
    opt = SAGA(model.parameters(), 0.1, N, max_table_bytes=N * 22 * 4 - 1)
    with pytest.raises(ValueError, match="the factored table needs 2,024 bytes"):
        _run(model, opt, _batches(1)[:1])
    assert not opt.state


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -0.1}, ValueError, "lr=-0.1 must be a finite number of at least 0"),
        ({"lr": float("nan")}, ValueError, "lr=nan must be"),
        ({"lr": "1e-3"}, TypeError, "lr='1e-3' is a str, not a number"),
        ({"lr": True}, TypeError, "lr=True is a bool, not a number"),
        ({"weight_decay": "0"}, TypeError, "weight_decay='0' is a str, not a number"),
        ({"l1": "0"}, TypeError, "l1='0' is a str, not a number"),
        ({"lr": torch.ones(2)}, ValueError, r"lr is a tensor of shape \(2,\)"),
        ({"l1": -1.0}, ValueError, "l1=-1.0 must be"),
        ({"weight_decay": float("inf")}, ValueError, "weight_decay=inf must be"),
        ({"num_samples": 0}, ValueError, "num_samples=0 must be an integer of at least 1"),
        ({"num_samples": 2.0}, ValueError, "num_samples=2.0 must be"),
        ({"max_table_bytes": True}, ValueError, "max_table_bytes=True must be"),
        ({"table": "dense"}, ValueError, "table='dense' must be one of auto, scalar, factored"),
        ({"table_dtype": torch.float16}, TypeError, "table_dtype=torch.float16 must be"),
        ({"params": [nn.Parameter(torch.zeros(1) + 0j)]}, ValueError, "got torch.complex64"),
    ],
)
def test_refused_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"params": _linear().parameters(), "lr": 0.1, "num_samples": N, **options}
    with pytest.raises(error, match=message):
        SAGA(**options)


def test_refused_groups() -> None:
    model = _linear()
    with pytest.raises(ValueError, match="unknown option 'weigth_decay'"):
        SAGA([{"params": [model.weight], "weigth_decay": 0.1}], 0.1, N)
    with pytest.raises(ValueError, match=r"num_samples=5 in a parameter group; it is 23 for all"):
        SAGA([{"params": [model.weight], "num_samples": 5}], 0.1, N)
    with pytest.raises(ValueError, match="l1=-1 must be"):
        SAGA([{"params": [model.weight], "l1": -1}], 0.1, N)
    opt = SAGA([model.bias], 0.1, N, table="full", max_table_bytes=N * 12)
    with pytest.raises(ValueError, match="the full table needs"):
        opt.add_param_group({"params": [model.weight]})
    assert len(opt.param_groups) == 1


# --- the contract of an optimizer, and continuing ---


def _continue(
    run: Callable[[nn.Module, SAGA], tuple[nn.Module, SAGA]], kind: str, dtype: Any
) -> None:
    """Go on in the middle of an epoch, with and without ``run`` in between: the same bits."""
    model = MODELS[kind]()
    opt = SAGA(model.parameters(), 0.2, N, table_dtype=dtype, weight_decay=0.01, l1=1e-4)
    batches = _batches(3)
    _run(model, opt, batches[:9])
    twin, other = run(model, opt)
    _run(model, opt, batches[9:])
    _run(twin, other, batches[9:])
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for key, value in opt.state[mine].items():
            assert torch.equal(value, other.state[theirs][key])
            assert value.dtype == other.state[theirs][key].dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_resume_through_a_state_dict(kind: str, dtype: torch.dtype) -> None:
    def resume(model: nn.Module, opt: SAGA) -> tuple[nn.Module, SAGA]:
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        twin = MODELS[kind]()
        twin.load_state_dict(saved["model"])
        other = SAGA(twin.parameters(), 9.0, N)
        other.load_state_dict(saved["opt"])
        assert other.param_groups[0]["lr"] == 0.2
        assert other.param_groups[0]["table"] == kind
        return twin, other

    _continue(resume, kind, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_resume_through_a_file(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def resume(model: nn.Module, opt: SAGA) -> tuple[nn.Module, SAGA]:
        opt.save_table(tmp_path / "table.saga")
        twin = copy.deepcopy(model)
        other = SAGA(twin.parameters(), 0.2, N, weight_decay=0.01, l1=1e-4)
        other.load_table(str(tmp_path / "table.saga"))
        return twin, other

    _continue(resume, kind, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_go_on_alone(kind: str) -> None:
    _continue(lambda model, opt: copy.deepcopy((model, opt)), kind, torch.int8)
    _continue(lambda model, opt: pickle.loads(pickle.dumps((model, opt))), kind, torch.bfloat16)


def test_load_goes_by_names() -> None:
    model = _linear()
    opt = SAGA(model.named_parameters(), 0.1, N)
    _run(model, opt, _batches(1))
    saved = opt.state_dict()
    turned = SAGA([("bias", model.bias), ("weight", model.weight)], 0.1, N)
    turned.load_state_dict(saved)
    for param in model.parameters():
        for key, value in opt.state[param].items():
            assert torch.equal(turned.state[param][key], value)
            assert turned.state[param][key] is not value


def _drop_version(saved: dict[str, Any]) -> None:
    del saved["param_groups"][0]["torsh_version"]


def _other_data(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["num_samples"] = 7


def _cast(saved: dict[str, Any]) -> None:
    saved["state"][0]["output_grad"] = saved["state"][0]["output_grad"].double()


def _extra(saved: dict[str, Any]) -> None:
    saved["state"][1]["exp_avg"] = torch.zeros(3)


def _stray(saved: dict[str, Any]) -> None:
    saved["state"][5] = {}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_version, "torsh_version=None of the loaded state is not between 1 and 2"),
        (_other_data, "the loaded table is for num_samples=7, this SAGA for 23"),
        (_cast, r"'output_grad' of parameter 0 is \(23, 3\) in torch.float64, not \(23, 3\) in to"),
        (_extra, "'exp_avg' of parameter 1 does not belong in a scalar table"),
        (_stray, "state 5 of the loaded state belongs to no parameter"),
    ],
)
def test_foreign_states_are_refused(damage: Callable[[dict[str, Any]], None], message: str) -> None:
    model = _linear()
    opt = SAGA(model.parameters(), 0.1, N)
    _run(model, opt, _batches(1))
    saved = copy.deepcopy(opt.state_dict())
    damage(saved)
    other = SAGA(model.parameters(), 0.1, N)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
    assert not other.state
    assert other.param_groups[0]["table"] == "auto"


@pytest.mark.parametrize("make", [torch.optim.AdamW, AdamW])
def test_states_of_other_optimizers_are_refused(make: Any) -> None:
    model = _linear()
    other = make(model.parameters(), lr=0.1)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    other.step()
    opt = SAGA(model.parameters(), 0.1, N)
    with pytest.raises(ValueError, match=r"is that of another optimizer: .* but .*betas, "):
        opt.load_state_dict(other.state_dict())
    assert not opt.state


def test_files_of_other_models_and_data_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table"
    model = _linear()
    opt = SAGA(model.parameters(), 0.1, N)
    with pytest.raises(RuntimeError, match="no table to save before the first step"):
        opt.save_table(path)
    _run(model, opt, _batches(1))
    opt.save_table(path)
    with pytest.raises(ValueError, match="is for num_samples=23, this SAGA for 24"):
        SAGA(model.parameters(), 0.1, N + 1).load_table(path)
    with pytest.raises(ValueError, match=r"has '1/gradient_mean', but there is no parameter '1'"):
        SAGA([model.weight], 0.1, N).load_table(path)
    with pytest.raises(ValueError, match=r"'output_grad' of parameter '0' is \(23, 3\) in torch."):
        SAGA(nn.Linear(5, 4).double().parameters(), 0.1, N).load_table(path)
    damaged = bytearray(path.read_bytes())
    damaged[40] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="chunk 0 of '0/output_grad' is damaged"):
        SAGA(model.parameters(), 0.1, N).load_table(path)


def test_schedulers_and_hooks() -> None:
    model = _linear()
    opt = SAGA(model.parameters(), 1.0, N)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    opt.register_load_state_dict_pre_hook(lambda *_: seen.append("load pre"))
    opt.register_load_state_dict_post_hook(lambda *_: seen.append("load post"))
    _run(model, opt, _batches(1)[:2])
    scheduler.step()
    assert opt.param_groups[0]["lr"] == 0.5
    opt.load_state_dict(opt.state_dict())
    assert seen == ["pre", "post", "pre", "post", "load pre", "load post"]


def test_distributed_checkpoint_format() -> None:
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def resume(model: nn.Module, opt: SAGA) -> tuple[nn.Module, SAGA]:
        saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
        twin = copy.deepcopy(model)
        other = SAGA(twin.parameters(), 0.3, N)
        set_optimizer_state_dict(twin, other, saved)
        return twin, other

    _continue(resume, "factored", torch.int8)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_models(kind: str) -> None:
    model = MODELS[kind]()
    twin = copy.deepcopy(model)
    opt = SAGA(model.parameters(), 0.2, N, table=kind)
    model.compile(backend="eager")
    _run(model, opt, _batches(2, size=1))
    _run(twin, SAGA(twin.parameters(), 0.2, N, table=kind), _batches(2, size=1))
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_equals_cpu(kind: str, dtype: torch.dtype) -> None:
    model = MODELS[kind]()
    twin = copy.deepcopy(model).cuda()
    opt = SAGA(model.parameters(), 0.2, N, table=kind, table_dtype=dtype)
    other = SAGA(twin.parameters(), 0.2, N, table=kind, table_dtype=dtype)
    x, y = _data()
    for index in _batches(2):
        _run(model, opt, [index])
        xs, ys = x[index].cuda(), y[index].cuda()
        other.step(lambda a=xs, b=ys: F.cross_entropy(twin(a), b, reduction="none"), index=index)
    # float64; products are summed in another order, which may turn single int8 codes
    atol = 1e-3 if dtype == torch.int8 else 1e-10 if dtype == torch.float64 else 1e-4
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.cpu(), rtol=0, atol=atol)
