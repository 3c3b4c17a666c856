"""What this machine has, and which implementation each kind of parameter gets."""

import importlib.util
import platform
import warnings
from dataclasses import dataclass

import torch

from torsh_optim._adamw import AdamW

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)


@dataclass(frozen=True)
class Finding:
    """How parameters of one element type on one device are updated.

    Attributes:
        device: Device, with its name.
        dtype: Element type of the parameters.
        implementation: ``triton``, ``cpu-fused`` or ``reference``.
        max_error: Largest difference of a parameter from the plain loop after ten steps of size
            1e-3, in units of the last place of its element type at 1; None if nothing was run.
        remedy: What to do where a slow path runs; empty where nothing is to be done.
    """

    device: str
    dtype: str
    implementation: str
    max_error: float | None
    remedy: str


def versions() -> dict[str, str]:
    """Versions of what the package builds on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": "missing"}
    if importlib.util.find_spec("triton") is not None:
        import triton

        found["triton"] = triton.__version__
    return found


def examine(*, run: bool = True) -> list[Finding]:
    """Find out what runs for each device and element type of this machine.

    Args:
        run: Also take ten steps with each and compare with the plain loop.

    Returns:
        One finding for each pair, the CPU first.
    """
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [_examine(device, dtype, run) for device in devices for dtype in _DTYPES]


def _examine(device: torch.device, dtype: torch.dtype, run: bool) -> Finding:
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(1037, generator=generator).to(device, dtype)
    mine, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    opt, reference = AdamW([mine]), AdamW([theirs], fused=False)
    name = device.type
    if device.type == "cuda":
        name = f"{device} {torch.cuda.get_device_name(device)}"
    max_error = None
    if run:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the slow path, reported below
            for _ in range(10):
                grad = torch.randn(1037, generator=generator).to(device, dtype)
                for param, optimizer in ((mine, opt), (theirs, reference)):
                    param.grad = grad.clone()
                    optimizer.step()
        max_error = (mine - theirs).abs().max().item() / torch.finfo(dtype).eps
    implementation = opt.implementation
    remedy = ""
    if implementation == "reference":
        if device.type == "cuda" and importlib.util.find_spec("triton") is None:
            remedy = "pip install triton"
        elif dtype == torch.float64:
            remedy = "use float32 parameters; no kernel computes in float64"
        else:
            remedy = "keep real and imaginary parts as real parameters"
    return Finding(name, str(dtype).removeprefix("torch."), implementation, max_error, remedy)
