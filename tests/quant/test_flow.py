import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torsh_quant._flow import record_flow


class Branches(nn.Module):
    """One convolution feeds one thing, one feeds two, one's output is returned as well."""

    def __init__(self):
        super().__init__()
        self.single = nn.Conv2d(3, 4, 1)
        self.shared = nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(4, 4, 1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.norm(self.single(x))
        y = self.shared(x)
        y = F.relu(y) + y
        y = self.twice(self.twice(y))
        z = self.last(y)
        return {"out": F.relu(z), "features": z}


def test_what_uses_an_output_alone():
    net = Branches().eval()
    flow = record_flow(net, torch.rand(2, 3, 5, 5))
    use = flow.only_user("single")
    assert (use.function, use.module) == ("batch_norm", "norm")
    assert flow.only_user("shared") is None  # relu and the sum
    assert flow.only_user("twice") is None  # called twice
    assert flow.only_user("last") is None  # the user gets it, too
    assert [use.function for use in flow.users(flow.output("shared"))] == ["relu", "add"]
    assert flow.input_of("last", "conv2d") == flow.uses[-2].inputs[0]
    assert flow.producers(flow.output("single")) == ["single"]


@pytest.mark.parametrize("inplace", [False, True])
def test_changes_in_place_are_new_tensors(inplace):
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=inplace), nn.Conv2d(2, 1, 1)).eval()
    flow = record_flow(net, torch.rand(1, 1, 2, 2))
    first = flow.only_user("0")
    assert first.function.rstrip("_") == "relu"
    assert flow.sole_use(first.output).module == "2"


def test_attributes_are_no_uses():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            y = self.fc(x)
            assert y.shape[0] == y.size(0) == len(y) == 3
            assert y.device.type == "cpu"
            assert y.dtype.is_floating_point
            return y * 2

    flow = record_flow(Sized().eval(), torch.rand(3, 2))
    assert flow.only_user("fc").function == "mul"


def test_the_model_is_left_as_it_was():
    net = Branches().eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    record_flow(net, torch.rand(2, 3, 5, 5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_hooks_go_when_the_model_fails():
    net = Branches().eval()
    with pytest.raises(RuntimeError, match="expected input"):
        record_flow(net, torch.rand(2, 5, 5, 5))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_torch_encoder_layers_are_seen():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    flow = record_flow(layer, torch.rand(2, 3, 8))
    assert flow.only_user("linear1").function == "relu"
