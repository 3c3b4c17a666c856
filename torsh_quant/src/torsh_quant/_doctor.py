"""What this machine can run, found by running it."""

import os
import platform
from dataclasses import dataclass

import torch

from torsh_quant import _cpu
from torsh_quant._explain import plan_for
from torsh_quant._layer import QuantizedLayer
from torsh_quant._numerics import ConvShape, exact_convolution, exact_linear
from torsh_quant._quant_conv import QuantConv2d
from torsh_quant._quant_linear import QuantLinear

SCHEMES = ("w8a8", "w4a8", "w8a16", "w4a16")
_CAPS = ("ONEDNN_MAX_CPU_ISA", "FBGEMM_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")


@dataclass(frozen=True)
class Path:
    """How one kind of layer would run under one scheme on one device."""

    device: str
    layer: str
    scheme: str
    kernel: str
    act_bits: int | None
    gain: str
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything ``torsh-quant doctor`` shows.

    Args:
        versions: Of Python, torch and the packages here.
        cpu: Its name.
        vnni: Whether the CPU says it has the wide int8 instructions of AVX-512.
        capped: Environment variables that keep libraries from using what the CPU has.
        devices: CUDA devices.
        self_check: For each integer kernel, whether its sums are exact with the activations it is
            used with: the largest integers, and 1,000 rows of random ones.
        paths: What runs for which scheme.
    """

    versions: dict[str, str]
    cpu: str
    vnni: bool
    capped: dict[str, str]
    devices: list[str]
    self_check: dict[str, bool]
    paths: list[Path]


def diagnose() -> Diagnosis:
    """Run the self-checks and list what would run."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    capabilities = torch.cpu.get_capabilities()
    return Diagnosis(
        versions={"python": platform.python_version(), "torch": torch.__version__},
        cpu=str(capabilities.get("cpu_name", platform.processor() or platform.machine())),
        vnni=torch.cpu._is_vnni_supported(),
        capped={name: os.environ[name] for name in _CAPS if name in os.environ},
        devices=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        self_check=_self_check(),
        paths=[path for device in devices for path in _paths(device)],
    )


def _self_check() -> dict[str, bool]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    kernel = _cpu.linear_kernels()[0]
    largest = _cpu.zero_point_for(kernel.act_bits) - 1
    weight = torch.randint(-127, 128, (96, 577), generator=generator, dtype=torch.int8)
    q = torch.randint(-largest, largest + 1, (1000, 577), generator=generator).float()
    q[0], weight[0] = largest, 127
    sums = _cpu.linear(q, weight, torch.ones(96, 1), kernel.act_bits)
    found[f"linear: {kernel.name}"] = torch.equal(sums, exact_linear(q, weight).float())
    kernel = _cpu.conv_kernels()[0]
    if not kernel.fast:
        return found | {f"conv2d: {kernel.name}": True}
    largest = _cpu.zero_point_for(kernel.act_bits) - 1
    shape = ConvShape((2, 1), (0, 0), (1, 2), 2)
    weight = torch.randint(-127, 128, (32, 16 * 9), generator=generator, dtype=torch.int8)
    images = torch.randint(2 * largest + 2, (8, 32, 15, 15), generator=generator, dtype=torch.uint8)
    images[0], weight[0] = 2 * largest + 1, 127
    expected = exact_convolution(images, weight.view(32, 16, 3, 3), shape)
    sums = _cpu.convolution(images, weight, torch.ones(32, 1), (3, 3), shape)
    found[f"conv2d: {kernel.name}"] = torch.equal(sums, expected.float())
    return found


def _paths(device: str) -> list[Path]:
    rows = []
    for scheme in SCHEMES:
        layers: list[tuple[str, QuantizedLayer]] = [
            ("linear", QuantLinear(512, 512, scheme=scheme, device=device)),
            ("conv2d", QuantConv2d(64, 64, 3, scheme=scheme, device=device)),
        ]
        for kind, layer in layers:
            plan = plan_for(kind, layer)
            rows.append(
                Path(device, kind, scheme, plan.kernel, plan.act_bits, plan.gain, plan.reason)
            )
    return rows
