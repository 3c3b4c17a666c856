import pytest
import torch
from torch import Tensor, nn

import torsh_nas as nas
from torsh_nas._activation import find_choices, mixed


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def forward(self, x: Tensor, *, bias: float = 0.0) -> Tensor:
        return torch.tanh(self.factor * x) + bias


def choice() -> nas.Choice:
    return nas.Choice({"two": Scale(2.0), "three": Scale(3.0)}, label="c", default="three")


def test_default_runs_outside_a_search() -> None:
    x = torch.randn(4, dtype=torch.float64)
    assert torch.equal(choice()(x), torch.tanh(3 * x))
    assert torch.equal(nas.Choice([Scale(2.0), Scale(3.0)])(x), torch.tanh(2 * x))


def test_arguments_reach_every_option() -> None:
    module, x = choice(), torch.zeros(2, dtype=torch.float64)
    assert module(x, bias=1.5).tolist() == [1.5, 1.5]
    with mixed(find_choices(module), {"c": torch.tensor([0.5, 0.5])}):
        assert module(x, bias=1.5).tolist() == [1.5, 1.5]


def test_single_path_and_back() -> None:
    module, x = choice(), torch.randn(4, dtype=torch.float64)
    with nas.single_path(module, {"c": "two"}):
        assert torch.equal(module(x), torch.tanh(2 * x))
    assert torch.equal(module(x), torch.tanh(3 * x))
    with pytest.raises(KeyError), nas.single_path(module, {"c": "two"}):
        raise KeyError
    assert torch.equal(module(x), torch.tanh(3 * x))


def test_mixed_forward_gradients() -> None:
    module = choice()

    def forward(x: Tensor, alpha: Tensor) -> Tensor:
        with mixed(find_choices(module), {"c": alpha.softmax(0)}):
            return module(x)

    inputs = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (5, 2)]
    assert torch.autograd.gradcheck(forward, inputs)


def test_mixed_forward_follows_the_formula() -> None:
    module, x = choice(), torch.randn(3, dtype=torch.float64)
    p = torch.tensor([0.25, 0.75], dtype=torch.float64)
    with mixed(find_choices(module), {"c": p}):
        expected = 0.25 * torch.tanh(2 * x) + 0.75 * torch.tanh(3 * x)
        # Two float64 roundings.
        torch.testing.assert_close(module(x), expected, rtol=1e-15, atol=1e-15)


def test_works_under_compile() -> None:
    module, x = choice(), torch.randn(4, dtype=torch.float64)
    compiled = torch.compile(module, backend="eager")
    assert torch.equal(compiled(x), torch.tanh(3 * x))
    with nas.single_path(module, {"c": "two"}):
        assert torch.equal(compiled(x), torch.tanh(2 * x))


@pytest.mark.parametrize("ops", [{}, [], {"one": nn.Identity()}])
def test_refuses_fewer_than_two_options(ops: dict[str, nn.Module]) -> None:
    with pytest.raises(ValueError, match="at least two options"):
        nas.Choice(ops)


@pytest.mark.parametrize("name", ["", "a.b", "float", "pop"])
def test_refuses_impossible_names(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name an option"):
        nas.Choice({name: nn.Identity(), "other": nn.ReLU()})


def test_refuses_what_is_no_module() -> None:
    with pytest.raises(TypeError, match="option 'f' is builtin_function_or_method, not an nn"):
        nas.Choice({"f": torch.relu, "other": nn.ReLU()})


def test_refuses_unknown_default() -> None:
    with pytest.raises(ValueError, match="default='x' is not an option"):
        nas.Choice([nn.ReLU(), nn.Tanh()], default="x")


def test_names_the_option_of_another_shape() -> None:
    model = nas.Choice({"same": nn.Conv2d(2, 2, 3, padding=1), "smaller": nn.Conv2d(2, 2, 3)}, "c")
    with pytest.raises(
        ValueError, match=r"option 'smaller' of Choice 'c' gives shape \(1, 2, 4, 4\)"
    ):
        nas.space(model, torch.zeros(1, 2, 6, 6))


def test_names_the_option_that_writes_into_its_input() -> None:
    model = nas.Choice({"relu": nn.ReLU(inplace=True), "skip": nn.Identity()}, "c")
    with pytest.raises(ValueError, match="option 'relu' of Choice 'c' changes its input in place"):
        nas.space(model, torch.randn(3))


def test_names_the_option_that_returns_no_tensor() -> None:
    model = nas.Choice({"lstm": nn.LSTM(2, 2), "skip": nn.Identity()})
    with pytest.raises(TypeError, match="option 'lstm' of a Choice returned tuple"):
        nas.space(model, torch.randn(3, 2))
