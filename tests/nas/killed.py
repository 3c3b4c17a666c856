"""A search that may be killed at any time: run as ``python killed.py FOLDER OUTPUT SECONDS``."""

import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "torsh_nas/src")]

import torsh_nas as nas  # noqa: E402
from tests.nas.nets import CellNet  # noqa: E402

EPOCHS = 4


def noisy(batch: list) -> list[torch.Tensor]:
    """Use all three global generators, as augmentation may."""
    x, y = (torch.stack(part) for part in zip(*batch, strict=True))
    return [x + random.random() * 0.01 + float(np.random.rand()) * 0.01, y]


def main(folder: str, output: str, seconds: float) -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = CellNet()
    x, y = torch.randn(96, 1, 8, 8), torch.arange(96) % 10
    train, val = TensorDataset(x[:48], y[:48]), TensorDataset(x[48:], y[48:])
    own = torch.Generator().manual_seed(7)
    loaders = [
        DataLoader(train, 8, shuffle=True, collate_fn=noisy),
        DataLoader(val, 8, shuffle=True, collate_fn=noisy, generator=own),
    ]
    sgd = torch.optim.SGD(nas.weights(model), 0.05, momentum=0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, EPOCHS)
    space = nas.space(model)
    table = nas.LatencyTable(space, dict.fromkeys(space.labels, (3.0, 1.0, 0.0)))
    penalty = nas.LatencyPenalty(table, target_ms=8.0)
    search = nas.Search(
        model, nas.DARTS(lr=0.05), functional.cross_entropy, sgd,
        penalty=penalty, scheduler=cosine, log_dir=folder,
    )  # fmt: skip
    if seconds:
        kill = threading.Timer(seconds, lambda: signal.raise_signal(signal.SIGKILL))
        kill.daemon = True
        kill.start()
    result = search.fit(*loaders, epochs=EPOCHS, resume="auto")
    torch.save(
        {
            "model": model.state_dict(),
            "strategy": search.strategy.state_dict(),
            "sgd": sgd.state_dict(),
            "penalty": penalty.multiplier,
            "rng": [torch.rand(4), random.random(), float(np.random.rand()), own.get_state()],
            "best": dict(result.architecture),
            "losses": [(row["train_loss"], row["val_loss"]) for row in result.history],
        },
        output,
    )


if __name__ == "__main__":
    start = time.time()
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
    print(time.time() - start)
