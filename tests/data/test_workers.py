import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from torsh_data import StreamLoader

OPTIONS = {"seed": 0, "rank": 0, "world_size": 1, "workers": "thread"}


class Numbers(torch.utils.data.Dataset):
    def __init__(self, broken=None):
        self.broken = broken
        self.threads = set()

    def __len__(self):
        return 100

    def __getitem__(self, index):
        if index == self.broken:
            raise RuntimeError(f"sample {index} is broken")
        self.threads.add(threading.current_thread().name)
        return {"x": torch.full((3,), index)}


def ours():
    return [t for t in threading.enumerate() if t.name.startswith("torsh_data")]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("prefetch_factor", [1, 4])
def test_threads_deliver_what_no_workers_do(count, prefetch_factor):
    here = list(StreamLoader(Numbers(), 7, seed=0, rank=0, world_size=1))
    data = Numbers()
    loader = StreamLoader(data, 7, num_workers=count, prefetch_factor=prefetch_factor, **OPTIONS)
    for a, b in zip(here, loader, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(name.startswith("torsh_data") for name in data.threads)
    assert not ours()


def test_a_state_counts_what_was_delivered_not_what_threads_read_ahead():
    whole = [b["index"].tolist() for b in StreamLoader(Numbers(), 5, seed=0, rank=0, world_size=1)]
    loader = StreamLoader(Numbers(), 5, num_workers=3, prefetch_factor=4, **OPTIONS)
    begun = [b["index"].tolist() for b in itertools.islice(loader, 3)]
    state = loader.state_dict()
    assert state["position"] == 15
    resumed = StreamLoader(Numbers(), 5, num_workers=2, **OPTIONS)
    resumed.load_state_dict(state)
    assert begun + [b["index"].tolist() for b in resumed] == whole


def test_a_loop_that_is_left_ends_its_threads():
    iterator = iter(StreamLoader(Numbers(), 5, num_workers=3, **OPTIONS))
    next(iterator)
    assert ours()
    del iterator
    assert not ours()


def test_an_error_comes_at_its_batch():
    order = [
        n
        for b in StreamLoader(Numbers(), 5, seed=0, rank=0, world_size=1)
        for n in b["index"].tolist()
    ]
    loader = iter(StreamLoader(Numbers(order[12]), 5, num_workers=3, **OPTIONS))
    assert [len(next(loader)["x"]) for _ in range(2)] == [5, 5]
    with pytest.raises(RuntimeError, match=f"sample {order[12]} is broken"):
        next(loader)
    assert not ours()


def test_refuses_another_kind():
    with pytest.raises(ValueError, match="workers='fibre'; use 'process' or 'thread'"):
        StreamLoader(Numbers(), 5, seed=0, workers="fibre")


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        time.sleep(0.002)
        return {"x": index}


def test_an_interrupt_is_for_the_main_process_alone():
    """Ctrl-C reaches all processes; workers that went at once would leave the others waiting."""
    expected = [b["index"].tolist() for b in StreamLoader(Numbers(), 5, rank=0, world_size=1)]
    received = []
    for batch in StreamLoader(Numbers(), 5, num_workers=2, rank=0, world_size=1):
        if len(received) == 2:  # both workers have begun
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGINT)
        received.append(batch["index"].tolist())
    assert received == expected


INTERRUPTED = """
import sys
from test_workers import Slow
from torch.utils.data import Subset
from torsh_data import DevicePrefetcher, StreamLoader
kind, through = sys.argv[1:]
loader = StreamLoader(Subset(Slow(), range(900)), 4, num_workers=2, workers=kind)
for batch in DevicePrefetcher(loader, "cpu") if through == "prefetcher" else loader:
    print("batch", flush=True)
"""


@pytest.mark.parametrize("kind", ["process", "thread"])
@pytest.mark.parametrize("through", ["loader", "prefetcher"])
def test_ctrl_c_shows_one_traceback(kind, through):
    loop = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, kind, through],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": ":".join([os.path.dirname(__file__), *sys.path])},  # noqa: PTH120
    )
    with loop:
        loop.stdout.readline()
        loop.stdout.readline()
        os.killpg(loop.pid, signal.SIGINT)
        _, errors = loop.communicate(timeout=60)
    assert loop.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1, errors
    assert errors.rstrip().endswith("KeyboardInterrupt")
