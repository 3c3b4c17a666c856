"""An ordered lane: collectives of several phases, run in the same order on every rank.

A communication hook that issues its second collective from a future's callback lets each rank
choose its own order as soon as there are two buckets: gloo then pairs the wrong messages. Here
one worker per rank takes the jobs in the order they were submitted and finishes one before it
starts the next, on a process group that nobody else uses, so the order is the same everywhere by
construction. On CUDA the collectives are queued by the caller on a side stream instead: there the
order of queueing is the order of running, and no thread is needed.
"""

import logging
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

logger = logging.getLogger(__name__)

_Job = tuple[str, Callable[[], Tensor], "Future[Tensor | BaseException]"]

_lanes: "weakref.WeakSet[Lane]" = weakref.WeakSet()
_SILENCE = 5.0  # seconds a failed lane waits for the others to say how they fared


class Lane:
    """One ordered lane over the ranks of ``group``.

    Args:
        group: the processes that take part; the lane makes a private group of the same ranks.
        device: where the tensors live.
        timeout: seconds a collective waits for its peers; None keeps torch's default.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, timeout: float | None = None
    ) -> None:
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.device = device
        self.sent = {"exchange": 0, "gather": 0}
        self._ranks = dist.get_process_group_ranks(group)
        made = dist.new_group(
            self._ranks,
            timeout=None if timeout is None else timedelta(seconds=timeout),
            backend=dist.get_backend(group),
            use_local_synchronization=len(self._ranks) < dist.get_world_size(),
            group_desc="torsh_dist_lane",
        )
        assert isinstance(made, dist.ProcessGroup)
        self._group = made
        self._reports = dist.PrefixStore(
            f"torsh_dist_lane/{made.group_name}", dist.distributed_c10d._get_default_store()
        )
        self._failure: str | None = None
        self._doing = "nothing"
        self._closed = False
        self._jobs: queue.SimpleQueue[_Job | threading.Event | None] = queue.SimpleQueue()
        self._stream: torch.cuda.Stream | None = None
        self._worker: threading.Thread | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
        else:
            self._worker = threading.Thread(target=self._work, name="torsh-dist lane", daemon=True)
            self._worker.start()
        _lanes.add(self)

    def submit(self, label: str, job: Callable[[], Tensor]) -> Future[Tensor]:
        """Queue ``job`` behind all earlier ones; its collectives must be this lane's.

        Args:
            label: what the job is, for error messages.
            job: runs on the lane and returns the future's value.

        Returns:
            A future of the result; on CUDA it is ready when the side stream gets there.
        """
        if self._closed:
            raise RuntimeError(f"{label}: the lane is closed; submit before Context.close()")
        if self._stream is not None:
            return self._enqueue(label, job, self._stream)
        done: Future[Tensor | BaseException] = Future()
        self._jobs.put((label, job, done))
        return done.then(_unwrap)

    def exchange(self, received: Tensor, rows: Tensor) -> None:
        """Send row ``r`` of ``rows`` to rank ``r`` and receive its row for us: all-to-all.

        Args:
            received: ``(world_size, row_bytes)`` uint8, filled.
            rows: ``(world_size, row_bytes)`` uint8.
        """
        self._doing = "exchange"
        self.sent["exchange"] += (self.world_size - 1) * rows.shape[1]
        dist.all_to_all_single(received, rows, group=self._group)

    def gather(self, gathered: Tensor, row: Tensor) -> None:
        """Collect every rank's ``row``: all-gather.

        Args:
            gathered: ``(world_size, row_bytes)`` uint8, filled.
            row: ``(row_bytes,)`` uint8, sent to each of the others.
        """
        self._doing = "gather"
        self.sent["gather"] += (self.world_size - 1) * row.numel()
        dist.all_gather_into_tensor(gathered.view(-1), row, group=self._group)

    def agree(self, number: int) -> list[int]:
        """Return every rank's ``number`` (63 bits); call it outside of jobs and on all ranks."""
        mine = torch.tensor([number], dtype=torch.int64, device=self.device)
        all_of_them = torch.empty(self.world_size, dtype=torch.int64, device=self.device)
        dist.all_gather_into_tensor(all_of_them, mine, group=self._group)
        return [int(one) for one in all_of_them.tolist()]

    def drain(self) -> None:
        """Wait until every submitted job has run."""
        if self._stream is not None:
            self._stream.synchronize()
        elif not self._closed:
            reached = threading.Event()
            self._jobs.put(reached)
            reached.wait()

    def close(self) -> None:
        """Run what is queued, stop the worker and leave the private group. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._worker is not None:
            self._jobs.put(None)
            self._worker.join()
        if self._failure is None and dist.is_initialized():
            dist.destroy_process_group(self._group)

    def _enqueue(
        self, label: str, job: Callable[[], Tensor], stream: torch.cuda.Stream
    ) -> Future[Tensor]:
        done: Future[Tensor] = Future(devices=[self.device])
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            done.set_result(self._run(label, job))
        return done

    def _work(self) -> None:
        while (queued := self._jobs.get()) is not None:
            if isinstance(queued, threading.Event):
                queued.set()
                continue
            label, job, done = queued
            try:
                result: Tensor | BaseException = self._run(label, job)
            except BaseException as error:
                result = error
            done.set_result(result)

    def _run(self, label: str, job: Callable[[], Tensor]) -> Tensor:
        if self._failure is not None:
            raise RuntimeError(self._failure)
        self._doing = "local work"
        try:
            return job()
        except Exception as error:
            self._failure = self._translate(label, error)
            logger.error("%s", self._failure)
            raise RuntimeError(self._failure) from error

    def _translate(self, label: str, error: Exception) -> str:
        """Tell the others how we fared, hear how they did, and name whoever caused it.

        A lost connection says nothing but an address. A rank whose own code failed says so in
        the store; a rank that says nothing is gone or stuck elsewhere.
        """
        told = "peer lost" if self._doing != "local work" else traceback.format_exc(limit=-1)
        what = f"rank {self.rank}: {label} failed in {self._doing}"
        try:
            self._reports.set(str(self.rank), told)
            others = [rank for rank in range(self.world_size) if rank != self.rank]
            deadline = time.monotonic() + (_SILENCE if self._doing != "local work" else 0.0)
            while True:
                silent = [rank for rank in others if not self._reports.check([str(rank)])]
                if not silent or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            for rank in others:
                if rank not in silent:
                    report = self._reports.get(str(rank)).decode()
                    if report != "peer lost":
                        return f"{what}: rank {self._ranks[rank]} failed first: {report}"
        except RuntimeError:  # the store went with the rank that kept it
            return f"{what}: the rendezvous store is gone, and so is the rank that kept it: {error}"
        if self._doing == "local work":
            return f"{what}: {error}"
        gone = [self._ranks[rank] for rank in silent]
        if gone:
            return f"{what}: no sign of life from rank(s) {gone} for {_SILENCE:g} s: {error}"
        return f"{what}: every rank answers, so a message was lost or late: {error}"


def _unwrap(done: "Future[Tensor | BaseException]") -> Tensor:
    # An exception set by Future.set_exception() is a plain value to DDP's C++ side; one raised
    # in a callback is an error there.
    value = done.value()
    if isinstance(value, BaseException):
        raise value
    return value


def close_lanes() -> None:
    """Close every open lane of this process."""
    for lane in list(_lanes):
        lane.close()
