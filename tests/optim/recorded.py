"""Problems whose solutions, by other packages and other versions, are kept in ``states``."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torsh_optim import LAMB, SGD, Adam, AdamW, AdvancedAdam, Lion, Lookahead

STEPS = 6
FILE = Path(__file__).parent / "states" / "peers.json"


def small_params() -> list[Tensor]:
    """Three tensors of size one, the last of them zero, in float64."""
    return [
        torch.nn.Parameter(torch.sin(torch.arange(12.0, dtype=torch.float64)).reshape(3, 4)),
        torch.nn.Parameter(torch.cos(torch.arange(5.0, dtype=torch.float64))),
        torch.nn.Parameter(torch.zeros(4, dtype=torch.float64)),
    ]


def set_small_grads(params: list[Tensor], step: int) -> None:
    """Set gradients whose norm is above 1 in odd steps and below in even ones."""
    for number, param in enumerate(params):
        index = torch.arange(param.numel(), dtype=torch.float64).reshape(param.shape)
        size = 2.0 if step % 2 else 0.05
        param.grad = size * torch.cos(0.7 * index + step + number) + 0.01 * param.detach()


@cache
def logistic_problem() -> tuple[Tensor, Tensor]:
    """Digits: the pixels that are not constant, as float32 in [0, 1], and the labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    return images[:, images.std(0) > 0.0], torch.tensor(digits.target)


def train_logistic(
    weights: list[Tensor], opt: torch.optim.Optimizer, steps: int, after: Any = None
) -> list[float]:
    """Take steps with the gradient over all images; give the losses before each."""
    images, labels = logistic_problem()
    losses = []
    for _ in range(steps):
        opt.zero_grad()
        logits = images @ weights[0] + weights[1]
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        opt.step()
        losses.append(loss.item())
        if after is not None:
            after()
    return losses


def peers() -> dict[str, Any]:
    """What ``states/record_peers.py`` has written."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def small_model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def batches(count: int) -> list[Tensor]:
    """The batches of all files of ``states`` that hold a model."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, generator=generator) for _ in range(count)]


def train_small(model: torch.nn.Module, opt: torch.optim.Optimizer, data: list[Tensor]) -> None:
    for batch in data:
        opt.zero_grad()
        model(batch).square().sum().backward()
        opt.step()


def two_groups(model: torch.nn.Sequential, **second: Any) -> list[dict[str, Any]]:
    """Named parameters in two groups, the first with a rate of its own."""
    return [
        {"params": list(model[0].named_parameters("0")), "lr": 0.01, "name": "first"},
        {"params": list(model[2].named_parameters("2")), **second},
    ]


OWN: dict[str, Callable[[torch.nn.Sequential], Any]] = {
    "adam": lambda m: Adam(two_groups(m, weight_decay=0.1), lr=0.02),
    "adamw": lambda m: AdamW(two_groups(m, amsgrad=True, weight_decay=0.1), lr=0.02),
    "advanced_adam": lambda m: AdvancedAdam(
        two_groups(m, cautious=True, amsgrad=True),
        lr=0.02,
        weight_decay=0.1,
        decay="absolute",
        ema_decay=0.9,
        warmup_steps=9,
        max_grad_norm=1.0,
    ),
    "adaptive": lambda m: AdvancedAdam(m.parameters(), adaptive_lr=True, warmup_steps=9),
    "lamb": lambda m: LAMB(two_groups(m, always_adapt=True, weight_decay=0.0), lr=0.02),
    "lion": lambda m: Lion(two_groups(m, betas=(0.8, 0.9)), lr=0.02, weight_decay=0.1),
    "sgd": lambda m: SGD(two_groups(m, momentum=0.0), lr=0.02, momentum=0.9, dampening=0.5),
    "lookahead": lambda m: Lookahead(
        AdamW(m.named_parameters(), lr=0.02), k=3, pullback="pullback"
    ),
    "lookahead_torch": lambda m: Lookahead(torch.optim.SGD(m.parameters(), lr=0.02), k=4),
}
# what wrote a file, and what takes it over
TORCH: dict[str, tuple[Callable[[torch.nn.Sequential], Any], type[Any]]] = {
    "adam": (lambda m: torch.optim.Adam(two_groups(m, weight_decay=0.1), lr=0.02), Adam),
    "adamw": (lambda m: torch.optim.AdamW(two_groups(m, amsgrad=True), lr=0.02), AdamW),
    "sgd": (lambda m: torch.optim.SGD(two_groups(m, momentum=0.0), momentum=0.9), SGD),
}
