"""Jobs that are killed, or limited, in processes of their own; run by test_kills.py, prints JSON.

This process imports torch once, and each job that is to die is a fork of it.
"""

import contextlib
import gc
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from torsh_data import ShardedDataset, StreamLoader, _columns, _writer, write_shards
from torsh_data._index import INDEX_NAME, read_index, replace_file
from torsh_data._journal import find_journals, read_journal

warnings.simplefilter("error")
torch.set_num_threads(1)
ROWS = 240
OPTIONS: dict[str, Any] = {"shard_bytes": "4kB", "block_bytes": "600B"}


def sample(n: int) -> dict[str, Any]:
    image = torch.full((3, 4), n % 251, dtype=torch.uint8)
    return {"image": image, "label": n, "text": "x" * (n * 7 % 30)}


class Recorded:
    """Samples from a function, and the places that it was asked to begin at."""

    def __init__(self) -> None:
        self.starts: list[int] = []

    def __call__(self, start: int) -> Iterator[dict[str, Any]]:
        self.starts.append(start)
        return map(sample, range(start, ROWS))


class Listed:
    """Samples with an index."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, n: int) -> dict[str, Any]:
        return sample(n)


def child(job: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            job()
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(code)
    return pid


def children(parent: int, group: int | None = None) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        in_group = group is None or int(fields[2]) == group
        if int(fields[1]) == parent and in_group and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def die_at(step: int) -> None:
    """Kill this process within its step-th call that changes a file; writes die half done."""
    calls = itertools.count()
    append, truncate = _writer._OpenShard.append, os.truncate

    def deadly(original: Callable) -> Callable:
        def call(*args, **options):
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        return call

    def half(original: Callable) -> Callable:
        def call(handle, data, *offset):
            if next(calls) == step:
                original(handle, data[: len(data) // 2], *offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(handle, data, *offset)

        return call

    def append_half(shard, block):
        before = shard.size
        append(shard, block)
        if next(calls) == step:
            truncate(shard.temporary, (before + shard.size) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("fsync", "replace", "unlink", "mkdir", "open", "ftruncate"):
        setattr(os, name, deadly(getattr(os, name)))
    os.write, os.pwrite = half(os.write), half(os.pwrite)
    _writer._OpenShard.append = append_half


def finished_rows(folder: Path) -> int:
    if not folder.exists():
        return 0
    records = [read_journal(path) for path in find_journals(folder)]
    return sum(shard.rows for r in records if r is not None for shard in r.shards)


def check_after_death(folder: Path, expected: dict[str, bytes]) -> int:
    """The finished rows. What is there must be right, and nothing be taken for a data set."""
    found = contents(folder)
    for name, content in found.items():
        if not name.startswith("."):
            assert content == expected[name], f"{name} is not what an unbroken run writes"
    if INDEX_NAME in found:
        assert len(ShardedDataset(folder)) == ROWS
        return ROWS
    try:
        ShardedDataset(folder)
    except (FileNotFoundError, RuntimeError) as error:
        assert "did not finish" in str(error) or not folder.exists(), error  # noqa: PT017
    else:
        raise AssertionError("half of a data set was opened")
    finished = finished_rows(folder)
    listed = sum(name.endswith(".arrow") and name[0] != "." for name in found)
    assert finished or listed <= 1, found.keys()
    return finished


def go_on(folder: Path, expected: dict[str, bytes], finished: int) -> None:
    """Make the same call again: nothing finished is computed or written again."""
    samples = Recorded()
    inodes = {path.name: path.stat().st_ino for path in folder.glob("*.arrow")}
    journals = [read_journal(path) for path in find_journals(folder)] if folder.exists() else []
    kept = {shard.name for record in journals if record is not None for shard in record.shards}
    try:
        write_shards(samples, folder, **OPTIONS)
    except ValueError as error:
        assert finished == ROWS, error  # noqa: PT017
        assert "holds a finished data set" in str(error), error  # noqa: PT017
    else:
        assert samples.starts[-1] == finished or finished == ROWS, samples.starts
    for name in kept:
        assert (folder / name).stat().st_ino == inodes[name], f"{name} was written again"
    assert contents(folder) == expected, "not what an unbroken run writes"


def writer_steps(folder: Path) -> dict[str, int]:
    """Kill a writer at every step, and one that goes on behind a killed one, too."""
    write_shards(map(sample, range(ROWS)), folder / "whole", **OPTIONS)
    expected = contents(folder / "whole")
    total = {"shards": len(expected) - 1}
    for name, earlier in (("first", None), ("second", 45)):
        start = folder / name
        if earlier is not None:

            def begin(start=start, earlier=earlier):
                die_at(earlier)
                write_shards(Recorded(), start, **OPTIONS)

            os.waitpid(child(begin), 0)
            assert 0 < finished_rows(start) < ROWS
        for step in itertools.count():
            target = folder / "target"
            if earlier is not None:
                shutil.copytree(start, target)

            def work(target=target, step=step):
                die_at(step)
                write_shards(map(sample, range(ROWS)), target, **OPTIONS)

            _, status = os.waitpid(child(work), 0)
            if status == 0:
                assert contents(target) == expected
                shutil.rmtree(target)
                break
            assert os.WIFSIGNALED(status), f"{name}, step {step}: status {status}"
            go_on(target, expected, check_after_death(target, expected))
            shutil.rmtree(target)
        total[name] = step
    return total


def writer_random(folder: Path) -> dict[str, int]:
    """Kill writers at random times, each going on behind the last, until they have finished."""
    chance = random.Random(0)
    write_shards(map(sample, range(ROWS)), folder / "whole", **OPTIONS)
    expected = contents(folder / "whole")
    deaths = runs = most = 0
    begin = time.perf_counter()
    os.waitpid(child(lambda: write_shards(Recorded(), folder / "timed", **OPTIONS)), 0)
    took = time.perf_counter() - begin
    while deaths < 100:
        target = folder / f"run-{runs}"
        finished = lives = 0
        while not (target / INDEX_NAME).exists():
            pid = child(lambda target=target: write_shards(Recorded(), target, **OPTIONS))
            time.sleep(chance.uniform(0, 0.7 * took))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            deaths += os.WIFSIGNALED(status)
            lives += 1
            before, finished = finished, check_after_death(target, expected)
            assert finished >= before, "a finished shard was lost"
        go_on(target, expected, ROWS)
        shutil.rmtree(target)
        runs, most = runs + 1, max(most, lives)
    return {"deaths": deaths, "data_sets": runs, "most_lives": most}


def workers_random(folder: Path) -> dict[str, int]:
    """Kill the main process of several workers, or one of the workers."""
    chance = random.Random(1)
    samples, options = Listed(), {**OPTIONS, "num_workers": 3}
    begin = time.perf_counter()
    os.waitpid(child(lambda: write_shards(samples, folder / "whole", **options)), 0)
    took = time.perf_counter() - begin
    expected = contents(folder / "whole")
    assert [s["label"] for s in ShardedDataset(folder / "whole")] == list(range(ROWS))
    killed = {"main": 0, "worker": 0}
    for turn in range(60):
        if min(killed.values()) >= 4:
            break
        target = folder / "target"
        victim = "main" if turn % 2 else "worker"
        pid = child(lambda target=target: write_shards(samples, target, **options))
        below: list[int] = []
        deadline = time.monotonic() + 10
        while not below and time.monotonic() < deadline:
            time.sleep(0.002)
            below = children(pid)
        time.sleep(chance.uniform(0, 0.7) * took)
        prey = chance.choice(below) if victim == "worker" and below else pid
        with contextlib.suppress(ProcessLookupError):  # a worker that is done
            os.kill(prey, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        killed["main" if prey == pid else "worker"] += status != 0
        for name, content in contents(target).items():
            assert name.startswith(".") or content == expected[name], name
        if not (target / INDEX_NAME).exists():
            write_shards(samples, target, **options)
        assert {n: c for n, c in contents(target).items() if n[0] != "."} == expected
        shutil.rmtree(target)
    return {**killed, "shards": len(expected) - 1}


def reader_random(folder: Path) -> dict[str, int]:
    """Kill a loop over batches that saves its place after each; all samples come exactly once."""
    chance = random.Random(2)
    data, place, log = folder / "data", folder / "place.json", folder / "log"
    write_shards(map(sample, range(ROWS)), data, **OPTIONS)
    epochs = 3

    def loader(workers: int) -> StreamLoader:
        opened = ShardedDataset(data)
        return StreamLoader(opened, 8, seed=5, window=80, num_workers=workers, rank=0, world_size=1)

    unbroken = loader(0)
    order = [n for _ in range(epochs) for batch in unbroken for n in batch["index"].tolist()]

    def train(workers: int) -> None:
        stream = loader(workers)
        saved = {"state": stream.state_dict(), "length": 0}
        if place.exists():
            saved = json.loads(place.read_text())
            stream.load_state_dict(saved["state"])
        with log.open("ab") as file:
            file.truncate(saved["length"])  # what a step did after the last saved place
            file.seek(0, os.SEEK_END)
            while stream.epoch < epochs:
                for batch in stream:
                    assert batch["label"].tolist() == batch["index"].tolist()
                    file.write(b"".join(n.to_bytes(2, "little") for n in batch["index"].tolist()))
                    file.flush()
                    saved = {"state": stream.state_dict(), "length": file.tell()}
                    replace_file(place, json.dumps(saved).encode())

    os.setpgid(0, 0)
    deaths = finished = 0
    while deaths < 100:
        workers = chance.choice([0, 0, 1, 2])
        pid = child(lambda workers=workers: train(workers))
        time.sleep(chance.uniform(0, 0.08))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        deaths += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or status == 0, status
        if status == 0:
            assert list(memoryview(log.read_bytes()).cast("H")) == order
            finished += 1
            log.unlink()
            place.unlink()
    os.waitpid(child(lambda: train(2)), 0)
    assert list(memoryview(log.read_bytes()).cast("H")) == order
    deadline = time.monotonic() + 8  # a DataLoader's workers look every 5 s whether they are alone
    while (orphans := children(1, os.getpgrp())) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in orphans:  # they would keep the pipe to the test open
        os.kill(pid, signal.SIGKILL)
    return {"deaths": deaths, "finished": finished, "leaked": leaked(), "orphans": len(orphans)}


def leaked() -> int:
    """Tensors in shared memory whose process was started after this one and is gone.

    Other tests of this machine have theirs; and a process that is killed while it makes a lock may
    leave that behind, whoever asked for it.
    """
    makers = [int(path.name.split("_")[1]) for path in Path("/dev/shm").glob("torch_*_*")]
    return sum(pid > os.getpid() and not Path(f"/proc/{pid}").exists() for pid in makers)


def memory(folder: Path) -> dict[str, int]:
    """Write ten times as much as this process may take."""
    write_shards(map(sample, range(ROWS)), folder / "small", **OPTIONS)  # load what loads lazily
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    room = 40 * 10**6
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
    content = bytes(range(250)) * 400
    samples = ({"n": n, "content": content} for n in range(10 * room // len(content)))
    write_shards(samples, folder / "big", shard_bytes="16MB", block_bytes="1MB")
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {"room": room, "written": read_index(folder / "big" / INDEX_NAME).bytes}


if __name__ == "__main__":
    jobs = {
        job.__name__: job
        for job in (writer_steps, writer_random, workers_random, reader_random, memory)
    }
    _columns.encode(pa.field("n", pa.int64()), [1], 0)  # pyarrow imports pandas at its first array
    gc.collect()
    gc.freeze()
    print(json.dumps(jobs[sys.argv[1]](Path(sys.argv[2]))))
