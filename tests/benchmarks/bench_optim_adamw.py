"""AdamW beside torch's and others: device time, host time, bandwidth, launches, memory.

    python tests/benchmarks/bench_optim_adamw.py [--json PATH] [--sweep] [--only NAME] [--cpu]

On a GPU: shapes of ResNet-50, of a GPT-2-medium-like and a Llama-like model, and 465 tensors in 465
groups, in float32 and pure bfloat16. Elsewhere: 20 million float32 parameters on the CPU.
"""

import argparse
import gc
import importlib.util
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "torsh_optim" / "src"))
from torsh_optim import AdamW

Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    """The 161 parameters of torchvision's resnet50, in its order."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            outputs = 4 * width
            for conv in ((width, inputs, 1, 1), (width, width, 3, 3), (outputs, width, 1, 1)):
                shapes += [conv, conv[:1], conv[:1]]
            if block == 0:
                shapes += [(outputs, inputs, 1, 1), (outputs,), (outputs,)]
            inputs = outputs
    return [*shapes, (1000, 2048), (1000,)]


def transformer(
    layers: int, dim: int, vocabulary: int, hidden: int, *, bias: bool, gated: bool
) -> list[Shape]:
    """GPT-2-like with biases, Llama-like without and with a gate."""
    shapes: list[Shape] = [(vocabulary, dim)]
    shapes += [] if gated else [(1024, dim)]
    if gated:
        block: list[Shape] = [(dim,), (dim, dim), (dim // 4, dim), (dim // 4, dim), (dim, dim)]
        block += [(dim,), (hidden, dim), (hidden, dim), (dim, hidden)]
    else:
        block = [(dim,), (dim,), (3 * dim, dim), (dim, dim), (dim,), (dim,)]
        block += [(hidden, dim), (dim, hidden)]
        block += [(3 * dim,), (dim,)] if bias else []
    for _ in range(layers):
        shapes += block
    return [*shapes, (dim,), *([] if gated else [(dim,)])]


def workloads() -> dict[str, tuple[list[Shape], bool]]:
    """Shapes, and whether each tensor has a group of its own."""
    return {
        "resnet50": (resnet50(), False),
        "gpt2-medium-like": (
            transformer(24, 1024, 50257, 4096, bias=True, gated=False),
            False,
        ),
        "llama-like": (transformer(11, 2560, 32000, 6912, bias=False, gated=True), False),
        "465 groups": ([(256, 64) if i % 3 else (64,) for i in range(465)], True),
    }


def contenders(fused_only: bool) -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    found: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "torsh": lambda params: AdamW(params, fused=True),
        "torch fused": lambda params: torch.optim.AdamW(params, fused=True),
        "torch foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    }
    if not fused_only and importlib.util.find_spec("optimi") is not None:
        import optimi

        found["optimi"] = lambda params: optimi.AdamW(params, lr=1e-3)
    return found


def make(
    shapes: list[Shape], grouped: bool, dtype: torch.dtype, device: str
) -> tuple[list[Tensor], Any]:
    generator = torch.Generator(device).manual_seed(0)
    params: list[Tensor] = []
    for shape in shapes:
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        params.append(torch.nn.Parameter(values.to(dtype)))
        params[-1].grad = torch.randn(shape, generator=generator, device=device).to(dtype)
    groups = [{"params": [p], "lr": 1e-3} for p in params] if grouped else params
    return params, groups


def copy_bandwidth(repeats: int = 20) -> float:
    """Bytes read and written per second by a device copy of 1 GiB."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * source.nbytes / (statistics.median(times) * 1e-3)


