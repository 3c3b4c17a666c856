import pytest
import torch
from torch import nn
from torch.nn import functional

import torsh_nas as nas


def table() -> nas.LatencyTable:
    space = nas.Space({"a": ("slow", "fast")})
    return nas.LatencyTable(space, {"a": (4.0, 2.0)}, intercept_ms=1.0)


def test_lagrangian_follows_the_constraint() -> None:
    penalty = nas.LatencyPenalty(table(), target_ms=4.0, weight=0.5)
    p = {"a": torch.tensor([1.0, 0.0], requires_grad=True)}
    value, expected = penalty.evaluate(p)
    assert (value.item(), expected.item()) == (0.0, 5.0)
    penalty.update(expected)
    assert penalty.multiplier == 0.5 * (5 / 4 - 1)
    value, _ = penalty.evaluate(p)
    assert value.item() == pytest.approx(0.125 * 0.25)
    (grad,) = torch.autograd.grad(value, p["a"])
    assert grad.tolist() == pytest.approx([0.125 * 4 / 4, 0.125 * 2 / 4])
    for _ in range(5):  # well under the target: back to zero, never below
        penalty.update(torch.tensor(1.0))
    assert penalty.multiplier == 0.0


def test_lagrangian_state_round_trips() -> None:
    penalty, other = (nas.LatencyPenalty(table(), target_ms=4.0) for _ in range(2))
    _, expected = penalty.evaluate({"a": torch.tensor([0.9, 0.1])})
    penalty.update(expected)
    other.load_state_dict(penalty.state_dict())
    assert other.multiplier == penalty.multiplier > 0
    with pytest.raises(ValueError, match="expected version 1, kind 'add'"):
        nas.LatencyPenalty(table(), 1.0, kind="add").load_state_dict(penalty.state_dict())


def test_pushes_a_search_to_the_fast_option() -> None:
    found = {}
    for weight in (None, 1.0):
        torch.manual_seed(0)
        model = nas.Choice({"slow": nn.Linear(1, 1), "fast": nn.Tanh()}, label="a")
        penalty = None
        if weight is not None:
            penalty = nas.LatencyPenalty(table(), target_ms=3.0, weight=weight)
        sgd = torch.optim.SGD(nas.weights(model), 0.1)
        darts = nas.DARTS(lr=0.05)
        search = nas.Search(model, darts, functional.mse_loss, sgd, penalty=penalty)
        x = torch.linspace(-3, 3, 16)[:, None]
        for _ in range(80):
            report = search.step((x, 2 * x), (x.clone(), 2 * x))
        assert ("expected_ms" in report) == (weight is not None)
        found[weight] = search.best()["a"]
    assert found == {None: "slow", 1.0: "fast"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_ms": 0.0}, "target_ms=0.0 and weight=0.05 must be positive"),
        ({"target_ms": 1.0, "weight": -1.0}, "weight=-1.0 must be positive"),
        ({"target_ms": 1.0, "kind": "mul"}, "kind='mul'; use 'add' or 'lagrangian'"),
    ],
)
def test_refuses_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nas.LatencyPenalty(table(), **options)
