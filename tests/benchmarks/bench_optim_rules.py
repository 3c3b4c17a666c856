"""LAMB, Lion, SGD, Lookahead, the options of AdvancedAdam and clipping, beside their peers.

    python tests/benchmarks/bench_optim_rules.py [--json PATH] [--only NAME] [--cpu]

On a GPU: shapes of ResNet-50, of a GPT-2-medium-like and of a Llama-like model in float32.
Elsewhere: 20 million float32 parameters on the CPU. Peers that are not installed are left out.
"""

import argparse
import gc
import importlib.util
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_optim_adamw import (
    copy_bandwidth,
    device_ms,
    host_us,
    launches,
    make,
    queued_ms,
    spread,
    workloads,
)
from torch import Tensor
from torch.optim import Optimizer

from torsh_optim import LAMB, SGD, AdamW, AdvancedAdam, Lion, Lookahead

Step = Callable[[], Any]
Build = Callable[[list[Tensor]], Step]

# Bytes read and written for each float32 parameter by the best that is known to us, in a step.
BYTES = {
    "adamw": 28.0,
    "clip + adamw": 32.0,
    "amsgrad": 36.0,
    "ema": 36.0,
    "cautious": 36.0,
    "adaptive": 40.0,
    "lamb": 40.0,
    "clip + lamb": 44.0,
    "lion": 20.0,
    "sgd momentum": 20.0,
    "lookahead k=5": 28.0 + 20.0 / 5,
}


def _stepping(build: Callable[[Any], Optimizer]) -> Build:
    return lambda params: build(params).step


def _clipped(build: Callable[[Any], Optimizer]) -> Build:
    """torch's way: clip the gradients, then step."""

    def make_step(params: list[Tensor]) -> Step:
        opt = build(params)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
            opt.step()

        return step

    return make_step


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def contenders(cuda: bool) -> dict[str, dict[str, Build]]:
    """Ways to take a step, for each rule."""
    rules: dict[str, dict[str, Build]] = {
        "adamw": {
            "torsh": _stepping(AdamW),
            "torch fused": _stepping(lambda p: torch.optim.AdamW(p, fused=True)),
        },
        "clip + adamw": {
            "torsh": _stepping(lambda p: AdamW(p, max_grad_norm=1.0)),
            "torch clip, fused": _clipped(lambda p: torch.optim.AdamW(p, fused=True)),
        },
        "amsgrad": {
            "torsh": _stepping(lambda p: AdamW(p, amsgrad=True)),
            "torch fused": _stepping(lambda p: torch.optim.AdamW(p, amsgrad=True, fused=True)),
        },
        "ema": {"torsh": _stepping(lambda p: AdvancedAdam(p, ema_decay=0.999))},
        "cautious": {"torsh": _stepping(lambda p: AdvancedAdam(p, cautious=True))},
        "adaptive": {"torsh": _stepping(lambda p: AdvancedAdam(p, adaptive_lr=True))},
        "lamb": {"torsh": _stepping(lambda p: LAMB(p, max_grad_norm=None))},
        "clip + lamb": {"torsh": _stepping(LAMB)},
        "lion": {"torsh": _stepping(lambda p: Lion(p, weight_decay=0.1))},
        "sgd momentum": {
            "torsh": _stepping(lambda p: SGD(p, momentum=0.9)),
            "torch fused": _stepping(lambda p: torch.optim.SGD(p, momentum=0.9, fused=True)),
        },
        "lookahead k=5": {"torsh": _stepping(lambda p: Lookahead(AdamW(p), k=5))},
    }
    if _installed("timm"):
        from timm.optim import Lamb
        from timm.optim import Lookahead as TimmLookahead

        rules["lamb"]["timm"] = _stepping(lambda p: Lamb(p, lr=1e-3, max_grad_norm=None))
        rules["clip + lamb"]["timm"] = _stepping(lambda p: Lamb(p, lr=1e-3, max_grad_norm=1.0))
        rules["lookahead k=5"]["timm over torch fused"] = _stepping(
            lambda p: TimmLookahead(torch.optim.AdamW(p, fused=True), k=5)
        )
    if _installed("prodigyopt"):
        from prodigyopt import Prodigy

        rules["adaptive"]["prodigyopt"] = _stepping(Prodigy)
    if _installed("lion_pytorch"):
        from lion_pytorch import Lion as LionPytorch

        rules["lion"]["lion-pytorch"] = _stepping(lambda p: LionPytorch(p, lr=1e-4))
    if _installed("optimi"):
        import optimi

        rules["lion"]["optimi"] = _stepping(lambda p: optimi.Lion(p, lr=1e-4))
    if cuda and _installed("bitsandbytes"):
        import bitsandbytes as bnb

        rules["lion"]["bitsandbytes"] = _stepping(lambda p: bnb.optim.Lion32bit(p))
        rules["clip + lamb"]["bitsandbytes"] = _stepping(lambda p: bnb.optim.LAMB32bit(p))
    if _installed("pytorch_optimizer"):
        from pytorch_optimizer import Lamb as KozistrLamb

        rules["clip + lamb"]["pytorch_optimizer"] = _stepping(lambda p: KozistrLamb(p, lr=1e-3))
    return rules


