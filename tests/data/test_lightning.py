"""A real Trainer saves and restores the stream by itself."""

import lightning
import pytest
import torch

from torsh_data import StreamLoader

ROWS, BATCH = 40, 4


class Recorder(lightning.LightningModule):
    def __init__(self, stop_after=None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []
        self.stop_after = stop_after

    def training_step(self, batch, _):
        self.seen.append(batch["index"].tolist())
        return self.layer(batch["x"]).square().mean()

    def on_train_batch_end(self, *_):
        if self.stop_after is not None and len(self.seen) == self.stop_after:
            self.trainer.save_checkpoint(self.trainer.default_root_dir + "/stop.ckpt")
            self.trainer.should_stop = True

    def validation_step(self, batch, _):
        self.log("loss", self.layer(batch["x"]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def stream():
    samples = [{"x": torch.tensor([float(n)])} for n in range(ROWS)]
    return StreamLoader(samples, BATCH, seed=3)


def fit(folder, module, ckpt_path=None):
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        default_root_dir=str(folder),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, stream(), ckpt_path=ckpt_path)
    return module.seen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning.*")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("stop", [3, 10, 14])
def test_a_trainer_resumes_on_the_exact_batch(tmp_path, stop):
    unbroken = fit(tmp_path, Recorder())
    assert len(unbroken) == 30
    for epoch in range(3):
        batches = unbroken[epoch * 10 : epoch * 10 + 10]
        assert sorted(n for batch in batches for n in batch) == list(range(ROWS))
    begun = fit(tmp_path, Recorder(stop_after=stop))
    assert begun == unbroken[:stop]
    resumed = fit(tmp_path, Recorder(), tmp_path / "stop.ckpt")
    assert begun + resumed == unbroken


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning.*")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_checkpoint_after_validation_goes_on_with_the_next_epoch(tmp_path):
    """Lightning restores no loader's state from such a checkpoint, only the number of epochs."""

    def run(epochs, folder, ckpt_path=None):
        best = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path / folder)
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            default_root_dir=str(tmp_path),
            logger=False,
            callbacks=[best],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Recorder()
        trainer.fit(module, stream(), stream(), ckpt_path=ckpt_path)
        return module.seen, best.best_model_path

    unbroken, _ = run(3, "whole")
    begun, checkpoint = run(1, "begun")
    resumed, _ = run(3, "resumed", checkpoint)
    assert begun + resumed == unbroken
