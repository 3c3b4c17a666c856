"""The same training on two local processes, with and without compressed gradients."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from digits import accuracy, digits, to_float
from report import Section, Table
from torsh_dist import CompressionStats, Int8, Step, compress, init, launch
from torsh_optim import AdamW

PROCESSES = 2
TOLERANCE = 0.05  # how far apart the mean losses of the two runs may be, as a share


@dataclass(frozen=True)
class Run:
    """What one process brings home."""

    losses: list[float]
    accuracy: float
    stats: CompressionStats
    weights: float


def train(net: nn.Module, compressed: bool, epochs: int) -> Run:
    """One of the processes: an ordinary loop over its share of every batch."""
    with init(device="cpu") as context:
        torch.set_num_threads(1)
        data = digits()
        model = DistributedDataParallel(net.train())
        compression = compress(model, Int8() if compressed else None, min_numel=256)
        optimizer = AdamW(model.parameters(), lr=4e-3, weight_decay=1e-2)
        step = Step(
            model, optimizer, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
        )
        order = torch.Generator().manual_seed(0)
        losses = []
        for _ in range(epochs):
            for index in torch.randperm(len(data.images), generator=order).split(64):
                mine = index[context.rank :: context.world_size]
                result = step((to_float(data.images[mine]), data.labels[mine]))
                losses.append(result.loss.item())
        weights = sum(p.detach().double().sum().item() for p in net.parameters())
        right = accuracy(net, data.test_images, data.test_labels)
        return Run(losses, right, compression.stats(), weights)


def run(demo) -> Section:
    epochs = demo.epochs(6)
    runs = {
        name: launch(train, copy.deepcopy(demo.made.net), compressed, epochs, nproc=PROCESSES)
        for name, compressed in (("float32", False), ("int8", True))
    }
    for name, ranks in runs.items():
        if len({rank.weights for rank in ranks}) != 1:
            raise RuntimeError(f"{name}: the processes ended with different weights")
    small = runs["int8"][0]
    means = {name: sum(r[0].losses) / len(r[0].losses) for name, r in runs.items()}
    apart = abs(means["int8"] / means["float32"] - 1)
    if apart > TOLERANCE:
        raise RuntimeError(f"the mean losses are {apart:.1%} apart, tolerance {TOLERANCE:.0%}")

    sent = {"float32": small.stats.bytes_uncompressed, "int8": small.stats.bytes_sent}
    rows = [
        [name, f"{means[name]:.4f}", f"{ranks[0].accuracy:.1%}", f"{sent[name]:,}"]
        for name, ranks in runs.items()
    ]
    section = Section(
        f"int8 gradients sent {small.stats.ratio:.0%} of the bytes; mean loss of the whole run "
        f"{means['int8']:.4f} against {means['float32']:.4f}: {apart:.1%} apart, "
        f"tolerance {TOLERANCE:.0%}",
        [
            f"{PROCESSES} processes, {small.stats.steps} steps; all ended with the same weights",
            "the float32 row counts what a ring all-reduce of the same gradients sends",
        ],
    )
    columns = ["gradients", "mean loss", "test accuracy", "bytes sent by a process"]
    section.tables.append(Table(columns, rows))
    figure = Figure(figsize=(9, 2.8))
    axes = figure.subplots()
    for name, ranks in runs.items():
        axes.plot(ranks[0].losses, label=name, alpha=0.8)
    axes.set(xlabel="step", ylabel="loss over both processes", yscale="log")
    axes.legend(frameon=False)
    section.add_figure("The same batches, gradients sent whole and in 8 bits", figure)
    return section