def spread(values: list[float]) -> tuple[float, float]:
    """Median, and half of the distance between the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, (high - low) / 2


def device_ms(step: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def queued_ms(step: Callable[[], Any]) -> float:
    """Time on the device alone: the step is queued behind work that outlasts its host time."""
    torch.cuda._sleep(20_000_000)
    return device_ms(step)


def host_us(step: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    spent = time.perf_counter() - begin
    torch.cuda.synchronize()
    return spent * 1e6


def launches(step: Callable[[], Any]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    kernels = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.name.startswith(("Mem", "Optimizer")) for e in kernels)


def _check(kinds: dict[str, Any], shapes: list[Shape], grouped: bool, dtype: torch.dtype) -> None:
    """Three steps must give the same parameters as torch's fused kernel."""
    small = [shape for shape in shapes if len(shape) < 2 or shape[0] * shape[1] < 2**22]
    results = {}
    for name, kind in kinds.items():
        params, groups = make(small, grouped, dtype, "cuda")
        opt = kind(groups)
        for _ in range(3):
            opt.step()
        results[name] = params
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    for a, b in zip(results["torsh"], results["torch fused"], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def on_gpu(repeats: int, only: str | None) -> list[dict[str, Any]]:
    limit = copy_bandwidth()
    print(f"device copy: {limit / 1e9:.0f} GB/s read + written\n")
    rows: list[dict[str, Any]] = []
    for (name, (shapes, grouped)), dtype in itertools.product(
        workloads().items(), (torch.float32, torch.bfloat16)
    ):
        if only is not None and only not in name:
            continue
        kinds = contenders(fused_only=grouped)
        _check(kinds, shapes, grouped, dtype)
        # One set of tensors for all: the large workloads would not fit several times.
        params, groups = make(shapes, grouped, dtype, "cuda")
        elements = sum(p.numel() for p in params)
        moved = 7 * elements * dtype.itemsize
        steps, peaks = {}, {}
        for kind, build in kinds.items():
            opt = build([dict(group) for group in groups] if grouped else list(params))
            for _ in range(5):
                opt.step()
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            opt.step()
            torch.cuda.synchronize()
            peaks[kind] = torch.cuda.max_memory_allocated() - held
            steps[kind] = opt.step
        measured: dict[str, dict[str, list[float]]] = {
            kind: {"device_ms": [], "step_ms": [], "host_us": []} for kind in kinds
        }
        for _ in range(repeats):  # interleaved, so that drift hits all alike
            for kind, step in steps.items():
                measured[kind]["device_ms"].append(queued_ms(step))
                measured[kind]["step_ms"].append(device_ms(step))
                measured[kind]["host_us"].append(host_us(step))
        best = min(
            statistics.median(measured[kind]["step_ms"]) for kind in kinds if kind != "torsh"
        )
        for kind in kinds:
            device, device_spread = spread(measured[kind]["device_ms"])
            wall, wall_spread = spread(measured[kind]["step_ms"])
            rows.append(
                {
                    "workload": name,
                    "tensors": len(shapes),
                    "elements": elements,
                    "dtype": str(dtype).removeprefix("torch."),
                    "contender": kind,
                    "device_ms": device,
                    "device_ms_spread": device_spread,
                    "step_ms": wall,
                    "step_ms_spread": wall_spread,
                    "host_us": statistics.median(measured[kind]["host_us"]),
                    "moved_bytes": moved,
                    "copy_percent": 100 * moved / (device * 1e-3) / limit,
                    "launches": launches(steps[kind]),
                    "peak_bytes": peaks[kind],
                    "speedup_over_best_peer": best / wall,
                }
            )
            print(_line(rows[-1]))
        print()
        del params, groups, steps
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['workload']:17} {row['tensors']:4} t {row['elements'] / 1e6:6.1f} M "
        f"{row['dtype']:9} {row['contender']:14} device {row['device_ms']:7.3f} "
        f"± {row['device_ms_spread']:.3f} ms ({row['copy_percent']:5.1f} % of copy)  "
        f"step {row['step_ms']:7.3f} ± {row['step_ms_spread']:.3f} ms  "
        f"host {row['host_us']:7.0f} µs  {row['launches']:3} launches  "
        f"peak +{row['peak_bytes'] / 2**20:7.1f} MiB  "
        f"{row['speedup_over_best_peer']:.2f}x best peer"
    )


