"""Remote data sets through the cache of a node: real servers, real processes, real kills."""

import errno
import gc
import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from torsh_data import Mixture, ShardedDataset, StreamLoader, write_shards
from torsh_data import _files as files
from torsh_data import _store as module
from torsh_data._store import Store

ROWS = 600


def sample(n):
    return {"label": n, "payload": bytes([n % 251]) * (50 + n % 40)}


class Handler(SimpleHTTPRequestHandler):
    """Files with ranges; the server's `fail` says which requests go wrong, and how."""

    def log_message(self, *_):
        pass

    def send_header(self, keyword, value):
        if not (self.server.silent and keyword == "Last-Modified"):
            super().send_header(keyword, value)

    def do_HEAD(self):
        if self.server.heads:
            self.send_error(self.server.heads)
        else:
            super().do_HEAD()

    def do_GET(self):
        server = self.server
        with server.mutex:
            server.requests[self.path.rpartition("/")[2]] += 1
            asked = self.path, self.headers.get("Range")
            server.asked[asked] += 1
            number = server.asked[asked]
        time.sleep(server.delay)
        wrong = server.fail(self.path, number)
        if wrong == "close":
            self.connection.close()
            return
        if isinstance(wrong, int):
            self.send_error(wrong)
            return
        path = Path(self.translate_path(self.path))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not (path.is_file() and wanted and server.ranges):
            super().do_GET()
            return
        content = path.read_bytes()
        start = int(wanted[1])
        end = min(int(wanted[2]) + 1 if wanted[2] else len(content), len(content))
        body = bytearray(content[start:end])
        if wrong == "flip":
            body[len(body) // 2] ^= 1
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if wrong == "half" else body)


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Handler(*a, directory=str(folder)))
    httpd.folder, httpd.url = folder, f"http://127.0.0.1:{httpd.server_port}"
    httpd.requests, httpd.asked, httpd.mutex = Counter(), Counter(), threading.Lock()
    httpd.silent, httpd.heads = False, None
    httpd.ranges, httpd.delay, httpd.fail = True, 0.0, lambda _path, _number: None
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def shards(server):
    write_shards(
        map(sample, range(ROWS)), server.folder / "set", shard_bytes="12kB", block_bytes="2kB"
    )
    return server.url + "/set"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(files, "FIRST_DELAY", 0.001)


def used(folder):
    return sum(p.stat().st_size for p in folder.iterdir() if p.name != ".lock")


def read_all(data, parts=20):
    order = np.random.default_rng(0).permutation(len(data))
    for ids in np.array_split(order, parts):
        assert data.__getitems__(ids) == [sample(n) for n in ids.tolist()]


def test_every_byte_is_fetched_once(server, shards, tmp_path):
    data = ShardedDataset(shards, cache_dir=tmp_path / "cache")
    read_all(data)
    fetched = {name: n for name, n in server.requests.items() if name.endswith(".arrow")}
    index = ShardedDataset(server.folder / "set")
    assert data.fingerprint == index.fingerprint
    blocks = {Path(shard.path).name: shard.blocks for shard in index._shards}
    assert fetched == blocks
    again = ShardedDataset(shards, cache_dir=tmp_path / "cache")
    read_all(again)
    read_all(pickle.loads(pickle.dumps(again)))
    assert {n: c for n, c in server.requests.items() if n.endswith(".arrow")} == blocks
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_server_without_ranges_sends_each_file_once(server, shards, tmp_path):
    server.ranges = False
    data = ShardedDataset(shards, cache_dir=tmp_path / "cache")
    read_all(data)
    read_all(ShardedDataset(shards, cache_dir=tmp_path / "cache"))
    # the first request is a range that comes back whole, the others fetch the file
    counts = [n for name, n in server.requests.items() if name.endswith(".arrow")]
    assert len(counts) == len(data.files)
    assert sum(counts) <= len(counts) + 1 + 20  # blocks that were asked for before it was known


