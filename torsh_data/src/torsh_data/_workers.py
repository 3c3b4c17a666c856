"""Batches prepared ahead, by processes or threads, in the order of their requests."""

import gc
import signal
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeAlias

import torch
from torch.utils.data import DataLoader

from torsh_data._orphans import die_with_parent
from torsh_data._reader import Delivery, Reader
from torsh_data._requests import Requests

Workers: TypeAlias = Literal["process", "thread"]


def deliveries(
    reader: Reader, requests: Requests, *, workers: Workers, count: int, ahead: int, seed: int
) -> Generator[Delivery]:
    """Read all requests, in order; closing ends the workers.

    Args:
        reader: Reads one request.
        requests: What to read.
        workers: What reads, if `count` is not 0.
        count: How many of them; 0 reads here, when asked.
        ahead: Batches that each worker prepares ahead.
        seed: Start of torch's generators in worker processes.
    """
    if workers == "thread" and count:
        yield from _by_threads(reader, requests, count, ahead)
    else:
        yield from DataLoader(
            reader,
            batch_size=None,
            sampler=requests,
            num_workers=count,
            collate_fn=_as_is,
            worker_init_fn=_begin_worker if count else None,
            prefetch_factor=ahead if count else None,
            generator=torch.Generator().manual_seed(seed),
        )


def _begin_worker(number: int) -> None:
    die_with_parent(number)
    # The collector writes to all objects that it looks at. Those of the parent share their pages
    # with it, and each of these would be copied.
    gc.freeze()
    # Ctrl-C reaches the whole group of processes: who started the workers gets it and ends them,
    # instead of waiting for batches of workers that have gone without a word
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _by_threads(reader: Reader, requests: Requests, count: int, ahead: int) -> Generator[Delivery]:
    pool = ThreadPoolExecutor(count, thread_name_prefix="torsh_data")
    waiting: deque[Future[Delivery]] = deque()
    try:
        for request in requests:
            waiting.append(pool.submit(reader.__getitem__, request))
            if len(waiting) == count * ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # a loop that was left early does not wait for what no one will ask for
        pool.shutdown(wait=True, cancel_futures=True)


def _as_is(delivery: Any) -> Any:
    return delivery
