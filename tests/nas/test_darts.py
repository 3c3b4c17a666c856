import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torsh_nas as nas
from tests.nas.nets import CellNet


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def toy(**options: float) -> tuple[nas.Choice, nas.DARTS, nas.Search]:
    """Bilevel toy: y = (p0 a + p1 b) x, mean squared error to a target t x."""
    model = nas.Choice({"a": Times(2.0), "b": Times(-1.0)}, label="c")
    strategy = nas.DARTS(weight_decay=0.0, grad_clip=None, **options)  # type: ignore[arg-type]
    sgd = torch.optim.SGD(nas.weights(model), lr=0.1)
    return model, strategy, nas.Search(model, strategy, functional.mse_loss, sgd)


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def test_one_step_against_the_closed_form() -> None:
    model, strategy, search = toy(lr=0.05)
    p = strategy.probabilities()["c"].tolist()
    val_x, val_y, train_x, train_y = 1.5, 2.0, 0.5, -1.0
    report = search.step((one(train_x), one(train_y)), (one(val_x), one(val_y)))

    m = 2.0 * p[0] - 1.0 * p[1]
    assert report["val_loss"].item() == pytest.approx((m * val_x - val_y) ** 2, rel=1e-12)
    # d loss / d alpha_a = 2 (m x - y) x * p0 (a - m); Adam's first step is -lr * sign, up to eps.
    to_alpha = 2 * (m * val_x - val_y) * val_x * p[0] * (2.0 - m)
    step = 0.05 * abs(to_alpha) / (abs(to_alpha) + 1e-8)
    before = math.log(p[0] / p[1])
    q = strategy.probabilities()["c"].tolist()
    # Both entries move by the same step in opposite directions.
    moved = math.log(q[0] / q[1]) - before
    assert moved == pytest.approx(-2 * math.copysign(step, to_alpha), rel=1e-9)

    m = 2.0 * q[0] - 1.0 * q[1]
    assert report["train_loss"].item() == pytest.approx((m * train_x - train_y) ** 2, rel=1e-12)
    to_m = 2 * (m * train_x - train_y) * train_x
    assert model.ops["a"].factor.item() == pytest.approx(2.0 - 0.1 * to_m * q[0], rel=1e-12)
    assert model.ops["b"].factor.item() == pytest.approx(-1.0 - 0.1 * to_m * q[1], rel=1e-12)


def test_alpha_gradient_equals_autograd_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CellNet().double()
    strategy = nas.DARTS()
    nas.Search(model, strategy, functional.cross_entropy, torch.optim.SGD(nas.weights(model), 0.1))
    x, y = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.tensor([1, 2, 3, 4])

    alphas = strategy._alphas
    seen = {}
    step = strategy._alpha_optimizer.step
    monkeypatch.setattr(
        strategy._alpha_optimizer,
        "step",
        lambda: seen.update({k: a.grad.clone() for k, a in alphas.items()}) or step(),
    )
    free = {k: a.detach().clone().requires_grad_() for k, a in alphas.items()}
    strategy._alpha_step((x, y))
    assert all(p.grad is None for p in model.parameters())

    def edge(cell: nas.Cell, source: int, target: int, h: Tensor) -> Tensor:
        p = functional.softmax(free[f"cell/{source}->{target}"], 0)
        return p[0] * cell.edge(source, target).ops["conv3"](h) + p[1] * h

    def naive(cell: nas.Cell, h: Tensor) -> Tensor:
        states = [h]
        for target in range(1, 4):
            states.append(sum(edge(cell, s, target, states[s]) for s in range(target)))
        return torch.cat(states[1:], 1)

    h = model.squeeze(naive(model.first, model.stem(x)))
    h = model.head(naive(model.second, functional.avg_pool2d(h, 2)).mean((2, 3)))
    expected = torch.autograd.grad(functional.cross_entropy(h, y), list(free.values()))
    for grad, other in zip(seen.values(), expected, strict=True):
        # Float64, the same terms in another order through two cells.
        torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-12)


def test_finds_the_option_that_fits() -> None:
    for target, name in ((2.0, "a"), (-1.0, "b")):
        _, strategy, search = toy(lr=0.1)
        for k in range(30):
            x = one(1.0 + 0.01 * k)
            search.step((x, target * x), (x.clone(), target * x))
        assert strategy.best()["c"] == name
        assert strategy.probabilities()["c"].sum().item() == pytest.approx(1.0)


