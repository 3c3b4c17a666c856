"""Time a module on the machine at hand."""

import gc
import os
import platform
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class DeviceInfo:
    """Where a time was measured.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        name: Model of the processor or accelerator.
        threads: CPU threads torch used.
        torch: Version of torch.
    """

    device: str
    name: str
    threads: int
    torch: str

    @classmethod
    def of(cls, device: torch.device | str) -> "DeviceInfo":
        """Describe a device of this machine under torch's present number of threads."""
        kind = torch.device(device).type
        name = torch.cuda.get_device_name(device) if kind == "cuda" else _processor()
        return cls(kind, name, torch.get_num_threads(), str(torch.__version__))


@dataclass(frozen=True)
class Timing:
    """A measured time.

    Attributes:
        ms: The percentile asked for, the median by default, in milliseconds.
        iqr_ms: Distance of the quartiles: half of all runs lie within it.
        n: Number of timed runs.
        device_info: Where it was measured.
    """

    ms: float
    iqr_ms: float
    n: int
    device_info: DeviceInfo

    def as_dict(self) -> dict[str, object]:
        """Return the timing as JSON-ready data."""
        return asdict(self)


def measure(
    module: nn.Module,
    example_inputs: object,
    *,
    device: torch.device | str | None = None,
    warmup: int = 10,
    min_time_s: float = 0.2,
    percentile: float = 50,
    threads: int | None = None,
) -> Timing:
    """Time the forward pass of a module as its user would wait for it.

    Runs in eval mode without gradients, one call at a time; on CUDA the clock stops when the
    device has finished, so launch cost counts. Modes and thread count are put back afterwards.

    Args:
        module: Any module, with its parameters on ``device``.
        example_inputs: One input or a tuple of inputs; tensors are moved to ``device`` first.
        device: By default that of the first input tensor.
        warmup: Untimed runs before the timed ones.
        min_time_s: Keep timing until this many seconds have been measured (at least 5 runs).
        percentile: Which percentile of the runs to report, in ``[0, 100]``.
        threads: CPU threads to use; by default as many as torch uses now.

    Raises:
        ValueError: A parameter lies on another device, or an argument is out of range.

    Example:
        >>> from torsh_nas import measure
        >>> timing = measure(torch.nn.Linear(8, 8), torch.ones(1, 8), min_time_s=0.01)
        >>> timing.ms > 0 and timing.n >= 5
        True
    """
    if min_time_s <= 0 or warmup < 0 or not 0 <= percentile <= 100:
        raise ValueError(
            f"need min_time_s > 0, warmup >= 0 and percentile in [0, 100], got "
            f"{min_time_s}, {warmup} and {percentile}"
        )
    inputs, device = place_inputs(example_inputs, device)
    for name, parameter in module.named_parameters():
        if parameter.device.type != device.type:
            raise ValueError(
                f"parameter {name!r} is on {parameter.device}, but device={device.type!r} was "
                "asked for; move the module there first"
            )
    with evaluating(module), torch.inference_mode(), torch_threads(threads):
        calls = [lambda: module(*inputs)]
        (seconds,) = time_calls(calls, device, warmup=warmup, min_time_s=min_time_s)
        info = DeviceInfo.of(device)
    return summarise(seconds, info, percentile)


def time_calls(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    warmup: int,
    min_time_s: float,
) -> list[list[float]]:
    """Return the seconds of each run of each call, one run of each in turn.

    Goes on until ``min_time_s`` seconds have been measured in all, for at least 5 turns. The
    collector of cycles is off meanwhile.
    """
    for _ in range(warmup):
        for call in calls:
            call()
    synchronize = torch.cuda.synchronize if device.type == "cuda" else _nothing
    seconds: list[list[float]] = [[] for _ in calls]
    collecting = gc.isenabled()
    gc.disable()
    try:
        total, turns = 0.0, 0
        while total < min_time_s or turns < 5:
            for call, runs in zip(calls, seconds, strict=True):
                synchronize()
                start = time.perf_counter()
                call()
                synchronize()
                runs.append(time.perf_counter() - start)
                total += runs[-1]
            turns += 1
    finally:
        if collecting:
            gc.enable()
    return seconds


def summarise(seconds: list[float], info: DeviceInfo, percentile: float = 50) -> Timing:
    """Reduce single runs to a :class:`Timing`."""
    low, chosen, high = (float(v) for v in np.percentile(seconds, [25, percentile, 75]))
    return Timing(1e3 * chosen, 1e3 * (high - low), len(seconds), info)


def place_inputs(
    example_inputs: object, device: torch.device | str | None
) -> tuple[tuple[object, ...], torch.device]:
    """Return the inputs as a tuple on the device, and the device."""
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if device is None:
        device = next((i.device for i in inputs if isinstance(i, Tensor)), torch.device("cpu"))
    device = torch.device(device)
    return tuple(i.to(device) if isinstance(i, Tensor) else i for i in inputs), device


@contextmanager
def torch_threads(threads: int | None) -> Generator[None]:
    """Let torch use this many CPU threads inside the context; ``None`` changes nothing."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def evaluating(module: nn.Module) -> Generator[None]:
    """Put a module in eval mode and each part back into its own mode afterwards."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode


def _nothing() -> None:
    pass


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {os.cpu_count()} cores"
