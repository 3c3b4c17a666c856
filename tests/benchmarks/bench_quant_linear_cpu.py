"""Quantized linear layers on a CPU beside 32-bit floats and whichever peers are installed.

Libraries that clip their sums on this CPU fail the check before timing and are left out. The
limit is the integer product alone: the same kernel on integers that are ready, without
rounding the input and scaling the output. Contenders take turns; the figures are medians of CPU
time of the process, which other work on the machine disturbs least.

    python tests/benchmarks/bench_quant_linear_cpu.py --rows 1 16 128 --json result.json
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "torsh_quant" / "src"))

from torsh_quant import QuantLinear, __version__, _cpu, explain  # noqa: E402
from torsh_quant._numerics import quantize_rows  # noqa: E402

Call = Callable[[], Tensor]
# Relative error against fp32 that each format may have on Gaussian data: wide of what is measured,
# narrow enough to catch clipped sums.
LIMIT = {8: 0.04, 4: 0.2}


def torsh(scheme: str) -> Callable[[nn.Linear, Tensor], Call]:
    def make(layer: nn.Linear, x: Tensor) -> Call:
        quantized = QuantLinear.from_float(layer, scheme)
        return lambda: quantized(x)

    return make


def product_alone(layer: nn.Linear, x: Tensor) -> Call:
    quantized = QuantLinear.from_float(layer, "w8a8")
    bits = _cpu.linear_kernels()[0].act_bits
    q, _, _ = quantize_rows(x, bits)
    return lambda: _cpu.linear(q, quantized.weight, quantized.scale, bits)


def float32(layer: nn.Linear, x: Tensor) -> Call:
    return lambda: layer(x)


def bfloat16(layer: nn.Linear, x: Tensor) -> Call:
    low = nn.Linear(layer.in_features, layer.out_features, dtype=torch.bfloat16)
    low.load_state_dict(layer.state_dict())
    narrow = x.bfloat16()
    return lambda: low(narrow)


def torch_dynamic(layer: nn.Linear, x: Tensor) -> Call:
    packed = _cpu._pack_fbgemm(
        QuantLinear.from_float(layer).weight, QuantLinear.from_float(layer).scale[:, 0]
    )
    return lambda: torch.ops.quantized.linear_dynamic(x, packed, True) + layer.bias


def torchao(name: str) -> Callable[[nn.Linear, Tensor], Call]:
    def make(layer: nn.Linear, x: Tensor) -> Call:
        import copy

        from torchao import quantization

        config = getattr(quantization, name)
        model = nn.Sequential(copy.deepcopy(layer))
        quantization.quantize_(model, config())
        return lambda: model(x)

    return make


def onnxruntime_int8(layer: nn.Linear, x: Tensor) -> Call:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weight = layer.weight.detach()
    scale = weight.abs().amax(1) / 127
    # u8 x s8 without VNNI clips in this library too: its own advice is 7-bit weights there.
    if _cpu.linear_kernels()[0].act_bits < 8:
        scale = weight.abs().amax(1) / 63
    q = torch.round(weight / scale[:, None]).to(torch.int8).T.contiguous()
    node = helper.make_node(
        "DynamicQuantizeMatMul", ["x", "w", "s", "", "b"], ["y"], domain="com.microsoft"
    )
    shapes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y")]
    stored = [(q, "w"), (scale, "s"), (layer.bias.detach(), "b")]
    constants = [numpy_helper.from_array(tensor.numpy(), name) for tensor, name in stored]
    graph = helper.make_graph([node], "g", shapes[:1], shapes[1:], constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


CONTENDERS: dict[str, tuple[int, Callable[[nn.Linear, Tensor], Call]]] = {
    "torch fp32": (8, float32),
    "torch bf16": (8, bfloat16),
    "torsh w8a8": (8, torsh("w8a8")),
    "torsh w4a8": (4, torsh("w4a8")),
    "torsh w8a16": (8, torsh("w8a16")),
    "torsh w4a16": (4, torsh("w4a16")),
    "torch linear_dynamic": (8, torch_dynamic),
    "torchao int8 dynamic": (8, torchao("Int8DynamicActivationInt8WeightConfig")),
    "torchao int8 weight": (8, torchao("Int8WeightOnlyConfig")),
    "onnxruntime int8": (8, onnxruntime_int8),
}


def available(layer: nn.Linear, x: Tensor) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    expected = layer(x)
    for name, (bits, make) in CONTENDERS.items():
        try:
            call = make(layer, x)
            out = call()
        except ImportError as error:
            print(f"{name}: left out, {error}")
            continue
        error = ((out.float() - expected).norm() / expected.norm()).item()
        if not error < LIMIT[bits]:
            print(f"{name}: left out, its result is off by {error:.1%}")
            continue
        calls[name] = call
    calls["the product alone"] = product_alone(layer, x)
    return calls


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
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    capabilities = torch.cpu.get_capabilities()
    layer = nn.Linear(options.size, options.size).eval()
    plan = explain(nn.Sequential(QuantLinear.from_float(layer))).rows[0]
    header = {
        "cpu": capabilities.get("cpu_name", platform.processor()),
        "vnni": torch.cpu._is_vnni_supported(),
        "kernel": plan.kernel,
        "act_bits": plan.act_bits,
        "threads": options.threads,
        "torch": torch.__version__,
        "torsh_quant": __version__,
        "size": options.size,
    }
    print(", ".join(f"{key} {value}" for key, value in header.items()))
    rows = []
    for count in options.rows:
        x = torch.randn(count, options.size)
        times = measure(available(layer, x), options.seconds)
        median = {name: statistics.median(values) for name, values in times.items()}
        peers = [name for name in median if not name.startswith(("torsh", "the "))]
        best = min(median[name] for name in peers)
        print(f"\n{count} rows of {options.size} x {options.size}")
        head = (
            f"{'':24}{'median us':>10}{'spread':>8}{'GOP/s':>8}",
            "of product",
            "x fp32",
            "x peer",
        )
        print(f"{head[0]}{head[1]:>11}{head[2]:>8}{head[3]:>8}")
        for name, value in median.items():
            low, _, high = statistics.quantiles(times[name], n=4)
            row = {
                "rows": count,
                "contender": name,
                "median_s": value,
                "spread": (high - low) / value,
                "gops": 2e-9 * count * options.size**2 / value,
                "of_product": median["the product alone"] / value,
                "times_fp32": median["torch fp32"] / value,
                "times_best_peer": best / value,
            }
            rows.append(row)
            print(
                f"{name:24}{value * 1e6:10.1f}{row['spread']:8.0%}{row['gops']:8.1f}"
                f"{row['of_product']:11.0%}{row['times_fp32']:8.2f}{row['times_best_peer']:8.2f}"
            )
    if options.json:
        command = "python " + " ".join(sys.argv)
        options.json.write_text(
            json.dumps({**header, "command": command, "results": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
