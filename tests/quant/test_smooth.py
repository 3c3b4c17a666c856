import pytest
import torch
from torch import nn

from torsh_quant import Scheme, quantize
from torsh_quant._smooth import SmoothQuant, smoothing_factor


class Attention(nn.Module):
    """Two layers share the output of a normalisation; a third has an input of its own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.out = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        y = self.norm(x)
        return self.out(self.q(y) * torch.sigmoid(self.k(y)))


def outlying(net):
    torch.manual_seed(0)
    with torch.no_grad():
        net.norm.weight[3], net.norm.bias[3] = 60.0, 5.0
    return net.eval()


X = torch.randn(6, 9, 32, generator=torch.Generator().manual_seed(1))


def test_the_formula_of_the_paper():
    largest, weights = torch.tensor([16.0, 1.0, 0.0]), torch.tensor([0.25, 4.0, 1.0])
    factor = smoothing_factor(largest, weights, 0.5)
    assert factor.tolist() == [8.0, 0.5, 1.0]
    assert smoothing_factor(largest, weights, 1.0).tolist() == [16.0, 1.0, 1.0]


@pytest.mark.parametrize("alpha", [0.5, 0.8, "auto"])
def test_outliers_of_activations_cost_less(alpha):
    net = outlying(Attention())
    expected = net(X)
    plain = quantize(net, "w8a6", data=[X])
    smooth = quantize(net, "w8a6", data=[X], method=SmoothQuant(alpha))
    errors = [((one(X) - expected).norm() / expected.norm()).item() for one in (plain, smooth)]
    assert errors[1] < errors[0] / 1.5


def test_the_float_model_stays_and_factors_go_where_they_cost_nothing():
    net = outlying(Attention())
    expected, model = net(X), outlying(Attention())
    model.load_state_dict(net.state_dict())
    schemes = {name: Scheme.parse("w8a8") for name in ("q", "k", "out")}
    left = SmoothQuant().apply(model, [X], schemes)
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)
    assert list(left) == ["out"]
    assert not torch.equal(model.norm.weight, net.norm.weight)
    # q and k see the same input, so they share the factor
    factors = [model.q.weight / net.q.weight, model.k.weight / net.k.weight]
    torch.testing.assert_close(*factors, rtol=1e-5, atol=0)


def test_a_factor_that_nothing_takes_stays_with_the_layer():
    net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2)).eval()
    x = torch.randn(64, 8) * torch.tensor([100.0] + [1.0] * 7)
    small = quantize(net, "w8a8", data=[x], method="smoothquant")
    assert small[0].input_scale.shape == (8,)
    assert not small[0]._forward_pre_hooks
    torch.testing.assert_close(small(x), net(x), rtol=0.05, atol=0.1)
    floats = small[0].to_float()
    torch.testing.assert_close(floats.weight, net[0].weight, rtol=0, atol=0.02)
    fresh = quantize(net, "w8a8")
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(x), small(x))


def test_normalisations_that_do_not_scale_by_their_weight_are_left():
    class OnePlus(nn.Module):
        """As Gemma's: multiplies by 1 + weight."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(32))

        def forward(self, x):
            return nn.functional.rms_norm(x, (32,)) * (1 + self.weight)

    net = Attention()
    net.norm = OnePlus()
    net.eval()
    small = quantize(net, "w8a8", data=[X], method="smoothquant")
    assert torch.equal(small.norm.weight, net.norm.weight)
    assert small.q.input_scale is not None
    assert ((small(X) - net(X)).norm() / net(X).norm()) < 0.03


def test_a_norm_with_other_uses_is_left():
    class Residual(Attention):
        def forward(self, x):
            y = self.norm(x)
            return y + self.out(self.q(y) * torch.sigmoid(self.k(y)))

    net = outlying(Residual())
    small = quantize(net, "w8a8", data=[X], method="smoothquant")
    assert torch.equal(small.norm.weight, net.norm.weight)


def test_padding_does_not_count():
    class Masked(Attention):
        def forward(self, hidden, attention_mask):
            return super().forward(hidden)

    net = outlying(Masked())
    mask = torch.ones(6, 9, dtype=torch.long)
    mask[:, 5:] = 0
    wild = X.clone()
    wild[:, 5:] *= torch.linspace(1, 1000, 32)
    found = [
        quantize(
            net, "w8a8", data=[{"hidden": x, "attention_mask": mask}], method="smoothquant"
        ).q.scale
        for x in (X, wild)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_options_are_checked(alpha):
    with pytest.raises(ValueError, match="alpha="):
        SmoothQuant(alpha)