def test_other_file_systems_and_ways_to_name_files(tmp_path):
    write_shards(map(sample, range(50)), tmp_path / "local", block_bytes="1kB")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "local"), "/bucket/set", recursive=True)
    cache = tmp_path / "cache"
    expected = [sample(n) for n in range(50)]
    assert list(ShardedDataset("memory://bucket/set", cache_dir=cache)) == expected
    assert list(ShardedDataset(f"file://{tmp_path}/local")) == expected
    table = pa.table({"n": list(range(30))})
    for number in range(3):
        with memory.open(f"/bucket/plain/part-{number}.parquet", "wb") as file:
            pq.write_table(table.slice(10 * number, 10), file, row_group_size=4)
    ns = [{"n": n} for n in range(30)]
    for source in (
        "memory://bucket/plain",
        "memory://bucket/plain/*.parquet",
        [f"memory://bucket/plain/part-{n}.parquet" for n in range(3)],
    ):
        assert list(ShardedDataset(source, cache_dir=cache)) == ns
    with pytest.raises(FileNotFoundError, match=r"no .arrow, .parquet, .tar or .jsonl files"):
        ShardedDataset("memory://bucket/plain/*.tar", cache_dir=cache)
    with pytest.raises(FileNotFoundError, match=r"memory://bucket/nothing.tar is missing"):
        ShardedDataset("memory://bucket/nothing.tar", cache_dir=cache)
    with pytest.raises(ValueError, match="URLs such as 'memory://x' beside paths"):
        ShardedDataset(["memory://x", tmp_path], cache_dir=cache)
    memory.rm("/bucket", recursive=True)


def test_what_fails_for_a_while_is_tried_again(server, shards, tmp_path):
    kinds = [None, 503, "close", "half", 429, None]
    server.fail = lambda path, number: kinds[number] if path.endswith(".arrow") else None
    data = ShardedDataset(shards, cache_dir=tmp_path / "cache")
    read_all(data)
    assert {n for (path, _), n in server.asked.items() if path.endswith(".arrow")} == {5}


def test_what_fails_for_good_names_the_url_and_the_attempts(server, shards, tmp_path):
    data = ShardedDataset(shards, cache_dir=tmp_path / "cache")
    server.fail = lambda path, _: 503 if path.endswith("00002.arrow") else None
    with pytest.raises(OSError, match=r"http://127.*/set/shard-00002.arrow could not be read in 5"):
        read_all(data)
    assert server.requests["shard-00002.arrow"] >= 5
    server.fail = lambda path, _: 403 if path.endswith("00003.arrow") else None
    with pytest.raises(OSError, match=r"shard-00003.arrow: the server says 403"):
        read_all(data)
    server.fail = lambda *_: None
    read_all(data)  # nothing that failed is remembered


@pytest.fixture
def few(server, shards):
    """The same rows in four formats."""
    table = pa.table({"n": list(range(40))})
    pq.write_table(table, server.folder / "few.parquet", row_group_size=10)
    lines = (f'{{"n": {n}}}\n' for n in range(40))
    (server.folder / "few.jsonl").write_text("".join(lines))
    with tarfile.open(server.folder / "few.tar", "w") as tar:
        for n in range(40):
            member = tarfile.TarInfo(f"{n:05}.cls")
            member.size = len(str(n))
            tar.addfile(member, io.BytesIO(str(n).encode()))
    return [shards, *(f"{server.url}/few.{kind}" for kind in ("parquet", "jsonl", "tar"))]


