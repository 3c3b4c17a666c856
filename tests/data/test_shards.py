"""Bad samples are replaced, and memory stays bounded whatever the size of the data."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from torsh_data import ShardedDataset, StreamLoader, write_shards
from torsh_data._mapping import map_file

pytestmark = pytest.mark.filterwarnings("ignore:sample .* is replaced by another one:UserWarning")


@pytest.fixture
def folder(tmp_path):
    rows = ({"n": n, "x": bytes([n % 256]) * 20} for n in range(1000))
    write_shards(rows, tmp_path, shard_bytes="8kB", block_bytes="700B")
    path = tmp_path / "shard-00001.arrow"
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)
    return tmp_path


def test_a_damaged_block_is_replaced_by_the_same_rows_for_everyone(folder):
    def make():
        return ShardedDataset(folder, on_error="substitute", max_errors=100)

    data = make()
    with pytest.raises(RuntimeError, match="is damaged"):
        list(ShardedDataset(folder))
    found = [s["n"] for s in data]
    bad = sorted(data.errors)
    assert 5 < len(bad) < 60
    assert all("shard-00001.arrow: block" in text for text in data.errors.values())
    assert [n for n in range(1000) if found[n] != n] == bad
    replaced = [found[n] for n in bad]
    assert len(set(replaced)) == len(bad)  # a whole block is not replaced by one row
    assert not set(replaced) & set(bad)
    other = make()
    ids = np.random.default_rng(0).permutation(1000)
    assert [s["n"] for s in other.__getitems__(ids)] == [found[n] for n in ids]
    for size in (7, 100):
        batches = [make().read_batch(ids[k : k + size]) for k in range(0, 1000, size)]
        assert torch.cat([b["n"] for b in batches]).tolist() == [found[n] for n in ids]
    loader = StreamLoader(make(), 50, shuffle=False)
    assert torch.cat([b["n"] for b in loader]).tolist() == found


def test_the_first_replaced_sample_is_a_warning(folder, recwarn):
    warnings.simplefilter("always")
    data = ShardedDataset(folder, on_error="substitute", max_errors=100)
    list(data)
    (warned,) = recwarn
    number = next(iter(data.errors))
    assert len(data.errors) > 5
    assert str(warned.message).startswith(f"sample {number}, in block ")
    assert "shard-00001.arrow, is replaced by another one: RuntimeError: " in str(warned.message)
    block = re.search("in block ([0-9]+) of", str(warned.message))[1]
    assert f"shard-00001.arrow: block {block} of " in data.errors[number]


def test_a_transform_that_fails_is_a_bad_sample(folder):
    def transform(sample, rng):
        if sample["n"] % 100 == 7:
            raise KeyError("no picture")
        return sample["n"], rng.random()

    data = ShardedDataset(
        sorted(folder.glob("*0.arrow")), transform=transform, on_error="substitute", max_errors=50
    )
    found = [data[n] for n in range(len(data))]
    assert data.errors
    assert all(text == "KeyError: 'no picture'" for text in data.errors.values())
    for n in data.errors:
        assert found[n] in [found[k] for k in range(len(data)) if k not in data.errors]


def test_too_many_bad_samples_are_an_error(folder):
    data = ShardedDataset(folder, on_error="substitute", max_errors=3)
    with pytest.raises(RuntimeError, match=r"4 bad samples, more than max_errors=3; the last is s"):
        list(data)
    data = ShardedDataset(folder, on_error="substitute", max_errors=3)
    data.add_errors({5: "x", 6: "y", 7: "z"})
    data.add_errors({5: "x"})
    with pytest.raises(RuntimeError, match="the last is sample 8: w"):
        data.add_errors({8: "w"})


def test_when_no_sample_is_good_it_ends(tmp_path):
    write_shards([{"n": n} for n in range(4)], tmp_path)
    data = ShardedDataset(tmp_path, transform=lambda s: 1 / 0, on_error="substitute", max_errors=10)
    with pytest.raises(RuntimeError, match="none of the 4 samples is good; sample 2 says: ZeroDi"):
        data[2]


def test_options_that_say_nothing_are_refused(folder):
    for options in (
        {"on_error": "skip"},
        {"on_error": "substitute"},
        {"max_errors": 5},
        {"on_error": "substitute", "max_errors": -1},
        {"decode": "jpeg"},
        {"cache_bytes": "many"},
    ):
        with pytest.raises(ValueError, match=next(reversed(options))):
            ShardedDataset(folder, **options)


def test_more_files_than_a_process_may_open(tmp_path):
    import resource

    write_shards([{"n": 1}], tmp_path)
    paths = []
    for number in range(300):
        (tmp_path / f"{number}").mkdir()
        for name in ("index.json", "shard-00000.arrow"):
            (tmp_path / f"{number}" / name).symlink_to(tmp_path / name)
        paths.append(tmp_path / f"{number}" / "shard-00000.arrow")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        assert sum(s["n"] for s in ShardedDataset(paths)) == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_mapping_lives_as_long_as_its_bytes(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)) * 100)
    part = map_file(path).buffer()[256:512]
    assert part.to_pybytes() == bytes(range(256))
    assert str(path) in Path("/proc/self/maps").read_text()
    del part
    assert str(path) not in Path("/proc/self/maps").read_text()
    path.write_bytes(b"")
    assert map_file(path).size == 0


# Anonymous memory (RLIMIT_DATA) is what is limited: pages of mapped files are the page cache,
# which the kernel takes back whenever it is short of memory.
LIMITED = """
import json, os, resource, sys
import numpy as np
from torsh_data import ShardedDataset, StreamLoader
def status(name):
    with open("/proc/self/status") as file:
        return next(int(l.split()[1]) * 1024 for l in file if l.startswith(name))
