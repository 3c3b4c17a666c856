"""Processes that run functions of the tests together, started once for many tests."""

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

_COLLECTIVE = 30.0  # seconds after which a process that waits for the others gives up
_FUNCTION = 240.0


class Ranks:
    """A process group over processes of this machine.

    Args:
        count: Number of processes.
        backend: ``gloo``, or ``nccl`` with a CUDA device for each process.
    """

    def __init__(self, count: int, backend: str = "gloo") -> None:
        self._count = count
        self._backend = backend
        self._running: list[tuple[Any, Any]] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function in all processes at once; give what each returns.

        Args:
            function: Defined at the top level of a module.
            *args: Its arguments.

        Raises:
            AssertionError: A process failed, or did not return.
        """
        if not self._running:
            self._start()
        for _, pipe in self._running:
            pipe.send((function, args))
        pipes = [pipe for _, pipe in self._running]
        found: dict[Any, tuple[bool, Any]] = {}
        while len(found) < self._count:
            ready = wait([pipe for pipe in pipes if pipe not in found], timeout=_FUNCTION)
            for pipe in ready:
                try:
                    found[pipe] = pipe.recv()
                except EOFError:
                    found[pipe] = (False, "the process has died")
            failed = [pipe for pipe in pipes if pipe in found and not found[pipe][0]]
            if failed or not ready:
                # the others may wait for it; a little, so that all that failed can say so
                wait([pipe for pipe in pipes if pipe not in found], timeout=2.0)
                self.close()
                said = [f"rank {pipes.index(p)}: {found[p][1]}" for p in failed]
                raise AssertionError("\n".join(said) or f"not done after {_FUNCTION} s")
        return [found[pipe][1] for pipe in pipes]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = Path(tempfile.mkdtemp(prefix="torsh-ranks-"), "store")
        for rank in range(self._count):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, rank, self._count, self._backend, str(store))
            )
            process.daemon = True
            process.start()
            there.close()
            self._running.append((process, here))

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._running:
            process.kill()
            process.join()
            pipe.close()
        self._running = []


@cache
def ranks(count: int, backend: str = "gloo") -> Ranks:
    """Give the processes that all tests share; they end with this one."""
    return Ranks(count, backend)


def _serve(pipe: Any, rank: int, count: int, backend: str, store: str) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=_COLLECTIVE),
    )
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.*")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    while True:
        function, args = pipe.recv()
        try:
            torch.manual_seed(0)
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