def on_gpu(repeats: int, only: str | None) -> list[dict[str, Any]]:
    limit = copy_bandwidth()
    print(f"device copy: {limit / 1e9:.0f} GB/s read + written\n")
    rows: list[dict[str, Any]] = []
    for workload, (shapes, grouped) in workloads().items():
        if grouped:
            continue
        params, _ = make(shapes, False, torch.float32, "cuda")
        elements = sum(p.numel() for p in params)
        for rule, builds in contenders(cuda=True).items():
            if only is not None and only not in rule:
                continue
            steps: dict[str, Step] = {}
            for name, build in builds.items():
                steps[name] = build(params)
                for _ in range(5):
                    steps[name]()
            # Lookahead takes its longer step every fifth time: all are measured over five
            times: dict[str, dict[str, list[float]]] = {
                name: {"device_ms": [], "step_ms": [], "host_us": []} for name in steps
            }
            # those that take far longer than any spread between samples are sampled less often
            samples = {
                name: repeats if device_ms(step) < 5.0 else max(5, repeats // 8)
                for name, step in steps.items()
            }
            for sample in range(repeats):  # interleaved, so that drift hits all alike
                for name, step in steps.items():
                    if sample >= samples[name]:
                        continue
                    several = _five(step)
                    times[name]["device_ms"].append(queued_ms(several) / 5)
                    times[name]["step_ms"].append(device_ms(several) / 5)
                    times[name]["host_us"].append(host_us(several) / 5)
            moved = BYTES[rule] * elements
            for name, step in steps.items():
                device, device_spread = spread(times[name]["device_ms"])
                wall, wall_spread = spread(times[name]["step_ms"])
                rows.append(
                    {
                        "workload": workload,
                        "rule": rule,
                        "contender": name,
                        "tensors": len(shapes),
                        "elements": elements,
                        "samples": samples[name],
                        "device_ms": device,
                        "device_ms_spread": device_spread,
                        "step_ms": wall,
                        "step_ms_spread": wall_spread,
                        "host_us": statistics.median(times[name]["host_us"]),
                        "moved_bytes": moved,
                        "copy_percent": 100 * moved / (device * 1e-3) / limit,
                        "launches": launches(step),
                    }
                )
            _compare(rows, len(steps))
            del steps
            gc.collect()
            torch.cuda.empty_cache()
        del params
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def _five(step: Step) -> Step:
    def several() -> None:
        for _ in range(5):
            step()

    return several


def _compare(rows: list[dict[str, Any]], count: int) -> None:
    """Add the ratio to the best peer to the last rows, and print them."""
    mine = rows[-count:]
    best = min((r["step_ms"] for r in mine if r["contender"] != "torsh"), default=None)
    for row in mine:
        row["speedup_over_best_peer"] = None if best is None else best / row["step_ms"]
        host = ""
        if "host_us" in row:
            host = f"host {row['host_us']:7.0f} µs  {row['launches']:3} launches  "
        print(
            f"{row.get('workload', 'cpu'):17} {row['rule']:14} {row['contender']:22} "
            f"step {row['step_ms']:7.3f} ± {row['step_ms_spread']:.3f} ms "
            f"({row['copy_percent']:5.1f} % of copy)  {host}"
            + ("no peer" if best is None else f"{best / row['step_ms']:.2f}x best peer")
        )


def on_cpu(repeats: int, only: str | None) -> list[dict[str, Any]]:
    shapes = [(4096, 2048), (2048, 4096), (1024, 3000), (100_000,), *[(1000,)] * 50]
    buffers = torch.empty(2, 2**25)
    copies = []
    for _ in range(repeats):
        begin = time.perf_counter()
        buffers[1].copy_(buffers[0])
        copies.append(time.perf_counter() - begin)
    limit = 2 * buffers[0].nbytes / statistics.median(copies)
    print(f"copy: {limit / 1e9:.1f} GB/s read + written\n")
    rows: list[dict[str, Any]] = []
    for rule, builds in contenders(cuda=False).items():
        if only is not None and only not in rule:
            continue
        steps: dict[str, Step] = {}
        for name, build in builds.items():
            params, _ = make(shapes, False, torch.float32, "cpu")
            steps[name] = build(params)
            steps[name]()
        elements = sum(math.prod(shape) for shape in shapes)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(repeats):
            for name, step in steps.items():
                begin = time.perf_counter()
                for _ in range(5):
                    step()
                times[name].append((time.perf_counter() - begin) * 1e3 / 5)
        moved = BYTES[rule] * elements
        for name in steps:
            median, deviation = spread(times[name])
            rows.append(
                {
                    "rule": rule,
                    "contender": name,
                    "elements": elements,
                    "step_ms": median,
                    "step_ms_spread": deviation,
                    "moved_bytes": moved,
                    "copy_percent": 100 * moved / (median * 1e-3) / limit,
                }
            )
        _compare(rows, len(steps))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--only", help="only rules with this in their name")
    parser.add_argument("--cpu", action="store_true", help="measure the CPU in spite of a GPU")
    parser.add_argument(
        "--repeats", type=int, default=0, help="samples each (50, of slow ones 6; CPU 11)"
    )
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available() and not arguments.cpu
    repeats = arguments.repeats or (50 if gpu else 11)
    result: dict[str, Any] = {
        "benchmark": "optim_rules",
        "command": " ".join(["python", "tests/benchmarks/bench_optim_rules.py", *sys.argv[1:]]),
        "hardware": torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if _installed("triton"):
        import triton

        result["triton"] = triton.__version__
    print("  ".join(f"{key}: {value}" for key, value in result.items()))
    result["rows"] = (on_gpu if gpu else on_cpu)(repeats, arguments.only)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
