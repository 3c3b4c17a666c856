"""Starting local processes that form a job of their own."""

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from socket import socket
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_LOOPBACK = "127.0.0.1"
_GRACE = 0.5  # a killed process closes its sockets before it is reaped: its peers may report first
_GOODBYE = 5.0  # seconds for a process to leave before it is made to


@dataclass(frozen=True)
class _Outcome:
    """What became of one rank: its pickled result, or why there is none."""

    rank: int
    when: float
    value: bytes = b""
    failure: str = ""
    died: bool = False


def launch(
    fn: Callable[..., Any],
    *args: Any,
    nproc: int = 2,
    device: str = "auto",
    timeout: float = 600.0,
) -> list[Any]:
    """Run ``fn(*args)`` in ``nproc`` local processes that form one job; return what each returned.

    For notebooks, tests and trying things out; ``torchrun`` starts the same functions on many
    machines. Every process has called :func:`init` when ``fn`` starts (a call inside ``fn``
    returns the same context), sees its neighbours through the loopback interface only, and is
    gone when this function returns or raises, or when the calling process dies. It leaves without
    running ``atexit`` handlers, so close in ``fn`` what must be closed.

    The processes are spawned: ``fn`` must sit at the top level of a module, and a script must
    call ``launch`` under ``if __name__ == "__main__":``. Starting takes some seconds, most of
    them for importing torch.

    Args:
        fn: what to run; it and its arguments are pickled.
        *args: its arguments, the same on every rank.
        nproc: number of processes, >= 1; on CUDA at most one per device.
        device: as for :func:`init`. On the CPU the cores are divided among the processes, unless
            ``OMP_NUM_THREADS`` is set.
        timeout: seconds for the whole call, and for each collective inside it.

    Returns:
        The results in rank order. Return CPU tensors: a CUDA tensor would open the device here.

    Raises:
        RuntimeError: a rank raised or died; the message holds the first one's traceback.
        TimeoutError: ``timeout`` passed; the message names the ranks still running.
        ValueError: ``fn`` cannot be sent to another process.

    Example:
        >>> import operator
        >>> launch(operator.add, 20, 22, nproc=2, device="cpu")
        [42, 42]
    """
    if nproc < 1:
        raise ValueError(f"nproc={nproc} is not a number of processes; use 1 or more")
    if not timeout > 0:
        raise ValueError(f"timeout={timeout!r} is not a number of seconds above 0")
    try:
        payload = pickle.dumps((fn, args))  # by value: every rank reads the same bytes
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"fn={getattr(fn, '__qualname__', fn)} and its arguments cannot be sent to a new "
            f"process ({error}); define fn at the top level of a module"
        ) from error

    # The store lives here on a socket of our own: nobody outside this machine can reach it, no
    # port can be taken between choosing and binding it, and it outlives a killed rank 0.
    listener = socket()
    listener.bind((_LOOPBACK, 0))
    listener.listen(nproc)
    port: int = listener.getsockname()[1]
    store = dist.TCPStore(
        _LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    context = mp.get_context("spawn")
    processes: list[SpawnProcess] = []
    pipes: list[Connection] = []
    try:
        for rank in range(nproc):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main,
                args=(theirs, payload, rank, nproc, port, device, timeout),
                name=f"torsh-dist rank {rank}",
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        outcomes = _collect(processes, pipes, time.monotonic() + timeout, timeout)
        for process in processes:
            process.join(_GOODBYE)
        # Bytes from our own children over anonymous pipes.
        return [pickle.loads(outcome.value) for outcome in outcomes]  # noqa: S301
    finally:
        _end(processes)
        for pipe in pipes:
            pipe.close()
        del store


def _rank_main(
    pipe: Connection,
    payload: bytes,
    rank: int,
    world_size: int,
    port: int,
    device: str,
    timeout: float,
) -> None:
    from torsh_dist._runtime import join

    threading.Thread(target=_die_with_parent, args=(pipe,), daemon=True).start()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR=_LOOPBACK,
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        NCCL_SOCKET_IFNAME="lo",
    )
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    try:
        fn, args = pickle.loads(payload)  # noqa: S301
        store = dist.TCPStore(_LOOPBACK, port, is_master=False, timeout=timedelta(seconds=timeout))
        context = join(device, "auto", timeout, store)
        value = pickle.dumps(fn(*args))
        context.close()
        outcome = _Outcome(rank, time.monotonic(), value=value)
    except BaseException:
        outcome = _Outcome(rank, time.monotonic(), failure=traceback.format_exc())
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # none, broken or closed
            stream.flush()
    pipe.send(outcome)
    # The outcome is away. After a failure a lane or a watchdog may be stuck in a collective, and
    # after a success torch's threads may abort the process while the interpreter is torn down.
    os._exit(1 if outcome.failure else 0)


def _die_with_parent(pipe: Connection) -> None:
    """Leave when the launching process does, however it went: its end of the pipe closes."""
    try:
        pipe.poll(None)
    finally:
        os._exit(1)


def _collect(
    processes: Sequence[SpawnProcess], pipes: Sequence[Connection], deadline: float, timeout: float
) -> list[_Outcome]:
    outcomes: dict[int, _Outcome] = {}
    while len(outcomes) < len(processes):
        waiting = [rank for rank in range(len(processes)) if rank not in outcomes]
        failed = [outcome for outcome in outcomes.values() if outcome.failure]
        if failed and time.monotonic() > min(one.when for one in failed) + _GRACE:
            break
        until = min([deadline, *(one.when + _GRACE for one in failed)])
        ready = wait([pipes[rank] for rank in waiting], max(0.0, until - time.monotonic()))
        if not ready and not failed and time.monotonic() >= deadline:
            raise TimeoutError(
                f"launch: timeout={timeout:g} s passed and ranks {waiting} were still running; "
                f"they have been ended. Raise timeout=, or look for a collective that not every "
                f"rank reaches"
            )
        for rank in waiting:
            if pipes[rank] in ready:
                outcomes[rank] = _receive(rank, processes[rank], pipes[rank])
    failed = [outcome for outcome in outcomes.values() if outcome.failure]
    if failed:
        first = min(failed, key=lambda outcome: (not outcome.died, outcome.when))
        raise RuntimeError(f"launch: rank {first.rank} failed first:\n{first.failure}")
    return [outcomes[rank] for rank in range(len(processes))]


def _receive(rank: int, process: SpawnProcess, pipe: Connection) -> _Outcome:
    try:
        outcome = pipe.recv()
    except (EOFError, ConnectionResetError):
        now = time.monotonic()
        process.join(5.0)
        code = process.exitcode
        if code is not None and code < 0:
            reason = f"rank {rank} was killed by {signal.Signals(-code).name}"
        else:
            reason = (
                f"rank {rank} exited with code {code} before it returned; its last words are on "
                f"stderr. If this is a script, call launch() under if __name__ == '__main__':, "
                f"and keep fn out of notebooks and interactive sessions"
            )
        return _Outcome(rank, now, failure=reason, died=True)
    assert isinstance(outcome, _Outcome)
    return outcome


def _end(processes: Sequence[SpawnProcess]) -> None:
    """End what still runs; nothing survives this call."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GOODBYE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
        process.close()
