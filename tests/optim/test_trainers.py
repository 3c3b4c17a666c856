"""Real trainers: Lightning, HF Transformers, Accelerate, and a GradScaler in both stages."""

import contextlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from torsh_optim import LAMB, SGD, AdamW, AdvancedAdam, Lion, Lookahead

KINDS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda ps: AdamW(ps, lr=0.02),
    "adamw-clip": lambda ps: AdamW(ps, lr=0.02, max_grad_norm=1.0, warmup_steps=3),
    "advanced": lambda ps: AdvancedAdam(ps, lr=0.02, cautious=True, ema_decay=0.9),
    "adaptive": lambda ps: AdvancedAdam(ps, adaptive_lr=True, max_grad_norm=math.inf),
    "lamb": lambda ps: LAMB(ps, lr=0.02),
    "lion": lambda ps: Lion(ps, lr=0.005),
    "sgd": lambda ps: SGD(ps, lr=0.02, momentum=0.9),
    "lookahead": lambda ps: Lookahead(AdamW(ps, lr=0.02), k=3),
}


def _data(dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 6, generator=generator)
    targets = torch.tanh(inputs[:, :2] - inputs[:, 2:4])
    return DataLoader(TensorDataset(inputs.to(dtype), targets.to(dtype)), batch_size=4)


def _model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


# --- Lightning ---


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers, loggers and folders
        yield


class Run:
    """A Lightning training of the small model.

    Attributes:
        net: The module, after the training.
        trainer: Its trainer.
        losses: Of all batches.
    """

    def __init__(
        self,
        make: Callable[[Any], Any],
        folder: Path,
        *,
        epochs: int = 2,
        checkpoint: Path | None = None,
        schedule: bool = True,
        manual: bool = False,
        **options: Any,
    ) -> None:
        lightning = pytest.importorskip("lightning")
        losses: list[float] = []
        run = self

        class Net(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.layers = _model()
                self.automatic_optimization = not manual

            def training_step(self, batch: list[Tensor], index: int) -> Tensor | None:
                loss = (self.layers(batch[0]) - batch[1]).float().square().mean()
                losses.append(loss.item())
                if not manual:
                    return loss
                opt = self.optimizers()
                assert isinstance(opt, lightning.pytorch.core.optimizer.LightningOptimizer)
                opt.zero_grad()
                self.manual_backward(loss)
                opt.step()
                return None

            def on_train_end(self) -> None:  # afterwards the trainer moves all to the CPU
                entries = self.trainer.optimizers[0].state.values()
                run.devices = {t.device.type for entry in entries for t in entry.values()}

            def configure_optimizers(self) -> Any:
                opt = make(self.named_parameters())
                if not schedule:
                    return opt
                scheduler = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.2, 30)
                return [opt], [{"scheduler": scheduler, "interval": "step"}]

        self.net = Net()
        self.losses = losses
        self.devices: set[str] = set()
        with _quiet():
            self.trainer = lightning.Trainer(
                **{
                    "max_epochs": epochs,
                    "accelerator": "cpu",
                    "logger": False,
                    "enable_checkpointing": False,
                    "enable_progress_bar": False,
                    "enable_model_summary": False,
                    "default_root_dir": folder,
                    **options,
                }
            )
            half = options.get("precision") == "bf16-true"
            self.trainer.fit(
                self.net,
                _data(torch.bfloat16 if half else torch.float32),
                ckpt_path=checkpoint,
                weights_only=True if checkpoint else None,
            )

    @property
    def optimizer(self) -> Any:
        return self.trainer.optimizers[0]


