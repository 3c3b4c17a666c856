import atexit
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from torsh_dist import init, launch

SOURCES = str(Path(__file__).parents[2] / "torsh_dist" / "src")


def place(scale, tensor):
    context = init()  # the launcher joined already: the same context
    everyone = tensor * (context.rank + 1)
    dist.all_reduce(everyone)
    return {
        "rank": context.rank * scale,
        "sum": everyone,
        "listening": [*listening(os.getpid()), *listening(os.getppid())],
        "threads": torch.get_num_threads(),
    }


def listening(pid):
    """The addresses, in the kernel's hexadecimal, at which a process waits for connections."""
    links = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(str(link.readlink()))
        except FileNotFoundError:
            continue
    own = {link[8:-1] for link in links if link.startswith("socket:[")}
    lines = [
        line.split()
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
    ]
    return [line[1].split(":")[0] for line in lines if line[3] == "0A" and line[9] in own]


def test_results_come_in_rank_order_and_nothing_listens_beyond_loopback():
    results = launch(place, 10, torch.arange(3.0), nproc=2, device="cpu", timeout=60)
    assert [result["rank"] for result in results] == [0, 10]
    for result in results:
        assert torch.equal(result["sum"], 3 * torch.arange(3.0))
        assert set(result["listening"]) == {"0100007F"}
        if "OMP_NUM_THREADS" not in os.environ:
            assert result["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)


def write_and_leave(folder, fail):
    atexit.register(Path(folder, str(os.getpid())).touch)
    sys.stdout.write(f"rank {init().rank} was here; ")
    if fail:
        raise KeyError("and failed")


def test_a_rank_leaves_without_teardown_but_with_its_output(tmp_path, capfd):
    """Torch's threads may abort a process whose interpreter is being torn down."""
    launch(write_and_leave, str(tmp_path), False, nproc=2, device="cpu", timeout=60)
    with pytest.raises(RuntimeError, match="and failed"):
        launch(write_and_leave, str(tmp_path), True, nproc=1, device="cpu", timeout=60)
    assert not list(tmp_path.iterdir())
    written = capfd.readouterr().out
    assert [written.count(f"rank {rank} was here") for rank in range(2)] == [2, 1]


def raise_on_one():
    if init().rank == 1:
        raise KeyError("the second rank's own words")
    dist.barrier()


def test_the_first_failing_rank_is_raised():
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed first.*the second rank's own words"):
        launch(raise_on_one, device="cpu", timeout=60)


def kill_oneself(folder):
    Path(folder, str(os.getpid())).touch()
    if init().rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_rank_is_named_and_takes_the_others_along(tmp_path):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 was killed by SIGKILL"):
        launch(kill_oneself, str(tmp_path), nproc=2, device="cpu", timeout=60)
    assert time.monotonic() - start < 60
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)


def hang(folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)


@pytest.mark.slow
def test_a_timeout_names_the_ranks_and_ends_them(tmp_path):
    with pytest.raises(TimeoutError, match=r"timeout=15 s passed and ranks \[0\] were still"):
        launch(hang, str(tmp_path), nproc=1, device="cpu", timeout=15)
    (pid,) = [int(path.name) for path in tmp_path.iterdir()]
    assert not alive(pid)


SCRIPT = """
import sys, time
from pathlib import Path
import os
from torsh_dist import launch

def work(folder):
    Path(folder, str(os.getpid())).touch()
    if folder != "-":
        time.sleep(600)

if __name__ == "__main__":
    launch(work, sys.argv[1], nproc=2, device="cpu")
"""


@pytest.mark.slow
def test_a_killed_script_leaves_no_orphans(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    pids = tmp_path / "pids"
    pids.mkdir()
    env = os.environ | {"PYTHONPATH": SOURCES}
    parent = subprocess.Popen([sys.executable, str(script), str(pids)], env=env)
    deadline = time.monotonic() + 60
    while len(list(pids.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    children = [int(path.name) for path in pids.iterdir()]
    assert len(children) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in children)


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_about_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace('if __name__ == "__main__":', "if True:"))
    env = os.environ | {"PYTHONPATH": SOURCES}
    done = subprocess.run(
        [sys.executable, str(script), "-"], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "call launch() under if __name__ == '__main__':" in done.stderr


def test_refuses_arguments():
    with pytest.raises(ValueError, match="nproc=0 is not a number of processes"):
        launch(hang, nproc=0)
    with pytest.raises(ValueError, match="timeout=0 is not a number of seconds"):
        launch(hang, timeout=0)
    with pytest.raises(
        ValueError, match=r"(?s)<lambda> and its arguments cannot be sent.*top level"
    ):
        launch(lambda: None)
