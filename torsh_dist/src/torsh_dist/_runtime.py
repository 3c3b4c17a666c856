"""Joining the process group that the launcher describes, and leaving it again."""

import logging
import os
import re
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Literal

import torch
import torch.distributed as dist

from torsh_dist._lane import close_lanes

logger = logging.getLogger(__name__)

Backend = Literal["auto", "gloo", "nccl"]


@dataclass(frozen=True)
class Context:
    """This process's place in the job, as returned by :func:`init`.

    Use it as a context manager, or call :meth:`close`, to leave the process group.

    Attributes:
        rank: number of this process, ``0 <= rank < world_size``.
        world_size: number of processes in the job.
        local_rank: number of this process on its machine.
        device: where this process should put its model and batches.
        backend: ``"gloo"`` or ``"nccl"``.
        timeout: seconds a collective waits for its peers; None is torch's default.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str
    timeout: float | None = None

    def close(self) -> None:
        """Stop the communication lanes and destroy the process group. Safe to call twice."""
        global _current
        if _current is not self:
            return
        close_lanes()
        if dist.is_initialized():
            dist.destroy_process_group()
        _current = None

    def __enter__(self) -> "Context":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


_current: Context | None = None


def init(
    device: str | torch.device = "auto",
    backend: Backend = "auto",
    timeout: float | None = None,
) -> Context:
    """Join the job this process was started in; a process started alone is a job of one.

    The same script then runs under ``python``, ``torchrun`` and ``srun``: rank and world size
    come from torchrun's variables, else from those of a SLURM step, else there is one process
    and no network is touched. A rendezvous on the loopback address keeps gloo on the loopback
    interface. NVLink multicast is switched off (``NCCL_NVLS_ENABLE=0``) unless it is set already.

    A second call returns the same context; one that asks for something else is an error.

    Args:
        device: ``"auto"`` (this process's CUDA device where there is one, else the CPU),
            ``"cpu"``, ``"cuda"`` or a device with an index.
        backend: ``"auto"`` takes nccl for CUDA and gloo for the CPU.
        timeout: seconds a collective may wait for its peers, > 0; None keeps torch's default
            (10 minutes for nccl, 30 for gloo).

    Returns:
        The context, with ``rank``, ``world_size``, ``local_rank``, ``device`` and ``backend``.

    Raises:
        RuntimeError: the process group exists already and is not this one.
        ValueError: the device, backend or timeout cannot be used here.

    Example:
        >>> with init("cpu") as context:
        ...     context.rank, context.world_size, context.backend
        (0, 1, 'gloo')
    """
    return join(device, backend, timeout, store=None)


def join(
    device: str | torch.device,
    backend: Backend,
    timeout: float | None,
    store: dist.Store | None,
) -> Context:
    """Do the work of :func:`init`; ``store`` replaces the rendezvous of the environment."""
    global _current
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout={timeout!r} is not a number of seconds above 0")
    if _current is not None:
        return _same(_current, device, backend, timeout)
    if dist.is_initialized():
        raise RuntimeError(
            "the process group exists already and was not made by torsh_dist.init(); call init() "
            "in its place, or leave init() out: Step and compress() work with any process group"
        )
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    rank, world_size, local_rank = _place(os.environ)
    chosen = _device(device, local_rank)
    name = _backend(backend, chosen)
    if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost", "::1"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1 and store is None:
        store = dist.HashStore()
    dist.init_process_group(
        name,
        init_method=None if store is not None else "env://",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=None if timeout is None else timedelta(seconds=timeout),
        device_id=chosen if chosen.type == "cuda" else None,
    )
    _current = Context(rank, world_size, local_rank, chosen, name, timeout)
    logger.info("rank %d of %d on %s over %s", rank, world_size, chosen, name)
    return _current


def _same(
    context: Context, device: str | torch.device, backend: str, timeout: float | None
) -> Context:
    asked = torch.device(device) if device != "auto" else context.device
    if asked.type == context.device.type and asked.index is None:
        asked = context.device
    for name, new, old in (
        ("device", asked, context.device),
        ("backend", context.backend if backend == "auto" else backend, context.backend),
        ("timeout", context.timeout if timeout is None else timeout, context.timeout),
    ):
        if new != old:
            raise RuntimeError(
                f"init() was called before with {name}={str(old)!r} and now with "
                f"{name}={str(new)!r}; close() the first context, or ask for the same"
            )
    return context


def _place(env: "os._Environ[str]") -> tuple[int, int, int]:
    """Return rank, world size and local rank; fill in the rendezvous address of a SLURM step."""
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", env["RANK"]))
    # A shell inside an allocation has SLURM_NTASKS too; only srun counts the tasks of its step.
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "127.0.0.1"))
        env.setdefault("MASTER_ADDR", first_host(nodes))
        env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
        return (
            int(env["SLURM_PROCID"]),
            int(env["SLURM_STEP_NUM_TASKS"]),
            int(env.get("SLURM_LOCALID", "0")),
        )
    return 0, 1, 0


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list.

    Example:
        >>> first_host("gpu[007-010,20],cpu1"), first_host("a,b"), first_host("rack1-n[3]-ib")
        ('gpu007', 'a', 'rack1-n3-ib')
    """
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r} names no host; set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())


def _device(device: str | torch.device, local_rank: int) -> torch.device:
    found = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if found else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type != "cuda":
        raise ValueError(f"device={str(device)!r} is not supported; use 'auto', 'cpu' or 'cuda'")
    index = local_rank if chosen.index is None else chosen.index
    if index >= found:
        raise ValueError(
            f"device={str(device)!r}: local rank {local_rank} needs CUDA device {index}, found "
            f"{found}; start at most {found} processes on this machine or use device='cpu'"
        )
    return torch.device("cuda", index)


def _backend(backend: Backend, device: torch.device) -> str:
    if backend == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    if backend not in ("gloo", "nccl"):
        raise ValueError(f"backend={backend!r} is not one of 'auto', 'gloo' and 'nccl'")
    if backend == "nccl" and device.type == "cpu":
        raise ValueError("backend='nccl' cannot move CPU tensors; use 'auto' or 'gloo'")
    return backend


def current_timeout() -> float | None:
    """Return the timeout given to :func:`init`, for process groups made later."""
    return None if _current is None else _current.timeout
