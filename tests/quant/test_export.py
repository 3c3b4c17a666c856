"""Quantized models through torch.export and torch.compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from torsh_quant import quantize

ROOT = Path(__file__).parents[2]


def convolutions(dims):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    return nn.Sequential(
        conv(2, 8, 3, padding=1, bias=False),
        norm(8),
        nn.ReLU(),
        conv(8, 8, 3, stride=2, padding=1, groups=2, padding_mode="circular"),
        nn.ReLU(),
        conv(8, 6, 2, padding="same"),
        pool(2),
        nn.Flatten(),
        nn.Linear(6 * 2**dims, 4),
    ).eval()


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.inner = nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(torch.relu(self.inner(self.table(ids))))


def made(kind, scheme):
    """A quantized model, and two inputs of different length."""
    torch.manual_seed(0)
    if kind == "words":
        net: nn.Module = Words().eval()
        inputs = [torch.randint(0, 20, (rows, 6)) for rows in (3, 5)]
        data = [inputs[0]] if "static" in scheme else None
        tables = {"table": "w4a16", "head": "w4a16"}
        return quantize(net, scheme, data=data, overrides=tables), inputs
    dims = int(kind[0])
    inputs = [torch.randn(rows, 2, *(6,) * dims) for rows in (3, 5)]
    data = [inputs[0]] if "static" in scheme else None
    net = convolutions(dims)
    method = ["smoothquant", "rtn"] if "static" in scheme else "rtn"
    return quantize(net, scheme, data=data, method=method), inputs


CASES = [  # test_modules has more in two dimensions
    ("1d", "w8a8-static"),
    ("2d", "w8a8-static"),
    ("3d", "w4a8"),
    ("words", "w8a8"),
]
EVEN = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
RUN = """
import sys, torch, torsh_quant
for path in sys.argv[1:]:
    program = torch.export.load(path)
    x = torch.load(path + ".x", weights_only=True)
    torch.save([program.module()(one) for one in x], path + ".out")
"""


@EVEN
@pytest.mark.slow
def test_exported_programs_run_in_another_process(tmp_path):
    expected = {}
    for number, (kind, scheme) in enumerate(CASES):
        net, inputs = made(kind, scheme)
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(net, (inputs[0],), dynamic_shapes=({0: batch},))
        targets = {str(node.target).split(".")[0] for node in program.graph.nodes}
        assert "torsh_quant" in targets
        assert not targets & {"aten.linear", "aten.embedding", "aten.conv2d"}
        path = str(tmp_path / f"{number}.pt2")
        torch.export.save(program, path)
        torch.save(inputs, path + ".x")
        with torch.no_grad():
            expected[path] = [net(one) for one in inputs]
    source = os.pathsep.join([str(ROOT / "torsh_quant" / "src"), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, *expected],
        env={**os.environ, "PYTHONPATH": source},
        check=True,
        timeout=200,
    )
    for path, outputs in expected.items():
        found = torch.load(path + ".out", weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(found, outputs, strict=True)), path


@EVEN
@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_compiled_graphs_are_whole_and_the_same(kind, scheme):
    net, inputs = made(kind, scheme)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for x in inputs:
            assert torch.equal(compiled(x), net(x))


@EVEN
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scheme"), [("1d", "w8a8-static"), ("words", "w8a8")])
def test_inductor(kind, scheme):
    net, inputs = made(kind, scheme)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, fullgraph=True)(inputs[0]), net(inputs[0]))


@EVEN
@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_compiled_on_a_gpu(kind, scheme):
    net, inputs = made(kind, scheme)
    net, x = net.cuda(), inputs[0].cuda()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, fullgraph=True)(x), net(x))