def _equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(map(torch.equal, first.parameters(), second.parameters()))


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", KINDS)
def test_lightning_trains(name: str, precision: str, tmp_path: Path) -> None:
    if (name, precision) == ("adaptive", "bf16-true"):
        with pytest.raises(RuntimeError, match="adaptive_lr=True takes float32 parameters"):
            Run(KINDS[name], tmp_path, precision=precision)
        return
    epochs = 5 if name == "adaptive" else 3
    run = Run(KINDS[name], tmp_path, epochs=epochs, precision=precision)
    assert sum(run.losses[-8:]) < 0.95 * sum(run.losses[:8])
    param = next(run.net.parameters())
    assert run.optimizer.state[param]["step"].item() == 8 * epochs
    assert param.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_lightning_clips_for_optimizers_that_do_not(
    algorithm: str, precision: str, tmp_path: Path
) -> None:
    """Also in mixed precision, where it refuses torch's fused optimizers."""
    runs = [
        Run(
            make, tmp_path, precision=precision, gradient_clip_val=0.05,
            gradient_clip_algorithm=algorithm,
        )
        for make in (
            lambda ps: SGD(ps, lr=0.1, momentum=0.9),
            lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
        )
    ]  # fmt: skip
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-4)  # float32, sixteen steps


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_max_grad_norm_is_lightnings_clip(precision: str, tmp_path: Path) -> None:
    inside = Run(
        lambda ps: SGD(ps, lr=0.1, momentum=0.9, max_grad_norm=0.05), tmp_path, precision=precision
    )
    outside = Run(
        lambda ps: SGD(ps, lr=0.1, momentum=0.9), tmp_path, precision=precision,
        gradient_clip_val=0.05,
    )  # fmt: skip
    assert inside.losses == pytest.approx(outside.losses, rel=1e-4)
    assert inside.optimizer.grad_norm.item() > 0.05


def test_lightning_refuses_to_clip_twice(tmp_path: Path) -> None:
    """In mixed precision it asks the optimizer; the message names the two."""
    with pytest.raises(
        RuntimeError, match="does not allow for gradient clipping because it performs unscaling"
    ):
        Run(KINDS["adamw-clip"], tmp_path, precision="bf16-mixed", gradient_clip_val=1.0)


@pytest.mark.parametrize("name", ["adamw-clip", "lamb", "lookahead"])
def test_lightning_accumulates(name: str, tmp_path: Path) -> None:
    run = Run(KINDS[name], tmp_path, accumulate_grad_batches=4)
    param = next(run.net.parameters())
    assert run.optimizer.state[param]["step"].item() == 4
    by_hand = _model()
    opt = KINDS[name](by_hand.named_parameters())
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.2, 30)
    for _ in range(2):
        for i, (inputs, targets) in enumerate(_data()):
            ((by_hand(inputs) - targets).square().mean() / 4).backward()
            if i % 4 == 3:
                opt.step()
                opt.zero_grad()
                scheduler.step()
    for mine, theirs in zip(run.net.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", KINDS)
def test_lightning_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    first = Run(KINDS[name], tmp_path, epochs=2)
    with _quiet():
        first.trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Run(KINDS[name], tmp_path, epochs=4, checkpoint=tmp_path / "half.ckpt")
    whole = Run(KINDS[name], tmp_path, epochs=4)
    assert _equal(resumed.net, whole.net)
    assert resumed.losses == whole.losses[16:]
    assert [g["lr"] for g in resumed.optimizer.param_groups] == [
        g["lr"] for g in whole.optimizer.param_groups
    ]


@pytest.mark.parametrize("name", ["adamw-clip", "advanced", "lookahead"])
def test_lightning_optimizer_in_manual_mode(name: str, tmp_path: Path) -> None:
    """``LightningOptimizer`` is made of our class without its constructor, and must share all."""
    manual = Run(KINDS[name], tmp_path, manual=True, schedule=False)
    automatic = Run(KINDS[name], tmp_path, schedule=False)
    assert manual.losses == automatic.losses
    from lightning.pytorch.core.optimizer import LightningOptimizer

    wrapped = LightningOptimizer(manual.optimizer)
    param = next(manual.net.parameters())
    assert isinstance(wrapped, type(manual.optimizer))
    assert wrapped.state is manual.optimizer.state
    assert wrapped.state_dict().keys() == manual.optimizer.state_dict().keys()
    assert wrapped.param_groups[0]["params"][0] is param
    if name != "lookahead":
        assert wrapped.last_lr() == manual.optimizer.last_lr()
        assert wrapped.implementation == manual.optimizer.implementation


def test_schedulers_see_no_warmup(tmp_path: Path) -> None:
    run = Run(KINDS["adamw-clip"], tmp_path)
    plain = Run(KINDS["adamw"], tmp_path)
    assert run.optimizer.param_groups[0]["lr"] == plain.optimizer.param_groups[0]["lr"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "32"])
@pytest.mark.parametrize("name", KINDS)
def test_lightning_on_the_gpu(name: str, precision: str, tmp_path: Path) -> None:
    run = Run(KINDS[name], tmp_path, epochs=6, accelerator="gpu", devices=1, precision=precision)
    assert sum(run.losses[-8:]) < 0.95 * sum(run.losses[:8])
    assert "cuda" in run.devices


