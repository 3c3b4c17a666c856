"""Jobs on a cache that need processes of their own; run by test_cache_processes.py, prints JSON.

Loads the cache's modules alone, without torch, so that a child takes milliseconds.
"""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

package = types.ModuleType("torsh_text")
package.__path__ = [str(Path(__file__).parents[2] / "torsh_text" / "src" / "torsh_text")]
sys.modules.setdefault("torsh_text", package)
from torsh_text._cache import EmbeddingCache  # noqa: E402

warnings.simplefilter("error")
DIM = 16
ROW = DIM * 4 + 32


def vectors_of(numbers: np.ndarray) -> np.ndarray:
    return (numbers[:, None] * 100 + np.arange(DIM)).astype(np.float32)


def store(cache: EmbeddingCache, numbers: range) -> None:
    keys = cache.keys("model", [str(n) for n in numbers])
    cache.store("model", keys, vectors_of(np.array(numbers)))


def known(cache: EmbeddingCache, numbers: range) -> set[int]:
    """Numbers that are found; every vector must be right."""
    hits = cache.lookup("model", DIM, cache.keys("model", [str(n) for n in numbers]))
    found = np.array(numbers)[hits.found]
    assert np.array_equal(hits.vectors, vectors_of(found)), "a wrong vector"
    return set(found.tolist())


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


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


