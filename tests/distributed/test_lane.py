import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import battery
from torsh_dist import Int8, compress, init, launch
from torsh_dist._lane import Lane


def lane(timeout=30.0):
    return Lane(dist.group.WORLD, torch.device("cpu"), timeout)


def jobs_keep_their_order_whatever_their_pace():
    """Rank 1 is slow with even jobs, rank 0 with odd ones; each has two phases."""
    with_lane = lane()
    rank = with_lane.rank

    def job(number):
        def work():
            time.sleep(0.01 * (number % 2 == rank))
            rows = torch.full((2, 16), number, dtype=torch.uint8)
            received = torch.empty_like(rows)
            with_lane.exchange(received, rows)
            assert bool((received == number).all())
            gathered = torch.empty_like(rows)
            with_lane.gather(gathered, received[rank] + rank)
            return gathered

        return work

    futures = [with_lane.submit(f"job {number}", job(number)) for number in range(40)]
    for number, future in enumerate(futures):
        assert future.wait()[:, 0].tolist() == [number, number + 1]
    assert with_lane.sent == {"exchange": 40 * 16, "gather": 40 * 16}
    assert with_lane.agree(rank + 5) == [5, 6]
    with_lane.close()
    with_lane.close()
    with pytest.raises(RuntimeError, match="late: the lane is closed"):
        with_lane.submit("late", job(0))


def drain_waits():
    with_lane = lane()
    done = []
    with_lane.submit("slow", lambda: time.sleep(0.2) or done.append(1) or torch.ones(1))
    with_lane.drain()
    assert done == [1]
    with_lane.close()


def a_failed_job_is_told_to_the_others():
    with_lane = lane(timeout=3.0)
    rank = with_lane.rank

    def work():
        if rank == 1:
            raise MemoryError("no room for the rows")
        rows = torch.zeros(2, 16, dtype=torch.uint8)
        with_lane.exchange(torch.empty_like(rows), rows)  # the other's message never comes
        return rows

    future = with_lane.submit("bucket 7", work)
    with pytest.raises(RuntimeError) as caught:
        future.wait()
    if rank == 1:
        assert "rank 1: bucket 7 failed in local work: no room for the rows" in str(caught.value)
    else:
        assert "rank 0: bucket 7 failed in exchange: rank 1 failed first" in str(caught.value)
        assert "MemoryError: no room for the rows" in str(caught.value)
    with pytest.raises(RuntimeError, match="bucket 7 failed"):  # and nothing runs after it
        with_lane.submit("bucket 8", work).wait()
    with_lane.close()


CHECKS = [
    jobs_keep_their_order_whatever_their_pace,
    drain_waits,
    a_failed_job_is_told_to_the_others,
]


@pytest.fixture(scope="module")
def two_ranks():
    return launch(battery.run, CHECKS, device="cpu", timeout=120)


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_two_ranks(two_ranks, check):
    battery.judge(two_ranks, check)


def lose_a_rank(folder):
    """Train; rank 2 is killed in the middle of it. The others write down what they are told."""
    context = init()
    model = DistributedDataParallel(nn.Linear(64, 64))
    compress(model, Int8())
    try:
        for number in range(100):
            if context.rank == 2 and number == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            model(torch.ones(1, 64)).sum().backward()
    except RuntimeError as error:
        Path(folder, str(context.rank)).write_text(str(error))
        time.sleep(1.0)  # let the other finish asking
        raise


@pytest.mark.slow
def test_survivors_name_the_killed_rank(tmp_path, monkeypatch):
    monkeypatch.setattr("torsh_dist._spawn._GRACE", 20.0)  # let both survivors speak
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 2 was killed by SIGKILL"):
        launch(lose_a_rank, str(tmp_path), nproc=3, device="cpu", timeout=100)
    assert time.monotonic() - start < 100
    for rank in (0, 1):
        told = (tmp_path / str(rank)).read_text()
        assert "gradient bucket 0 failed in" in told
        assert "no sign of life from rank(s) [2]" in told
