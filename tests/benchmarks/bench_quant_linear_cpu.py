"""Quantized linear layers on a CPU beside 32-bit floats and whichever peers are installed.

Eight layers take turns, so that weights come from memory as they do in a model, and not from the
caches nearest to the core. Contenders take turns too, on one thread; figures are medians of CPU
time of the process, which other work on the machine disturbs least. Libraries that clip their sums
on this CPU fail the check before timing and are left out.

``of limit``: the limit of a contender is the time to read its weights (1 byte each in 8 bits, 0.625
in 4 bits with float scales of groups of 32), read its input and write its output at the rate of
reading such weights in turn, or that of its arithmetic at the best rate of a large product on this
core, whichever is more. Both rates are measured first. Of weights in 4 bits it is hard to reach:
no kernel of torch's multiplies them, and ours reads 8 bits.

    python tests/benchmarks/bench_quant_linear_cpu.py --rows 1 8 128 --json result.json
"""

import argparse
import copy
import io
import itertools
import json
import logging
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "torsh_quant" / "src"))

from torsh_quant import __version__, _cpu, explain, fuse, quantize  # noqa: E402

Call = Callable[[], Tensor]
Maker = Callable[[nn.Linear, Tensor], Call]
COPIES = 8
GROUP = 32
PACKAGES = ("torch", "torchao", "onnxruntime")
BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "w8": 1.0, "w4": 0.5 + 4 / GROUP}
# Relative error against fp32 that each format may have on Gaussian data: wide of what is measured,
# narrow enough to catch clipped sums.
LARGEST_ERROR = {"fp32": 1e-5, "bf16": 0.01, "int8": 0.04, "w8": 0.04, "w4": 0.2}


def of_model(model: nn.Module, x: Tensor) -> Call:
    return lambda: model(x)


def float32(layer: nn.Linear, x: Tensor) -> Call:
    return of_model(layer, x)


def bfloat16(layer: nn.Linear, x: Tensor) -> Call:
    return of_model(copy.deepcopy(layer).bfloat16(), x.bfloat16())


def torsh(scheme: str, *, fused: bool = False) -> Maker:
    def make(layer: nn.Linear, x: Tensor) -> Call:
        net = nn.Sequential(copy.deepcopy(layer)).eval()
        data = [x] if scheme.endswith("static") else None
        made = quantize(net, scheme, data=data, observer="minmax", inplace=True, progress=False)
        if fused:
            return of_model(fuse(made, x), x)
        return of_model(made[0], x)  # pyrefly: ignore[bad-index]

    return make


def torch_dynamic(engine: str) -> Maker:
    def make(layer: nn.Linear, x: Tensor) -> Call:
        from torch.ao.quantization import quantize_dynamic

        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            return of_model(quantize_dynamic(nn.Sequential(copy.deepcopy(layer)), {nn.Linear}), x)
        finally:
            torch.backends.quantized.engine = before

    return make


def int4pack(layer: nn.Linear, x: Tensor) -> Call:
    """torch's own product with 4-bit weights, which torchao no longer reaches on a CPU."""
    groups = layer.weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(2), groups.amax(2)
    scale = ((high - low) / 15).clamp(min=1e-8)
    q = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).int().flatten(1)
    packed = torch._convert_weight_to_int4pack_for_cpu(q.contiguous(), 2)
    both = torch.stack([scale, low + 8 * scale], 2).transpose(0, 1).contiguous().bfloat16()
    narrow, bias = x.bfloat16(), layer.bias.bfloat16()
    return lambda: torch._weight_int4pack_mm_for_cpu(narrow, packed, GROUP, both) + bias


def torchao(config: str, *, compiled: bool = False, **options: Any) -> Maker:
    def make(layer: nn.Linear, x: Tensor) -> Call:
        from torchao import quantization
        from torchao.quantization.granularity import PerGroup

        if "4" in str(options.get("dtype", "")):
            key = "granularity" if "WeightOnly" in config else "weight_granularity"
            given = {"weight_dtype": options["dtype"], key: PerGroup(GROUP)}
        else:
            given = {}
        model = nn.Sequential(copy.deepcopy(layer))
        quantization.quantize_(model, getattr(quantization, config)(**given))
        return of_model(torch.compile(model) if compiled else model, x)

    return make


