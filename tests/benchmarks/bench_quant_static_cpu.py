"""Whole convolutional nets with static INT8 on a CPU, beside torch's own and ONNX Runtime's.

The digits net of the tests, torchvision's ResNet-18 and MobileNetV2 with random weights. All
contenders are calibrated on the same images with the smallest and largest value, take turns, and
run on one thread; figures are medians of CPU time. ``off`` is the distance of the outputs from
those of the float model; torch.ao and ONNX Runtime are left out where they are not installed.

    python tests/benchmarks/bench_quant_static_cpu.py --json result.json
"""

import argparse
import copy
import json
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "torsh_quant" / "src"))

from torsh_quant import __version__, _cpu, fold_batch_norm, fuse, quantize  # noqa: E402

Call = Callable[[], Tensor]


def digits_net() -> nn.Module:
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


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "digits net, 64 images of 16x16": (digits_net, (64, 1, 16, 16)),
    "ResNet-18, 1 image of 224x224": (torchvision.models.resnet18, (1, 3, 224, 224)),
    "ResNet-18, 8 images of 224x224": (torchvision.models.resnet18, (8, 3, 224, 224)),
    "MobileNetV2, 1 image of 224x224": (torchvision.models.mobilenet_v2, (1, 3, 224, 224)),
    "MobileNetV2, 8 images of 224x224": (torchvision.models.mobilenet_v2, (8, 3, 224, 224)),
}


def settle(net: nn.Module, images: Tensor) -> nn.Module:
    """Give random weights statistics of batch normalisation that fit them, as training would."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    net.train()
    for _ in range(2):
        net(images)
    return net.eval()


def ours(net: nn.Module, x: Tensor, data: list[Tensor]) -> dict[str, Call]:
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    y = x.to(memory_format=torch.channels_last)
    folded = fold_batch_norm(last, x[:1])
    plain = quantize(net, "w8a8-static", data=data, observer="minmax")
    single = quantize(last, "w8a8-static", data=data, observer="minmax")
    dynamic = quantize(folded, "w8a8")
    joined = fuse(plain, x)
    return {
        "torch fp32": lambda: net(x),
        "torch fp32, folded, channels last": lambda: folded(y),
        "torsh w8a8, channels last": lambda: dynamic(y),
        "torsh w8a8-static": lambda: plain(x),
        "torsh w8a8-static, channels last": lambda: single(y),
        "torsh w8a8-static, fused": lambda: joined(x),
    }


def torch_ao(net: nn.Module, x: Tensor, data: list[Tensor]) -> dict[str, Call]:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    calls: dict[str, Call] = {}
    for engine, mapping in (("onednn", "x86"), ("fbgemm", "fbgemm")):
        torch.backends.quantized.engine = engine
        prepared = prepare_fx(copy.deepcopy(net), get_default_qconfig_mapping(mapping), (x[:1],))
        for batch in data:
            prepared(batch)
        converted = convert_fx(prepared)
        calls[f"torch.ao FX, {engine}"] = lambda model=converted: model(x)
    torch.backends.quantized.engine = "x86"
    return calls


def onnx_runtime(net: nn.Module, x: Tensor, data: list[Tensor]) -> dict[str, Call]:
    import onnxruntime
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader
    from onnxruntime.quantization.shape_inference import quant_pre_process

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    array = x.numpy()

    class Reader(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            parts = torch.cat(data).split(len(x)) if len(x) == 1 else data
            self.batches = iter([{name: part.numpy()} for part in parts])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    calls: dict[str, Call] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{name}.onnx" for name in ("float", "ready", "int8")]
        free = ({0: torch.export.Dim.DYNAMIC},) if len(x) > 1 else None
        torch.onnx.export(
            net, (x,), paths[0], dynamo=True, verbose=False, external_data=False,
            dynamic_shapes=free,
        )  # fmt: skip
        quant_pre_process(paths[0], paths[1], skip_symbolic_shape=True)
        kinds = {"u8 x s8": QuantType.QUInt8, "s8 x s8": QuantType.QInt8}
        sessions = {"fp32": onnxruntime.InferenceSession(paths[0], options)}
        for kind, act in kinds.items():
            name = sessions["fp32"].get_inputs()[0].name
            quantize_static(
                paths[1],
                paths[2],
                Reader(name),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=_cpu.conv_kernels()[0].act_bits == 7,
                activation_type=act,
                weight_type=QuantType.QInt8,
            )
            sessions[f"QDQ, {kind}"] = onnxruntime.InferenceSession(paths[2], options)
    for kind, session in sessions.items():
        name = session.get_inputs()[0].name
        calls[f"ONNX Runtime {kind}"] = lambda run=session, key=name: torch.from_numpy(
            run.run(None, {key: array})[0]
        )
    return calls


def measure(calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    loops: dict[str, int] = {}
    for name, call in calls.items():
        call()
        start = time.process_time()
        call()
        loops[name] = max(1, int(0.03 / max(time.process_time() - start, 1e-6)))
    order = list(calls.items())
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[order[0][0]]) < 7:
        random.shuffle(order)
        for name, call in order:
            start = time.process_time()
            for _ in range(loops[name]):
                call()
            times[name].append((time.process_time() - start) / loops[name])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    kernel = _cpu.conv_kernels()[0]
    versions = {"torch": torch.__version__, "torsh_quant": __version__}
    if find_spec("onnxruntime"):
        import onnxruntime

        versions["onnxruntime"] = onnxruntime.__version__
    header = {
        "cpu": str(torch.cpu.get_capabilities().get("cpu_name", platform.processor())),
        "vnni": torch.cpu._is_vnni_supported(),
        "kernel": kernel.name,
        "act_bits": kernel.act_bits,
        "threads": 1,
        **versions,
    }
    print(", ".join(f"{key} {value}" for key, value in header.items()))
    rows = []
    for case, (make, size) in CASES.items():
        data = [torch.randn(8, *size[1:]) for _ in range(2)]
        net, x = settle(make(), torch.cat(data)), data[0].repeat(-(-size[0] // 8), 1, 1, 1)
        x = x[: size[0]].contiguous()
        calls: dict[str, Call] = {}
        makers = [ours, torch_ao]
        if find_spec("onnxruntime") and find_spec("onnx") and find_spec("onnxscript"):
            makers.append(onnx_runtime)
        for maker in makers:
            try:
                if maker is onnx_runtime:  # exporting wants gradients on
                    calls |= maker(net, x, data)
                else:
                    with torch.no_grad():
                        calls |= maker(net, x, data)
            except Exception as error:
                print(f"{maker.__name__} is left out: {type(error).__name__}: {error}"[:200])
        with torch.no_grad():
            expected = net(x)
            off = {
                name: ((call() - expected).norm() / expected.norm()).item()
                for name, call in calls.items()
            }
            times = measure(calls, options.seconds)
        median = {name: statistics.median(values) for name, values in times.items()}
        print(f"\n{case}\n{'':36}{'median ms':>10}{'spread':>8}{'x fp32':>8}{'off':>8}")
        for name, value in median.items():
            low, _, high = statistics.quantiles(times[name], n=4)
            row = {
                "case": case,
                "contender": name,
                "median_s": value,
                "spread": (high - low) / value,
                "times_fp32": median["torch fp32"] / value,
                "off": off[name],
            }
            rows.append(row)
            print(
                f"{name:36}{value * 1e3:10.3f}{row['spread']:8.0%}{row['times_fp32']:8.2f}"
                f"{off[name]:8.4f}"
            )
    if options.json:
        command = "python " + " ".join(sys.argv)
        result = {**header, "command": command, "results": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
