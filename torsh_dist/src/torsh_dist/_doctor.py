"""What this machine has for training on several processes."""

import importlib.util
import os
import platform
import socket
import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from torsh_dist._spawn import launch


@dataclass(frozen=True)
class Finding:
    """One line of the examination; ``remedy`` is empty where nothing is to be done."""

    what: str
    found: str
    remedy: str = ""


def examine(*, run: bool) -> list[Finding]:
    """Look at devices, backends, network names and kernels.

    Args:
        run: also start two processes that average a tensor through the loopback interface.
    """
    findings = [
        Finding("python", platform.python_version()),
        Finding("torch", str(torch.__version__)),
        _devices(),
        _backends(),
        _hostname(),
        _interfaces(),
        _int8(),
    ]
    if run:
        findings.append(_loopback())
    return findings


def _devices() -> Finding:
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    return Finding("devices", ", ".join([cores, *names]))


def _backends() -> Finding:
    present = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    found = ", ".join(name for name, there in present.items() if there)
    if torch.cuda.is_available() and not present["nccl"]:
        return Finding("backends", found, "this torch has no nccl: CUDA jobs need another build")
    return Finding("backends", found)


def _hostname() -> Finding:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        remedy = "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME to the interface to use"
        return Finding("host name", f"{name}: {error}", remedy)
    remedy = ""
    if address.startswith("127."):
        remedy = "other machines cannot reach that: for several, set GLOO_SOCKET_IFNAME"
    return Finding("host name", f"{name} is {address}", remedy)


def _interfaces() -> Finding:
    names = [name for _, name in socket.if_nameindex()]
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if chosen and chosen not in names:
        remedy = f"GLOO_SOCKET_IFNAME={chosen} does not exist: unset it or name another"
        return Finding("interfaces", ", ".join(names), remedy)
    return Finding("interfaces", ", ".join(names) + (f"; gloo uses {chosen}" if chosen else ""))


def _int8() -> Finding:
    if not torch.cuda.is_available():
        return Finding("Int8", "plain torch on the CPU")
    if importlib.util.find_spec("triton") is None:
        return Finding("Int8", "plain torch on CUDA, slower", "pip install triton")
    return Finding("Int8", "Triton kernels")


def _loopback() -> Finding:
    try:
        first, _ = launch(_time_all_reduce, nproc=2, device="cpu", timeout=60.0)
    except (RuntimeError, TimeoutError) as error:
        last = str(error).strip().splitlines()[-1]
        return Finding("two processes", f"failed: {last}", "see the log; is a firewall on lo?")
    return Finding("two processes", f"all-reduce of 4 MB through loopback in {first:.1f} ms")


def _time_all_reduce() -> float:
    ones = torch.ones(1 << 20)
    times = []
    for _ in range(5):
        ones.fill_(1.0)
        start = time.perf_counter()
        dist.all_reduce(ones)
        times.append(1e3 * (time.perf_counter() - start))
        if not bool((ones == dist.get_world_size()).all()):
            raise RuntimeError("the all-reduce returned a wrong sum")
    return statistics.median(times)
