"""Real Trainers, in processes of their own where a new process is the point.

As a script: ``test_lightning.py FOLDER ACTION`` runs one Trainer and writes what came out.
"""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torsh_quant import QuantLinear, quantize
from torsh_quant._qat import qat_layers
from torsh_quant._qat_layers import QATConv2d, QATLinear
from torsh_quant._quant_conv import QuantConv2d
from torsh_quant.lightning import QATCallback

EPOCHS = 4
QUIET = (
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*:UserWarning:lightning.*",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
)
pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )
        self.head = nn.Linear(3, 3)

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.head(self.body(x)), y)

    def training_step(self, batch):
        loss = self.loss(batch)
        self.log("train", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch):
        self.log("valid", self.loss(batch))

    def test_step(self, batch):
        self.log("test", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 1, 6, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x.mean((1, 2, 3)) * 9).long().clamp(0, 2)), 8)


def callback(**options):
    defaults = {"start_epoch": 1, "freeze_bn_epoch": 2, "freeze_range_epoch": 3}
    return QATCallback("w4a4-static", **{**defaults, **options})


def trainer(folder, *callbacks, epochs=EPOCHS, **options):
    return lightning.Trainer(
        max_epochs=epochs,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        **options,
    )


def keep_all(folder):
    return ModelCheckpoint(folder, "{epoch}", save_top_k=-1)


def made(seed=0):
    torch.manual_seed(seed)
    return Net()


def one_run(folder, action):
    """Run one Trainer; actions are ``whole``, ``half``, ``resume``, ``test``."""
    torch.use_deterministic_algorithms(True)
    net = made(9 if action in ("resume", "test") else 0)
    path = Path(folder, {"resume": "half", "test": "whole"}.get(action, action))
    if action == "test":
        runs = trainer(folder, callback())
        (metrics,) = runs.test(net, rows(), str(path / "epoch=3.ckpt"), verbose=False)
    else:
        runs = trainer(folder, callback(), keep_all(path), epochs=2 if action == "half" else EPOCHS)
        ckpt = str(path / "epoch=1.ckpt") if action == "resume" else None
        runs.fit(net, rows(), rows(), ckpt_path=ckpt)
        (metrics,) = runs.test(net, rows(), verbose=False)
    torch.save(net.state_dict(), Path(folder, f"{action}.pt"))
    Path(folder, f"{action}.json").write_text(json.dumps(metrics))


def process(folder, action):
    subprocess.run([sys.executable, "-W", "ignore", __file__, folder, action], check=True)
    state = torch.load(Path(folder, f"{action}.pt"), weights_only=True)
    return state, json.loads(Path(folder, f"{action}.json").read_text())


@pytest.mark.slow
def test_new_processes_go_on_to_the_same_bits_and_test_the_same(tmp_path):
    folder = str(tmp_path)
    whole, metrics = process(folder, "whole")
    process(folder, "half")
    resumed, resumed_metrics = process(folder, "resume")
    assert whole["body.0.weight"].dtype == torch.uint8
    assert not any("body.1" in name for name in whole)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert resumed_metrics == metrics
    tested, tested_metrics = process(folder, "test")
    assert all(torch.equal(whole[name], tested[name]) for name in whole)
    assert tested_metrics == metrics


def test_switches_follow_the_epochs(tmp_path):
    seen = []

    class Watch(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            conv = module.body[0]
            norm = conv.batch_norm is module.body[1]
            seen.append((conv.enabled, norm, conv.norm_frozen, conv.ranges_frozen))

    net = made()
    trainer(tmp_path, callback(), Watch()).fit(net, rows())
    assert seen == [
        (False, True, False, False),
        (True, True, False, False),
        (True, True, True, False),
        (True, True, True, True),
    ]
    assert type(net.body[0]) is QuantConv2d
    assert type(net.body[1]) is nn.Identity
    assert type(net.head) is QuantLinear


def test_before_the_start_it_is_the_float_model(tmp_path):
    plain, net = made(), made()
    trainer(tmp_path, epochs=2).fit(plain, rows())
    with pytest.warns(UserWarning, match=r"stays float; fit it up to start_epoch=5"):
        trainer(
            tmp_path,
            callback(start_epoch=5, freeze_bn_epoch=None, freeze_range_epoch=None),
            epochs=2,
        ).fit(net, rows())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, net.state_dict()[name]), name


def test_a_second_fit_trains_on_and_converts_again(tmp_path):
    net = made()
    trainer(tmp_path, callback(), epochs=2).fit(net, rows())
    before = net.head.weight.clone()
    again = trainer(tmp_path, callback(), epochs=3)
    again.fit(net, rows())
    assert type(net.head) is QuantLinear
    assert not torch.equal(net.head.weight, before)
    again.save_checkpoint(tmp_path / "end.ckpt")
    (expected,) = again.test(net, rows(), verbose=False)
    fresh = made(5)
    (found,) = trainer(tmp_path, callback()).test(
        fresh, rows(), str(tmp_path / "end.ckpt"), verbose=False
    )
    assert found == expected
    assert torch.equal(fresh.head.weight, net.head.weight)


def test_scales_are_trained_and_layers_can_stay_prepared(tmp_path):
    net = made()
    runs = trainer(tmp_path, callback(convert_on_end=False), epochs=2)
    runs.fit(net, rows(), rows())
    runs.test(net, rows(), verbose=False)
    assert type(net.body[0]) is QATConv2d
    assert type(net.head) is QATLinear
    assert all((layer.weight_scale != 1).any() for _, layer in qat_layers(net))


def test_beside_averaged_weights(tmp_path):
    path = tmp_path / "kept"
    net = made()
    runs = trainer(
        tmp_path,
        QATCallback("w4a4-static"),
        EMAWeightAveraging(decay=0.5),
        keep_all(path),
        epochs=2,
    )
    runs.fit(net, rows(), rows())
    (expected,) = runs.test(net, rows(), verbose=False)
    assert type(net.head) is QuantLinear
    (prepared,) = runs.validate(net, rows(), verbose=False)
    assert type(net.head) is QATLinear  # the averages are swapped in and out around validation
    assert prepared["valid"] == pytest.approx(expected["test"], rel=0.05)  # steps of 4 bits
    (found,) = trainer(tmp_path, QATCallback("w4a4-static")).validate(
        made(4), rows(), str(path / "epoch=1.ckpt"), verbose=False
    )
    assert found["valid"] == expected["test"]
    with pytest.raises(ValueError, match=r"lists EMAWeightAveraging ahead of QATCallback"):
        trainer(tmp_path, EMAWeightAveraging(), QATCallback()).fit(made(), rows())


def test_what_cannot_be():
    with pytest.raises(ValueError, match=r"start_epoch=-1 is negative"):
        QATCallback(start_epoch=-1)
    with pytest.raises(ValueError, match=r"freeze_bn_epoch=1 comes before start_epoch=2"):
        QATCallback(start_epoch=2, freeze_bn_epoch=1)
    with pytest.raises(ValueError, match=r"version 7; known is 1"):
        QATCallback().load_state_dict({"version": 7})


def test_quantized_modules_are_refused(tmp_path):
    net = made()
    net.head = quantize(nn.Sequential(net.head).eval())[0]
    with pytest.raises(RuntimeError, match=r"'head' is quantized already"):
        trainer(tmp_path, QATCallback()).fit(net, rows())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    one_run(*sys.argv[1:])
