"""Contrastive fine-tuning of an encoder on a few labelled texts."""

import logging
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._encoder import Encoder

logger = logging.getLogger(__name__)

_WINDOW = 10


def pair_loss(vectors: Tensor, y: Tensor) -> Tensor:
    """Squared error of all pairs' cosines: 1 within a class, 0 between classes.

    Both kinds of pairs count half, however many there are.

    Args:
        vectors: ``(rows, dim)``; with two or more rows of a class and two or more classes.
        y: Class of each row ``(rows,)``.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> pair_loss(x, torch.tensor([0, 0, 1])).item()  # cosines: 0 within, 1 and 0 between
        0.75
    """
    unit = F.normalize(vectors, dim=1)
    same = y.unsqueeze(0) == y.unsqueeze(1)
    above = torch.ones_like(same).triu(1)
    cosines = unit @ unit.T
    within = (1 - cosines).square()[same & above].mean()
    between = cosines.square()[~same & above].mean()
    return (within + between) / 2


class _Draws:
    """Balanced draws of rows: each class gives its rows in turn, shuffled anew each round."""

    def __init__(self, y: Tensor, rows: int, generator: torch.Generator) -> None:
        self._members = [(y == kind).nonzero()[:, 0] for kind in y.unique()]
        self._queues: list[list[int]] = [[] for _ in self._members]
        self._classes = min(len(self._members), max(2, rows // 2))
        self._each = max(2, rows // self._classes)
        self._generator = generator

    def __call__(self) -> list[int]:
        order = torch.randperm(len(self._members), generator=self._generator)
        found = []
        for kind in order[: self._classes].tolist():
            members = self._members[kind]
            for _ in range(min(self._each, len(members))):
                if not self._queues[kind]:
                    shuffled = torch.randperm(len(members), generator=self._generator)
                    self._queues[kind] = members[shuffled].tolist()
                found.append(self._queues[kind].pop())
        return found


def tune_on_pairs(
    encoder: Encoder,
    texts: Sequence[str],
    y: Tensor,
    *,
    steps: int,
    rows: int,
    lr: float,
    seed: int,
    progress: bool,
) -> list[float]:
    """Train an encoder in place so that texts of a class come close together.

    Each step packs a balanced draw of texts, encodes it once and compares all its pairs. AdamW
    with weight decay 0.01, one tenth of the steps to warm up, then a linear decay. It stops early
    when the mean loss of ten steps is below 0.01, or has not sunk by one percent in thirty.

    Args:
        encoder: The encoder, with float32 weights; left in eval mode.
        texts: The texts.
        y: Class of each text ``(texts,)`` on the CPU; two or more texts of each class.
        steps: Most steps.
        rows: About how many texts a step draws.
        lr: Largest learning rate.
        seed: Seed of draws and dropout.
        progress: Show a progress bar.

    Returns:
        The loss of each step.
    """
    from tqdm.auto import tqdm  # comes with transformers

    device = encoder.backbone.device
    draw = _Draws(y, rows, torch.Generator().manual_seed(seed))
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up)),
    )
    losses: list[float] = []
    best, best_at = float("inf"), 0
    gpus = [device] if device.type == "cuda" else []
    encoder.train()
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=gpus):
            torch.manual_seed(seed)
            for step in tqdm(range(steps), disable=not progress, unit="step", leave=False):
                chosen = draw()
                with warnings.catch_warnings():  # the probe says once what was cut
                    warnings.simplefilter("ignore", UserWarning)
                    batch = encoder.pack([texts[i] for i in chosen]).to(device)
                loss = pair_loss(encoder(batch), y[chosen].to(device))
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                if len(losses) < _WINDOW:
                    continue
                mean = sum(losses[-_WINDOW:]) / _WINDOW
                if mean < 0.99 * best:
                    best, best_at = mean, step
                if mean < 0.01 or step - best_at >= 3 * _WINDOW:
                    logger.info("pairs fit after %d of %d steps, loss %.4f", step + 1, steps, mean)
                    break
    finally:
        encoder.eval()
    return losses