paths, options = json.loads(sys.argv[1])
data = ShardedDataset(paths, **options)
for _ in StreamLoader(data, 16, shuffle=False, drop_last=False):
    break
headroom = int(sys.argv[2])
limit = status("VmData") + headroom
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
peak, before, rows = 0, status("RssAnon"), 0
for batch in StreamLoader(data, 16, window=len(data) // 8, drop_last=False):
    rows += len(batch["index"])
    peak = max(peak, status("RssAnon"))
assert rows == len(data)
print(json.dumps({"bytes": data.nbytes, "grown": peak - before}))
"""


def links(folder, original, count):
    folder.mkdir()
    for number in range(count):
        os.link(original, folder / f"{number:03}{original.suffix}")
    return str(folder)


def make_format(kind, tmp_path):
    """A file of 16 MB; many names for it are a data set that takes little disk."""
    import io
    import tarfile

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [np.random.default_rng(n).bytes(16_000) for n in range(1000)]
    path = tmp_path / f"original.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as tar:
            for n, row in enumerate(rows):
                info = tarfile.TarInfo(f"{n}.bin")
                info.size = len(row)
                tar.addfile(info, io.BytesIO(row))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"x": row.hex()[:16_000]}) + "\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.table({"x": rows}), path, row_group_size=100)
    else:
        table = pa.table({"x": rows})
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["arrow", "tar", "jsonl", "parquet"])
def test_an_epoch_takes_no_more_memory_than_it_may(tmp_path, kind):
    headroom = 48 << 20
    count = 12 * headroom // (16 << 20)
    options = {}
    if kind == "parquet":
        options = {"cache_dir": str(tmp_path / "cache"), "cache_bytes": "200MB"}
    source = links(tmp_path / "set", make_format(kind, tmp_path), count)
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-c",
            LIMITED,
            json.dumps([source, options]),
            str(headroom),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bytes"] > 10 * headroom
    assert found["grown"] < headroom


# All that the process allocates is limited, from its start on. What it maps is the page cache's,
# but the kernel's tables of it are not, so they are counted, too.
WHOLLY_LIMITED = """
import json, resource, sys
import torch
from torsh_data import ShardedDataset, StreamLoader
def status(*names):
    with open("/proc/self/status") as file:
        return sum(int(l.split()[1]) * 1024 for l in file if l.split(":")[0] in names)
torch.set_num_threads(1)
data = ShardedDataset(sys.argv[1])
limit = status("VmData") + (160 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
rows, used = 0, []
for batch in StreamLoader(data, 64, window="64MB", rank=0, world_size=1):
    rows += len(batch["index"])
    used.append(status("RssAnon", "VmPTE"))
late = len(used) * 3 // 4  # when as many blocks are open as may be
print(json.dumps({
    "limit": limit, "bytes": data.nbytes, "lost": len(data) - rows,
    "grown": max(used[late:]) - max(used[:late]), "in all": max(used) - used[0],
}))
"""


@pytest.mark.slow
def test_memory_is_flat_over_ten_times_the_limit_of_the_process(tmp_path):
    source = links(tmp_path / "set", make_format("arrow", tmp_path), 2400)  # 38 GB in 16 MB of disk
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WHOLLY_LIMITED, source],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bytes"] > 10 * found["limit"], found
    assert found["lost"] < 64
    assert found["grown"] < 8 << 20, found
    assert found["in all"] < 192 << 20, found
