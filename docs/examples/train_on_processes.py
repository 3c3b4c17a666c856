"""One training script for one process, several local ones, and many machines.

python train_on_processes.py                             one process
python train_on_processes.py 2                           two, started from Python
torchrun --nproc-per-node 2 train_on_processes.py        two, started by torchrun
"""

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torsh_dist import Int8, Step, compress, init, launch


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def train(epochs: int) -> float:
    with init() as context:
        data = load_digits()
        images = torch.tensor(data.data, dtype=torch.float32, device=context.device) / 16
        labels = torch.tensor(data.target, device=context.device)

        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        model = DistributedDataParallel(net.to(context.device))
        compression = compress(model, Int8())
        step = Step(model, torch.optim.AdamW(model.parameters(), lr=3e-3), loss_fn, max_norm=1.0)

        order = torch.Generator().manual_seed(0)
        for _ in range(epochs):
            for batch in torch.randperm(len(images), generator=order).split(64):
                mine = batch[context.rank :: context.world_size]
                step((images[mine], labels[mine]))

        mine = slice(context.rank, None, context.world_size)
        loss = float(step.eval((images[mine], labels[mine])))
        if context.rank == 0:
            stats = compression.stats()
            print(f"{context.world_size} process(es): loss {loss:.3f}, sent {stats.ratio:.2f}x")
        return loss


if __name__ == "__main__":
    if len(sys.argv) > 1:
        launch(train, 3, nproc=int(sys.argv[1]))
    else:
        train(3)
