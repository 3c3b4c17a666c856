"""A training loop under accelerate; run by test_accelerate.py, writes the samples that it saw."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from torsh_data import StreamLoader


def main(folder: Path, steps: int, begin: bool) -> None:
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    samples = [{"x": torch.tensor([float(n)])} for n in range(120)]
    loader = StreamLoader(samples, 12 // accelerator.num_processes, seed=3)
    accelerator.register_for_checkpointing(loader)
    if not begin:
        accelerator.load_state(str(folder / "state"))
    seen = []
    for step, batch in enumerate(loader, 1):
        seen.append(batch["index"].tolist())
        accelerator.backward(model(batch["x"]).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        if begin and step == steps:
            break
    if begin:
        accelerator.save_state(str(folder / "state"))
    name = f"{'begun' if begin else 'resumed'}_{accelerator.process_index}.json"
    (folder / name).write_text(json.dumps(seen))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "begin")
