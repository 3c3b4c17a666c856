"""Which tables fit a model, and inputs that must not change under a scalar one."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.optim.saga_problem import (
    DenseSAGA,
    N,
    cnn,
    linear_net,
    make_batches,
    make_data,
    mlp,
    run_saga,
    unbiased_net,
)
from torsh_optim._saga import SAGA

# --- what fits a model ---


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (linear_net, "scalar"),
        (lambda: nn.Sequential(nn.Dropout(0.0), nn.Linear(5, 3)).double(), "scalar"),
        (mlp, "factored"),
        (cnn, "full"),
    ],
)
def test_auto_picks_the_smallest_that_fits(make: Callable[[], nn.Module], kind: str) -> None:
    model = make()
    opt = SAGA(model.parameters(), 0.1, N)
    assert opt.param_groups[0]["table"] == "auto"
    assert opt.table_bytes == 0
    run_saga(model, opt, make_batches(1))
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
    run_saga(model, only_layer, make_batches(1)[:1])
    assert only_layer.param_groups[0]["table"] == "factored"
    everything = SAGA(model.parameters(), 0.1, N)
    run_saga(model, everything, make_batches(1)[:1])
    assert everything.param_groups[0]["table"] == "full"


def test_nothing_stays_on_the_model() -> None:
    from torch.nn.modules import module

    model = linear_net()
    run_saga(model, SAGA(model.parameters(), 0.1, N), make_batches(1))
    assert not model._forward_hooks
    for name in dir(module):
        if name.startswith("_global_") and "hooks" in name:
            assert not getattr(module, name), name


def test_other_calls_without_gradient_do_not_count() -> None:
    model = linear_net()
    x, y = make_data()

    def closure() -> Tensor:
        with torch.no_grad():
            model(x)
        return F.cross_entropy(model(x[:2]), y[:2])

    opt = SAGA(model.parameters(), 0.1, N)
    opt.step(closure, index=[0, 1])
    assert opt.param_groups[0]["table"] == "scalar"


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
        (mlp, "scalar", r"scalar table does not fit: 2 linear layers are called; use table='fac"),
        (cnn, "factored", r"belongs to a Conv1d, which is no nn.Linear; use table='full'"),
        (_shared, "factored", "is called more than once, so its calls share weights"),
        (_tied, "factored", "a parameter is shared by two modules, the second a Linear"),
        (_sequence, "factored", r"has shape \(2, 5, 1\), not \(batch, features\)"),
        (
            cnn,
            "full",
            r"the full table .*needs the gradient of each of the 2 samples; return the ",
        ),
        (cnn, "auto", r"table \(auto chose it: .* Conv1d, which is no nn.Linear\) needs the gra"),
    ],
)
def test_models_that_do_not_fit(make: Callable[[], nn.Module], table: Any, message: str) -> None:
    model = make()
    opt = SAGA(model.parameters(), 0.1, N, table=table)
    with pytest.raises(RuntimeError, match=message):
        run_saga(model, opt, [torch.tensor([0, 1])], "mean")
    assert not opt.state
    assert opt.param_groups[0]["table"] == table


@pytest.mark.parametrize("make", [_shared, _tied, _sequence])
def test_full_takes_what_the_others_refuse(make: Callable[[], nn.Module]) -> None:
    model = make()
    twin = copy.deepcopy(model)
    opt = SAGA(model.parameters(), 0.1, N, table_dtype=torch.float64)
    dense = DenseSAGA(twin, 0.1, "full", torch.float64)
    for index in make_batches(2):
        run_saga(model, opt, [index])
        dense.step(index)
    assert opt.param_groups[0]["table"] == "full"
    for param, reference in zip(model.parameters(), dense.params, strict=True):
        torch.testing.assert_close(param, reference, rtol=0, atol=1e-12)


def test_parameters_used_by_hand_are_said() -> None:
    weight = nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
    x, y = make_data()
    opt = SAGA([weight], 0.1, N, table="factored")
    with pytest.raises(RuntimeError, match="1 of the parameters are not used by calling a module"):
        opt.step(lambda: F.cross_entropy(F.linear(x[:1], weight), y[:1]), index=0)


# --- inputs of the scalar table, which must stay the same ---


_CHANGED = r"the input of sample \d+ is another one than at its last visit, .* table='factored'"


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
        run_saga(model, opt, make_batches(2))
    model.eval()
    run_saga(model, SAGA(trained, 0.1, N, table=table), make_batches(2))
    model.train()
    run_saga(model, SAGA(trained, 0.1, N, table="factored"), make_batches(2))


@pytest.mark.parametrize("noise", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("make", [linear_net, unbiased_net])
def test_noise_is_refused_and_changes_nothing(make: Any, noise: float) -> None:
    model = make()
    opt = SAGA(model.parameters(), 0.1, N)
    run_saga(model, opt, make_batches(1))
    before = copy.deepcopy((model.state_dict(), opt.state_dict()["state"]))
    x, y = make_data()
    bad = x[3:6].clone()
    bad[1, 4] += noise
    with pytest.raises(RuntimeError, match="the input of sample 4 is another one"):
        opt.step(lambda: F.cross_entropy(model(bad), y[3:6]), index=[3, 4, 5])
    after = (model.state_dict(), opt.state_dict()["state"])
    for old, new in ((before[0], after[0]), *((before[1][k], after[1][k]) for k in before[1])):
        for key in old:
            assert torch.equal(old[key], new[key])
    run_saga(model, opt, make_batches(1))  # it can go on


def test_two_inputs_of_a_sample_in_one_batch_are_refused() -> None:
    model = linear_net()
    x, y = make_data()
    opt = SAGA(model.parameters(), 0.1, N)
    with pytest.raises(RuntimeError, match="the input of sample 7 is another one"):
        opt.step(lambda: F.cross_entropy(model(x[[2, 3, 4]]), y[[2, 3, 4]]), index=[7, 1, 7])
    assert not opt.state
    for _ in range(2):
        opt.step(lambda: F.cross_entropy(model(x[[7, 1, 7]]), y[[7, 1, 7]]), index=[7, 1, 7])


def test_an_input_that_was_zero_is_not_unseen() -> None:
    model = linear_net()
    x, y = make_data()
    opt = SAGA(model.parameters(), 0.1, N)
    for _ in range(2):
        opt.step(lambda: F.cross_entropy(model(0 * x[:1]), y[:1]), index=0)
    with pytest.raises(RuntimeError, match=_CHANGED):
        opt.step(lambda: F.cross_entropy(model(x[:1]), y[:1]), index=0)


def test_small_changes_do_not_add_up() -> None:
    model = linear_net()
    x, y = make_data()
    opt = SAGA(model.parameters(), 0.0, N)

    def step(change: float) -> None:
        grown = x[:1].abs() * (1 + change)  # of one sign, so the sum grows as much
        opt.step(lambda: F.cross_entropy(model(grown), y[:1]), index=0)

    for k in (0, 1, 2):  # taken as rounding
        step(3e-13 * k)
    with pytest.raises(RuntimeError, match=_CHANGED):
        step(3e-13 * 4)


def test_inputs_do_not_matter_to_a_bias() -> None:
    model = linear_net()
    x, y = make_data()
    opt = SAGA([model.bias], 0.1, N, table="scalar", max_table_bytes=N * 12)
    for index in make_batches(2):
        noisy = x[index] + torch.randn(len(index), 5)
        opt.step(lambda i=index, v=noisy: F.cross_entropy(model(v), y[i]), index=index)
    assert opt.table_bytes == N * 12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [linear_net, unbiased_net, lambda: _backbone().eval()])
def test_fixed_inputs_are_never_refused(make: Any, dtype: torch.dtype) -> None:
    """In other orders, in batches of other sizes and compositions, also behind fixed layers."""
    torch.manual_seed(0)
    model = make().to(dtype)
    trained = [param for param in model.parameters() if param.requires_grad]
    opt = SAGA(trained, 0.05, N)
    x, y = make_data()
    x = x.to(dtype)
    for seed, size in enumerate((1, 4, 7, N, 2, 16)):
        for i in make_batches(1, size, seed):
            opt.step(lambda i=i: F.cross_entropy(model(x[i]), y[i], reduction="none"), index=i)
    assert opt.param_groups[0]["table"] == "scalar"
    assert bool((opt.state[trained[0]]["input_sum"] != 0).all())


def test_inputs_under_autocast_are_never_refused() -> None:
    model = linear_net().float()
    opt = SAGA(model.parameters(), 0.05, N)
    x, y = make_data()
    for i in make_batches(3):
        with torch.autocast("cpu", torch.bfloat16):
            opt.step(lambda i=i: F.cross_entropy(model(x[i].float()), y[i]), index=i)
    assert opt.param_groups[0]["table"] == "scalar"
