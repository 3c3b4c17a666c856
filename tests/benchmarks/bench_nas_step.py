"""Time of a DARTS step, ours beside the usual mixed operation, and of the exact solver.

Run: python tests/benchmarks/bench_nas_step.py [--json PATH] [--device cuda] [--repeats N]
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "torsh_nas/src"))

import torch
from torch import Tensor, nn
from torch.nn import functional

import torsh_nas as nas

OPS = ("none", "skip", "conv1", "conv3", "pool")  # NAS-Bench-201


def op(name: str, channels: int, stride: int) -> nn.Module:
    if name == "skip":
        return nn.Identity()
    norm = nn.BatchNorm2d(channels, affine=False)
    if name == "pool":
        return nn.Sequential(nn.AvgPool2d(3, stride, 1, count_include_pad=False), norm)
    size = int(name[-1])
    conv = nn.Conv2d(channels, channels, size, stride, size // 2, bias=False)
    return nn.Sequential(nn.ReLU(), conv, norm)


class Net(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        )
        self.cell = nas.Cell(
            op, OPS, channels=channels, nodes=3, keep=None, inputs=1, reduce="last", label="cell"
        )
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.stem(x)).mean((2, 3)))


class Naive:
    """What DARTS implementations usually do: per-edge sums of w[e, k] * op(x), full backwards."""

    def __init__(self, net: Net) -> None:
        self.net = net
        device = next(net.parameters()).device
        self.alpha = torch.zeros(6, len(OPS), device=device, requires_grad=True)
        self.arch = torch.optim.Adam([self.alpha], 3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
        self.sgd = torch.optim.SGD(net.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.alpha.softmax(-1)
        states, edge = [self.net.stem(x)], 0
        for target in range(1, 4):
            inputs = []
            for source in range(target):
                h, ops = states[source], self.net.cell.edge(source, target).ops
                terms = [weights[edge, k] * ops[n](h) for k, n in enumerate(OPS[1:])]
                terms.append(weights[edge, 4] * h.mul(0.0))
                inputs.append(sum(terms))
                edge += 1
            states.append(sum(inputs))
        return self.net.head(states[-1].mean((2, 3)))

    def step(self, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> None:
        self.arch.zero_grad()
        functional.cross_entropy(self.forward(val[0]), val[1]).backward()
        self.arch.step()
        self.sgd.zero_grad()
        functional.cross_entropy(self.forward(train[0]), train[1]).backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 5.0)
        self.sgd.step()


class Ours:
    def __init__(self, net: Net) -> None:
        self.strategy = nas.DARTS()
        sgd = torch.optim.SGD(nas.weights(net), 0.025, momentum=0.9, weight_decay=3e-4)
        self.search = nas.Search(net, self.strategy, functional.cross_entropy, sgd)
        for alpha in self.strategy._alphas.values():
            alpha.data.zero_()

    def step(self, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> None:
        self.search.step(train, val)


def batches(count: int, size: int, side: int, device: str) -> list:
    g = torch.Generator().manual_seed(0)
    made = [
        (torch.randn(size, 3, side, side, generator=g), torch.randint(10, (size,), generator=g))
        for _ in range(count)
    ]
    return [(x.to(device), y.to(device)) for x, y in made]


def check_equal() -> float:
    """Return the largest difference of the weights after three float64 steps of both."""
    torch.manual_seed(0)
    nets = [Net(4).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    both = Naive(nets[0]), Ours(nets[1])
    both[0].alpha.data = both[0].alpha.data.double()
    for x, y in batches(3, 8, 8, "cpu"):
        pair = (x[:4].double(), y[:4]), (x[4:].double(), y[4:])
        for contender in both:
            contender.step(*pair)
    pairs = zip(nets[0].parameters(), nets[1].parameters(), strict=True)
    worst = max(float((a - b).detach().abs().max()) for a, b in pairs)
    # Adam's first steps are sign-like, so float64 rounding of gradients may show a little.
    assert worst < 1e-7, worst
    return worst


def time_in_turn(
    calls: dict[str, Callable[[], None]], repeats: int, device: str
) -> dict[str, dict[str, float]]:
    clock = time.perf_counter if device == "cuda" else time.process_time
    runs: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 3):
        for name, call in calls.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = clock()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 3:
                runs[name].append(1e3 * (clock() - start))
    table = {}
    for name, times in runs.items():
        low, _, high = statistics.quantiles(times, n=4)
        table[name] = {"median_ms": statistics.median(times), "iqr_ms": high - low}
    return table


def bench_step(channels: int, size: int, side: int, repeats: int, device: str) -> dict:
    torch.manual_seed(0)
    data = batches(8, size, side, device)
    contenders = {"naive mixed op": Naive, "torsh_nas": Ours}
    calls, turns = {}, dict.fromkeys(contenders, 0)
    for name, kind in contenders.items():
        contender = kind(Net(channels).to(device))

        def call(name: str = name, contender: Naive | Ours = contender) -> None:
            k = turns[name] = (turns[name] + 1) % 4
            contender.step(data[k], data[k + 4])

        calls[name] = call
    return time_in_turn(calls, repeats, device)


def bench_solve(repeats: int) -> dict:
    g = torch.Generator().manual_seed(0)
    options = tuple("abcdefg")
    space = nas.Space({f"layer{k}": options for k in range(21)})
    costs = {label: (torch.rand(7, generator=g) + 0.1).tolist() for label in space.labels}
    scores = {label: torch.rand(7, generator=g) for label in space.labels}
    table = nas.LatencyTable(space, costs)
    middle = sum(sorted(c)[2] for c in costs.values())
    budget = nas.Budget(latency_ms=middle, source=table)
    call = {"solve 21 x 7": lambda: nas.solve(scores, budget)}
    return time_in_turn(call, repeats, "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    info = nas.DeviceInfo.of(options.device)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": info.name,
        "threads": info.threads,
        "torch": info.torch,
        "python": platform.python_version(),
        "clock": "wall" if options.device == "cuda" else "process CPU time",
        "largest difference after 3 float64 steps": check_equal(),
        "results": {},
    }
    for key, value in report.items():
        if key != "results":
            print(f"{key}: {value}")
    cases = {"C=8 16x16 B=64": (8, 64, 16), "C=16 32x32 B=32": (16, 32, 32)}
    print(f"{'case':<18}{'contender':<18}{'median ms':>10}{'IQR ms':>9}{'ratio':>8}")
    for name, case in cases.items():
        result = bench_step(*case, options.repeats, options.device)
        report["results"][f"bilevel step, {name}"] = result
        base = result["naive mixed op"]["median_ms"]
        for contender, row in result.items():
            ratio = base / row["median_ms"]
            print(
                f"{name:<18}{contender:<18}{row['median_ms']:>10.2f}{row['iqr_ms']:>9.2f}"
                f"{ratio:>7.2f}x"
            )
    report["results"]["solver"] = bench_solve(options.repeats)
    for contender, row in report["results"]["solver"].items():
        print(f"{'solver':<18}{contender:<18}{row['median_ms']:>10.2f}{row['iqr_ms']:>9.2f}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
