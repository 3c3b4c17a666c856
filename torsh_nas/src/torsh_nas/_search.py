"""The loop around a strategy: batches, budget, log and checkpoints."""

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler, SequentialSampler

from torsh_nas._architecture import Architecture
from torsh_nas._budget import Budget, InfeasibleBudget
from torsh_nas._checkpoint import (
    append_log,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
    write_log,
)
from torsh_nas._derive import derive
from torsh_nas._measure import Timing, measure, torch_threads
from torsh_nas._penalty import LatencyPenalty
from torsh_nas._solve import maximise, minimise, solve
from torsh_nas._strategy import Batch, Loss, Strategy

T = TypeVar("T")
_MEASUREMENTS = 10
_CLOSE = 1.02


def cycle(loader: Iterable[T]) -> Iterator[T]:
    """Repeat a loader for ever, starting it anew each time so that it shuffles again.

    Args:
        loader: Anything that can be iterated more than once.

    Raises:
        ValueError: The loader is empty.

    Example:
        >>> from torsh_nas import cycle
        >>> batches = cycle([1, 2])
        >>> [next(batches) for _ in range(5)]
        [1, 2, 1, 2, 1]
    """
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("the loader is empty")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
        architecture: The chosen architecture.
        timing: Measured latency of the derived model; ``None`` without a budget.
        history: One row per epoch: losses, seconds, probabilities, present best architecture.
        supernet: The searched model.
    """

    architecture: Architecture
    timing: Timing | None
    history: tuple[dict[str, Any], ...]
    supernet: nn.Module = dataclasses.field(repr=False)

    def model(self, *, weights: Literal["inherit", "reset"] = "inherit") -> nn.Module:
        """Return the found model, as :func:`derive` makes it; a new copy on each call."""
        return derive(self.supernet, self.architecture, weights=weights)


class Search:
    """Train a model with choices and find the best architecture in it.

    With a budget the found model is measured, and the limit on the predictions moved until the
    measurement holds the budget and little of it is left unused; where that is impossible,
    :class:`InfeasibleBudget` says what is possible.

    Args:
        model: Your model, with choices in it.
        strategy: Such as :class:`DARTS`; used for one search.
        loss: Called as ``loss(model(*inputs), target)``; returns one number.
        weight_optimizer: Built from :func:`weights` of the model.
        budget: Latency limit that the found model holds, measured.
        penalty: Latency term in the loss of the architecture parameters.
        scheduler: Learning rate schedule of ``weight_optimizer``, stepped after each epoch.
        log_dir: Folder for ``log.jsonl`` and checkpoints, written after each epoch.
        seed: Seed of the architecture parameters.

    Raises:
        ValueError: Optimizer, table or penalty do not belong to the model.

    Example:
        >>> from torsh_nas import DARTS, Choice, Search, weights
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(Choice({"lin": nn.Linear(1, 1), "skip": nn.Identity()}))
        >>> sgd = torch.optim.SGD(weights(model), lr=0.1)
        >>> search = Search(model, DARTS(lr=0.1), nn.functional.mse_loss, sgd)
        >>> x = torch.linspace(-1, 1, 8)[:, None]
        >>> result = search.fit([(x, x)] * 20, [(x.flip(0), x.flip(0))], epochs=1)
        >>> result.model()
        Sequential(
          (0): Identity()
        )
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: Strategy,
        loss: Loss,
        weight_optimizer: torch.optim.Optimizer,
        *,
        budget: Budget | None = None,
        penalty: LatencyPenalty | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        log_dir: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        strategy.bind(model, loss, weight_optimizer, penalty=penalty, seed=seed)
        for part in (budget, penalty):
            if part is not None:
                info = part.source.device_info
                with torch_threads(None if info is None else info.threads):
                    part.source.check(strategy.space)
        self.model, self.strategy = model, strategy
        self.budget, self.penalty = budget, penalty
        self.epoch = 0
        self._optimizer, self._scheduler = weight_optimizer, scheduler
        self._log_dir = None if log_dir is None else Path(log_dir)
        self._history: list[dict[str, Any]] = []
        self._timing: Timing | None = None

    def step(self, train_batch: Batch, val_batch: Batch) -> dict[str, Tensor]:
        """Do one step of the strategy, for a training loop of your own.

        Set :attr:`epoch` in such a loop if the strategy has warm-up epochs. The model runs in the
        mode it is in: call ``model.train()`` before.

        Args:
            train_batch: Inputs and, last, the target.
            val_batch: The same from data that the weights are not trained on.

        Returns:
            Losses as 0-dim tensors on the device; reading them synchronises, the step does not.

        Raises:
            ValueError: Both batches are the same tensors.
        """
        if train_batch[0] is val_batch[0]:
            raise ValueError(
                "train_batch and val_batch are the same tensors; the architecture must be judged "
                "on data that the weights are not trained on"
            )
        return self.strategy.step(train_batch, val_batch, epoch=self.epoch)

    def fit(
        self,
        train_loader: Iterable[Batch],
        val_loader: Iterable[Batch],
        epochs: int,
        *,
        resume: str | None = None,
    ) -> Result:
        """Search for a number of epochs over ``train_loader``.

        Validation batches are taken in turn, ``val_loader`` being started anew when it ends.
        Tensors in the batches are moved to the device of the model.

        Args:
            train_loader: Batches for the weights, such as a ``DataLoader``.
            val_loader: Batches for the architecture, from other data.
            epochs: Epochs in total, those before a resume included.
            resume: ``None`` starts from the present state; ``"auto"`` continues from the
                checkpoint in ``log_dir`` if there is one; a path from the one in that folder. On
                the CPU a resumed search repeats the interrupted one bit for bit, with loaders
                that shuffle by torch's global generator or by their own ``generator``.

        Raises:
            ValueError: Both loaders read the same data, an empty loader, or nothing to resume.
            RuntimeError: The loss of an epoch is not finite; checkpoints before it stay.
            InfeasibleBudget: No architecture holds the budget.
        """
        _check_loaders(train_loader, val_loader)
        if resume is not None:
            self._resume(resume, [train_loader, val_loader])
        log = None if self._log_dir is None else self._log_dir / "log.jsonl"
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            write_log(log, self._header(), self._history)
        while self.epoch < epochs:
            row = self._run_epoch(train_loader, val_loader)
            self._history.append(row)
            self.epoch += 1
            if self._log_dir is not None and log is not None:
                space_id = self.strategy.space.space_id
                state = self._state([train_loader, val_loader])
                folder = self._log_dir / "checkpoints"
                save_checkpoint(folder, state, epoch=self.epoch, space_id=space_id)
                append_log(log, row)
        architecture = self.best()
        return Result(architecture, self._timing, tuple(self._history), self.model)

    def best(self) -> Architecture:
        """Return the best architecture so far; with a budget, one measured to hold it.

        Raises:
            InfeasibleBudget: No architecture holds the budget.
        """
        if self.budget is None:
            return self.strategy.best()
        arch, self._timing = _best_within(self.model, self.strategy.scores(), self.budget)
        return arch

    def _run_epoch(self, train: Iterable[Batch], val: Iterable[Batch]) -> dict[str, Any]:
        self.model.train()
        device = next(self.model.parameters()).device
        start = time.perf_counter()
        sums: dict[str, Tensor] = {}
        steps = 0
        val_batches = cycle(val)
        for batch in train:
            report = self.step(_on(batch, device), _on(next(val_batches), device))
            for key, value in report.items():
                sums[key] = sums[key] + value if key in sums else value
            steps += 1
        if not steps:
            raise ValueError("train_loader is empty")
        if self._scheduler is not None:
            self._scheduler.step()
        row: dict[str, Any] = {"epoch": self.epoch}
        row |= {key: (value / steps).item() for key, value in sums.items()}
        for key in sums:
            if not math.isfinite(row[key]):
                raise RuntimeError(
                    f"{key} is {row[key]} in epoch {self.epoch}: lower the learning rate; "
                    "checkpoints of the epochs before are intact"
                )
        if self.penalty is not None:
            row["multiplier"] = self.penalty.multiplier
        row["seconds"] = time.perf_counter() - start
        probabilities = self.strategy.probabilities()
        row["probabilities"] = {label: p.tolist() for label, p in probabilities.items()}
        row["best"] = dict(self.strategy.best())
        return row

    def _header(self) -> dict[str, object]:
        chosen = self.strategy.space
        return {
            "format": "torsh_nas.log",
            "version": 1,
            "strategy": type(self.strategy).__name__,
            "space_id": chosen.space_id,
            "choices": {label: list(options) for label, options in chosen.choices.items()},
            "budget_ms": None if self.budget is None else self.budget.latency_ms,
        }

    def _state(self, loaders: list[Iterable[Batch]]) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "weight_optimizer": self._optimizer.state_dict(),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "strategy": self.strategy.state_dict(),
            "penalty": None if self.penalty is None else self.penalty.state_dict(),
            "history": self._history,
            "rng": rng_state(),
            "loaders": [g.get_state() for g in _generators(loaders)],
        }

    def _resume(self, resume: str, loaders: list[Iterable[Batch]]) -> None:
        if resume == "auto" and self._log_dir is None:
            raise ValueError("resume='auto' needs log_dir")
        folder = self._log_dir if resume == "auto" else Path(resume)
        state = load_checkpoint(
            Path(folder or "") / "checkpoints", space_id=self.strategy.space.space_id
        )
        if state is None:
            if resume == "auto":
                return
            raise ValueError(f"resume={resume!r} has no checkpoint; use 'auto' to start anew")
        if (state["scheduler"] is None) != (self._scheduler is None) or (
            state["penalty"] is None
        ) != (self.penalty is None):
            raise ValueError("the checkpoint was made with another scheduler or penalty setting")
        generators = _generators(loaders)
        if len(generators) != len(state["loaders"]):
            raise ValueError(
                f"the checkpoint holds {len(state['loaders'])} loader generators, the loaders "
                f"have {len(generators)}"
            )
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["weight_optimizer"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        if self.penalty is not None:
            self.penalty.load_state_dict(state["penalty"])
        self.strategy.load_state_dict(state["strategy"])
        self._history = list(state["history"])
        for generator, its_state in zip(generators, state["loaders"], strict=True):
            generator.set_state(its_state)
        set_rng_state(state["rng"])


def _best_within(
    model: nn.Module, scores: Mapping[str, Tensor], budget: Budget
) -> tuple[Architecture, Timing]:
    """Search for the loosest limit on predictions whose solution is measured to hold the budget.

    Predictions err on both sides: where they promise too much the limit is tightened, where they
    are too cautious it is loosened, so that no score is given away for a budget left unused.
    """
    table = budget.source
    limit, holds, fails = budget.latency_ms, 0.0, math.inf
    seen: dict[Architecture, Timing] = {}
    found: Architecture | None = None
    best = maximise(table.space, scores)
    try:
        for _ in range(_MEASUREMENTS):
            arch = solve(scores, Budget(latency_ms=limit, source=table))
            if arch not in seen:
                seen[arch] = _time_derived(model, arch, budget)
            ratio = budget.latency_ms / seen[arch].ms
            if ratio >= 1:
                found, holds = arch, limit
                if arch == best:
                    break
                # At least past what this architecture is predicted to take.
                limit *= max(ratio, _CLOSE)
            else:
                # Below what this architecture is predicted to take: it cannot come again.
                fails = min(fails, limit, table.predict(arch) * (1 - 1e-4))
                limit = fails * ratio
            if limit >= fails or limit <= holds:
                limit = (holds + fails) / 2
            if fails <= holds * _CLOSE or limit <= 0:
                break
    except InfeasibleBudget:
        if not seen:
            raise
    if found is not None:
        return found, seen[found]
    costs = {label: list(times) for label, times in table.costs.items()}
    fastest = minimise(table.space, costs)
    if fastest not in seen:
        seen[fastest] = _time_derived(model, fastest, budget)
    if seen[fastest].ms <= budget.latency_ms:
        return fastest, seen[fastest]
    minimum = min(timing.ms for timing in seen.values())
    raise InfeasibleBudget(
        f"latency_ms={budget.latency_ms:.4g} cannot be met: of {len(seen)} architectures "
        "measured, the predicted fastest among them, none took less than "
        f"{minimum:.4g} ms; raise the budget, add faster options, or measure on an idle machine",
        minimum_ms=minimum,
    )


def _time_derived(model: nn.Module, arch: Architecture, budget: Budget) -> Timing:
    table = budget.source
    if table.device_info is None or not table.input_specs:
        raise ValueError(
            "the budget's table holds given numbers, not measurements of this machine, so the "
            "found model cannot be held against it; use LatencyTable.build, or solve() by hand"
        )
    device = table.device_info.device
    inputs = table.example_inputs(device)
    floating = next((i.dtype for i in inputs if i.is_floating_point()), None)
    plain = derive(model, arch).to(device=device, dtype=floating)
    timing = measure(plain, inputs, device=device, threads=table.device_info.threads)
    if timing.ms > budget.latency_ms:
        # One busy moment of the machine must not cost the better architecture.
        again = measure(plain, inputs, device=device, threads=table.device_info.threads)
        timing = min(timing, again, key=lambda t: t.ms)
    return timing


def _on(batch: Batch, device: torch.device) -> list[Any]:
    return [
        part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in batch
    ]


def _generators(loaders: list[Iterable[Batch]]) -> list[torch.Generator]:
    found = (getattr(loader, "generator", None) for loader in loaders)
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def _check_loaders(train: Iterable[Batch], val: Iterable[Batch]) -> None:
    if train is val or _everything(train) is _everything(val) is not None:
        raise ValueError(
            "train_loader and val_loader read the same data; split it, for example with "
            "torch.utils.data.random_split"
        )


def _everything(loader: Iterable[Batch]) -> object:
    """Return the data set of a loader that reads all of it; two samplers may share one."""
    whole = isinstance(getattr(loader, "sampler", None), RandomSampler | SequentialSampler)
    return getattr(loader, "dataset", None) if whole else None
