import pytest
import torch

from torsh_optim import SGD, AdamW


def _step(*params: torch.Tensor) -> None:
    for param in params:
        param.grad = torch.ones(param.shape)
    SGD(params, lr=1.0).step()


def test_elements_that_share_memory() -> None:
    for view in (torch.zeros(3).as_strided((2, 2), (1, 1)), torch.zeros(1).expand(4)):
        with pytest.raises(RuntimeError, match="elements that share memory; give the optimizer a"):
            _step(torch.nn.Parameter(view))


def test_parameters_that_share_memory() -> None:
    base = torch.zeros(8)
    first, second = torch.nn.Parameter(base[:5]), torch.nn.Parameter(base[4:])
    with pytest.raises(RuntimeError, match=r"shapes \(5,\) and \(4,\) share memory; tie modules"):
        _step(first, second)
    _step(torch.nn.Parameter(base[:4]), torch.nn.Parameter(base[4:]))  # side by side
    assert torch.equal(base, -torch.ones(8))


@pytest.mark.filterwarnings("ignore:SGD updates a parameter")
def test_views_with_gaps_in_each_other() -> None:
    base = torch.zeros(8)
    _step(torch.nn.Parameter(base[::2]), torch.nn.Parameter(base[1::2]))
    _step(torch.nn.Parameter(torch.zeros(3, 4).t()), torch.nn.Parameter(torch.zeros(1, 5, 1)))
    assert torch.equal(base, -torch.ones(8))


def test_state_on_another_device() -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    opt = AdamW([param])
    opt.step()
    opt.state[param]["exp_avg"] = opt.state[param]["exp_avg"].to("meta")
    with pytest.raises(
        RuntimeError, match="state 'exp_avg' is on meta, its parameter on cpu; move"
    ):
        opt.step()
