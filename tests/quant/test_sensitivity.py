import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from torsh_quant import Sensitivity, quantize, sensitivity


def net():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(288, 32),
        nn.ReLU(inplace=True),
        nn.Linear(32, 5),
    ).eval()


@pytest.fixture
def batches():
    return [torch.randn(40, 1, 8, 8) for _ in range(3)]


def test_mse_is_the_error_of_one_quantized_layer(batches):
    model = net()
    found = sensitivity(model, batches, ["w8a8", "w3a16"], score="mse")
    only = quantize(model, "w3a16", skip=("0", "5"))
    x = torch.cat(batches)
    with torch.no_grad():
        expected = (only(x) - model(x)).square().sum() / model(x).square().sum()
    assert found.value("3", "w3a16") == pytest.approx(expected.item(), rel=1e-4)
    assert found.samples == 120


def test_kl_is_the_divergence_of_the_softmax(batches):
    model = net()
    found = sensitivity(model, batches, ["w2a16"], score="kl")
    only = quantize(model, "w2a16", skip=("0", "3"))
    x = torch.cat(batches)
    with torch.no_grad():
        p, q = model(x).double().softmax(1), only(x).double().softmax(1)
    expected = (p * (p / q).log()).sum(1).mean()
    assert found.value("5", "w2a16") == pytest.approx(expected.item(), rel=1e-3)


def test_gradient_score_is_unbiased_where_the_model_is_linear():
    model = nn.Sequential(nn.Linear(20, 6)).eval()
    data = [torch.randn(2000, 20)]
    exact = sensitivity(model, data, ["w4a16", "w4a8"], score="mse")
    found = sensitivity(model, data, ["w4a16", "w4a8"], score="grad")
    for row, right in zip(found.rows, exact.rows, strict=True):
        # 2,000 samples of a squared sum: a relative spread of about sqrt(2 / 2000) = 3 %.
        assert row.value == pytest.approx(right.value, rel=0.13)


def test_gradient_score_ranks_as_the_measured_error(batches):
    schemes = ["w8a8", "w4a16", "w3a16", "w2a16"]
    exact = sensitivity(net(), batches, schemes, score="mse")
    found = sensitivity(net(), batches, schemes, score="grad")
    values = ([row.value for row in exact.rows], [row.value for row in found.rows])
    assert spearmanr(*values).statistic > 0.95


