"""The same training on two local processes, with and without compressed gradients."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from digits import accuracy, digits, to_float
from matplotlib.figure import Figure
from report import Section, Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torsh_dist import Context, Int8, Step, compress

TOLERANCE = 0.02  # on the mean loss of the last epoch


@dataclass(frozen=True)
class Run:
    """What one process brings home."""

    losses: list[float]
    accuracy: float
    bytes_sent: int
    weights_sum: float


def train(net: nn.Module, compressed: bool, epochs: int) -> Run:
    """One of the processes: an ordinary loop over its half of every batch."""
    with init(device="cpu") as context:
        torch.set_num_threads(1)
        data = digits()
        model = DistributedDataParallel(net)
        compression = compress(model, Int8() if compressed else None, min_numel=256)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-2)
        step = Step(
            model, optimizer, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
        )
        order = torch.Generator().manual_seed(0)
        losses = []
        for _ in range(epochs):
            net.train()
            for index in torch.randperm(len(data.images), generator=order).split(64):
                mine = index[context.rank :: context.world_size]
                losses.append(step((to_float(data.images[mine]), data.labels[mine])).loss.item())
        return Run(losses, accuracy(net, data.test_images, data.test_labels), compression.stats())