def test_what_the_cache_holds_is_read_without_the_server(server, few, tmp_path):
    cache = tmp_path / "cache"
    seen = [list(ShardedDataset(url, cache_dir=cache)) for url in few]
    opened = ShardedDataset(few[0], cache_dir=cache)
    ShardedDataset(few[0], cache_dir=tmp_path / "unread")
    server.shutdown()
    server.server_close()
    assert list(opened) == seen[0]
    for url, expected in zip(few, seen, strict=True):
        known = r"attempts; .* as it was opened last, as far as the cache in .*cache holds it"
        with pytest.warns(UserWarning, match=known):
            assert list(ShardedDataset(url, cache_dir=cache)) == expected
        unknown = r"could not be read in 5 .*; the cache in .*other does not know this data set"
        with pytest.raises(OSError, match=unknown):
            ShardedDataset(url, cache_dir=tmp_path / "other")
    with pytest.warns(UserWarning, match="as it was opened last"):
        unread = ShardedDataset(few[0], cache_dir=tmp_path / "unread")
    with pytest.raises(OSError, match=r"set/shard-0000.\.arrow could not be read in 5 att"):
        unread[ROWS // 2]


def test_an_answer_of_the_server_replaces_the_last(server, tmp_path):
    url, cache = server.url + "/folder", tmp_path / "cache"
    for rows in (20, 30):
        shutil.rmtree(server.folder / "folder", ignore_errors=True)
        write_shards(map(sample, range(rows)), server.folder / "folder")
        assert len(list(ShardedDataset(url, cache_dir=cache))) == rows
    server.fail = lambda *_: 503
    with pytest.warns(UserWarning, match="as it was opened last"):
        assert len(list(ShardedDataset(url, cache_dir=cache))) == 30
    server.fail = lambda *_: 403
    with pytest.raises(OSError, match="the server says 403"):
        ShardedDataset(url, cache_dir=cache)
    shutil.rmtree(server.folder / "folder")
    server.fail = lambda *_: None
    with pytest.raises(FileNotFoundError):
        ShardedDataset(url, cache_dir=cache)


@pytest.mark.parametrize(("status", "error"), [(403, "server says 403"), (503, "in 5 attempts")])
def test_a_file_whose_server_refuses_is_not_said_to_be_missing(server, tmp_path, status, error):
    (server.folder / "a.jsonl").write_text('{"n": 1}\n')
    server.fail = lambda *_: status
    server.heads = status
    with pytest.raises(OSError, match=error):
        ShardedDataset(server.url + "/a.jsonl", cache_dir=tmp_path / "cache")
    server.fail = lambda *_: 404
    server.heads = 404
    with pytest.raises(FileNotFoundError, match=r"a.jsonl is missing; check the URL"):
        ShardedDataset(server.url + "/a.jsonl", cache_dir=tmp_path / "cache")


def test_damage_on_the_way_is_fetched_again_and_damage_at_the_source_named(
    server, shards, tmp_path
):
    data = ShardedDataset(shards, cache_dir=tmp_path / "a")
    flipped = Counter()

    def flip_once(path, _):
        flipped[path] += 1
        return "flip" if flipped[path] == 1 and path.endswith(".arrow") else None

    server.fail = flip_once
    read_all(data)
    server.fail = lambda *_: None
    path = server.folder / "set" / "shard-00001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    data = ShardedDataset(shards, cache_dir=tmp_path / "b")
    with pytest.raises(
        RuntimeError, match=r"shard-00001.arrow: block \d of \d is damaged: .*fetched twice"
    ):
        read_all(data)


def test_a_shard_that_is_missing_at_the_server_is_named(server, shards, tmp_path):
    (server.folder / "set" / "shard-00001.arrow").unlink()
    data = ShardedDataset(shards, cache_dir=tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match=r"set/shard-00001.arrow is missing"):
        read_all(data)


def test_damaged_pieces_of_the_cache_are_made_anew(server, shards, tmp_path):
    cache = tmp_path / "cache"
    read_all(ShardedDataset(shards, cache_dir=cache))
    before = sum(server.requests.values())
    pieces = sorted(cache.glob("*.part"))
    for number, path in enumerate(pieces[:6]):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes([b"", content[:-3], content][number % 3])
    read_all(ShardedDataset(shards, cache_dir=cache))
    assert sum(server.requests.values()) - before == 6 + 1  # and the index


def test_the_limit_is_kept_and_what_was_used_last_stays(server, shards, tmp_path):
    cache = tmp_path / "cache"
    data = ShardedDataset(shards, cache_dir=cache, cache_bytes="16kB")
    for _ in range(2):
        for n in np.random.default_rng(0).integers(ROWS, size=150).tolist():
            assert data[n] == sample(n)
            assert used(cache) <= 16_000
    recent = n
    before = sum(server.requests.values())
    assert ShardedDataset(shards, cache_dir=cache, cache_bytes="16kB")[recent] == sample(recent)
    assert sum(server.requests.values()) - before <= 2  # the index, and perhaps the schema


def entry(store, number, size=1000):
    return store.view(f"piece {number}", lambda sink: sink.write(bytes([number]) * size), size)


def test_what_a_live_process_has_mapped_is_not_removed(tmp_path):
    script = f"""
import sys
from pathlib import Path
from torsh_data._store import Store
store = Store(Path({str(tmp_path)!r}), 5000)
held = store.view("piece 0", lambda sink: sink.write(bytes(1000)), 1000)
print("mapped", flush=True)
sys.stdin.read()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"mapped\n"
    store = Store(tmp_path, 5000)
    for number in range(1, 20):
        entry(store, number)
    assert store.has("piece 0")
    assert used(tmp_path) <= 5000
    holder.kill()
    holder.communicate()
    for number in range(1, 20):
        entry(store, number)
    assert not store.has("piece 0")
    mine = entry(store, 50)
    for number in range(1, 20):
        entry(store, number)
    assert store.has("piece 50")
    del mine
    gc.collect()
    for number in range(1, 20):
        entry(store, number)
    assert not store.has("piece 50")


def test_without_room_it_reads_through_memory_and_says_so(tmp_path):
    store = Store(tmp_path, 2500)
    held = [entry(store, 1), entry(store, 2)]
    with pytest.warns(UserWarning, match="cache_bytes=2.5 kB is in use: reading through memory"):
        view = entry(store, 3)
    assert view.in_memory
    assert view.content.to_pybytes() == b"\3" * 1000
    assert [v.content.to_pybytes()[:1] for v in held] == [b"\1", b"\2"]
    released = []
    store.release = lambda: (released.append(1), held.clear(), gc.collect())
    assert not entry(store, 4).in_memory
    assert released == [1]


def test_a_full_disk_makes_room_and_then_reads_through(tmp_path, monkeypatch):
    store = Store(tmp_path, 10_000)
    for number in range(4):
        entry(store, number)
    real, full = os.posix_fallocate, [True]

    def fallocate(descriptor, start, size):
        if full and full.pop():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor, start, size)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    assert not entry(store, 5).in_memory
    assert sum(store.has(f"piece {n}") for n in range(4)) == 3
    full[:] = [True, True]
    with pytest.warns(UserWarning, match=r"the disk under .* is full: reading through memory"):
        assert entry(store, 6).in_memory
    assert not list(tmp_path.glob("*.tmp"))


TOGETHER = """
import os, sys
import numpy as np
import aiohttp, fsspec.implementations.http
from torsh_data import ShardedDataset
url, cache = sys.argv[1:]
children = []
for seed in range(4):
    children.append(os.fork())
    if children[-1] == 0:
        data = ShardedDataset(url, cache_dir=cache)
        order = np.random.default_rng(seed).permutation(len(data)).tolist()
        os._exit(0 if all(data[n]["label"] == n for n in order) else 1)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
"""


def test_many_processes_and_jobs_fetch_each_piece_once(server, shards, tmp_path):
    server.delay = 0.005
    subprocess.run([sys.executable, "-c", TOGETHER, shards, tmp_path / "cache"], check=True)
    index = ShardedDataset(server.folder / "set")
    blocks = {Path(shard.path).name: shard.blocks for shard in index._shards}
    assert {n: c for n, c in server.requests.items() if n.endswith(".arrow")} == blocks


KILLED = """
import os, random, signal, sys, time
import aiohttp, fsspec.implementations.http
from torsh_data import ShardedDataset
url, cache, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
random.seed(times)
for _ in range(times):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"!")
        data = ShardedDataset(url, cache_dir=cache, cache_bytes="20kB")
        os.write(writing, b"!")
        random.seed(os.getpid())
        while True:
            data[random.randrange(len(data))]
    os.read(reading, 1)
    if random.random() < 0.8:
        os.read(reading, 1)
    time.sleep(random.uniform(0, 0.2))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
