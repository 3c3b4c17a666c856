import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torsh_nas as nas
from tests.nas.nets import CellNet, ChainNet, generator, warmed_up

MODELS = {
    "chain": ChainNet,
    "concat": CellNet,
    "sum": lambda: CellNet(reduce="sum", inputs=2),
    "last": lambda: CellNet(keep=None, reduce="last"),
    "gaps": lambda: CellNet(keep=None, reduce="concat"),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_masked_supernet_exactly(name: str) -> None:
    model = warmed_up(MODELS[name]()).eval()
    space = nas.space(model)
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    for seed in range(5):
        arch = space.sample(generator(seed))
        plain = nas.derive(model, arch, example_inputs=x)
        with nas.single_path(model, arch), torch.no_grad():
            expected = model(x)
        assert torch.equal(plain(x), expected)
        assert not [m for m in plain.modules() if type(m).__module__.startswith("torsh_nas")]
        assert type(plain) is type(model)


def test_does_not_touch_or_share_the_model() -> None:
    model = warmed_up(CellNet())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = nas.derive(model, nas.space(model).sample(generator()))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert plain.training


def test_shared_parameters_stay_shared() -> None:
    tied = nn.Linear(3, 3)
    model = nn.Sequential(nas.Choice({"lin": tied, "skip": nn.Identity()}), nn.ReLU(), tied)
    plain = nas.derive(model, {"0": "lin"})
    assert plain[0] is plain[2]
    assert plain[0] is not tied


def test_a_choice_may_be_the_whole_model() -> None:
    assert isinstance(nas.derive(nas.Choice([nn.ReLU(), nn.Tanh()]), {"choice": "1"}), nn.Tanh)


@pytest.mark.parametrize("name", MODELS)
def test_copies_and_exports(name: str) -> None:
    model = warmed_up(MODELS[name]()).eval()
    plain = nas.derive(model, nas.space(model).sample(generator(1))).eval()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(plain)(x), plain(x))
    program = torch.export.export(plain, (x,))
    # Export may decompose batch norm and pooling: the same float64 numbers, rounded elsewhere.
    torch.testing.assert_close(program.module()(x), plain(x), rtol=1e-12, atol=1e-12)


def test_state_reloads_in_a_fresh_process(tmp_path: Path) -> None:
    model = warmed_up(CellNet()).eval()
    arch = nas.space(model).sample(generator(2))
    plain = nas.derive(model, arch).eval()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    arch.to_json(tmp_path / "arch.json")
    torch.save(plain.state_dict(), tmp_path / "weights.pt")
    torch.save([x, plain(x)], tmp_path / "io.pt")
    code = """
import sys, torch, torsh_nas as nas
from pathlib import Path
from tests.nas.nets import CellNet
folder = Path(sys.argv[1])
model = CellNet().double()
arch = nas.Architecture.from_json(folder / "arch.json", space=nas.space(model))
plain = nas.derive(model, arch).eval()
plain.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
x, y = torch.load(folder / "io.pt", weights_only=True)
assert torch.equal(plain(x), y)
"""
    source = Path(nas.__file__).parents[1]
    root = Path(__file__).parents[2]
    code = f"import sys; sys.path[:0] = [{str(root)!r}, {str(source)!r}]\n" + code
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)


def test_edges_that_reach_nothing_are_left_out() -> None:
    model = CellNet(keep=None, reduce="last", nodes=2)
    arch = {"cell/0->1": "conv3", "cell/0->2": "skip", "cell/1->2": "none"}
    plain = nas.derive(model, arch)
    assert [name for name, _ in plain.first.named_children()] == ["edge_0_2"]


def test_reset_draws_new_weights() -> None:
    model = warmed_up(ChainNet())
    arch = {"block": "conv3", "act": "0"}
    torch.manual_seed(3)
    first = nas.derive(model, arch, weights="reset")
    torch.manual_seed(3)
    second = nas.derive(model, arch, weights="reset")
    inherited = nas.derive(model, arch)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, inherited.head.weight)
    assert torch.equal(first.a[2].running_mean, torch.zeros(4, dtype=torch.float64))


def test_reset_names_a_module_it_cannot_reset() -> None:
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1))

    model = nn.Sequential(nas.Choice([nn.Linear(1, 1), nn.Identity()]), Bias())
    with pytest.raises(ValueError, match="needs a reset_parameters method on Bias '1'"):
        nas.derive(model, {"0": "0"}, weights="reset")


def test_refuses_bad_arguments() -> None:
    model = ChainNet()
    with pytest.raises(ValueError, match="weights='keep'; use"):
        nas.derive(model, {"block": "skip", "act": "0"}, weights="keep")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown option 'conv9' of 'block'"):
        nas.derive(model, {"block": "conv9", "act": "0"})
    foreign = nas.Space({"block": ("skip", "x"), "act": ("0", "1")})
    with pytest.raises(ValueError, match="belongs to space"):
        nas.derive(model, foreign.architecture({"block": "skip", "act": "0"}))
    labels = nas.space(CellNet(keep=None)).labels
    with pytest.raises(ValueError, match="'none' stands on every path to the output of 'cell'"):
        nas.derive(CellNet(keep=None), dict.fromkeys(labels, "none"))


def test_comparison_notices_a_forward_that_looks_inside() -> None:
    class Peeking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.choice = nas.Choice([nn.ReLU(), nn.Tanh()], label="c")

        def forward(self, x: Tensor) -> Tensor:
            return self.choice(x) + isinstance(self.choice, nas.Choice)

    with pytest.raises(RuntimeError, match="computes something else"):
        nas.derive(Peeking(), {"c": "0"}, example_inputs=torch.ones(2))
