"""What a step of SAGA takes, and what it and the constructor refuse."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.optim.saga_problem import (
    DTYPES,
    KINDS,
    MODELS,
    N,
    cnn,
    linear_net,
    make_batches,
    make_data,
    mlp,
    run_saga,
)
from torsh_optim._saga import SAGA


@pytest.mark.parametrize("kind", KINDS)
def test_forms_of_the_loss(kind: str) -> None:
    """Mean or losses, with or without backward in the closure: the same step."""
    first = MODELS[kind]()
    x, y = make_data()
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
    model = cnn()
    x, y = make_data()
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
    model = linear_net()
    twin = copy.deepcopy(model)
    x, y = make_data()
    inside = SAGA(model.parameters(), 0.2, N)
    outside = SAGA(twin.parameters(), 0.2, N, weight_decay=0.3)
    for index in make_batches(2):
        inside.step(
            lambda i=index: (
                F.cross_entropy(model(x[i]), y[i])
                + 0.15 * sum(p.square().sum() for p in model.parameters())
            ),
            index=index,
        )
    run_saga(twin, outside, make_batches(2), "mean")
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("index", [[1, 4], (1, 4), range(1, 7, 3), torch.tensor([1, 4]).int()])
def test_kinds_of_index(index: Any) -> None:
    model = linear_net()
    twin = copy.deepcopy(model)
    x, y = make_data()
    opt = SAGA(model.parameters(), 0.2, N)
    opt.step(lambda: F.cross_entropy(model(x[[1, 4]]), y[[1, 4]]), index=index)
    run_saga(twin, SAGA(twin.parameters(), 0.2, N), [torch.tensor([1, 4])])
    assert torch.equal(model.weight, twin.weight)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters_stay(frozen: str) -> None:
    model = linear_net()
    getattr(model, frozen).requires_grad_(False)
    before = getattr(model, frozen).clone()
    everything, twin = copy.deepcopy((model, model))
    moving = "bias" if frozen == "weight" else "weight"
    a = SAGA(everything.parameters(), 0.2, N)
    b = SAGA([getattr(twin, moving)], 0.2, N)
    run_saga(everything, a, make_batches(2))
    run_saga(twin, b, make_batches(2))
    assert torch.equal(getattr(everything, frozen), before)
    assert torch.equal(getattr(everything, moving), getattr(twin, moving))


def test_groups_have_their_own_options() -> None:
    model = linear_net()
    groups = [{"params": [model.weight], "lr": 0.0}, {"params": [model.bias], "l1": 1e3}]
    before = model.weight.detach().clone()
    run_saga(model, SAGA(groups, 0.2, N), make_batches(1))
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
    model = mlp()
    opt = SAGA(model[2].parameters(), 0.1, N)
    run_saga(model, opt, make_batches(1))
    assert opt.param_groups[0]["table"] == "factored"
    opt.add_param_group({"params": model[0].parameters(), "lr": 0.05})
    run_saga(model, opt, make_batches(1)[:1])
    assert [group["table"] for group in opt.param_groups] == ["factored"] * 2
    assert int(opt.state[model[0].weight]["output_grad"].any(1).sum()) == 4


def test_float32_models_and_tensor_rates() -> None:
    model = linear_net().float()
    x, y = make_data()
    opt = SAGA(model.parameters(), torch.tensor(0.2), N)
    twin = copy.deepcopy(model).double()
    run_saga(twin, SAGA(twin.parameters(), 0.2, N), make_batches(3))
    for i in make_batches(3):
        opt.step(lambda i=i: F.cross_entropy(model(x[i].float()), y[i]), index=i)
    assert opt.state[model.weight]["gradient_mean"].dtype == torch.float64
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)


# --- what a step refuses ---


def test_index_is_not_optional() -> None:
    model = linear_net()
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
    model = linear_net()
    x, y = make_data()
    opt = SAGA(model.parameters(), 0.1, N)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        opt.step(lambda: F.cross_entropy(model(x[:2]), y[:2]), index=index)
    assert not opt.state
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda out: out, r"mean loss or the losses \(batch,\), got \(2, 3\)"),
        (lambda out: 1.0, "got float"),
        (lambda out: out.flatten(), "the closure returned 6 losses for 2 numbers"),
    ],
)
def test_refused_losses(loss: Callable[[Tensor], Any], message: str) -> None:
    model = linear_net()
    opt = SAGA(model.parameters(), 0.1, N)
    with pytest.raises(RuntimeError, match=message):
        opt.step(lambda: loss(model(torch.zeros(2, 5).double())), index=[0, 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_nonfinite_gradients_change_nothing(kind: str, dtype: torch.dtype) -> None:
    model = MODELS[kind]()
    opt = SAGA(model.parameters(), 0.1, N, table=kind, table_dtype=dtype)
    run_saga(model, opt, make_batches(1))
    before = copy.deepcopy((model.state_dict(), opt.state_dict()["state"]))
    x, y = make_data()
    bad = torch.tensor([1.0, float("nan")], dtype=torch.float64)
    with pytest.raises(RuntimeError, match="not finite; nothing was stored or changed"):
        opt.step(lambda: F.cross_entropy(model(x[:2]), y[:2], reduction="none") * bad, index=[0, 1])
    after = (model.state_dict(), opt.state_dict()["state"])
    for old, new in ((before[0], after[0]), *((before[1][k], after[1][k]) for k in before[1])):
        for key in old:
            assert torch.equal(old[key], new[key])


# --- what the constructor refuses ---


def test_large_tables_are_refused_with_their_bytes() -> None:
    """The full table at once, the others before anything is allocated."""
    model = mlp()
    with pytest.raises(
        ValueError, match=r"full table needs 6,600,000,000 bytes \(25,000,000 samples of 66 numbe"
    ):
        SAGA(model.parameters(), 0.1, 25_000_000, table="full")
    opt = SAGA(model.parameters(), 0.1, N, max_table_bytes=N * 22 * 4 - 1)
    with pytest.raises(ValueError, match="the factored table needs 2,024 bytes"):
        run_saga(model, opt, make_batches(1)[:1])
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
    options = {"params": linear_net().parameters(), "lr": 0.1, "num_samples": N, **options}
    with pytest.raises(error, match=message):
        SAGA(**options)


def test_refused_groups() -> None:
    model = linear_net()
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
