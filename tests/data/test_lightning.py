"""A real Trainer saves and restores the stream by itself."""

import warnings

import lightning
import pytest
import torch

from torsh_data import StreamLoader

ROWS, BATCH = 40, 4


def trains(test):
    for ignored in (
        ":lightning.fabric.utilities.warnings.PossibleUserWarning",
        ".*:UserWarning:lightning.*",
        ":DeprecationWarning",
        ":FutureWarning",
    ):
        test = pytest.mark.filterwarnings(f"ignore:{ignored}")(test)
    return pytest.mark.slow(test)


class Recorder(lightning.LightningModule):
    def __init__(self, stop_after=None, validate=False):
        super().__init__()
        self.validated = [] if validate else None
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

    def on_validation_end(self):
        if self.validated is not None and not self.trainer.sanity_checking:
            self.validated.append(len(self.seen))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def stream(batch_size=BATCH):
    samples = [{"x": torch.tensor([float(n)])} for n in range(ROWS)]
    return StreamLoader(samples, batch_size, seed=3)


def fit(folder, module, ckpt_path=None, batch_size=BATCH, **options):
    trainer = lightning.Trainer(
        **{"max_epochs": 3, **options},
        accelerator="cpu",
        default_root_dir=str(folder),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = (
        (stream(batch_size), stream()) if module.validated is not None else (stream(batch_size),)
    )
    trainer.fit(module, *loaders, ckpt_path=ckpt_path)
    return module.seen


@trains
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


@trains
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


@trains
@pytest.mark.parametrize("batch_size", [4, 2, 1])
def test_a_trainer_resumes_with_smaller_batches(tmp_path, batch_size):
    begun = fit(tmp_path, Recorder(stop_after=3))
    module = Recorder(validate=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = fit(tmp_path, module, tmp_path / "stop.ckpt", batch_size)
    warned = [str(w.message) for w in caught if "will not validate" in str(w.message)]
    assert len(warned) == (batch_size != BATCH)
    left = (ROWS - 12) // batch_size
    assert sorted(n for batch in begun + resumed[:left] for n in batch) == list(range(ROWS))
    assert len(resumed) == left + 2 * (ROWS // batch_size)
    epochs = [left, left + ROWS // batch_size, len(resumed)]
    assert module.validated == (epochs if batch_size == BATCH else epochs[1:])


@trains
def test_larger_batches_of_which_a_trainer_would_leave_some_out_are_refused(tmp_path):
    fit(tmp_path, Recorder(stop_after=3))
    with pytest.raises(ValueError, match=r"lose the last 1 batches.*go on with at most 4 "):
        fit(tmp_path, Recorder(), tmp_path / "stop.ckpt", 8)
    begun = torch.load(tmp_path / "stop.ckpt", weights_only=True)
    state = begun["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
    plain = stream(8)
    plain.load_state_dict(state)  # a plain loop counts nothing
    assert sum(len(batch["index"]) for batch in plain) == 24  # and 4 that fill no batch of 8
