"""The trained network in 8 and 4 bits: what it costs and what it saves."""

import copy
from collections import Counter

import torch
from matplotlib.figure import Figure
from torch import nn

from digits import accuracy, digits, to_float
from report import Section, Table
from torsh_nas import measure
from torsh_quant import explain, quantize, sensitivity

SCHEMES = ["w8a8", "w4a16"]


def run(demo) -> Section:
    data = digits()
    net = copy.deepcopy(demo.made.trained).eval().to(memory_format=torch.channels_last)
    versions = {"fp32": net} | {scheme: quantize(net, scheme) for scheme in SCHEMES}
    batch = to_float(data.test_images)
    rows, results = [], {}
    for name, model in versions.items():
        size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        right = accuracy(model, data.test_images, data.test_labels)
        latency = measure(model, batch, device="cpu")
        results[name] = right, size, latency.ms
        rows.append(
            [name, f"{right:.1%}", f"{size:,}", f"{latency.ms:.1f} ± {latency.iqr_ms:.1f} ms"]
        )
    (exact, full, _), (low, small, _) = results["fp32"], results["w4a16"]
    section = Section(
        f"8 bits: {results['w8a8'][0]:.1%} right, 4 bits: {low:.1%}, fp32: {exact:.1%}; "
        f"4-bit weights take {small / full:.0%} of the bytes",
        [
            *(f"{name}: {kernels(model)}" for name, model in versions.items() if name != "fp32"),
            "a net this small gains no time: its products are over before the rounding is",
        ],
        [Table(["version", "test accuracy", "bytes of state", "360 images"], rows)],
    )
    plans = [
        [plan.layer, plan.scheme, plan.kernel, f"{plan.bytes_float:,}", f"{plan.bytes_now:,}"]
        for scheme in SCHEMES
        for plan in explain(versions[scheme]).rows
    ]
    section.tables.append(Table(["layer", "scheme", "what multiplies", "fp32 bytes", "now"], plans))
    calibration = [to_float(part) for part in data.images[:512].split(128)]
    found = sensitivity(net, calibration, SCHEMES)
    figure = Figure(figsize=(9, 3.2))
    found.plot(ax=figure.subplots())
    section.add_figure("How much each layer, quantized alone, changes the output", figure)
    return section


def kernels(model: nn.Module) -> str:
    """How many layers each kernel has."""
    counts = Counter(plan.kernel for plan in explain(model).rows)
    return ", ".join(f"{number} layers: {kernel}" for kernel, number in counts.items())
