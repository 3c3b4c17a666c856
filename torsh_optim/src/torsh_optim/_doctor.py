"""What this machine has, what updates each kind of parameter on it, and whether it is right."""

import importlib.util
import json as json_format
import platform
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from torsh_optim._adam import AdamW, AdvancedAdam
from torsh_optim._lamb import LAMB
from torsh_optim._lion import Lion
from torsh_optim._optimizer import FusedOptimizer
from torsh_optim._sgd import SGD

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)
_Maker = Callable[..., FusedOptimizer]
# Each rule of the kernels, and the pass that takes the norm. A learning rate of 1e-3 for all.
ALGORITHMS: dict[str, tuple[_Maker, dict[str, Any]]] = {
    "AdamW": (AdamW, {}),
    "AdvancedAdam with the norm": (AdvancedAdam, {"max_grad_norm": 1.0}),
    "LAMB": (LAMB, {}),
    "Lion": (Lion, {"lr": 1e-3}),
    "SGD": (SGD, {"momentum": 0.9}),
}
_ELEMENTS = (1037, 5)  # more than a block of the kernels, and less than a wide access
_STEPS = 10
# Ten steps of a thousandth differ by a few roundings; a wrong formula by hundreds of them.
TOLERANCE = 16.0


@dataclass(frozen=True)
class Finding:
    """How an algorithm updates parameters of one element type on one device.

    Attributes:
        algorithm: A key of ``ALGORITHMS``.
        device: Device, with its name.
        dtype: Element type of the parameters.
        implementation: ``triton``, ``cpu-fused``, ``cpu-chunked`` or ``reference``.
        max_error: Largest difference from the plain loop after ten steps of size 1e-3, of a
            parameter, of a state (relative to its largest number, if that is above 1) or of the
            norm of the gradients (relative to itself), in units of the last place of the element
            type at 1, with the norm at least of float32's; None if nothing was run.
        remedy: What to do where a slow path runs; empty where nothing is to be done.
    """

    algorithm: str
    device: str
    dtype: str
    implementation: str
    max_error: float | None
    remedy: str

    @property
    def wrong(self) -> bool:
        """Whether it was run and is not right."""
        return self.max_error is not None and not self.max_error <= TOLERANCE


def doctor(*, json: bool = False, run: bool = True) -> None:
    """Say what updates which parameters on this machine, and whether it is right.

    Ends with status 1 if a result is wrong.

    Args:
        json: Print JSON instead of a table.
        run: Take ten steps with each algorithm and compare with the plain loop.
    """
    findings = examine(run=run)
    if json:
        report = {
            "versions": versions(),
            "notes": notes(),
            "findings": [asdict(finding) for finding in findings],
        }
        sys.stdout.write(json_format.dumps(report) + "\n")
    else:
        _show(findings)
    if any(finding.wrong for finding in findings):
        raise SystemExit(1)


def versions() -> dict[str, str]:
    """Versions of this package and of what it builds on."""
    from torsh_optim import __version__

    found = {
        "torsh-optim": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": "missing",
    }
    if importlib.util.find_spec("triton") is not None:
        import triton

        found["triton"] = triton.__version__
    return found


def notes() -> list[str]:
    """What holds for the machine as a whole, and what to do about it."""
    found: list[str] = []
    if not torch.cuda.is_available() and Path("/dev/nvidiactl").exists():
        build = "a build for the CPU" if torch.version.cuda is None else "no driver that fits"
        found.append(
            f"there is an NVIDIA driver, but torch {torch.__version__} finds no device: it has "
            f"{build}; install a build of torch for the driver's version of CUDA"
        )
    missing = importlib.util.find_spec("triton") is None
    found += kernel_notes(cuda=torch.cuda.is_available(), triton=not missing)
    if torch.cuda.is_available() and _interpreting():
        found.append("TRITON_INTERPRET=1 runs kernels in an interpreter; unset it")
    if torch.get_num_threads() == 1 and torch.multiprocessing.cpu_count() > 1:
        found.append(
            "torch uses one thread of the CPU; OMP_NUM_THREADS or torch.set_num_threads sets it"
        )
    return found


