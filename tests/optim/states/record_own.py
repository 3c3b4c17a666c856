"""Writes the states of this format, and of torch's optimizers; see ``README.md``.

``PYTHONPATH=. python tests/optim/states/record_own.py``.
"""

import copy
from pathlib import Path
from typing import Any

import torch

from tests.optim.recorded import OWN, TORCH, batches, small_model, train_small
from torsh_optim._checkpoint import FORMAT

HERE = Path(__file__).parent


def record(make: Any, file: Path) -> None:
    model = small_model()
    opt = make(model)
    data = batches(10)
    train_small(model, opt, data[:7])
    before = copy.deepcopy({"model": model.state_dict(), "optimizer": opt.state_dict()})
    train_small(model, opt, data[7:])
    torch.save({**before, "after": dict(model.state_dict())}, file)


if __name__ == "__main__":
    for name, make in OWN.items():
        record(make, HERE / f"{name}_v{FORMAT}.pt")
    for name, (make, _) in TORCH.items():
        record(make, HERE / f"{name}_v0.pt")
