import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from torsh_data import StreamLoader


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, index):
        return {"x": index}


def test_workers_outlive_the_thread_that_started_them():
    iterator = iter(StreamLoader(Numbers(), 5, num_workers=2, rank=0, world_size=1))
    first = []
    thread = threading.Thread(target=lambda: first.append(next(iterator)))
    thread.start()
    thread.join()
    time.sleep(0.2)
    rest = [batch["index"].tolist() for batch in iterator]
    assert len(first) + len(rest) == 20


PARENT = """
import multiprocessing, os, sys, time

def work(kind, pipe):
    if kind == "late":
        while os.getppid() == parent:
            time.sleep(0.01)
    from torsh_data._orphans import die_with_parent
    die_with_parent()
    pipe.send(os.getpid())
    time.sleep(60)

if __name__ == "__main__":
    method, kind = sys.argv[1:]
    context = multiprocessing.get_context(method)
    parent = os.getpid()
    ours, theirs = context.Pipe()
    context.Process(target=work, args=(kind, theirs), daemon=True).start()
    if kind == "late":
        time.sleep(0.2)
        os._exit(0)
    print(ours.recv(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_ends_with_its_killed_parent(tmp_path, method):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen(
        [sys.executable, str(script), method, "early"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    ) as parent:
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)
        parent.kill()
    gone_within(worker, seconds=20)


def test_a_worker_whose_parent_ended_before_it_began_ends_too(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    start = time.monotonic()
    # the worker holds the pipe of its standard output for as long as it lives
    subprocess.run(
        [sys.executable, str(script), "fork", "late"],
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )
    assert time.monotonic() - start < 40


def gone_within(pid, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            if file.read().rpartition(")")[2].split()[0] == "Z":  # nobody has asked how it ended
                return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError(f"process {pid} lives on")