def sweep(repeats: int) -> list[dict[str, Any]]:
    """Block size, warps and registers of the kernel."""
    from torsh_optim import _kernels

    limit = copy_bandwidth()
    rows: list[dict[str, Any]] = []
    names = ("resnet50", "gpt2-medium-like")
    for name, dtype in itertools.product(names, (torch.float32, torch.bfloat16)):
        shapes, grouped = workloads()[name]
        params, groups = make(shapes, grouped, dtype, "cuda")
        moved = 7 * sum(p.numel() for p in params) * dtype.itemsize
        for block, warps, registers in itertools.product(
            (512, 1024, 2048, 4096), (2, 4, 8), (40, 48, 64, 128)
        ):
            if block // warps > 512 or block // warps < 128:
                continue  # 4 to 16 elements a thread
            _kernels.BLOCK, _kernels.NUM_WARPS = block, warps
            _kernels.MAX_REGISTERS = registers
            opt = AdamW(groups, fused=True)
            for _ in range(3):
                opt.step()
            median, deviation = spread([queued_ms(opt.step) for _ in range(repeats)])
            rows.append(
                {
                    "workload": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "block": block,
                    "warps": warps,
                    "registers": registers,
                    "device_ms": median,
                    "device_ms_spread": deviation,
                    "copy_percent": 100 * moved / (median * 1e-3) / limit,
                }
            )
            print(
                f"{name:17} {rows[-1]['dtype']:9} BLOCK {block:5} warps {warps} "
                f"registers {registers:3}: {median:.3f} ± {deviation:.3f} ms "
                f"({rows[-1]['copy_percent']:.1f} % of copy)"
            )
            del opt
    return rows


def on_cpu(repeats: int) -> list[dict[str, Any]]:
    shapes = [(4096, 2048), (2048, 4096), (1024, 3000), (100_000,), *[(1000,)] * 50]
    kinds: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "torsh": AdamW,
        "torch fused": lambda params: torch.optim.AdamW(params, fused=True),
        "torch foreach": lambda params: torch.optim.AdamW(params, foreach=True),
        "torch default": torch.optim.AdamW,
    }
    optimizers, elements = {}, sum(torch.Size(shape).numel() for shape in shapes)
    params = {kind: make(shapes, False, torch.float32, "cpu")[0] for kind in kinds}
    for kind, build in kinds.items():
        optimizers[kind] = build(params[kind])
        for _ in range(2):
            optimizers[kind].step()
    for a, b in zip(params["torsh"], params["torch fused"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    buffers = torch.empty(2, 2**25)
    times: dict[str, list[float]] = {kind: [] for kind in ("copy", *kinds)}
    for _ in range(repeats):
        begin = time.perf_counter()
        buffers[1].copy_(buffers[0])
        times["copy"].append(time.perf_counter() - begin)
        for kind, opt in optimizers.items():
            begin = time.perf_counter()
            opt.step()
            times[kind].append(time.perf_counter() - begin)
    limit = 2 * buffers[0].nbytes / statistics.median(times["copy"])
    print(f"copy: {limit / 1e9:.1f} GB/s read + written; {elements / 1e6:.1f} M float32\n")
    rows = []
    best = min(statistics.median(times[kind]) for kind in kinds if kind != "torsh")
    for kind in kinds:
        median, deviation = spread([t * 1e3 for t in times[kind]])
        moved = 7 * 4 * elements
        rows.append(
            {
                "contender": kind,
                "elements": elements,
                "step_ms": median,
                "step_ms_spread": deviation,
                "moved_bytes": moved,
                "copy_percent": 100 * moved / (median * 1e-3) / limit,
                "speedup_over_best_peer": best * 1e3 / median,
            }
        )
        print(
            f"{kind:14} {median:8.1f} ± {deviation:.1f} ms ({rows[-1]['copy_percent']:5.1f} % of "
            f"copy) {rows[-1]['speedup_over_best_peer']:.2f}x best peer"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--sweep", action="store_true", help="sweep block size, warps, registers")
    parser.add_argument("--only", help="only workloads with this in their name")
    parser.add_argument("--cpu", action="store_true", help="measure the CPU in spite of a GPU")
    parser.add_argument(
        "--repeats", type=int, default=0, help="samples each (50; sweep and CPU 15)"
    )
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available() and not arguments.cpu
    repeats = arguments.repeats or (50 if gpu and not arguments.sweep else 15)
    hardware = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU"
    result: dict[str, Any] = {
        "benchmark": "optim_adamw",
        "command": " ".join(["python", "tests/benchmarks/bench_optim_adamw.py", *sys.argv[1:]]),
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if importlib.util.find_spec("triton") is not None:
        import triton

        result["triton"] = triton.__version__
    print("  ".join(f"{key}: {value}" for key, value in result.items()))
    if gpu:
        result["rows"] = sweep(repeats) if arguments.sweep else on_gpu(repeats, arguments.only)
    else:
        result["rows"] = on_cpu(repeats)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