def kernel_notes(*, cuda: bool, triton: bool) -> list[str]:
    """Why the Triton kernels are not used, if they are not, and what runs in their place.

    Args:
        cuda: Whether there is a CUDA device.
        triton: Whether Triton is installed.
    """
    if not cuda:
        return [
            "no CUDA device, so the Triton kernels are not used on this machine: parameters on the "
            "CPU take torch's fused kernels (cpu-fused) or pieces that fit into the cache "
            "(cpu-chunked)"
        ]
    if not triton:
        return [
            "there is a CUDA device, but Triton is missing: parameters there are updated one by "
            "one (reference), which is slow; pip install triton"
        ]
    return []


def _interpreting() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def examine(*, run: bool = True) -> list[Finding]:
    """Find out what runs for each device, element type and algorithm of this machine.

    Args:
        run: Also take ten steps with each and compare with the plain loop.

    Returns:
        One finding for each of them, the CPU first.
    """
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [
        _examine(device, dtype, algorithm, run)
        for device in devices
        for dtype in _DTYPES
        for algorithm in ALGORITHMS
    ]


def _examine(device: torch.device, dtype: torch.dtype, algorithm: str, run: bool) -> Finding:
    make, options = ALGORITHMS[algorithm]
    generator = torch.Generator().manual_seed(0)
    starts = [torch.rand(n, generator=generator).to(device, dtype) for n in _ELEMENTS]
    mine, theirs = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    opt, reference = make(mine, **options), make(theirs, fused=False, **options)
    max_error = None
    if run:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the slow path, reported below
            for _ in range(_STEPS):
                for pair in zip(mine, theirs, strict=True):
                    grad = torch.randn(pair[0].shape, generator=generator).to(device, dtype)
                    for param in pair:
                        param.grad = grad.clone()
                opt.step()
                reference.step()
        max_error = _max_error(opt, reference, dtype)
    name = device.type
    if device.type == "cuda":
        name = f"{device} {torch.cuda.get_device_name(device)}"
    return Finding(
        algorithm,
        name,
        str(dtype).removeprefix("torch."),
        opt.implementation,
        max_error,
        _remedy(device, dtype) if opt.implementation == "reference" else "",
    )


def _max_error(opt: FusedOptimizer, reference: FusedOptimizer, dtype: torch.dtype) -> float:
    pairs = zip(opt.param_groups[0]["params"], reference.param_groups[0]["params"], strict=True)
    errors: list[float] = []
    for mine, theirs in pairs:
        tensors = [(mine.detach(), theirs.detach())]
        tensors += [(opt.state[mine][key], t) for key, t in reference.state[theirs].items()]
        for found, expected in tensors:
            size = max(1.0, float(expected.abs().max()))
            errors.append(float((found - expected).abs().max()) / size)
    unit = torch.finfo(dtype).eps
    if opt.grad_norm is not None and reference.grad_norm is not None:
        unit = max(unit, torch.finfo(torch.float32).eps)  # in which the gradients are scaled
        errors.append(abs(float(opt.grad_norm / reference.grad_norm) - 1.0))
    # not max(errors), which may pass over a NaN
    return float(torch.tensor(errors, dtype=torch.float64).max()) / unit


def _remedy(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "pip install triton"
    if dtype.is_complex:
        return "keep real and imaginary parts as real parameters"
    if dtype == torch.float64:
        return "use float32 parameters; no kernel computes in float64"
    return "report this: a kernel should take these parameters"


def _show(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print("  ".join(f"{name} {version}" for name, version in versions().items()))
    for note in notes():
        console.print(note, style="yellow")
    table = Table("device", "dtype", "implementation", "algorithms", "error")
    rows: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        key = (finding.device, finding.dtype, finding.implementation)
        rows.setdefault(key, []).append(finding)
    for key, row in rows.items():
        names = [f"[red]{f.algorithm} WRONG[/]" if f.wrong else f.algorithm for f in row]
        worst = max((f.max_error for f in row if f.max_error is not None), default=None)
        table.add_row(*key, ", ".join(names), "" if worst is None else f"{worst:.1f}")
    console.print(table)
    if any(finding.max_error is not None for finding in findings):
        console.print(
            f"error: largest difference from the plain loop after {_STEPS} steps, in units of the "
            f"last place; more than {TOLERANCE:.0f} is wrong"
        )
    remedies: dict[str, list[str]] = {}
    for finding in findings:
        if finding.remedy:
            remedies.setdefault(finding.remedy, []).append(f"{finding.dtype} on {finding.device}")
    for remedy, where in remedies.items():
        console.print(f"{', '.join(dict.fromkeys(where))}: slow; {remedy}")