@pytest.mark.gpu
@pytest.mark.parametrize("clip", ["inside", "outside"])
def test_16_mixed_clips(clip: str, tmp_path: Path) -> None:
    """Unscaled before it is clipped, whoever clips."""
    inside = clip == "inside"
    run = Run(
        lambda ps: SGD(ps, lr=0.1, momentum=0.9, max_grad_norm=0.05 if inside else None),
        tmp_path, epochs=4, accelerator="gpu", devices=1, precision="16-mixed",
        gradient_clip_val=None if inside else 0.05,
    )  # fmt: skip
    full = Run(
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9), tmp_path, epochs=4,
        accelerator="gpu", devices=1, precision="32", gradient_clip_val=0.05,
    )  # fmt: skip
    # float16 products, and the first steps that the scaler may leave out
    assert run.losses[-1] == pytest.approx(full.losses[-1], rel=0.1)


# --- GradScaler, beside torch's fused optimizers ---


@pytest.mark.parametrize("max_grad_norm", [None, math.inf, 1.0])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_beside_torchs_fused(unscale: bool, max_grad_norm: float | None) -> None:
    """Same scales, same steps left out, same weights over overflows that come and go."""
    models = [_model(), _model()]
    ours = AdamW(models[0].parameters(), lr=0.02, max_grad_norm=max_grad_norm)
    torchs = torch.optim.AdamW(models[1].parameters(), lr=0.02, fused=True)
    clips = max_grad_norm == 1.0
    unscales = {ours: unscale, torchs: unscale or clips}  # torch's clip needs them unscaled
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3) for _ in models]
    for step, (inputs, targets) in enumerate(_data()):
        for model, opt, scaler in zip(models, (ours, torchs), scalers, strict=True):
            opt.zero_grad()
            loss = (model(inputs) - targets).square().sum()
            scaler.scale(loss * (math.inf if step in (0, 4) else 1.0)).backward()
            if unscales[opt]:
                scaler.unscale_(opt)
            if opt is torchs and clips:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(opt)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert ours.skipped_steps.item() == (0 if max_grad_norm is None else 2)
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert ours.state[mine]["step"] == torchs.state[theirs]["step"] == 6


# --- HF Transformers and Accelerate ---

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed"
)


@needs_accelerate
@pytest.mark.parametrize("name", ["adamw-clip", "lamb", "lookahead"])
def test_transformers_trainer_resumes(name: str, tmp_path: Path) -> None:
    """``Trainer(optimizers=...)`` with a tiny model; a checkpoint goes on bit for bit."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=12, num_labels=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 40, (24, 8), generator=generator)
    data = [{"input_ids": row, "labels": int(row[0] > 20)} for row in tokens]

    def train(folder: str, resume: str | None) -> Any:
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        opt = KINDS[name](model.named_parameters())
        scheduler = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, 12)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder), per_device_train_batch_size=4, num_train_epochs=2,
            save_strategy="epoch", report_to=[], use_cpu=True, disable_tqdm=True,
            max_grad_norm=0.0 if name == "adamw-clip" else 1.0, logging_strategy="no",
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=data, optimizers=(opt, scheduler)
        )
        with _quiet():
            trainer.train(resume_from_checkpoint=resume)
        return model, opt

    whole, opt = train("whole", None)
    assert opt.state[next(whole.parameters())]["step"].item() == 12
    resumed, _ = train("resumed", str(tmp_path / "whole" / "checkpoint-6"))
    assert _equal(whole, resumed)


@needs_accelerate
@pytest.mark.parametrize("name", ["adamw", "lion", "lookahead"])
def test_accelerated_optimizer(name: str) -> None:
    import accelerate

    with _quiet():
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    models = [_model(), _model()]
    opts = [KINDS[name](model.parameters()) for model in models]
    model, wrapped, data = accelerator.prepare(models[0], opts[0], _data())
    for inputs, targets in data:
        with accelerator.accumulate(model):
            accelerator.backward((model(inputs) - targets).square().mean())
            wrapped.step()
            wrapped.zero_grad()
    for i, (inputs, targets) in enumerate(_data()):
        ((models[1](inputs) - targets).square().mean() / 2).backward()
        if i % 2:
            opts[1].step()
            opts[1].zero_grad()
    assert _equal(model, models[1])
    assert not wrapped.step_was_skipped
