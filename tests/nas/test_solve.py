import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torsh_nas as nas
from tests.nas.nets import CellNet, op

COARSE = st.integers(-8, 8).map(lambda n: n / 8)  # sums are exact, ties are real


def chain_space() -> nas.Space:
    return nas.Space({"a": ("x", "y"), "b": ("x", "y", "z"), "c": ("x", "y", "z")})


def mixed_space() -> nas.Space:
    cell = nas.Cell(op, ("conv3", "skip"), channels=1, nodes=2, keep=1, inputs=2, label="cell")
    return nas.space(torch.nn.ModuleList([cell, nas.Choice([torch.nn.ReLU(), torch.nn.Tanh()])]))


SPACES = {
    "chain": chain_space(),
    "keep": nas.space(CellNet()),
    "none": nas.space(CellNet(keep=None, reduce="last", nodes=2)),
    "mixed": mixed_space(),
}


def valid(space: nas.Space) -> list[nas.Architecture]:
    found = []
    for options in itertools.product(*space.choices.values()):
        try:
            found.append(space.architecture(dict(zip(space.labels, options, strict=True))))
        except ValueError:
            continue
    return found


VALID = {name: valid(space) for name, space in SPACES.items()}


def total(space: nas.Space, values: dict[str, list[float]], arch: nas.Architecture) -> float:
    return sum(values[k][space.choices[k].index(arch[k])] for k in space.labels)


@pytest.mark.parametrize("name", SPACES)
@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_equals_brute_force(name: str, data: st.DataObject) -> None:
    space = SPACES[name]

    def numbers(values: st.SearchStrategy[float]) -> dict[str, list[float]]:
        return {
            label: data.draw(st.lists(values, min_size=len(options), max_size=len(options)))
            for label, options in space.choices.items()
        }

    scores, costs = numbers(COARSE), numbers(COARSE.map(abs))
    limit = data.draw(st.integers(1, 40)) / 8
    budget = nas.Budget(latency_ms=limit, source=nas.LatencyTable(space, costs))
    allowed = [arch for arch in VALID[name] if total(space, costs, arch) <= limit]
    if not allowed:
        least = min(total(space, costs, arch) for arch in VALID[name])
        with pytest.raises(nas.InfeasibleBudget) as caught:
            nas.solve(scores, budget)
        assert caught.value.minimum_ms == pytest.approx(least)
        return
    best = nas.solve(scores, budget)
    assert best in allowed
    assert total(space, scores, best) == max(total(space, scores, arch) for arch in allowed)


def test_intercept_and_scale_count() -> None:
    space = nas.Space({"a": ("slow", "fast")})
    table = nas.LatencyTable(space, {"a": (3.0, 1.0)}, intercept_ms=10.0, scale=2.0)
    scores = {"a": torch.tensor([1.0, 0.0])}
    assert nas.solve(scores, nas.Budget(latency_ms=16.1, source=table))["a"] == "slow"
    assert nas.solve(scores, nas.Budget(latency_ms=15.9, source=table))["a"] == "fast"


def test_infeasible_budget_says_what_is_possible() -> None:
    table = nas.LatencyTable(nas.Space({"a": ("x", "y")}), {"a": (3.0, 1.0)}, intercept_ms=0.5)
    with pytest.raises(nas.InfeasibleBudget, match=r"latency_ms=1.2 .* predicted to take 1.5 ms"):
        nas.solve({"a": [0.0, 0.0]}, nas.Budget(latency_ms=1.2, source=table))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "scores lacks 'a'"),
        ({"a": [1.0]}, r"scores\['a'\] has shape \(1,\), but 'a' has options"),
        ({"a": [1.0, math.nan]}, "scores must be finite, got nan"),
        ({"a": np.array([1.0, -np.inf])}, "scores must be finite, got -inf"),
    ],
)
def test_refuses_bad_scores(scores: dict[str, list[float]], message: str) -> None:
    table = nas.LatencyTable(nas.Space({"a": ("x", "y")}), {"a": (3.0, 1.0)})
    with pytest.raises(ValueError, match=message):
        nas.solve(scores, nas.Budget(latency_ms=9.0, source=table))


def test_refuses_a_budget_without_time() -> None:
    table = nas.LatencyTable(nas.Space({"a": ("x", "y")}), {"a": (3.0, 1.0)})
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="must be positive, in milliseconds"):
            nas.Budget(latency_ms=limit, source=table)
