"""Quantization with data: the pipeline from batches to quantized layers."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from torsh_quant import QuantConv2d, QuantLinear, quantize
from torsh_quant._numerics import range_qparams


def batches(digits, count=8, size=32):
    return list(digits.images.split(size)[:count])


METHODS = [
    "rtn",
    "hqq",
    "gptq",
    "adaround",
    "bias_correction",
    "equalize",
    "smoothquant",
    ["equalize", "smoothquant", "gptq", "bias_correction"],
]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("scheme", ["w8a8-static", "w4a8", "w4a16-asym"])
def test_every_method_keeps_the_digits(digits, method, scheme):
    small = quantize(digits.net, scheme, data=batches(digits), method=method)
    assert all(
        isinstance(module, (QuantConv2d, QuantLinear))
        for module in small.modules()
        if getattr(module, "weight", None) is not None
    )
    lost = digits.accuracy(digits.net) - digits.accuracy(small)
    assert lost < (0.006 if scheme == "w8a8-static" else 0.025)
    assert [row.scheme for row in small.quant_report.rows] == [scheme] * 5


def test_three_bits_with_data_lose_less(digits):
    data = batches(digits, 12)
    plain = digits.accuracy(quantize(digits.net, "w3a16-channel"))
    chain = ["gptq", "bias_correction"]
    better = digits.accuracy(quantize(digits.net, "w3a16-channel", data=data, method=chain))
    assert better >= 0.955
    assert better >= plain


def test_static_scales_are_those_of_the_inputs(digits):
    data = batches(digits)
    small = quantize(digits.net, "w8a8-static", data=data, observer="minmax")
    inputs = torch.cat(data)
    scale, zero_point = range_qparams(inputs.min(), inputs.max(), 8)
    assert torch.equal(small[0].act_scale, scale)
    assert torch.equal(small[0].act_zero_point, zero_point)
    with torch.no_grad():
        hidden = digits.net[:4](inputs)
    scale, _ = range_qparams(hidden.min(), hidden.max(), 8)
    # its data went through the float net, whose sums are ordered by the batch
    torch.testing.assert_close(small[5].act_scale, scale, rtol=1e-4, atol=0)


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "entropy", "mse"])
def test_every_observer(digits, observer):
    small = quantize(digits.net, "w8a8-static", data=batches(digits), observer=observer)
    assert digits.accuracy(digits.net) - digits.accuracy(small) < 0.02


def test_normalisations_are_folded():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    net(torch.randn(16, 3, 8, 8))  # statistics
    net.eval()
    x = torch.randn(4, 3, 8, 8)
    small = quantize(net, "w8a8-static", data=[x])
    assert type(small[1]) is nn.Identity
    assert (small(x) - net(x)).norm() / net(x).norm() < 0.03
    assert type(net[1]) is nn.BatchNorm2d
    assert small(x).shape == net(x).shape


def test_in_place_keeps_the_object(digits):
    import copy

    net = copy.deepcopy(digits.net)
    small = quantize(net, "w8a8-static", data=batches(digits, 2), inplace=True)
    assert small is net
    assert isinstance(net[0], QuantConv2d)
    assert len(net.quant_report.rows) == 5


def test_embeddings_are_quantized_where_they_are_named():
    net = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 4)).eval()
    ids = torch.arange(20)
    assert type(quantize(net, "w8a8")[0]) is nn.Embedding
    small = quantize(net, "w8a16", overrides={"0": "w4a16-g16"})
    assert [row.scheme for row in small.quant_report.rows] == ["w4a16-g16", "w8a16"]
    assert (small[0](ids) - net[0](ids)).norm() / net[0](ids).norm() < 0.15
    with_data = quantize(net, "w4a16-g16", data=[ids], method="gptq", overrides={"0": "w4a16-g16"})
    assert torch.equal(with_data[0].weight, small[0].weight)  # a table has no input to look at
    with pytest.raises(ValueError, match=r"rounds activations, but '0' has indices.*'w8a16'"):
        quantize(net, "w8a16", overrides={"0": "w8a8"})


def test_tied_layers_share_their_integers():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(30, 16), nn.Linear(16, 30, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    net = Tied().eval()
    small = quantize(net, "w8a16", overrides={"table": "w8a16"})
    assert small.head.weight.data_ptr() == small.table.weight.data_ptr()
    with pytest.warns(UserWarning, match=r"'head' stays float: .*Embedding"):
        quantize(net, "w8a16", overrides={"head": "w8a16"})


def test_what_is_missing_or_wrong_is_named(digits):
    net, data = digits.net, batches(digits, 1)
    for arguments, message in (
        ({"scheme": "w8a8-static"}, r"data is missing: w8a8-static of '0' needs calibration data"),
        ({"method": "gptq"}, "data is missing: method needs calibration data"),
        ({"resume": "x"}, "resume keeps the work of calibration, which needs data="),
        ({"scheme": "w8a8-static", "data": []}, "data is empty"),
        ({"scheme": "w8a8-static", "data": data, "observer": "max"}, "observer"),
        ({"method": "awq"}, "method='awq' is not known; use 'equalize'"),
        ({"method": ["gptq", "hqq"]}, "GPTQ and HQQ, which both choose the integers"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(net, **arguments)
    with pytest.raises(TypeError, match="method has 3"):
        quantize(net, method=3)
    wild = data[0].clone()
    wild[3, 0, 2, 2] = float("nan")
    with pytest.raises(ValueError, match="the input of '0' in batch 1"):
        quantize(net, "w8a8-static", data=[data[0], wild])


def test_layers_that_data_does_not_reach_are_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match=r"data does not reach 'unused'; .*skip="):
        quantize(Half().eval(), "w8a8-static", data=[torch.rand(2, 2)])
    small = quantize(Half().eval(), "w8a8-static", data=[torch.rand(2, 2)], skip=("unused",))
    assert type(small.unused) is nn.Linear


CHILD = """
import sys, torch
from torch import nn
import torsh_quant._calibrate as calibrate
from torsh_quant import quantize
calibrate.SAVE_S = 0.0
torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
    nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 5),
).eval()
data = torch.randn(12, 8, 3, 8, 8)
method = ["equalize", "smoothquant", "gptq", "bias_correction"]
print("begin", flush=True)
small = quantize(net, "w4a8-static", data=data, method=method, resume=sys.argv[1])
torch.save(small.state_dict(), sys.argv[2])
"""


def run_child(folder, out):
    child = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", CHILD, str(folder), str(out)],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with child.stdout as begun:
        assert begun.readline() == b"begin\n"
    return child


@pytest.mark.slow
def test_killed_at_random_it_ends_with_the_same_bits(tmp_path):
    whole = run_child(tmp_path / "whole", tmp_path / "whole.pt")
    begin = time.monotonic()
    assert whole.wait() == 0
    took = time.monotonic() - begin
    expected = torch.load(tmp_path / "whole.pt", weights_only=True)
    chance, deaths, places = random.Random(0), 0, set()
    for turn in range(8):
        if deaths >= 6 and len(places) > 2:
            break
        folder = tmp_path / f"{turn}"
        for _ in range(4):
            child = run_child(folder, tmp_path / "out.pt")
            time.sleep(chance.uniform(0, 0.5) * took)
            child.kill()
            deaths += child.wait() == -signal.SIGKILL
            places.add(frozenset(path.name for path in folder.glob("*.safetensors")))
        assert run_child(folder, tmp_path / "out.pt").wait() == 0
        found = torch.load(tmp_path / "out.pt", weights_only=True)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert deaths >= 6
    assert len(places) > 2
