import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torsh_nas as nas
from tests.nas.nets import CellNet, generator
from torsh_nas._measure import torch_threads


class Wide(nn.Module):
    """A block whose cost is plain to see: two products of width ``hidden``."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        ops = lambda: {"wide": Wide(16384), "narrow": Wide(64), "skip": nn.Identity()}  # noqa: E731
        self.once = nas.Choice(ops(), label="once")
        self.twice = nas.Choice(ops(), label="twice")

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.twice(self.once(x)))


@pytest.fixture(scope="module")
def table() -> nas.LatencyTable:
    torch.manual_seed(0)
    return nas.LatencyTable.build(
        Stack(), torch.randn(64, 64), threads=1, calibration=4, min_time_s=0.02
    )


def test_orders_options_and_architectures(table: nas.LatencyTable) -> None:
    wide, narrow, skip = table.costs["once"]
    assert wide > narrow > skip >= 0
    # The second choice runs twice in a forward pass.
    assert table.costs["twice"][0] > wide
    predicted = [
        table.predict({"once": a, "twice": b})
        for a, b in [("skip", "skip"), ("wide", "skip"), ("narrow", "wide"), ("wide", "wide")]
    ]
    assert predicted == sorted(predicted)
    x, model = torch.randn(64, 64), Stack()
    fast, slow = (
        nas.measure(nas.derive(model, {"once": op, "twice": op}), x, min_time_s=0.05).ms
        for op in ("skip", "wide")
    )
    assert fast < slow


def test_equal_options_are_timed_once(table: nas.LatencyTable) -> None:
    wide = table.costs["once"][0]
    assert table.costs["twice"][0] == pytest.approx(2 * wide, rel=1e-12)


def test_building_leaves_the_model_alone() -> None:
    model = CellNet()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    threads = torch.get_num_threads()
    table = nas.LatencyTable.build(
        model, torch.randn(2, 1, 8, 8), threads=1, calibration=3, min_time_s=0.005
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert torch.get_num_threads() == threads
    assert all(times[-1] == 0 for times in table.costs.values())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_other_dtype() -> None:
    model = Stack()
    x = torch.randn(4, 64)
    table = nas.LatencyTable.build(model, x, dtype=torch.float64, calibration=2, min_time_s=0.005)
    assert table.input_specs == (((4, 64), "float64"),)
    assert next(model.parameters()).dtype == torch.float32


def given() -> nas.LatencyTable:
    space = nas.space(CellNet(op_names=("conv3", "skip", "none"), nodes=3))
    costs = dict.fromkeys(space.labels, (3.0, 1.0, 0.0))
    return nas.LatencyTable(space, costs, intercept_ms=0.5, scale=2.0)


def test_expected_is_the_mean_over_drawn_architectures() -> None:
    table = given()
    g = generator()
    p = {label: torch.rand(3, generator=g).double().softmax(0) for label in table.space.labels}
    # By hand: nodes keep 1 of 1, 2 of 2 and 2 of 3 edges; "none" takes no part.
    mean = 0.0
    for label, probabilities in p.items():
        conv, skip, _ = probabilities.tolist()
        share = 2 / 3 if label.endswith("->3") else 1.0
        mean += share * (3 * conv + 1 * skip) / (conv + skip)
    assert table.expected(p).item() == pytest.approx(0.5 + 2 * mean, rel=1e-12)


def test_expected_has_correct_gradients() -> None:
    table = given()
    labels = table.space.labels
    alphas = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in labels]

    def expected(*a: Tensor) -> Tensor:
        return table.expected({k: v.softmax(0) for k, v in zip(labels, a, strict=True)})

    assert torch.autograd.gradcheck(expected, alphas)


def test_one_hot_expectation_is_the_prediction() -> None:
    space = nas.Space({"a": ("x", "y"), "b": ("x", "y", "z")})
    table = nas.LatencyTable(space, {"a": (1.0, 2.0), "b": (4.0, 8.0, 16.0)}, intercept_ms=0.25)
    for seed in range(6):
        arch = space.sample(generator(seed))
        p = {k: torch.tensor([float(o == arch[k]) for o in v]) for k, v in space.choices.items()}
        assert table.expected(p).item() == table.predict(arch)


def test_file_round_trip(table: nas.LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table.save(path)
    back = nas.LatencyTable.load(path)
    for name in ("costs", "intercept_ms", "scale", "residual_ms", "device_info", "input_specs"):
        assert getattr(back, name) == getattr(table, name)
    assert back.space.space_id == table.space.space_id
    assert [tuple(x.shape) for x in back.example_inputs("cpu")] == [(64, 64)]
    with torch_threads(1):
        back.check(nas.space(Stack()))


def test_refuses_a_damaged_file(table: nas.LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table.save(path)
    document = json.loads(path.read_text())
    document["scale"] = 0.1
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="checksum of this torsh_nas"):
        nas.LatencyTable.load(path)


def test_an_option_that_changes_its_input_is_refused() -> None:
    choice = nas.Choice({"relu": nn.ReLU(inplace=True), "skip": nn.Identity()}, label="q")
    with pytest.raises(ValueError, match="option 'relu' of Choice 'q' changes its input in place"):
        nas.LatencyTable.build(nn.Sequential(nn.Linear(4, 4), choice), torch.randn(2, 4))


def test_refuses_another_number_of_threads(table: nas.LatencyTable) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        table.check(table.space)
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match=r"measured with 1 threads, torch uses 2 now; call"):
            table.check(table.space)
        info = dataclasses.replace(table.device_info, threads=7)
        other = nas.LatencyTable(table.space, table.costs, device_info=info)
        with pytest.raises(ValueError, match="measured with 7 threads"):
            other.check(table.space)
    finally:
        torch.set_num_threads(before)


def test_refuses_another_space_or_machine(table: nas.LatencyTable) -> None:
    with pytest.raises(ValueError, match="latency table belongs to space"):
        table.check(nas.Space({"a": ("x", "y")}))
    assert table.device_info is not None

    def elsewhere(**changes: object) -> nas.LatencyTable:
        info = dataclasses.replace(table.device_info, **changes)
        return nas.LatencyTable(table.space, table.costs, device_info=info)

    with pytest.raises(ValueError, match="measured on 'Another CPU', this is"):
        elsewhere(name="Another CPU").check(table.space)
    with torch_threads(1), pytest.warns(UserWarning, match="measured with torch 2.0"):
        elsewhere(torch="2.0").check(table.space)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="this machine has no CUDA device"):
            elsewhere(device="cuda").check(table.space)


@pytest.mark.parametrize(
    ("costs", "options", "message"),
    [
        ({"b": (1.0, 2.0)}, {}, r"costs has labels \['b'\], the space \['a'\]"),
        ({"a": (1.0,)}, {}, "has 1 times for options"),
        ({"a": (1.0, float("nan"))}, {}, "must be finite and not negative"),
        ({"a": (1.0, -1.0)}, {}, "must be finite and not negative"),
        ({"a": (1.0, 2.0)}, {"scale": 0.0}, "scale=0.0 > 0"),
    ],
)
def test_refuses_bad_numbers(costs: dict, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nas.LatencyTable(nas.Space({"a": ("x", "y")}), costs, **options)


def test_refuses_bad_builds() -> None:
    with pytest.raises(ValueError, match="calibration=1: a line needs"):
        nas.LatencyTable.build(Stack(), torch.randn(1, 64), calibration=1)
    with pytest.raises(TypeError, match="needs tensor inputs, got int"):
        nas.LatencyTable.build(Stack(), (3,))


@pytest.mark.gpu
def test_builds_on_cuda() -> None:
    table = nas.LatencyTable.build(Stack(), torch.randn(4096, 64), device="cuda", min_time_s=0.02)
    assert table.device_info is not None
    assert table.device_info.device == "cuda"
    assert table.costs["once"][0] > table.costs["once"][2]
