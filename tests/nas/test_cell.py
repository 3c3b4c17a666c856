import pytest
import torch
from torch import nn

import torsh_nas as nas
from tests.nas.nets import generator, op
from torsh_nas._activation import find_choices, mixed


def cell(**options: object) -> nas.Cell:
    settings = {"channels": 2, "nodes": 2, "inputs": 2, "label": "c", **options}
    return nas.Cell(op, ("conv3", "skip", "none"), **settings).double()  # type: ignore[arg-type]


def by_hand(module: nas.Cell, p: dict[str, torch.Tensor], inputs: list[torch.Tensor]) -> list:
    """Naive mixed cell: one product per option, in float64."""
    states = list(inputs)
    for target in range(2, 4):
        node = torch.zeros_like(states[0])
        for source in range(target):
            ops = module.edge(source, target).ops
            w = p[f"c/{source}->{target}"]
            node = node + w[0] * ops["conv3"](states[source]) + w[1] * ops["skip"](states[source])
        states.append(node)
    return states[2:]


@pytest.mark.parametrize("reduce", ["concat", "sum", "last"])
def test_mixed_forward_is_the_naive_sum(reduce: str) -> None:
    module = cell(reduce=reduce).eval()
    x = [torch.randn(3, 2, 5, 5, dtype=torch.float64) for _ in range(2)]
    found = find_choices(module)
    p = {label: torch.rand(3, dtype=torch.float64) for label in found}
    nodes = by_hand(module, p, x)
    expected = {"concat": torch.cat(nodes, 1), "sum": sum(nodes), "last": nodes[-1]}[reduce]
    with mixed(found, p):
        # Float64 sums in another order.
        torch.testing.assert_close(module(*x), expected, rtol=1e-12, atol=1e-12)


def test_mixed_gradients() -> None:
    module = cell(nodes=1)
    x = [torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    found = find_choices(module)

    def forward(*tensors: torch.Tensor) -> torch.Tensor:
        alphas = dict(zip(found, tensors[2:], strict=True))
        with mixed(found, {label: a.softmax(0) for label, a in alphas.items()}):
            return module(*tensors[:2])

    alphas = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in found]
    assert torch.autograd.gradcheck(forward, [*x, *alphas], fast_mode=True)


def test_stride_belongs_to_the_edges_from_the_inputs() -> None:
    module = cell(stride=2, nodes=3)
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    assert module(x, x).shape == (1, 6, 4, 4)


def test_keep_adds_none_and_counts_as_darts() -> None:
    names = tuple(f"conv{k}" for k in (1, 3, 5, 7))
    with_none = nas.Cell(op, names, channels=1, nodes=4, keep=2, inputs=2)
    assert all(options[-1] == "none" for options in nas.space(with_none).choices.values())
    # Liu et al. 2018: prod over nodes of C(n, 2) * ops^2, here for four operations.
    assert nas.space(with_none).size() == 1 * 3 * 6 * 10 * 4 ** (2 * 4)


def test_nas_bench_201_space_has_15625_cells() -> None:
    names = ("none", "skip", "conv1", "conv3", "pool")
    module = nas.Cell(op, names, channels=1, nodes=3, keep=None, inputs=1, reduce="last")
    assert nas.space(module).size() == 15625


def test_node_without_inputs_stays_a_gap() -> None:
    module = cell(inputs=1, nodes=2, keep=None)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    arch = {"c/0->1": "none", "c/0->2": "skip", "c/1->2": "conv3"}
    with nas.single_path(module, arch):
        assert torch.equal(module(x), torch.cat([torch.zeros_like(x), x], 1))


def test_refuses_to_compute_a_cell_that_is_cut_off() -> None:
    module = cell(inputs=1, nodes=1, keep=None)
    with pytest.raises(ValueError, match="'none' stands on every path"):
        nas.space(module).architecture({"c/0->1": "none"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0}, "nodes=0 must be at least 1"),
        ({"keep": 0}, "keep=0 must be at least 1"),
        ({"stride": -1}, "stride=-1 must be"),
        ({"reduce": "mean"}, "reduce='mean'; use"),
    ],
)
def test_refuses_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cell(**options)


def test_refuses_bad_operations() -> None:
    with pytest.raises(ValueError, match="duplicates"):
        nas.Cell(op, ("skip", "skip"), channels=1)
    with pytest.raises(ValueError, match="no operation besides"):
        nas.Cell(op, ("none",), channels=1)
    with pytest.raises(ValueError, match="nothing to decide"):
        nas.Cell(op, ("skip",), channels=1, keep=None)


def test_refuses_wrong_number_of_inputs() -> None:
    with pytest.raises(ValueError, match=r"takes 2 input\(s\), got 1"):
        cell()(torch.zeros(1, 2, 4, 4, dtype=torch.float64))


def test_single_operation_with_keep_searches_the_wiring() -> None:
    module = nas.Cell(op, ("skip",), channels=1, nodes=3, keep=1, inputs=1, label="c")
    its_space = nas.space(module)
    assert its_space.size() == 1 * 2 * 3
    assert len({its_space.sample(generator(seed)) for seed in range(60)}) == 6


def test_is_an_ordinary_module() -> None:
    module = cell()
    assert isinstance(module, nn.Module)
    copy = cell()
    copy.load_state_dict(module.state_dict())
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    assert torch.equal(module.eval()(x, x), copy.eval()(x, x))