def test_gradient_score_runs_the_model_once_a_batch(batches):
    model, calls = net(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    sensitivity(model, batches, ["w8a8", "w4a16", "w2a16"], score="grad")
    assert len(calls) == len(batches)


@pytest.mark.parametrize("score", ["kl", "mse", "grad"])
def test_nothing_is_left_changed(batches, score):
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = list(model.modules())
    found = sensitivity(model, batches, ["w4a16"], score=score)
    assert list(model.modules()) == modules
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert found == sensitivity(model, iter(batches), ["w4a16"], score=score)


def test_frozen_models_can_be_scored(batches):
    model = net().requires_grad_(False)
    found = sensitivity(model, batches, ["w4a16"], score="grad")
    assert all(row.value > 0 for row in found.rows)


@pytest.mark.parametrize("score", ["kl", "mse", "grad"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_transformer_encoder_calls_its_layers(score, frozen, enabled):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval().requires_grad_(not frozen)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        found = sensitivity(model, [torch.randn(4, 8, 32)], ["w8a8", "w2a16"], score=score)
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert len(found.layers) == 4
    for name in found.layers:
        assert 0 < found.value(name, "w8a8") < found.value(name, "w2a16")


class Dictionaries(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x, mask=None):
        return {"loss": None, "logits": self.fc(x), "other": (x,)}


class Strange(Dictionaries):
    def forward(self, x):
        self.fc(x)
        return "text"


@pytest.mark.parametrize("score", ["kl", "grad"])
def test_batches_and_outputs_of_other_shapes(score):
    x = torch.randn(6, 4)
    plain = sensitivity(Dictionaries().eval(), [x], ["w8a8"], score=score)
    model = Dictionaries().eval()
    torch.manual_seed(0)
    for batch in ((x, torch.zeros(6)), [x], {"x": x, "mask": x, "labels": x}):
        found = sensitivity(model, [batch], ["w8a8"], score=score)
        assert found.samples == plain.samples == 6
        assert (
            found.value("fc", "w8a8")
            == sensitivity(model, [x], ["w8a8"], score=score).rows[0].value
        )
    with pytest.raises(TypeError, match="the model returned str"):
        sensitivity(Strange().eval(), [x], ["w8a8"], score=score)


def test_a_layer_called_twice_counts_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6, bias=False)

        def forward(self, x):
            return self.fc(x) - self.fc(x) + 1

    found = sensitivity(Twice().eval(), [torch.randn(50, 6)], ["w2a16"], score="grad")
    assert found.value("fc", "w2a16") < 1e-10


def test_refusals(batches):
    with pytest.raises(ValueError, match="score='max' is not known; use 'kl', 'mse' or 'grad'"):
        sensitivity(net(), batches, ["w8a8"], score="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 layers, 0 schemes, 3 batches"):
        sensitivity(net(), batches, [])
    with pytest.raises(ValueError, match="3 layers, 1 schemes, 0 batches"):
        sensitivity(net(), [], ["w8a8"])
    with pytest.raises(RuntimeError, match="training mode"):
        sensitivity(net().train(), batches, ["w8a8"])
    with pytest.raises(RuntimeError, match="'0' is quantized already"):
        sensitivity(quantize(net()), batches, ["w8a8"])
    found = sensitivity(net(), batches, ["w8a8"])
    with pytest.raises(KeyError, match="layer='0' with scheme='w4a16' was not measured"):
        found.value("0", "w4a16")


def test_table_json_and_plot(batches, monkeypatch):
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    found = sensitivity(net(), batches, ["w8a8", "w2a16"], score="mse")
    lines = found.table().splitlines()
    assert lines[0].split() == ["layer", "(mse)", "w8a8", "w2a16"]
    assert len(lines) == 4
    assert str(found) == found.table()
    read = json.loads(found.to_json())
    assert (read["format"], read["version"], len(read["rows"])) == ("torsh-quant-sensitivity", 2, 6)
    assert read["rows"][0]["value"] == found.rows[0].value
    figure, axes = plt.subplots()
    assert found.plot(ax=axes) is axes
    assert [line.get_label() for line in axes.lines] == ["w8a8", "w2a16"]
    assert list(axes.lines[0].get_ydata()) == [found.value(name, "w8a8") for name in found.layers]
    figure.canvas.draw()
    plt.close(figure)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'torsh-quant\[plot\]'"):
        found.plot()


def test_json_comes_back(digits):
    data = digits.images[:32].split(16)
    found = sensitivity(digits.net, data, ["w4a16", "w8a8"], score="mse")
    assert Sensitivity.from_json(found.to_json()) == found
    content = json.loads(found.to_json())
    for text, message in (
        ("{", "no JSON"),
        ('{"format": "else"}', "no torsh-quant-sensitivity"),
        (json.dumps({**content, "version": 1}), "has version 1 .*measure again"),
        (json.dumps({**content, "rows": [{"layer": "0"}]}), "damaged"),
        (json.dumps({**content, "rows": None}), "damaged"),
    ):
        with pytest.raises(ValueError, match=message):
            Sensitivity.from_json(text)


CHILD = """
import sys, torch
from torch import nn
import torsh_quant._sensitivity as module
from torsh_quant import sensitivity
module.SAVE_S = 0.0
torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.GELU()))).eval()
data = torch.randn(40, 64, 64)
print("begin", flush=True)
found = sensitivity(net, data, ["w8a8", "w4a16", "w2a16"], score=sys.argv[1], resume=sys.argv[2])
print(found.to_json())
"""


@pytest.mark.slow
@pytest.mark.parametrize("score", ["grad", "kl"])
def test_killed_at_random_it_ends_with_the_same_numbers(tmp_path, score):
    def start(folder):
        command = [sys.executable, "-W", "error", "-c", CHILD, score, str(tmp_path / folder)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"begin\n"
        return child

    whole, begin = start("whole"), time.monotonic()
    expected = whole.communicate()[0]
    took = time.monotonic() - begin
    chance, deaths = random.Random(0), 0
    for _ in range(5):
        child = start("broken")
        time.sleep(chance.uniform(0, 0.3 * took))
        child.kill()
        deaths += child.wait() == -signal.SIGKILL
        child.stdout.close()
    last = start("broken")
    assert last.communicate()[0] == expected
    assert last.returncode == 0
    assert deaths >= 2


def test_other_work_in_the_folder_is_refused(digits, tmp_path):
    data = digits.images[:32].split(16)
    first = sensitivity(digits.net, data, ["w4a16"], score="mse", resume=tmp_path)
    again = sensitivity(digits.net, data, ["w4a16"], score="mse", resume=tmp_path)
    assert again == first
    with pytest.raises(ValueError, match="of another run: data differ"):
        sensitivity(digits.net, data[:1], ["w4a16"], score="mse", resume=tmp_path)
    with pytest.raises(ValueError, match="schemes, score differ"):
        sensitivity(digits.net, data, ["w3a16"], score="kl", resume=tmp_path)


def test_static_schemes_are_refused(digits):
    with pytest.raises(ValueError, match=r"'w8a8-static', whose scales .* measure 'w8a8'"):
        sensitivity(digits.net, [digits.images[:8]], ["w8a8-static"])