def onnxruntime(kind: str) -> Maker:
    def make(layer: nn.Linear, x: Tensor) -> Call:
        import onnx
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        stored = [(layer.weight.detach().T.contiguous(), "w"), (layer.bias.detach(), "b")]
        constants = [numpy_helper.from_array(tensor.numpy(), name) for tensor, name in stored]
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["p"], name="product"),
            helper.make_node("Add", ["p", "b"], ["y"], name="sum"),
        ]
        sizes = {"x": layer.in_features, "y": layer.out_features}
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
            for name, size in sizes.items()
        ]
        graph = helper.make_graph(nodes, "linear", ends[:1], ends[1:], constants)
        opsets = [helper.make_opsetid("", 21)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        if kind == "int8":
            from onnxruntime.quantization import QuantType, quantize_dynamic

            written = io.BytesIO()
            quantize_dynamic(
                model,
                written,  # pyrefly: ignore[bad-argument-type]
                per_channel=True,
                # u8 x s8 without VNNI clips in this library: its advice is 7-bit weights there.
                reduce_range=_cpu.linear_kernels()[0].act_bits < 8,
                weight_type=QuantType.QInt8,
            )
            model = onnx.load_from_string(written.getvalue())
        elif kind != "fp32":
            from onnxruntime.quantization import matmul_nbits_quantizer as nbits

            level = int(kind[-1])
            config = nbits.DefaultWeightOnlyQuantConfig(
                block_size=GROUP, is_symmetric=True, accuracy_level=level
            )
            quantizer = nbits.MatMulNBitsQuantizer(model, algo_config=config)
            quantizer.process()
            model = quantizer.model.model
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        feed = {"x": x.numpy()}
        return lambda: torch.from_numpy(session.run(None, feed)[0])

    return make


@dataclass(frozen=True)
class Contender:
    """What takes part: what is stored of its weights, and what its products are made of."""

    weights: str
    product: str
    make: Maker


CONTENDERS = {
    "torch fp32": Contender("fp32", "fp32", float32),
    "torch bf16": Contender("bf16", "bf16", bfloat16),
    "torsh w8a8": Contender("int8", "int8", torsh("w8a8")),
    "torsh w8a8-static": Contender("int8", "int8", torsh("w8a8-static")),
    "torsh w8a8-static, fused": Contender("int8", "int8", torsh("w8a8-static", fused=True)),
    "torsh w4a8-g32": Contender("w4", "int8", torsh(f"w4a8-g{GROUP}")),
    "torsh w8a16": Contender("w8", "fp32", torsh("w8a16")),
    "torsh w4a16-g32": Contender("w4", "fp32", torsh(f"w4a16-g{GROUP}")),
    "torch.ao dynamic, x86": Contender("int8", "int8", torch_dynamic("x86")),
    "torch.ao dynamic, onednn": Contender("int8", "int8", torch_dynamic("onednn")),
    "torch int4pack, bf16": Contender("w4", "bf16", int4pack),
    "torchao int8 dynamic": Contender(
        "int8", "int8", torchao("Int8DynamicActivationInt8WeightConfig")
    ),
    "torchao int8 dynamic, compiled": Contender(
        "int8", "int8", torchao("Int8DynamicActivationInt8WeightConfig", compiled=True)
    ),
    "torchao int8 weights": Contender("w8", "fp32", torchao("Int8WeightOnlyConfig")),
    "torchao int8 weights, compiled": Contender(
        "w8", "fp32", torchao("Int8WeightOnlyConfig", compiled=True)
    ),
    "torchao int8 dynamic, int4 weights": Contender(
        "w4", "int8", torchao("Int8DynamicActivationIntxWeightConfig", dtype=torch.int4)
    ),
    "torchao int4 weights": Contender(
        "w4", "fp32", torchao("IntxWeightOnlyConfig", dtype=torch.int4)
    ),
    "ONNX Runtime fp32": Contender("fp32", "fp32", onnxruntime("fp32")),
    "ONNX Runtime int8 dynamic": Contender("int8", "int8", onnxruntime("int8")),
    "ONNX Runtime int4, int8 sums": Contender("w4", "int8", onnxruntime("accuracy 4")),
    "ONNX Runtime int4, fp32 sums": Contender("w4", "fp32", onnxruntime("accuracy 0")),
}


def turns(calls: Sequence[Call]) -> Call:
    order = itertools.cycle(calls)
    return lambda: next(order)()


def available(layers: Sequence[nn.Linear], x: Tensor) -> tuple[dict[str, Call], dict[str, float]]:
    calls: dict[str, Call] = {}
    off: dict[str, float] = {}
    expected = layers[0](x)
    for name, one in CONTENDERS.items():
        try:
            made = [one.make(layer, x) for layer in layers]
            outputs = [call() for call in made]
        except Exception as error:
            print(f"{name}: left out, {type(error).__name__}: {error}"[:200])
            continue
        off[name] = ((outputs[0].float() - expected).norm() / expected.norm()).item()
        if not off[name] < LARGEST_ERROR[one.weights]:
            print(f"{name}: left out, its result is off by {off[name]:.1%}")
            continue
        calls[name] = turns(made)
    return calls, off


def measure(calls: dict[str, Call], seconds: float, least: int = 7) -> dict[str, list[float]]:
    """CPU seconds of each call, ``least`` times or more, in an order that changes every round."""
    loops = {}
    for name, call in calls.items():
        quickest = float("inf")
        for _ in range(3):
            start = time.process_time()
            call()
            quickest = min(quickest, time.process_time() - start)
        loops[name] = max(1, int(4e-3 / max(quickest, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls.items()), random.Random(0).shuffle
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < least:
        shuffle(order)  # what runs before leaves its mark on the caches and the clock
        for name, call in order:
            start = time.process_time()
            for _ in range(loops[name]):
                call()
            times[name].append((time.process_time() - start) / loops[name])
    return times


def _least(call: Callable[[], object], times: int = 20) -> float:
    call()
    best = float("inf")
    for _ in range(times):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return best


def read_rate(nbytes: float) -> float:
    """Bytes a second, of tensors so large that are read in turn as the layers are."""
    held = [torch.randn(int(nbytes) // 4) for _ in range(COPIES)]
    ways: list[Callable[[Tensor], Tensor]] = [torch.sum, torch.amax, lambda t: torch.dot(t, t)]
    seconds = min(_least(lambda way=way: [way(one) for one in held], 10) for way in ways)
    return sum(one.nbytes for one in held) / seconds


def product_rates() -> dict[str, float]:
    """Operations a second of each kind of product, the best that torch reaches on this core."""
    side, rates = 1024, {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(2, side, side, dtype=dtype)
        image = a.view(1, 32, 32, side).permute(0, 3, 1, 2)
        kernel = b.view(side, side, 1, 1).to(memory_format=torch.channels_last)
        ways = (lambda a=a, b=b: F.linear(a, b), lambda i=image, k=kernel: F.conv2d(i, k))
        rates[name] = 2 * side**3 / min(map(_least, ways))
    if torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported():
        # One bfloat16 instruction does twice what one of float32 does, and torch's float32
        # products do not use the widest of the latter on every CPU.
        rates["fp32"] = max(rates["fp32"], rates["bf16"] / 2)
    q = torch.randint(0, 256, (side, side), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (side, side), dtype=torch.int8)
    scale = torch.ones(side, 1)
    packed = _cpu.packed_linear(weight, scale, side)
    output = (1.0, 0, torch.float32)
    call = lambda: _cpu.run_linear(q, packed, 1.0, None, ("none", []), output)  # noqa: E731
    rates["int8"] = 2 * side**3 / _least(call)
    return rates


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "torsh_quant": __version__}
    for name in PACKAGES[1:]:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def processor() -> dict[str, Any]:
    kernel = _cpu.linear_kernels()[0]
    return {
        "cpu": str(torch.cpu.get_capabilities().get("cpu_name", platform.processor())),
        "vnni": torch.cpu._is_vnni_supported(),
        "kernel": kernel.name,
        "act_bits": kernel.act_bits,
        "threads": torch.get_num_threads(),
        **versions(),
    }


def spread(values: Sequence[float]) -> float:
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def write(path: Path, header: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    command = "python " + " ".join(sys.argv)
    path.write_text(json.dumps({**header, "command": command, "results": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 128])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # ONNX Runtime asks for a step that changes nothing here
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    size = options.size
    layers = [nn.Linear(size, size).eval() for _ in range(COPIES)]
    reads = {kind: read_rate(size * size * count) for kind, count in BYTES.items()}
    products = product_rates()
    header = {
        **processor(),
        "size": size,
        "layers in turn": COPIES,
        "reading, GB/s": {kind: rate / 1e9 for kind, rate in reads.items()},
        "products, GOP/s": {kind: rate / 1e9 for kind, rate in products.items()},
    }
    print(", ".join(f"{key} {value}" for key, value in header.items()))
    print(explain(quantize(nn.Sequential(layers[0]).eval(), "w8a8")))
    rows = []
    for count in options.rows:
        calls, off = available(layers, torch.randn(count, size))
        times = measure(calls, options.seconds)
        median = {name: statistics.median(values) for name, values in times.items()}
        print(f"\n{count} rows of {size} x {size}")
        print(f"{'':36}{'median us':>10}{'spread':>8}{'of limit':>9}{'x fp32':>8}{'off':>8}")
        for name, value in median.items():
            one = CONTENDERS[name]
            moved = size * size * BYTES[one.weights] + 8 * count * size
            arithmetic = 2 * count * size * size / products[one.product]
            limit = max(moved / reads[one.weights], arithmetic)
            row = {
                "rows": count,
                "contender": name,
                "median_s": value,
                "spread": spread(times[name]),
                "gops": 2e-9 * count * size**2 / value,
                "of_limit": limit / value,
                "times_fp32": median["torch fp32"] / value,
                "off": off[name],
            }
            rows.append(row)
            print(
                f"{name:36}{value * 1e6:10.1f}{row['spread']:8.0%}{row['of_limit']:9.0%}"
                f"{row['times_fp32']:8.2f}{off[name]:8.4f}"
            )
    if options.json:
        write(options.json, header, rows)


if __name__ == "__main__":
    main()
