import pytest
import torch
import torchvision
from torch import nn

from torsh_quant._flow import record_flow
from torsh_quant._fold import fold_batch_norm, foldable_pairs


def lived(net):
    """Give normalisations the statistics and weights of a trained net."""
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return net.eval()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_whole_networks(name):
    net = lived(getattr(torchvision.models, name)())
    x = torch.randn(2, 3, 64, 64)
    expected = net(x)
    folded = fold_batch_norm(net, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4)
    assert any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Linear, nn.BatchNorm1d, (5, 6)),
        (nn.Conv1d, nn.BatchNorm1d, (5, 6, 7)),
        (nn.Conv2d, nn.BatchNorm2d, (5, 6, 4, 4)),
        (nn.Conv3d, nn.BatchNorm3d, (5, 6, 3, 3, 3)),
    ],
)
def test_each_kind(layer, norm, shape, bias, affine):
    arguments = () if layer is nn.Linear else (1,)
    net = lived(nn.Sequential(layer(6, 4, *arguments, bias=bias), norm(4, affine=affine)))
    x = torch.randn(shape)
    folded = fold_batch_norm(net, x)
    assert type(folded[1]) is nn.Identity
    torch.testing.assert_close(folded(x), net(x), rtol=1e-5, atol=1e-5)


def test_what_is_used_elsewhere_stays():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x):
            x = self.conv(x)
            return self.norm(x) + x

    net = lived(Skip())
    x = torch.randn(2, 2, 3, 3)
    assert foldable_pairs(net, x) == []
    assert isinstance(fold_batch_norm(net, x).norm, nn.BatchNorm2d)


def test_a_layer_that_does_more_is_undone_alone():
    class Odd(nn.Module):
        """Reads a weight beside the call of its layer."""

        def __init__(self):
            super().__init__()
            self.good = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x):
            return self.norm(self.conv(self.good(x))) + self.conv.weight.sum()

    net = lived(Odd())
    x = torch.randn(4, 2, 3, 3)
    folded = fold_batch_norm(net, x)
    assert isinstance(folded.norm, nn.BatchNorm2d)
    assert isinstance(folded.good[1], nn.Identity)
    torch.testing.assert_close(folded(x), net(x))


def test_pairs_of_a_real_network_are_in_the_flow():
    net = lived(torchvision.models.resnet18())
    x = torch.randn(1, 3, 32, 32)
    pairs = foldable_pairs(net, x)
    flow = record_flow(net, x)
    assert len(pairs) == 20
    assert all(flow.only_user(layer).module == norm for layer, norm in pairs)


def test_training_mode_is_refused():
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    with pytest.raises(RuntimeError, match="training mode"):
        fold_batch_norm(net, torch.rand(1, 1, 1, 1))
