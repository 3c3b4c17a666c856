"""Quantized convolutions on a CPU beside 32-bit floats, in both memory layouts.

Single layers as small nets have them, and a whole net on digits-sized images. Every integer
result is compared with exact arithmetic before it is timed. Contenders take turns; the figures
are medians of CPU time of the process. GOP/s counts two per product; the limit is the integer
convolution alone, on integers that are ready.

    python tests/benchmarks/bench_quant_conv_cpu.py --batch 64 --json result.json
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "torsh_quant" / "src"))

from torsh_quant import QuantConv2d, __version__, _cpu, explain, quantize  # noqa: E402
from torsh_quant._cpu import ConvShape  # noqa: E402
from torsh_quant._numerics import exact_convolution, quantize_rows  # noqa: E402

Call = Callable[[], Tensor]

LAYERS: dict[str, tuple[nn.Conv2d, tuple[int, int, int]]] = {
    "1 to 16, 3x3, 16x16": (nn.Conv2d(1, 16, 3, padding=1), (1, 16, 16)),
    "16 to 32, 3x3, 16x16": (nn.Conv2d(16, 32, 3, padding=1), (16, 16, 16)),
    "32 to 64, 3x3 step 2, 16x16": (nn.Conv2d(32, 64, 3, padding=1, stride=2), (32, 16, 16)),
    "64 to 64, 3x3, 28x28": (nn.Conv2d(64, 64, 3, padding=1), (64, 28, 28)),
    "256 to 256, 1x1, 14x14": (nn.Conv2d(256, 256, 1), (256, 14, 14)),
    "64 to 64 depthwise, 3x3, 28x28": (nn.Conv2d(64, 64, 3, padding=1, groups=64), (64, 28, 28)),
}


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 16, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def check(layer: QuantConv2d, x: Tensor) -> None:
    """Raise unless the integer sums are those of exact arithmetic."""
    bits = _cpu.conv_kernels()[0].act_bits
    q, _, _ = quantize_rows(x, bits)
    shape = ConvShape(layer.stride, (1, 1), layer.dilation, layer.groups)
    kernel = layer.integers().view(layer.out_channels, -1, *layer.kernel_size)
    ones = torch.ones(layer.out_channels, 1)
    shifted = (q + _cpu.zero_point_for(bits)).to(torch.uint8)
    sums = _cpu.convolution(shifted, layer.integers(), ones, layer.kernel_size, shape)
    exact = exact_convolution(shifted, kernel, shape)
    if not torch.equal(sums, exact.float()):
        raise RuntimeError("the integer convolution is not exact here")


def layer_calls(layer: nn.Conv2d, x: Tensor) -> dict[str, Call]:
    nhwc, y = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    nchw = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        groups=layer.groups,
    )
    nchw.load_state_dict(layer.state_dict())
    contiguous = QuantConv2d.from_float(nchw.eval())
    last = QuantConv2d.from_float(nhwc.eval())
    floats = QuantConv2d.from_float(nhwc, "w4a16")
    check(contiguous, x)
    bits = _cpu.conv_kernels()[0].act_bits
    ready = (quantize_rows(y, bits)[0] + _cpu.zero_point_for(bits)).to(torch.uint8)
    shape = ConvShape(last.stride, (layer.padding[0], layer.padding[1]), last.dilation, last.groups)
    return {
        "torch fp32": lambda: nchw(x),
        "torch fp32, channels last": lambda: nhwc(y),
        "torsh w8a8": lambda: contiguous(x),
        "torsh w8a8, channels last": lambda: last(y),
        "torsh w4a16, channels last": lambda: floats(y),
        "the product alone": lambda: _cpu.convolution(
            ready, last.weight, last.scale, last.kernel_size, shape
        ),
    }


def net_calls(x: Tensor) -> dict[str, Call]:
    plain = net().eval()
    state = plain.state_dict()
    last = net().eval().to(memory_format=torch.channels_last)
    last.load_state_dict(state)
    models = {
        "torch fp32": plain,
        "torch fp32, channels last": last,
        "torsh w8a8": quantize(plain),
        "torsh w8a8, channels last": quantize(last),
        "torsh w8a8, first layer float": quantize(last, overrides={"0": None}),
        "torsh w4a16, channels last": quantize(last, "w4a16"),
        "torsh w4a8, channels last": quantize(last, "w4a8"),
    }
    expected = plain(x)
    for name, model in models.items():
        error = ((model(x) - expected).norm() / expected.norm()).item()
        if error > (0.3 if "w4" in name else 0.05):
            raise RuntimeError(f"{name} is off by {error:.1%}")
    return {name: lambda model=model: model(x) for name, model in models.items()}


def measure(calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    loops = {}
    for name, call in calls.items():
        quickest = float("inf")
        for _ in range(5):
            start = time.process_time()
            call()
            quickest = min(quickest, time.process_time() - start)
        loops[name] = max(1, int(4e-3 / max(quickest, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls.items()), random.Random(0).shuffle
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 7:
        shuffle(order)  # what runs before leaves its mark on the caches and the clock
        for name, call in order:
            start = time.process_time()
            for _ in range(loops[name]):
                call()
            times[name].append((time.process_time() - start) / loops[name])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    kernel = _cpu.conv_kernels()[0]
    header = {
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "vnni": torch.cpu._is_vnni_supported(),
        "kernel": kernel.name,
        "act_bits": kernel.act_bits,
        "threads": options.threads,
        "batch": options.batch,
        "torch": torch.__version__,
        "torsh_quant": __version__,
    }
    print(", ".join(f"{key} {value}" for key, value in header.items()))
    rows = []
    cases = {
        name: (layer_calls(layer, torch.randn(options.batch, *size)), layer, size)
        for name, (layer, size) in LAYERS.items()
    }
    cases["a net on 16x16 images"] = (net_calls(torch.randn(options.batch, 1, 16, 16)), None, None)
    for case, (calls, layer, size) in cases.items():
        operations = 0
        if layer is not None and size is not None:
            _, height, width = size
            outputs = height * width // (layer.stride[0] * layer.stride[1]) * options.batch
            operations = 2 * outputs * layer.weight.numel()
        times = measure(calls, options.seconds)
        median = {name: statistics.median(values) for name, values in times.items()}
        floats = min(median["torch fp32"], median["torch fp32, channels last"])
        print(f"\n{case}\n{'':32}{'median us':>10}{'spread':>8}{'GOP/s':>8}{'x best fp32':>13}")
        for name, value in median.items():
            low, _, high = statistics.quantiles(times[name], n=4)
            row = {
                "case": case,
                "contender": name,
                "median_s": value,
                "spread": (high - low) / value,
                "gops": operations / value / 1e9,
                "times_best_fp32": floats / value,
            }
            rows.append(row)
            print(
                f"{name:32}{value * 1e6:10.1f}{row['spread']:8.0%}{row['gops']:8.1f}"
                f"{row['times_best_fp32']:13.2f}"
            )
    print(f"\n{explain(quantize(net().eval()))}")
    if options.json:
        command = "python " + " ".join(sys.argv)
        options.json.write_text(
            json.dumps({**header, "command": command, "results": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
