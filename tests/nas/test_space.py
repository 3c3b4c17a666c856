import itertools

import pytest
import torch
from torch import nn

import torsh_nas as nas
from tests.nas.nets import CellNet, ChainNet, generator


def everything(space: nas.Space) -> set[nas.Architecture]:
    """Try all combinations of options and keep those the space accepts."""
    found = set()
    for options in itertools.product(*space.choices.values()):
        try:
            found.add(space.architecture(dict(zip(space.labels, options, strict=True))))
        except ValueError:
            continue
    return found


SPACES = {
    "chain": nas.space(ChainNet()),
    "keep": nas.space(CellNet()),
    "none": nas.space(CellNet(keep=None, reduce="last", nodes=2)),
}


@pytest.mark.parametrize("name", SPACES)
def test_sampling_reaches_all_and_only_valid_architectures(name: str) -> None:
    space, g = SPACES[name], generator()
    valid = everything(space)
    drawn = [space.sample(g) for _ in range(60 * len(valid))]
    assert set(drawn) == valid
    # Uniform: 60 expected each; 30 is four standard deviations below.
    assert min(drawn.count(arch) for arch in valid) >= 30


def test_size_counts() -> None:
    assert SPACES["chain"].size() == len(everything(SPACES["chain"])) == 6
    assert SPACES["keep"].size() == len(everything(SPACES["keep"])) == 2 * 4 * 12
    # 3^3 wirings, of which some are cut off: counted, never sampled.
    assert SPACES["none"].size() == 3**3 > len(everything(SPACES["none"]))


@pytest.mark.parametrize("name", SPACES)
def test_neighbours_are_mutual_and_connect_the_space(name: str) -> None:
    space = SPACES[name]
    valid = everything(space)
    around = {arch: set(space.neighbours(arch)) for arch in valid}
    assert all(arch in around[other] for arch in valid for other in around[arch])
    assert all(arch not in around[arch] for arch in valid)
    reached, frontier = set(), {next(iter(valid))}
    while frontier:
        reached |= frontier
        frontier = set().union(*(around[a] for a in frontier)) - reached
    assert reached == valid


@pytest.mark.parametrize("name", SPACES)
def test_mutate_is_a_neighbour(name: str) -> None:
    space, g = SPACES[name], generator()
    for _ in range(20):
        arch = space.sample(g)
        assert space.mutate(arch, g) in space.neighbours(arch)


@pytest.mark.parametrize("name", SPACES)
def test_crossover_takes_from_parents(name: str) -> None:
    space, g = SPACES[name], generator()
    for _ in range(20):
        first, second = space.sample(g), space.sample(g)
        child = space.crossover(first, second, g)
        assert all(child[label] in (first[label], second[label]) for label in child)


def test_encode_is_one_hot() -> None:
    space = SPACES["chain"]
    arch = space.architecture({"block": "skip", "act": "1"})
    assert space.encode(arch).tolist() == [0, 0, 1, 0, 1]
    codes = {tuple(space.encode(a).tolist()) for a in everything(space)}
    assert len(codes) == 6


def test_same_generator_state_same_draw() -> None:
    space = SPACES["keep"]
    assert space.sample(generator(5)) == space.sample(generator(5))


def test_description_keeps_the_fingerprint() -> None:
    for space in SPACES.values():
        assert nas.Space.from_description(space.describe()).space_id == space.space_id
    assert len({space.space_id for space in SPACES.values()}) == 3


def test_labels_come_from_the_place_in_the_model() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nas.Choice([nn.ReLU(), nn.Tanh()])))
    assert nas.space(model).labels == ("1.0",)


def test_refuses_labels_with_other_options() -> None:
    model = nn.Sequential(
        nas.Choice({"a": nn.ReLU(), "b": nn.Tanh()}, label="same"),
        nas.Choice({"a": nn.ReLU(), "c": nn.Tanh()}, label="same"),
    )
    with pytest.raises(
        ValueError, match=r"label 'same' stands for options \('a', 'b'\) and, at '1'"
    ):
        nas.space(model)


def test_refuses_cells_with_one_label_and_two_graphs() -> None:
    def op(name: str, channels: int, stride: int) -> nn.Module:
        return nn.Identity()

    cells = [nas.Cell(op, ("x",), channels=1, keep=keep, label="same") for keep in (1, 2)]
    with pytest.raises(ValueError, match="two cells share the label 'same'"):
        nas.space(nn.ModuleList(cells))


def test_refuses_nested_choices() -> None:
    inner = nas.Choice([nn.ReLU(), nn.Tanh()])
    model = nn.Sequential(nas.Choice([nn.Sequential(inner), nn.Identity()]))
    with pytest.raises(ValueError, match="nested choices are not supported"):
        nas.space(model)


def test_refuses_a_model_without_choices() -> None:
    with pytest.raises(ValueError, match="Linear has no Choice"):
        nas.space(nn.Linear(1, 1))


def test_names_a_choice_that_never_runs() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nas.Choice([nn.ReLU(), nn.Tanh()], label="idle")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(ValueError, match="never reaches a choice labelled 'idle'"):
        nas.space(Idle(), torch.zeros(1))


def test_refuses_the_wrong_number_of_edges() -> None:
    edges = dict.fromkeys(SPACES["keep"].labels, "skip")
    with pytest.raises(ValueError, match="exactly 2 of the edges"):
        SPACES["keep"].architecture(edges)


def test_a_space_of_one_cannot_mutate() -> None:
    def op(name: str, channels: int, stride: int) -> nn.Module:
        return nn.Identity()

    space = nas.space(nas.Cell(op, ("x",), channels=1, nodes=1, inputs=1))
    with pytest.raises(ValueError, match="only one connected architecture"):
        space.mutate(space.sample(generator()), generator())