def test_warm_up_leaves_the_architecture_alone() -> None:
    _, strategy, search = toy(warmup_epochs=1)
    before = strategy.probabilities()["c"]
    report = search.step((one(1.0), one(1.0)), (one(2.0), one(1.0)))
    assert "val_loss" not in report
    assert torch.equal(strategy.probabilities()["c"], before)
    search.epoch = 1
    search.step((one(1.0), one(1.0)), (one(2.0), one(1.0)))
    assert not torch.equal(strategy.probabilities()["c"], before)


def test_gradients_are_clipped() -> None:
    model = nas.Choice({"a": Times(2.0), "b": Times(-1.0)})
    strategy = nas.DARTS(grad_clip=1e-3)
    sgd = torch.optim.SGD(nas.weights(model), lr=1.0)
    search = nas.Search(model, strategy, functional.mse_loss, sgd)
    before = [p.item() for p in model.parameters()]
    search.step((one(1.0), one(9.0)), (one(2.0), one(9.0)))
    moved = [a - p.item() for a, p in zip(before, model.parameters(), strict=True)]
    assert math.hypot(*moved) == pytest.approx(1e-3, rel=1e-2)  # clip divides by norm + 1e-6


def test_best_follows_the_published_rule() -> None:
    model = CellNet()
    strategy = nas.DARTS()
    nas.Search(model, strategy, functional.cross_entropy, torch.optim.SGD(nas.weights(model), 0.1))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for alpha in strategy._alphas.values():
            alpha.copy_(torch.randn(alpha.shape, generator=g))
    p, expected = strategy.probabilities(), {}
    for target in (1, 2, 3):
        strength = {s: p[f"cell/{s}->{target}"][:-1].max().item() for s in range(target)}
        kept = sorted(strength, key=strength.__getitem__)[-2:]
        for source in range(target):
            label = f"cell/{source}->{target}"
            options = ("conv3", "skip")
            expected[label] = options[int(p[label][:-1].argmax())] if source in kept else "none"
    assert dict(strategy.best()) == expected


def test_state_round_trips_bit_for_bit() -> None:
    batches = [((one(0.5 + k), one(1.0)), (one(1.5 + k), one(2.0))) for k in range(4)]
    model, strategy, search = toy()
    for pair in batches[:2]:
        search.step(*pair)
    other_model, other, again = toy(lr=0.3)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(strategy.state_dict())
    assert all(g["lr"] == strategy.lr for g in other._alpha_optimizer.param_groups)
    for pair in batches[2:]:
        search.step(*pair)
        again.step(*pair)
    assert torch.equal(other.probabilities()["c"], strategy.probabilities()["c"])
    for a, b in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_refuses_foreign_state() -> None:
    _, strategy, _ = toy()
    state = strategy.state_dict()
    with pytest.raises(ValueError, match="state version 2"):
        strategy.load_state_dict({**state, "version": 2})
    with pytest.raises(ValueError, match="belongs to space 0000"):
        strategy.load_state_dict({**state, "space_id": "0000"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 2}, "order=2 is not available; use order=1"),
        ({"lr": 0.0}, "need lr > 0"),
        ({"weight_decay": -1.0}, "weight_decay >= 0"),
        ({"warmup_epochs": -1}, "warmup_epochs >= 0"),
        ({"grad_clip": 0.0}, "grad_clip=0.0 must be positive"),
    ],
)
def test_refuses_bad_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nas.DARTS(**options)  # type: ignore[arg-type]


def test_names_a_choice_without_influence() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nas.Choice([nn.ReLU(), nn.Tanh()], label="idle")
            self.used = nas.Choice([Times(1.0), Times(2.0)], label="used")

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Idle()
    sgd = torch.optim.SGD(nas.weights(model), 0.1)
    search = nas.Search(model, nas.DARTS(), functional.mse_loss, sgd)
    with pytest.raises(ValueError, match="does not depend on the choice labelled 'idle'"):
        search.step((one(1.0), one(1.0)), (one(2.0), one(1.0)))


@pytest.mark.gpu
def test_step_on_cuda_matches_cpu() -> None:
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = CellNet().double().to(device)
        strategy = nas.DARTS(lr=0.01)
        sgd = torch.optim.SGD(nas.weights(model), 0.05)
        search = nas.Search(model, strategy, functional.cross_entropy, sgd)
        g = torch.Generator().manual_seed(0)
        for _ in range(3):
            x = torch.randn(8, 1, 8, 8, generator=g, dtype=torch.float64).to(device)
            y = torch.randint(10, (8,), generator=g).to(device)
            search.step((x[:4], y[:4]), (x[4:], y[4:]))
        results.append([p.cpu() for p in strategy.probabilities().values()])
    for a, b in zip(*results, strict=True):
        # Adam divides by the root of the gradient: rounding of 1e-16 grows, but stays below this.
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