"""


@pytest.mark.parametrize("times", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_a_kill_while_fetching_leaves_nothing_that_reads_as_whole(server, shards, tmp_path, times):
    cache = tmp_path / "cache"
    server.delay = 0.003
    subprocess.run([sys.executable, "-c", KILLED, shards, cache, str(times)], check=True)
    assert any(name.endswith(".arrow") for name in server.requests)  # some lived to read
    assert all(module._is_whole(pa.py_buffer(p.read_bytes())) for p in cache.glob("*.part"))
    server.delay = 0.0
    data = ShardedDataset(shards, cache_dir=cache, cache_bytes="20kB")
    read_all(data, parts=ROWS)
    assert used(cache) <= 20_000
    assert not list(cache.glob("*.tmp"))


def test_two_windows_must_fit_into_the_cache(server, shards, tmp_path):
    data = ShardedDataset(shards, cache_dir=tmp_path / "cache", cache_bytes="20kB")
    data.require_cache(50)
    with pytest.raises(ValueError, match=r"cache_bytes=20 kB does not hold the two windows of 20"):
        data.require_cache(200)
    try:
        data.require_cache(200)
    except ValueError as error:
        needed = re.search(r"give it ([\d.]+ kB)", str(error))[1]
    ShardedDataset(shards, cache_dir=tmp_path / "c", cache_bytes=needed).require_cache(190)
    ShardedDataset(server.folder / "set").require_cache(10**9)  # local files need no cache


def test_what_will_be_read_is_fetched_meanwhile(server, shards, tmp_path):
    server.delay = 0.02
    data = ShardedDataset(shards, cache_dir=tmp_path / "cache")
    data.will_read(range(300))
    deadline = time.monotonic() + 10
    while data._ahead.is_busy:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    before = sum(server.requests.values())
    assert data.__getitems__(range(300)) == [sample(n) for n in range(300)]
    assert sum(server.requests.values()) == before


@pytest.mark.parametrize("kind", ["mixture", "subset", "both"])
def test_remote_parts_of_a_data_set_are_told_what_will_be_read(server, shards, tmp_path, kind):
    data = ShardedDataset(shards, cache_dir=tmp_path / "cache")
    far = torch.utils.data.Subset(data, range(100, 500))
    near = [sample(n) for n in range(100)]
    whole = {
        "mixture": Mixture({"far": (data, 1.0), "near": (near, 1.0)}, epoch_size=800),
        "subset": far,
        "both": torch.utils.data.ConcatDataset([near, far]),
    }[kind]
    told = []
    data.will_read = lambda ids: told.append(np.array(ids))
    loader = StreamLoader(whole, 20, seed=1, drop_last=False)
    seen = [batch["index"] for batch in loader]
    ids = np.concatenate([index.numpy() for index in seen])
    expected = {
        "mixture": lambda: [r for name, r in whole.locate(ids) if name == "far"],
        "subset": lambda: (ids + 100).tolist(),
        "both": lambda: [n for n in ids.tolist() if n >= 100],
    }[kind]()
    assert [n for n in told[0].tolist() if n in expected] == expected


def test_workers_forked_while_blocks_are_fetched_do_not_keep_their_locks(server, shards, tmp_path):
    server.delay = 0.05
    data = ShardedDataset(shards, cache_dir=tmp_path / "cache")
    data.will_read(range(ROWS))
    time.sleep(0.1)
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        done = threading.Event()
        threading.Thread(target=lambda: (read_all(data), done.set()), daemon=True).start()
        assert done.wait(30), "a block's lock lives on in the other process"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_plans_of_files_that_are_gone_make_room(server, tmp_path):
    cache = tmp_path / "cache"
    for version in range(30):
        lines = (f'{{"n": {n}, "version": {version}}}\n' for n in range(2000))
        (server.folder / "a.jsonl").write_text("".join(lines))
        os.utime(server.folder / "a.jsonl", (version, version))
        data = ShardedDataset(server.url + "/a.jsonl", cache_dir=cache, cache_bytes="200kB")
        assert data[1999] == {"n": 1999, "version": version}
        del data
        gc.collect()  # it holds its pieces until it is gone
    assert used(cache) <= 200_000


def test_a_file_that_changed_at_the_server_is_fetched_again(server, tmp_path):
    url, cache = server.url + "/a.jsonl", tmp_path / "cache"
    for number in (1, 2):
        (server.folder / "a.jsonl").write_text(f'{{"n": {number}}}\n')
        os.utime(server.folder / "a.jsonl", (number, number))
        assert ShardedDataset(url, cache_dir=cache)[0] == {"n": number}


def test_a_server_that_tells_no_version_is_named(server, tmp_path):
    (server.folder / "a.jsonl").write_text('{"n": 1}\n')
    server.silent = True
    with pytest.warns(UserWarning, match=r"a.jsonl: the server tells no version of the file"):
        ShardedDataset(server.url + "/a.jsonl", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_through_the_loader_with_a_small_cache(server, shards, tmp_path, workers):
    data = ShardedDataset(shards, cache_dir=tmp_path / "cache", cache_bytes="40kB")
    loader = StreamLoader(data, 20, window=100, num_workers=workers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = [n for batch in loader for n in batch["label"].tolist()]
    assert sorted(labels) == list(range(ROWS))
    assert used(tmp_path / "cache") <= 40_000


def test_the_default_cache_is_the_users(monkeypatch, tmp_path, server, shards):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert ShardedDataset(shards)[3] == sample(3)
    assert list((tmp_path / "home" / "torsh-data").glob("*.part"))


def test_remote_files_without_an_index_are_looked_at_once(server, tmp_path):
    table = pa.table({"n": list(range(100)), "t": [f"ü{n}" for n in range(100)]})
    pq.write_table(table, server.folder / "a.parquet", row_group_size=10)
    with pa.ipc.new_file(str(server.folder / "b.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    urls = [server.url + "/a.parquet", server.url + "/b.arrow"]
    cache = tmp_path / "cache"
    expected = table.to_pylist()
    data = ShardedDataset(urls, cache_dir=cache)
    assert list(data) == expected * 2
    before = sum(server.requests.values())
    again = ShardedDataset(urls, cache_dir=cache)
    assert list(again) == expected * 2
    assert sum(server.requests.values()) == before
    assert again.fingerprint == data.fingerprint
    shutil.copy(server.folder / "a.parquet", tmp_path / "a.parquet")
    shutil.copy(server.folder / "b.arrow", tmp_path / "b.arrow")
    local = ShardedDataset([tmp_path / "a.parquet", tmp_path / "b.arrow"])
    assert local.fingerprint == data.fingerprint


def test_an_index_that_points_elsewhere_is_refused(tmp_path):
    import json

    from torsh_data._index import _canonical, hash_bytes

    write_shards(map(sample, range(5)), tmp_path)
    body = json.loads((tmp_path / "index.json").read_text())
    body["shards"][0]["name"] = "../secret.arrow"
    del body["checksum"]
    body["checksum"] = hash_bytes(_canonical(body))
    (tmp_path / "index.json").write_text(json.dumps(body))
    with pytest.raises(RuntimeError, match=r"lists '../secret.arrow', which is not a file beside"):
        ShardedDataset(tmp_path)


def test_one_of_many_threads_makes_a_piece(tmp_path):
    store, made = Store(tmp_path, 10**6), []

    def make(sink):
        made.append(1)
        time.sleep(0.1)
        sink.write(b"x" * 100)

    threads = [threading.Thread(target=store.prepare, args=("a", make, 100)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert store.view("a", make, 100).content.to_pybytes() == b"x" * 100


@pytest.mark.parametrize("place", [0, 500, 1001, 1020, -1])
def test_a_piece_with_a_flipped_byte_is_made_anew(tmp_path, place):
    entry(Store(tmp_path, 10_000), 7)
    (path,) = tmp_path.glob("*.part")
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert entry(Store(tmp_path, 10_000), 7).content.to_pybytes() == b"\7" * 1000
    assert module._is_whole(pa.py_buffer(path.read_bytes()))


@pytest.fixture(scope="module")
def s3():
    """A server on this machine that speaks S3, with a bucket in it."""
    pytest.importorskip("s3fs", reason="needs s3fs")
    moto = pytest.importorskip("moto.server", reason="needs moto[server]")
    requests = pytest.importorskip("requests")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    options = {"endpoint_url": url, "key": "tester", "secret": "word"}
    bucket = fsspec.filesystem("s3", **options)
    bucket.mkdir("bucket")
    yield bucket, options, lambda: requests.post(f"{url}/moto-api/reset-auth", data="0", timeout=9)
    server.stop()


def put(bucket, name, content):
    with bucket.open(f"bucket/{name}", "wb") as file:
        file.write(content)


@pytest.mark.filterwarnings("ignore:datetime.datetime.utc:DeprecationWarning")
def test_an_object_store_serves_shards_tar_and_json_lines(s3, tmp_path):
    bucket, options, _ = s3
    write_shards(map(sample, range(ROWS)), tmp_path / "set", shard_bytes="12kB", block_bytes="2kB")
    bucket.put(str(tmp_path / "set"), "bucket/whole", recursive=True)
    keep = {"storage_options": options, "cache_dir": tmp_path / "cache"}
    data = ShardedDataset("s3://bucket/whole", **keep)
    read_all(data)
    ids = [n for batch in StreamLoader(data, 50, num_workers=2) for n in batch["label"].tolist()]
    assert sorted(ids) == list(range(ROWS))

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for n in range(20):
            member = tarfile.TarInfo(f"{n:03d}.cls")
            member.size = len(str(n))
            tar.addfile(member, io.BytesIO(str(n).encode()))
    put(bucket, "tars/0.tar", packed.getvalue())
    put(bucket, "lines.jsonl", b"".join(b'{"n": %d}\n' % n for n in range(30)))
    assert [s["cls"] for s in ShardedDataset("s3://bucket/tars/*.tar", **keep)] == list(range(20))
    assert [s["n"] for s in ShardedDataset("s3://bucket/lines.jsonl", **keep)] == list(range(30))


@pytest.mark.filterwarnings("ignore:datetime.datetime.utc:DeprecationWarning")
def test_an_object_store_that_refuses_says_what_to_do(s3, tmp_path, monkeypatch):
    bucket, options, demand_keys = s3
    write_shards(map(sample, range(ROWS)), tmp_path / "set", shard_bytes="12kB", block_bytes="2kB")
    bucket.put(str(tmp_path / "set"), "bucket/shrinking", recursive=True)
    keep = {"storage_options": options, "cache_dir": tmp_path / "cache"}
    url = "s3://bucket/shrinking"
    with pytest.raises(FileNotFoundError, match=r"s3://nobucket/set is missing; check"):
        ShardedDataset("s3://nobucket/set", **keep)
    with pytest.raises(TypeError, match=r"'sekret'; is one of storage_options .*unknown"):
        ShardedDataset(url, storage_options={**options, "sekret": 1}, cache_dir=tmp_path / "cache")

    data = ShardedDataset(url, **keep)
    assert data[0] == sample(0)
    gone = data._shards[-1].path
    bucket.rm(gone)
    with pytest.raises(FileNotFoundError, match=f"{gone} is missing; it was listed when"):
        data[ROWS - 1]

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    nobody = {"endpoint_url": options["endpoint_url"]}
    with pytest.raises(PermissionError, match=r"needs credentials .*storage_options"):
        ShardedDataset(url, storage_options=nobody, cache_dir=tmp_path / "cache")

    demand_keys()
    fsspec.filesystem("s3", **options).invalidate_cache()
    with pytest.raises(PermissionError, match=r"index\.json: the server refuses access .*right"):
        ShardedDataset(url, **keep)


def test_a_missing_package_for_a_url_is_named():
    explain = files._explain_import
    gcs = explain("gs://bucket/set", ImportError("Please install gcsfs"))
    assert str(gcs) == "source='gs://bucket/set' needs another package: pip install gcsfs"
    web = explain("https://host/set", ImportError("No module named 'aiohttp'"))
    assert str(web).endswith("pip install 'torsh-data[remote]'")
    with pytest.raises(ValueError, match="source='quux://host/set': Protocol not known: quux"):
        ShardedDataset("quux://host/set")
