import pytest
import torch
from torch import Tensor, nn

from torsh_nas._signature import signature_of


class Repeat(nn.Module):
    def __init__(self, times: int, function: object = None) -> None:
        super().__init__()
        self.times, self.function = times, function


def of(module: nn.Module, *shape: int, **kwargs: object) -> str:
    return signature_of(module, ((torch.zeros(shape),), kwargs))


def test_equal_structure_is_equal() -> None:
    assert of(nn.Conv2d(2, 3, 3), 1, 2, 4, 4) == of(nn.Conv2d(2, 3, 3), 1, 2, 4, 4)


def test_whatever_changes_the_time_differs() -> None:
    base = of(nn.Conv2d(2, 2, 3), 1, 2, 4, 4)
    others = [
        of(nn.Conv2d(2, 2, 3), 2, 2, 4, 4),
        of(nn.Conv2d(2, 2, 3, stride=2), 1, 2, 4, 4),
        of(nn.Conv2d(2, 2, 3, bias=False), 1, 2, 4, 4),
        of(nn.Conv2d(2, 2, 3).double(), 1, 2, 4, 4),
        of(nn.Sequential(nn.Conv2d(2, 2, 3)), 1, 2, 4, 4),
        of(nn.Conv2d(2, 2, 3), 1, 2, 4, 4, flag=True),
    ]
    assert len({base, *others}) == 7
    # Invisible in repr(module).
    assert of(Repeat(1), 1) != of(Repeat(2), 1)
    assert of(Repeat(1, torch.relu), 1) != of(Repeat(1, object()), 1)


class Hidden(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self._times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self._times):
            x = x.tanh()
        return x


def test_private_attributes_count_and_torchs_own_do_not() -> None:
    assert of(Hidden(1), 1) != of(Hidden(60), 1)
    hooked = Hidden(1).eval()
    hooked.register_forward_hook(lambda *_: None)
    assert of(Hidden(1), 1) == of(hooked, 1)


@pytest.mark.filterwarnings("ignore:.torch.jit.:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
def test_modules_with_code_of_their_own_are_unique() -> None:
    traced = [torch.fx.symbolic_trace(Hidden(times)) for times in (1, 60)]
    scripted = [torch.jit.trace(Hidden(times), torch.zeros(1)) for times in (1, 60)]
    for one, other in (traced, scripted):
        assert of(one, 1) == of(one, 1) != of(other, 1)
        assert of(nn.Sequential(one), 1) != of(nn.Sequential(other), 1)