def die_at(step: int) -> None:
    """Kill this process within its step-th call that changes a file; writes die half done."""
    calls = itertools.count()
    originals = {name: getattr(os, name) for name in ("fsync", "ftruncate", "rename", "unlink")}
    pwrite, open_ = os.pwrite, os.open

    def deadly(original: Callable) -> Callable:
        def call(*args, **options):
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        return call

    def write(handle, data, offset):
        turn = next(calls)
        if turn == step:
            pwrite(handle, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return pwrite(handle, data, offset)

    for name, original in originals.items():
        setattr(os, name, deadly(original))
    os.open, os.pwrite = deadly(open_), write


def check_after_death(folder: Path, before: set[int], max_bytes: int | None) -> None:
    everything = range(400)
    reader = EmbeddingCache(folder, readonly=True)
    seen = known(reader, everything)
    if max_bytes is None:
        assert before <= seen, f"lost {sorted(before - seen)[:5]}"
    assert reader.verify() == []
    cache = EmbeddingCache(folder, max_bytes=max_bytes)
    store(cache, range(390, 400))
    assert known(cache, range(390, 400)) == set(range(390, 400))
    stats = cache.stats()
    assert len(files(folder)) == 2 * stats.segments + 1, files(folder)
    assert stats.bytes == size(folder)
    if max_bytes is not None:
        assert stats.bytes <= max_bytes
    assert known(reader, everything) == known(cache, everything)


def kills(folder: Path) -> dict[str, int]:
    """Kill a writer at every step of storing, evicting and compacting."""
    total = {}

    def grow(cache):
        store(cache, range(100, 130))
        store(cache, range(130, 150))

    jobs = {
        "first": (None, 0, grow),
        "more": (None, 100, grow),
        "evict": (16 * (256 + 20 * ROW), 320, lambda cache: store(cache, range(330, 375))),
        "compact": (None, 100, lambda cache: cache.compact()),
        "compact many": (16 * (256 + 20 * ROW), 60, lambda cache: cache.compact()),
    }
    for name, (max_bytes, rows, job) in jobs.items():
        start = folder / "start"
        if rows:
            cache = EmbeddingCache(start, max_bytes=max_bytes)
            for first in range(0, rows, 20):
                store(cache, range(first, first + 20))
        else:
            start.mkdir()
        for step in itertools.count():
            target = folder / "target"
            shutil.copytree(start, target)

            def work(target=target, max_bytes=max_bytes, job=job, step=step):
                die_at(step)
                job(EmbeddingCache(target, max_bytes=max_bytes))

            _, status = os.waitpid(child(work), 0)
            check_after_death(target, set(range(rows)), max_bytes)
            shutil.rmtree(target)
            if status == 0:
                break
            assert os.WIFSIGNALED(status), f"{name}, step {step}: status {status}"
            assert os.WTERMSIG(status) == signal.SIGKILL
        total[name] = step
        shutil.rmtree(start)
    return total


def random_kills(folder: Path) -> dict[str, int]:
    """Kill a writer at random times while it stores and compacts; what it had said must stay."""
    chance = random.Random(0)
    deaths, said, took = 0, set(), 0.0
    for turn in range(60):
        start = time.perf_counter()
        inlet, outlet = os.pipe()

        def work(turn=turn, outlet=outlet):
            cache = EmbeddingCache(folder / "cache")
            for i in range(4):
                first = (turn * 4 + i) * 5
                store(cache, range(first, first + 5))
                os.write(outlet, bytes([i]))
                if i == 2:
                    cache.compact()

        pid = child(work)
        os.close(outlet)
        if turn:
            time.sleep(chance.uniform(0, took))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        took = took or time.perf_counter() - start  # the first one may live
        deaths += os.WIFSIGNALED(status)
        with os.fdopen(inlet, "rb") as pipe:
            for i in pipe.read():
                first = (turn * 4 + i) * 5
                said |= set(range(first, first + 5))
        if (folder / "cache").exists():
            reader = EmbeddingCache(folder / "cache", readonly=True)
            seen = known(reader, range(1200))
            assert said <= seen, f"lost {sorted(said - seen)[:5]}"
            assert reader.verify() == []
    return {"deaths": deaths, "said": len(said)}


def writers(folder: Path, max_bytes: int | None = None) -> dict[str, int]:
    """Two processes write overlapping rows while a third compacts and this one reads."""

    def write(offset):
        cache = EmbeddingCache(folder, max_bytes=max_bytes)
        for first in range(0, 600, 10):
            store(cache, range(first + offset, first + offset + 15))
            assert max_bytes is None or cache.stats().bytes <= max_bytes

    def compact():
        cache = EmbeddingCache(folder, max_bytes=max_bytes)
        for _ in range(15):
            cache.compact()

    cache = EmbeddingCache(folder, max_bytes=max_bytes)
    jobs = [child(lambda: write(0)), child(lambda: write(5)), child(compact)]
    reads, seen = 0, set()
    while jobs:
        now = known(cache, range(700))
        assert max_bytes is not None or seen <= now, "a finished row went away"
        seen, reads = now, reads + 1
        for pid in list(jobs):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                assert status == 0, f"a child ended with {status}"
                jobs.remove(pid)
    assert cache.verify() == []
    return {"rows": cache.stats().rows, "known": len(known(cache, range(700))), "reads": reads}


def full_disk(folder: Path) -> dict[str, int]:
    """Store under a limit on file sizes, then without it."""
    cache = EmbeddingCache(folder)
    store(cache, range(10))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused = 0
    for limit in (64, 128 + 15 * DIM * 4, 128 + 25 * 32, 128 + 40 * DIM * 4):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        for target in (cache, EmbeddingCache(folder)):
            try:
                store(target, range(10, 60))
            except OSError as error:
                refused += "is full: File too large" in str(error)
    fresh = folder.parent / "fresh"
    try:
        store(EmbeddingCache(fresh), range(50))
    except OSError:
        refused += 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after == before, "a refused store left something"
    for target in (cache, EmbeddingCache(fresh)):
        store(target, range(60))
        assert known(target, range(100)) == set(range(60))
        assert target.verify() == []
    return {"refused": refused}


def disk_full_under_a_reader(folder: Path) -> dict[str, int]:
    """Fill the disk in the middle of the records while another process maps those written."""
    store(EmbeddingCache(folder), range(10))
    (asks, tell), (hears, answer) = os.pipe(), os.pipe()

    def read():
        cache = EmbeddingCache(folder, readonly=True)
        for _ in range(2):  # between two writes of the writer, and when it has given up
            os.read(asks, 1)
            seen = known(cache, range(400))
            os.write(answer, len(seen).to_bytes(2, "little"))

    def ask() -> int:
        os.write(tell, b"!")
        return int.from_bytes(os.read(hears, 2), "little")

    reader = child(read)
    during = []
    fsync, pwrite = os.fsync, os.pwrite

    def limited_fsync(handle):
        fsync(handle)  # the vectors are through
        resource.setrlimit(resource.RLIMIT_FSIZE, (128 + 300 * 32 + 5, resource.RLIM_INFINITY))

    def watched_pwrite(handle, data, offset):
        written = pwrite(handle, data, offset)
        if written < len(data):
            during.append(ask())
        return written

    cache = EmbeddingCache(folder)
    os.fsync, os.pwrite = limited_fsync, watched_pwrite
    refused = ""
    try:
        store(cache, range(10, 400))
    except OSError as error:
        refused = str(error)
    os.fsync, os.pwrite = fsync, pwrite
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    after = ask()
    _, status = os.waitpid(reader, 0)
    assert "is full: File too large" in refused, refused
    assert cache.verify() == []
    kept = len(known(cache, range(500)))
    store(cache, range(500))
    assert known(EmbeddingCache(folder), range(500)) == set(range(500))
    assert cache.verify() == []
    rows = cache.stats().rows
    return {"status": status, "during": during[0], "after": after, "kept": kept, "rows": rows}


def file_cut_under_a_reader(folder: Path) -> dict[str, int]:
    """Cut a file that this process has mapped: it must read what is left, not die."""
    cache = EmbeddingCache(folder)
    store(cache, range(400))
    assert len(known(cache, range(400))) == 400
    (path,) = folder.glob("*.vectors")
    os.truncate(path, 128 + 100 * DIM * 4)
    left = len(known(cache, range(400)))
    store(cache, range(400))
    return {"left": left, "known": len(known(cache, range(400)))}


def read_only_folder(folder: Path) -> dict[str, str]:
    """Use a folder that this user may not write."""
    cache = EmbeddingCache(folder / "cache")
    store(cache, range(10))
    (folder / "cache").chmod(0o555)
    for path in (folder / "cache").iterdir():
        path.chmod(0o444)
    found: dict[str, str] = {}
    if os.getuid() == 0:
        os.setuid(65534)  # root may write anywhere
    for path in (folder / "cache", folder / "cache" / "new"):
        try:
            EmbeddingCache(path)
        except PermissionError as error:
            found[path.name] = str(error)
    assert known(EmbeddingCache(folder / "cache", readonly=True), range(10)) == set(range(10))
    return found


if __name__ == "__main__":
    jobs = {
        "kills": kills,
        "random_kills": random_kills,
        "writers": writers,
        "small_writers": lambda folder: writers(folder, 150 * ROW),
        "full_disk": full_disk,
        "disk_full_under_a_reader": disk_full_under_a_reader,
        "file_cut_under_a_reader": file_cut_under_a_reader,
        "read_only_folder": read_only_folder,
    }
    print(json.dumps(jobs[sys.argv[1]](Path(sys.argv[2]))))
