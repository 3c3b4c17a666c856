"""Time to a gap of 1e-6 in the objective on scikit-learn's digits, and bytes of the tables.

Softmax regression with L2 in float64, one thread, features centred as for scikit-learn's own
advice. scikit-learn's `saga` is compiled code that takes one sample a step; SAGA here takes
batches through autograd, whatever the model. Needs scikit-learn.

    python tests/benchmarks/bench_optim_saga.py --json result.json
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "torsh_optim/src"))

from torsh_optim._saga import SAGA

L2 = 0.01
GAP = 1e-6
DTYPES = (torch.float32, torch.bfloat16, torch.int8)


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.data / 16)
    return x - x.mean(0), torch.tensor(data.target)


def objective(linear: nn.Linear, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(linear(x), y) + 0.5 * L2 * linear.weight.square().sum())


def estimator(x: Tensor, **options: Any) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1 / (L2 * len(x)), **options)


def layer_of(fitted: Any) -> nn.Linear:
    linear = nn.Linear(64, 10).double()
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(fitted.coef_))
        linear.bias.copy_(torch.tensor(fitted.intercept_))
    return linear


@dataclass
class Run:
    """One training from zeros."""

    epochs: int
    cpu: float  # seconds; one thread, so that other work on the machine counts less
    wall: float
    gap: float
    bytes: int


def scikit_learn(x: Tensor, y: Tensor, best: float, epochs: int) -> Run:
    """Fit with a fixed number of epochs; it cannot be asked for a gap."""
    model = estimator(x, solver="saga", tol=0.0, max_iter=epochs, random_state=0)
    inputs, labels = x.numpy(), y.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged to 0
        start, cpu = time.perf_counter(), time.process_time()
        model.fit(inputs, labels)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - start
    return Run(epochs, cpu, wall, objective(layer_of(model), x, y) - best, len(y) * 10 * 8)


def first_epochs(run: Callable[[int], Run]) -> int:
    """Return the least number of epochs that reaches the gap."""
    return next(epochs for epochs in range(1, 500) if run(epochs).gap <= GAP)


def saga(
    x: Tensor, y: Tensor, best: float, dtype: torch.dtype, batch: int, lr: float, epochs: int
) -> Run:
    linear = nn.Linear(64, 10).double()
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    groups = [{"params": [linear.weight], "weight_decay": L2}, {"params": [linear.bias]}]
    opt = SAGA(groups, lr=lr, num_samples=len(y), table_dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(epochs):
        for index in torch.randperm(len(y), generator=generator).split(batch):
            inputs, labels = x[index], y[index]
            opt.step(lambda a=inputs, b=labels: F.cross_entropy(linear(a), b), index=index)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - start
    return Run(epochs, cpu, wall, objective(linear, x, y) - best, opt.table_bytes)


def sgd(x: Tensor, y: Tensor, best: float, batch: int, epochs: int) -> Run:
    """As many steps of plain SGD: what autograd and an optimizer cost without a table."""
    linear = nn.Linear(64, 10).double()
    opt = torch.optim.SGD(linear.parameters(), lr=0.1, weight_decay=L2)
    generator = torch.Generator().manual_seed(0)
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(epochs):
        for index in torch.randperm(len(y), generator=generator).split(batch):
            opt.zero_grad()
            F.cross_entropy(linear(x[index]), y[index]).backward()
            opt.step()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - start
    return Run(epochs, cpu, wall, objective(linear, x, y) - best, 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    import sklearn

    x, y = digits()
    best = objective(
        layer_of(estimator(x, solver="newton-cg", tol=1e-12, max_iter=1000).fit(x, y)), x, y
    )
    contenders: dict[str, Callable[[int], Run]] = {
        "scikit-learn saga, float64": lambda epochs: scikit_learn(x, y, best, epochs)
    }
    for dtype in DTYPES:
        for batch, lr in ((32, 1.0), (64, 1.5), (128, 1.5)):
            name = f"SAGA, {str(dtype).removeprefix('torch.')} table, batch {batch}, lr {lr}"
            contenders[name] = lambda epochs, d=dtype, b=batch, r=lr: saga(
                x, y, best, d, b, r, epochs
            )
    epochs = {name: first_epochs(run) for name, run in contenders.items()}
    name = "torch SGD, as many steps, batch 64"
    contenders[name] = lambda epochs: sgd(x, y, best, 64, epochs)
    epochs[name] = epochs["SAGA, float32 table, batch 64, lr 1.5"]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    runs: dict[str, Run] = {}
    for _ in range(options.repeats):
        for name, run in contenders.items():  # interleaved
            runs[name] = run(epochs[name])
            times[name].append((runs[name].cpu, runs[name].wall))

    full_bytes = len(y) * 650 * 4
    base = statistics.median(cpu for cpu, _ in times["scikit-learn saga, float64"])
    rows = []
    for name, run in runs.items():
        cpu = [seconds for seconds, _ in times[name]]
        quarters = statistics.quantiles(cpu, n=4)
        median = statistics.median(cpu)
        rows.append(
            {
                "contender": name,
                "epochs": run.epochs,
                "cpu_ms": median * 1e3,
                "wall_ms": statistics.median(wall for _, wall in times[name]) * 1e3,
                "cpu_iqr_ms": (quarters[2] - quarters[0]) * 1e3,
                "gap": run.gap,
                "table_bytes": run.bytes,
                "full_float32_gradients": full_bytes / run.bytes if run.bytes else None,
                "time_of_scikit_learn": median / base,
            }
        )
    result: dict[str, Any] = {
        "command": f"python {' '.join(['tests/benchmarks/bench_optim_saga.py', *sys.argv[1:]])}",
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread used",
        "load": f"{os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "python": platform.python_version(),
        "workload": f"softmax regression, digits 1797 x 64 centred, 10 classes, L2 {L2}, float64",
        f"time to a gap of {GAP}": rows,
        "gap after 100 epochs, batch 32, lr 1.0": [
            {"table_dtype": str(dtype), "gap": saga(x, y, best, dtype, 32, 1.0, 100).gap}
            for dtype in DTYPES
        ],
    }
    for key, value in result.items():
        if isinstance(value, str):
            print(f"{key}: {value}")
    print(f"{'contender':42} epochs  cpu ms     iqr wall ms      gap   bytes  x less  ratio")
    for row in rows:
        print(
            f"{row['contender']:42} {row['epochs']:6} {row['cpu_ms']:7.1f} "
            f"{row['cpu_iqr_ms']:7.1f} {row['wall_ms']:7.1f} {row['gap']:8.1e} "
            f"{row['table_bytes']:7} {row['full_float32_gradients'] or 0:7.1f} "
            f"{row['time_of_scikit_learn']:6.2f}"
        )
    for row in result["gap after 100 epochs, batch 32, lr 1.0"]:
        print(f"gap after 100 epochs, {row['table_dtype']}: {row['gap']:.1e}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
