"""Train the found network with our AdamW under Lookahead and with torch's AdamW."""

import copy
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from digits import accuracy, digits, to_float
from report import Section, Table
from torsh_optim import AdamW, Lookahead

SETTINGS = {"lr": 4e-3, "weight_decay": 1e-2}


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, epochs: int
) -> tuple[list[float], list[float], list[float]]:
    """An ordinary loop; returns the loss of each step, test accuracy of each epoch, step times."""
    data = digits()
    order = torch.Generator().manual_seed(0)
    losses, accuracies, seconds = [], [], []
    for _ in range(epochs):
        net.train()
        for index in torch.randperm(len(data.images), generator=order).split(64):
            loss = F.cross_entropy(net(to_float(data.images[index])), data.labels[index])
            optimizer.zero_grad()
            loss.backward()
            start = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
            losses.append(loss.item())
        accuracies.append(accuracy(net, data.test_images, data.test_labels))
    return losses, accuracies, seconds


def clipped_step_us(net: nn.Module, *, inside: bool) -> float:
    """Median time of clipping and stepping, of the network's last gradients."""
    params = [nn.Parameter(param.detach().clone()) for param in net.parameters()]
    for param, trained in zip(params, net.parameters(), strict=True):
        param.grad = trained.grad.clone()
    if inside:
        optimizer = AdamW(params, **SETTINGS, max_grad_norm=0.5)
    else:
        optimizer = torch.optim.AdamW(params, **SETTINGS)
    seconds = []
    for _ in range(60):
        start = time.perf_counter()
        if not inside:
            nn.utils.clip_grad_norm_(params, 0.5)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return torch.tensor(seconds[10:]).median().item() * 1e6


def run(demo) -> Section:
    contenders: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "torch.optim.AdamW": lambda p: torch.optim.AdamW(p, **SETTINGS),
        "torsh_optim.AdamW": lambda p: AdamW(p, **SETTINGS),
        "Lookahead(torsh_optim.AdamW)": lambda p: Lookahead(AdamW(p, **SETTINGS), k=5, alpha=0.5),
    }
    epochs = demo.epochs(12)
    curves, rows = {}, []
    for name, make in contenders.items():
        net = copy.deepcopy(demo.made.net)
        curves[name] = train(net, make(list(net.parameters())), epochs)
        losses, accuracies, seconds = curves[name]
        step_us = torch.tensor(seconds[5:]).median().item() * 1e6
        final = sum(losses[-23:]) / len(losses[-23:])
        rows.append([name, f"{final:.4f}", f"{accuracies[-1]:.1%}", f"{step_us:.0f} µs"])
    demo.made.trained = net

    same = torch.tensor(curves["torsh_optim.AdamW"][0]) - torch.tensor(
        curves["torch.optim.AdamW"][0]
    )
    section = Section(
        f"a step takes {rows[1][3]}, torch's default {rows[0][3]}; right on 360 unseen digits: "
        f"{rows[1][2]}, under Lookahead {rows[2][2]}, torch {rows[0][2]}",
        [
            "on a CPU our AdamW is torch's fused kernel, which torch leaves off by default",
            f"our AdamW follows torch's loss within {same.abs().max():.1e} over {len(same)} steps",
            f"with clipping inside the step it takes {clipped_step_us(net, inside=True):.0f} µs, "
            f"torch's clip_grad_norm_ and step {clipped_step_us(net, inside=False):.0f} µs",
        ],
        [Table(["optimizer", "training loss, last epoch", "test accuracy", "time per step"], rows)],
    )
    figure = Figure(figsize=(9, 3.2))
    left, right = figure.subplots(1, 2)
    for name, (losses, accuracies, _) in curves.items():
        smooth = torch.tensor(losses).unfold(0, min(23, len(losses)), 1).mean(1)
        left.plot(smooth, label=name, linestyle="--" if name == "torsh_optim.AdamW" else "-")
        right.plot(range(1, len(accuracies) + 1), accuracies, marker=".", label=name)
    left.set(xlabel="step", ylabel="training loss (mean of an epoch)", yscale="log")
    right.set(xlabel="epoch", ylabel="test accuracy", ylim=(0.8, 1.005))
    left.legend(frameon=False)
    section.add_figure("The same network, seed and batches under each optimizer", figure)
    return section
