"""SAGA against a dense table of every sample's gradient, and against scikit-learn's optimum."""

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.optim.saga_problem import (
    DTYPES,
    KINDS,
    MODELS,
    DenseSAGA,
    N,
    linear_net,
    make_batches,
    make_data,
    run_saga,
)
from torsh_optim._saga import SAGA


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_dense_table(kind: str, dtype: torch.dtype) -> None:
    model = MODELS[kind]()
    twin = copy.deepcopy(model)
    opt = SAGA(model.parameters(), 0.2, N, table=kind, table_dtype=dtype, weight_decay=0.01)
    dense = DenseSAGA(twin, 0.2, kind, dtype, wd=0.01)
    for step, index in enumerate(make_batches(3)):
        run_saga(model, opt, [index])
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
        run_saga(model, opt, make_batches(2))
    for other in models[1:]:
        for mine, theirs in zip(first.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_estimate_is_unbiased(kind: str, dtype: torch.dtype) -> None:
    """Its mean over all samples is the gradient, from any state and however rounded."""
    model = MODELS[kind]()
    opt = SAGA(model.parameters(), 0.2, N, table=kind, table_dtype=dtype)
    run_saga(model, opt, make_batches(2)[:8])  # some samples twice, some once
    opt.param_groups[0]["lr"] = 0.0
    x, y = make_data()
    exact = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    total = [torch.zeros_like(p) for p in model.parameters()]
    spread = 0.0
    for i in range(N):
        twin, other = copy.deepcopy((model, opt))
        run_saga(twin, other, [torch.tensor([i])])
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
        run_saga(model, opt, [torch.tensor(index)])
        dense.step(torch.tensor(index))
    for param, reference, mean in zip(model.parameters(), dense.params, dense.mean(), strict=True):
        torch.testing.assert_close(param, reference, rtol=0, atol=1e-12)
        torch.testing.assert_close(opt.state[param]["gradient_mean"], mean, rtol=0, atol=1e-12)


def test_factored_stores_inputs_that_change() -> None:
    """With noisy inputs the mean is still that of what is stored."""
    model = linear_net()
    opt = SAGA(model.parameters(), 0.1, N, table="factored")
    x, y = make_data()
    for index in make_batches(3):
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


# --- the contract of an optimizer ---


def test_schedulers_and_hooks() -> None:
    model = linear_net()
    opt = SAGA(model.parameters(), 1.0, N)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    opt.register_load_state_dict_pre_hook(lambda *_: seen.append("load pre"))
    opt.register_load_state_dict_post_hook(lambda *_: seen.append("load post"))
    run_saga(model, opt, make_batches(1)[:2])
    scheduler.step()
    assert opt.param_groups[0]["lr"] == 0.5
    opt.load_state_dict(opt.state_dict())
    assert seen == ["pre", "post", "pre", "post", "load pre", "load post"]


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_models(kind: str) -> None:
    model = MODELS[kind]()
    twin = copy.deepcopy(model)
    opt = SAGA(model.parameters(), 0.2, N, table=kind)
    model.compile(backend="eager")
    run_saga(model, opt, make_batches(2, size=1))
    run_saga(twin, SAGA(twin.parameters(), 0.2, N, table=kind), make_batches(2, size=1))
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
    x, y = make_data()
    for index in make_batches(2):
        run_saga(model, opt, [index])
        xs, ys = x[index].cuda(), y[index].cuda()
        other.step(lambda a=xs, b=ys: F.cross_entropy(twin(a), b, reduction="none"), index=index)
    # float64; products are summed in another order, which may turn single int8 codes
    atol = 1e-3 if dtype == torch.int8 else 1e-10 if dtype == torch.float64 else 1e-4
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.cpu(), rtol=0, atol=atol)
