"""Step against the same loop by hand, in one process: what the convenience costs.

python tests/benchmarks/bench_dist_step.py --json result.json
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torsh_dist import Step

Batch = tuple[Tensor, Tensor]


def mlp(device: torch.device) -> tuple[nn.Module, Batch]:
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(),
                          nn.Linear(1024, 10))  # fmt: skip
    return model.to(device), (
        torch.randn(256, 256, device=device),
        torch.randint(10, (256,), device=device),
    )


class TinyGPT(nn.Module):
    def __init__(self, width: int, layers: int, vocabulary: int = 512, length: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, F.gelu, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device)
        hidden = self.tokens(x) + self.places.weight[: x.shape[1]]
        return self.head(self.blocks(hidden, mask, is_causal=True))


def gpt(device: torch.device) -> tuple[nn.Module, Batch]:
    wide = device.type == "cuda"
    model = TinyGPT(768 if wide else 128, 12 if wide else 2)
    x = torch.randint(512, (16, 64), device=device)
    return model.to(device), (x, x.roll(-1, 1))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Batch], Tensor]:
    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


def measure(name: str, device: torch.device, repeats: int, inner: int) -> dict[str, object]:
    build = {"mlp": mlp, "gpt": gpt}[name]
    fused = device.type == "cuda"
    steps: dict[str, Callable[[Batch], Tensor]] = {}
    for contender in ("by hand", "Step"):
        torch.manual_seed(0)
        model, batch = build(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
        if contender == "by hand":
            steps[contender] = by_hand(model, optimizer)
        else:
            step = Step(model, optimizer, loss_fn, max_norm=1.0)
            steps[contender] = lambda batch, step=step: step(batch).loss
    for _ in range(5):
        losses = [float(step(batch)) for step in steps.values()]
        assert abs(losses[0] - losses[1]) <= 1e-5 * losses[0], losses
    times: dict[str, list[float]] = {contender: [] for contender in steps}
    for _ in range(repeats):
        for contender, step in steps.items():
            start = time.perf_counter()
            for _ in range(inner):
                step(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[contender].append(1e3 * (time.perf_counter() - start) / inner)
    hand, ours = times["by hand"], times["Step"]
    return {
        "workload": name,
        "parameters": sum(param.numel() for param in model.parameters()),
        "by_hand_ms": statistics.median(hand),
        "step_ms": statistics.median(ours),
        "ratio": statistics.median(b / a for a, b in zip(hand, ours, strict=True)),
        "fastest_ratio": min(ours) / min(hand),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hardware = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    )
    print(f"{hardware}; torch {torch.__version__}; python {platform.python_version()}")
    print(
        f"{'workload':<10}{'parameters':>12}{'by hand ms':>12}{'Step ms':>10}{'ratio':>8}{'min':>8}"
    )
    rows = []
    for name in ("mlp", "gpt"):
        row = measure(name, device, arguments.repeats, 10 if device.type == "cuda" else 2)
        rows.append(row)
        print(
            f"{row['workload']:<10}{row['parameters']:>12}{row['by_hand_ms']:>12.2f}"
            f"{row['step_ms']:>10.2f}{row['ratio']:>8.3f}{row['fastest_ratio']:>8.3f}"
        )
    if arguments.json:
        report = {
            "command": " ".join(["python", "tests/benchmarks/bench_dist_step.py", *sys.argv[1:]]),
            "hardware": hardware,
            "torch": torch.__version__,
            "time per step": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
