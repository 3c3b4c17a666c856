import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torsh_quant import quantize
from torsh_quant._equalize import Equalize, equalizable_pairs
from torsh_quant._flow import record_flow
from torsh_quant._layers import quantizable_layers


def pairs_of(net, x):
    return equalizable_pairs(record_flow(net, x), dict(quantizable_layers(net)))


def chain():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(32, 6),
        nn.GELU(),
        nn.Linear(6, 2),
    ).eval()


X = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def test_pairs_end_at_what_is_not_homogeneous():
    assert pairs_of(chain(), X) == [("0", "3"), ("3", "6")]


def test_channels_meet_at_one_range():
    net = chain()
    with torch.no_grad():
        net[0].weight *= torch.logspace(-2, 2, 8).view(-1, 1, 1, 1)
    expected = net(X)
    assert Equalize().apply(net, X) == [("0", "3"), ("3", "6")]
    torch.testing.assert_close(net(X), expected, rtol=1e-4, atol=1e-5)
    rows = net[0].weight.abs().amax((1, 2, 3))
    columns = net[3].weight.view(4, 2, 2, 9).abs().amax((1, 3)).flatten()
    torch.testing.assert_close(rows, columns, rtol=1e-2, atol=0)


def test_one_scale_for_all_gets_better():
    net = chain()
    with torch.no_grad():
        net[0].weight *= torch.logspace(-2, 2, 8).view(-1, 1, 1, 1)
    expected = net(X)
    errors = [
        (quantize(net, "w8a16-tensor", data=[X], method=method)(X) - expected).norm().item()
        for method in ("rtn", "equalize")
    ]
    assert errors[1] < errors[0] / 3


def test_dead_channels_and_other_uses_are_left():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).eval()
    with torch.no_grad():
        net[0].weight[1], net[2].weight[:, 2] = 0, 0
    before = net[0].weight[1:].clone()
    Equalize().apply(net, torch.rand(2, 2))
    assert torch.equal(net[0].weight[1:], before)

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            x = F.relu(self.a(x))
            return self.b(x) + x

    assert pairs_of(Skip().eval(), torch.rand(2, 2)) == []


def test_what_changes_the_output_is_undone():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.b(F.relu(self.a(x))) + self.a.weight.sum()

    net = Reads().eval()
    before = net.a.weight.clone()
    assert Equalize().apply(net, torch.rand(2, 2)) == []
    assert torch.equal(net.a.weight, before)


def test_options_are_checked():
    with pytest.raises(ValueError, match="steps=0"):
        Equalize(steps=0)
