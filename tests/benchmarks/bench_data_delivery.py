"""What a loader costs: delivery, token rows, decoding, order, state and the first batch.

Two sets of JPEGs from warm page cache, in random order, without decoding: CIFAR-10's 50,000
training images (0.9 kB each, batches of 256), and 2,000 photographs of about 110 kB (batches of
32), which are crops of the two that come with scikit-learn. All contenders run in turns in one
process. What is not the same: a plain DataLoader over a list holds all samples in memory and hands
out references (0 workers), so it is the bound for Python code rather than a peer; the others mix
what they mix (webdataset and streaming Hugging Face data sets a buffer of 10,000 samples, litdata
one chunk). Slow contenders are stopped after three seconds. JSON Lines hold base64.

    python tests/benchmarks/bench_data_delivery.py --rounds 7 --json result.json
"""

import argparse
import base64
import importlib.metadata
import io
import itertools
import json
import logging
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tarfile
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2.functional import resize

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "torsh_data" / "src"))

from torsh_data import ShardedDataset, StreamLoader, write_shards  # noqa: E402
from torsh_data._order import Order, effective_batch  # noqa: E402

Epoch = Callable[[], Iterator[list[bytes] | torch.Tensor]]
Transform = Callable[[bytes], Any]
Row = dict[str, Any]
_T = TypeVar("_T")

ENOUGH = 3.0  # seconds
PACKAGES = ("torch", "torchvision", "pyarrow", "datasets", "litdata", "webdataset")
PACKAGES += ("mosaicml-streaming", "torchdata")


@dataclass(frozen=True)
class Corpus:
    """Samples, and how they are stored and read."""

    samples: list[tuple[bytes, int]]
    batch: int
    shard: int
    block: int
    window: str

    @property
    def rows(self) -> Iterator[dict]:
        return ({"jpeg": jpeg, "label": label} for jpeg, label in self.samples)

    @property
    def chunk(self) -> int:
        """Samples in a shard."""
        return self.shard * len(self.samples) // sum(len(jpeg) for jpeg, _ in self.samples)


def cifar() -> Corpus:
    path = Path(os.environ.get("TORSH_TEST_DATA", ROOT / "../shared/data")) / "cifar10/train.npz"
    if not path.exists():
        raise SystemExit(f"needs {path}; set TORSH_TEST_DATA")
    stored = np.load(path)
    data, offset = stored["data"].tobytes(), stored["offset"].tolist()
    samples = [
        (data[a:b], int(label))
        for a, b, label in zip(offset[:-1], offset[1:], stored["label"], strict=True)
    ]
    return Corpus(samples, 256, 8_000_000, 64_000, "4MB")


def photographs(count: int = 2000) -> Corpus:
    from sklearn.datasets import load_sample_images

    whole = [
        torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images
    ]
    crop = RandomResizedCrop((375, 500), scale=(0.3, 0.9), ratio=(1.3, 1.4), antialias=True)
    torch.manual_seed(0)
    samples = []
    for n in range(count):
        image = resize(crop(whole[n % 2]), [375, 500]).float()
        grain = torch.randn(image.shape) * 8  # of a photograph that was not enlarged
        picture = (image + grain).clamp(0, 255).to(torch.uint8)
        samples.append((encode_jpeg(picture, quality=95).numpy().tobytes(), n % 2))
    return Corpus(samples, 32, 32_000_000, 1_000_000, "25MB")


def to_crop(jpeg: bytes) -> torch.Tensor:
    """What a training on ImageNet does to an image: decode it, crop and resize to 224."""
    data = torch.frombuffer(bytearray(jpeg), dtype=torch.uint8)
    return RandomResizedCrop(224, antialias=True)(decode_jpeg(data, ImageReadMode.RGB))


class Mapped(torch.utils.data.Dataset):
    """A map-style data set of mappings whose pictures are transformed."""

    def __init__(self, samples: Any, transform: Transform) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, n: int) -> dict:
        sample = self.samples[n]
        return {"jpeg": self.transform(sample["jpeg"]), "label": sample["label"]}


def _stream(source: Path, corpus: Corpus, workers: int, transform: Transform | None) -> Epoch:
    apply = transform and (lambda s: {"jpeg": transform(s["jpeg"]), "label": s["label"]})
    data = ShardedDataset(source, transform=apply, cache_dir=source.parent / "cache")
    loader = StreamLoader(data, corpus.batch, window=corpus.window, num_workers=workers)
    return lambda: (batch["jpeg"] for batch in loader)


def torsh(corpus: Corpus, folder: Path, workers: int, transform: Transform | None) -> Epoch:
    if not (folder / "arrow/index.json").exists():
        sizes = {"shard_bytes": corpus.shard, "block_bytes": corpus.block}
        write_shards(corpus.rows, folder / "arrow", **sizes)
    return _stream(folder / "arrow", corpus, workers, transform)


def torsh_parquet(corpus: Corpus, folder: Path, workers: int, transform: Any) -> Epoch:
    _parquet(corpus, folder / "parquet")
    return _stream(folder / "parquet", corpus, workers, transform)


def _batched(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    remaining = iter(items)
    while part := list(itertools.islice(remaining, size)):
        yield part


def _parquet(corpus: Corpus, folder: Path) -> list[str]:
    for k, part in enumerate(_batched(corpus.samples, corpus.chunk)):
        folder.mkdir(parents=True, exist_ok=True)
        table = pa.table({"jpeg": [j for j, _ in part], "label": [y for _, y in part]})
        group = corpus.chunk * corpus.block * 16 // corpus.shard
        if not (folder / f"{k:05d}.parquet").exists():
            pq.write_table(table, folder / f"{k:05d}.parquet", row_group_size=group)
    return sorted(map(str, folder.glob("*.parquet")))


def torsh_tar(corpus: Corpus, folder: Path, workers: int, transform: Transform | None) -> Epoch:
    _tars(corpus, folder / "tar")
    data = ShardedDataset(folder / "tar", decode="bytes", transform=transform and _from_tar)
    loader = StreamLoader(data, corpus.batch, window=corpus.window, num_workers=workers)
    name = "jpeg" if transform else "jpg"
    return lambda: (batch[name] for batch in loader)


def _from_tar(sample: dict) -> dict:
    return {"jpeg": to_crop(sample["jpg"]), "label": int(sample["cls"])}


def _tars(corpus: Corpus, folder: Path) -> list[str]:
    for k, part in enumerate(_batched(enumerate(corpus.samples), corpus.chunk)):
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / f"{k:05d}.tar").exists():
            continue
        with tarfile.open(folder / f"{k:05d}.tar", "w") as tar:
            for n, (jpeg, label) in part:
                for suffix, content in (("jpg", jpeg), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{n:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return sorted(map(str, folder.glob("*.tar")))


def torsh_jsonl(corpus: Corpus, folder: Path, workers: int, transform: Transform | None) -> Epoch:
    folder.mkdir(exist_ok=True)
    if not (folder / "all.jsonl").exists():
        with (folder / "all.jsonl").open("w") as file:
            for row in corpus.rows:
                line = {**row, "jpeg": base64.b64encode(row["jpeg"]).decode()}
                file.write(json.dumps(line) + "\n")
    after = transform or bytes
    return _stream(folder / "all.jsonl", corpus, workers, lambda s: after(base64.b64decode(s)))


def in_memory(corpus: Corpus, folder: Path, workers: int, transform: Transform | None) -> Epoch:
    del folder
    return _map_style(list(corpus.rows), corpus, workers, transform)


def _map_style(data: Any, corpus: Corpus, workers: int, transform: Transform | None) -> Epoch:
    data = data if transform is None else Mapped(data, transform)
    loader = DataLoader(data, corpus.batch, shuffle=True, drop_last=True, num_workers=workers)
    return lambda: (batch["jpeg"] for batch in loader)


def hf_datasets(corpus: Corpus, folder: Path, workers: int, transform: Transform | None) -> Epoch:
    from datasets import Dataset, disable_progress_bars, load_from_disk

    disable_progress_bars()
    if not folder.exists():
        Dataset.from_list(list(corpus.rows)).save_to_disk(str(folder))
    return _map_style(load_from_disk(str(folder)), corpus, workers, transform)


def hf_streaming(corpus: Corpus, folder: Path, workers: int, transform: Transform | None) -> Epoch:
    from datasets import load_dataset

    files = _parquet(corpus, folder / "parquet")
    cache = str(folder / "cache")
    data = load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=cache)
    data = data.shuffle(seed=0, buffer_size=len(corpus.samples) // 5)
    if transform is not None:
        data = data.map(lambda s: {"jpeg": transform(s["jpeg"]), "label": s["label"]})
    loader = DataLoader(data, corpus.batch, drop_last=True, num_workers=workers)
    return lambda: (batch["jpeg"] for batch in loader)


def litdata(corpus: Corpus, folder: Path, workers: int, transform: Transform | None) -> Epoch:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    if not folder.exists():
        writer = BinaryWriter(str(folder), chunk_bytes=corpus.shard)
        for n, row in enumerate(corpus.rows):
            writer[n] = row
        writer.done()
        writer.merge()
    apply = transform and (lambda s: {"jpeg": transform(s["jpeg"]), "label": s["label"]})
    data = StreamingDataset(str(folder), shuffle=True, drop_last=True, transform=apply)
    size = {"batch_size": corpus.batch, "drop_last": True, "num_workers": workers}
    loader = StreamingDataLoader(data, **size)
    return lambda: (batch["jpeg"] for batch in loader)


def mosaic(corpus: Corpus, folder: Path, workers: int, transform: Transform | None) -> Epoch:
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    if not folder.exists():
        columns = {"jpeg": "bytes", "label": "int"}
        with MDSWriter(out=str(folder), columns=columns, size_limit=corpus.shard) as writer:
            for row in corpus.rows:
                writer.write(row)
    clean_stale_shared_memory()
    data: Any = StreamingDataset(local=str(folder), shuffle=True, batch_size=corpus.batch)
    if transform is not None:
        plain = data.get_item
        data.get_item = lambda n, *rest: {
            **(sample := plain(n, *rest)),
            "jpeg": transform(sample["jpeg"]),
        }
    loader = DataLoader(data, corpus.batch, drop_last=True, num_workers=workers)
    return lambda: (batch["jpeg"] for batch in loader)


def webdataset(corpus: Corpus, folder: Path, workers: int, transform: Transform | None) -> Epoch:
    import webdataset as wds

    shards = _tars(corpus, folder)
    data = wds.WebDataset(shards, shardshuffle=len(shards), empty_check=False)
    data = data.shuffle(len(corpus.samples) // 5).to_tuple("jpg", "cls")
    if transform is not None:
        data = data.map_tuple(transform, int)
    data = data.batched(corpus.batch, partial=False)
    loader = wds.WebLoader(data, batch_size=None, num_workers=workers)
    return lambda: (batch[0] for batch in loader)


OURS = "torsh_data, Arrow"
ALONE = "decoding alone, two processes"
BOUND = "torch DataLoader, list in memory"
CONTENDERS: dict[str, Callable[[Corpus, Path, int, Transform | None], Epoch]] = {
    OURS: torsh,
    "torsh_data, Parquet": torsh_parquet,
    "torsh_data, tar": torsh_tar,
    "torsh_data, JSON Lines": torsh_jsonl,
    BOUND: in_memory,
    "HF datasets, map-style": hf_datasets,
    "HF datasets, streaming": hf_streaming,
    "litdata": litdata,
    "MosaicML Streaming": mosaic,
    "WebDataset": webdataset,
}


def available(
    corpus: Corpus, folder: Path, workers: int, transform: Transform | None = None
) -> dict[str, Epoch]:
    made = {}
    for number, (name, make) in enumerate(CONTENDERS.items()):
        try:
            made[name] = make(corpus, folder / str(number), workers, transform)
        except ImportError as error:
            print(f"{name}: left out, {error}")
    return made


def check(epoch: Epoch, corpus: Corpus, name: str, transform: Transform | None) -> None:
    """Every image that comes is one of the stored ones, and hardly any is missing."""
    if transform is not None:
        first = next(epoch())
        shapes = {tuple(image.shape) for image in first}
        if shapes != {(3, 224, 224)} or any(image.dtype != torch.uint8 for image in first):
            raise RuntimeError(f"{name} delivered {shapes}")
        return
    stored = {jpeg for jpeg, _ in corpus.samples}
    seen = {bytes(jpeg) for batch in epoch() for jpeg in batch}
    if not seen <= stored or len(seen) < 0.9 * len(stored):
        raise RuntimeError(f"{name} delivered other contents")


def cpu_seconds() -> float:
    """Of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def timed(epoch: Epoch) -> dict[str, float]:
    """One epoch, or as much of it as comes in three seconds."""
    begin, cpu = time.perf_counter(), cpu_seconds()
    batches = epoch()
    head = next(batches)
    first, count = time.perf_counter() - begin, len(head)
    was_stopped = False
    for batch in batches:
        count += len(batch)
        was_stopped = time.perf_counter() - begin > ENOUGH
        if was_stopped:
            break
    wall = time.perf_counter() - begin
    close = getattr(batches, "close", None)
    if close is not None:
        close()
    cpu = cpu_seconds() - cpu
    later = 0 if was_stopped else count - len(head)  # a filled buffer comes out in a burst
    return {
        "whole": count / wall,
        "rate": later / (wall - first) if later else count / wall,
        "cpu_us": cpu / count * 1e6,
        "first_ms": first * 1e3,
    }


def delivery(
    corpus: Corpus, folder: Path, workers: int, rounds: int, transform: Transform | None = None
) -> list[Row]:
    contenders = available(corpus, folder, workers, transform)
    for name, epoch in contenders.items():
        check(epoch, corpus, name, transform)
    if transform is not None:
        contenders[ALONE] = lambda: decode_alone(corpus)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, epoch in contenders.items():
            found[name].append(timed(epoch))
    ours = statistics.median(each["rate"] for each in found[OURS])
    rows = []
    for name, each in found.items():
        rates = [one["rate"] for one in each]
        rate = statistics.median(rates)
        rows.append(
            {
                "contender": name,
                "samples_per_s": rate,
                "spread": (max(rates) - min(rates)) / rate,
                "with_start": statistics.median(one["whole"] for one in each),
                "cpu_us_per_sample": statistics.median(one["cpu_us"] for one in each),
                "first_batch_ms": statistics.median(one["first_ms"] for one in each),
                "ours_is_times": ours / rate,
            }
        )
    return rows


def tokens(folder: Path, rounds: int, count: int = 20_000, length: int = 2048) -> list[Row]:
    """Rows of a fixed length against one gather from the same bytes in a plain mapped file."""
    rows = np.random.default_rng(0).integers(0, 2**31 - 1, (count, length), dtype=np.int32)
    rows.tofile(folder / "tokens.bin")
    mapped = torch.from_numpy(np.memmap(folder / "tokens.bin", np.int32, "c").reshape(rows.shape))
    shards = folder / "tokens"
    write_shards(({"tokens": row} for row in rows), shards, shard_bytes="64MB", block_bytes="4MB")
    loader = StreamLoader(ShardedDataset(shards), 256, window="100MB")
    order = loader._order
    places = [torch.from_numpy(order(0, np.arange(k, k + 256))) for k in range(0, count - 256, 256)]
    for batch in loader:
        if not torch.equal(batch["tokens"], mapped.index_select(0, batch["index"])):
            raise RuntimeError("other tokens were delivered")
    contenders: dict[str, Callable[[], Any]] = {
        "index_select from a mapped file": lambda: [mapped.index_select(0, at) for at in places],
        "torsh_data, Arrow": lambda: [None for _ in loader],
    }
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(2 * rounds):
        for name, run in contenders.items():
            begin = time.process_time()
            made = run()
            found[name].append((time.process_time() - begin) / len(made) / 256 * 1e6)
            del made
    medians = {name: statistics.median(each) for name, each in found.items()}
    limit = medians["index_select from a mapped file"]
    return [
        {
            "contender": name,
            "cpu_us_per_row": median,
            "spread": (max(found[name]) - min(found[name])) / median,
            "gb_per_s": 4 * length / median / 1e3,
            "percent_of_limit": 100 * limit / median,
        }
        for name, median in medians.items()
    ]


def decode_alone(corpus: Corpus) -> Iterator[list[bytes]]:
    """All images, decoded and cropped by two processes that do nothing else."""
    fork = multiprocessing.get_context("fork")
    halves = [corpus.samples[k::2] for k in range(2)]
    workers = [fork.Process(target=_decode, args=(half,)) for half in halves]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    yield [jpeg for jpeg, _ in corpus.samples]


def _decode(samples: list[tuple[bytes, int]]) -> None:
    for jpeg, _ in samples:
        to_crop(jpeg)


def decoding(corpus: Corpus, folder: Path, rounds: int) -> list[Row]:
    rows = delivery(corpus, folder, 2, rounds, to_crop)
    limit = next(row for row in rows if row["contender"] == ALONE)
    for row in rows:
        row["percent_of_limit"] = 100 * row["samples_per_s"] / limit["samples_per_s"]
        row["percent_by_cpu"] = 100 * limit["cpu_us_per_sample"] / row["cpu_us_per_sample"]
    return rows


def shuffle_quality(rows: int = 65_536, epochs: int = 16) -> list[Row]:
    """What a batch of 256 is worth in sorted order, and where the rows of a block are alike."""
    lines = []
    for block in (64, 32):
        for window in (2048, 4096, 8192, 16_384, rows):
            order = Order(rows, 0, window, block)
            values = [effective_batch(order, 256, rows // 256, epoch) for epoch in range(epochs)]
            mean = 1 / statistics.mean(1 / value for value in values)
            live = 100 * min(1.0, 2 * window / rows)
            line = {"block_rows": block, "window_rows": window, "percent_live": live}
            line |= {"worth": mean, "least": min(values), "most": max(values)}
            lines.append({**line, "worth_if_blocks_are_alike": worth_of_blocks(order, epochs)})
    return lines


def worth_of_blocks(order: Order, epochs: int) -> float:
    """The same where all rows of a block are alike, and blocks have nothing in common."""
    rows, shared, batches = order.rows, 0, 0
    for epoch in range(epochs):
        blocks = order(epoch, np.arange(rows)) // order.block_rows
        for batch in blocks.reshape(-1, 256):
            counts = np.unique(batch, return_counts=True)[1]
            shared += int((counts * counts).sum())
            batches += 1
    of_one_kind = shared / batches / 256**2  # two rows of a batch
    chance = order.block_rows / rows
    return (1 - chance) / (of_one_kind - chance)


def order_cost() -> list[Row]:
    chunks, rows = 30, 10**9
    lines = []
    for place in (0, rows // 2, rows - chunks * 8192):
        begin = time.perf_counter()
        order = Order(rows, 0, 2_000_000, 4000)
        order(0, np.arange(8192) + place)
        start = time.perf_counter() - begin
        begin = time.process_time()
        for chunk in range(chunks):
            order(0, np.arange(8192) + place + chunk * 8192)
        each = (time.process_time() - begin) / chunks / 8192
        tracemalloc.start()
        Order(rows, 0, 2_000_000, 4000)(0, np.arange(8192) + place)
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        line = {"position": place, "start_ms": start * 1e3, "peak_mb": memory / 1e6}
        lines.append({**line, "us_per_sample": each * 1e6})
    return lines


class Numbers(torch.utils.data.Dataset):
    """As many samples as one likes."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, n: int) -> dict[str, int]:
        return {"n": n}


def states(corpus: Corpus, folder: Path, rounds: int) -> list[Row]:
    """What saving the place costs, after each batch, with two workers."""
    data = ShardedDataset(folder / "0/arrow")
    loaders: dict[str, Any] = {"torsh_data": StreamLoader(data, corpus.batch, num_workers=2)}
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader

        plain = Mapped(data, bytes)
        size = {"batch_size": corpus.batch, "shuffle": True, "num_workers": 2}
        loaders["StatefulDataLoader"] = StatefulDataLoader(plain, **size)
    except ImportError as error:
        print(f"StatefulDataLoader: left out, {error}")
    lines = []
    for name, loader in loaders.items():
        costs: list[float] = []
        state: Any = None
        batches = iter(loader)
        for _ in range(20 * rounds):
            next(batches)
            begin = time.perf_counter()
            state = loader.state_dict()
            costs.append(time.perf_counter() - begin)
        file = io.BytesIO()
        torch.save(state, file)
        as_json = len(json.dumps(state, default=lambda value: np.asarray(value).tolist()))
        line = {"loader": name, "us": statistics.median(costs) * 1e6, "json_bytes": as_json}
        lines.append({**line, "torch_save_bytes": file.tell()})
    return lines


def first_batches(corpus: Corpus, folder: Path, rounds: int) -> list[Row]:
    """Time to the first batch of a new loader, and of one that takes up a saved place."""
    shards = folder / "0/arrow"

    def stream() -> StreamLoader:
        return StreamLoader(ShardedDataset(shards), corpus.batch, window=corpus.window)

    def huge() -> StreamLoader:
        return StreamLoader(Numbers(2 * 10**9), 256)

    cases: dict[str, tuple[Callable[[], StreamLoader], int | None]] = {
        "2e9 numbers, cold start": (huge, None),
        "2e9 numbers, resumed at 0": (huge, 0),
        "2e9 numbers, resumed at 1e9": (huge, 10**9),
        "cifar, cold start": (stream, None),
        "cifar, resumed at 0": (stream, 0),
        "cifar, resumed at 8,000": (stream, 8_000),
        "cifar, resumed at 25,000": (stream, 25_000),
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(10 * rounds):
        for name, (make, position) in cases.items():
            warm = make()
            next(iter(warm))  # or else the case before would decide what is in the CPU's caches
            state = warm.state_dict()
            begin = time.process_time()
            loader = make()
            if position is not None:
                loader.load_state_dict({**state, "position": position})
            next(iter(loader))
            found[name].append(time.process_time() - begin)
            del loader, warm  # letting go of the mapped files is not the next case's cost
    lines = []
    for name, each in found.items():
        cold = statistics.median(found[name.split(",")[0] + ", cold start"])
        median = statistics.median(each)
        lines.append({"case": name, "cpu_ms": median * 1e3, "times_cold_start": median / cold})
    return lines


def goals(result: dict[str, Any]) -> list[Row]:
    """What was wanted, and what came out."""

    def rate(table: str, name: str, column: str = "ours_is_times") -> float | None:
        rows = [row for row in result[table] if row["contender"] == name]
        return rows[0].get(column) if rows else None

    def by_cpu(table: str, name: str) -> float | None:
        each = [rate(table, one, "cpu_us_per_sample") for one in (name, OURS)]
        return each[0] / each[1] if each[0] and each[1] else None

    wanted: list[tuple[str, float | None, str, float]] = []
    for table, name, least in (
        ("cifar, 0 workers", "litdata", 2.0),
        ("cifar, 0 workers", "HF datasets, map-style", 1.5),
        ("cifar, 2 workers", "litdata", 2.0),
        ("cifar, 2 workers", "HF datasets, map-style", 1.5),
        ("photographs, 2 workers", "litdata", 2.0),
    ):
        if table in result:
            wanted.append((f"{table}: times {name}", rate(table, name), ">=", least))
            wanted.append((f"{table}: times {name}, CPU time", by_cpu(table, name), ">=", least))
    token = rate("token rows", OURS, "percent_of_limit")
    wanted.append(("token rows: % of index_select", token, ">=", 80))
    decoded = rate("decode and crop, 2 workers", OURS, "percent_of_limit")
    wanted.append(("decode and crop, 2 workers: % of decoding alone", decoded, ">=", 90))
    decoded = rate("decode and crop, 2 workers", OURS, "percent_by_cpu")
    wanted.append(("decode and crop, 2 workers: % of it, CPU time", decoded, ">=", 90))
    order, save = result["order of 1e9 samples"], result["state"][0]
    wanted.append(("order: ms to start anywhere", max(o["start_ms"] for o in order), "<=", 100))
    wanted.append(("order: MB", max(o["peak_mb"] for o in order), "<=", 50))
    wanted.append(("order: us a sample", max(o["us_per_sample"] for o in order), "<=", 0.5))
    for block in (64, 32):
        worth = max(
            line["worth"]
            for line in result["what a batch of 256 is worth"]
            if line["block_rows"] == block and line["percent_live"] <= 12.5
        )
        wanted.append((f"batch of 256, 12.5 % live, blocks of {block} rows", worth, ">=", 100))
    wanted.append(("state_dict: us", save["us"], "<=", 20))
    wanted.append(("state_dict: bytes", save["json_bytes"], "<=", 500))
    for title, case in (("2e9 numbers", "2e9"), ("shards, in mid-epoch", "cifar")):
        of = [line for line in result["first batch"] if line["case"].startswith(case)]
        slowest = max(line["times_cold_start"] for line in of)
        wanted.append((f"first batch of {title}: times a cold start", slowest, "<=", 1.1))
    return [
        {
            "goal": goal,
            "wanted": f"{sign} {limit:g}",
            "reached": value,
            "met": "not measured"
            if value is None
            else "yes"
            if (value >= limit if sign == ">=" else value <= limit)
            else "NO",
        }
        for goal, value, sign, limit in wanted
    ]


def show(title: str, rows: list[Row]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print(f"\n{title}\n{'':2}{columns[0]:52}" + "".join(f"{name:>19}" for name in columns[1:]))
    for row in rows:
        cells = (row.get(name, "") for name in columns[1:])
        texts = (f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        print(
            f"{'':2}{row[columns[0]]!s:52}" + "".join(f"{text:>19}" for text in texts), flush=True
        )


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rounds, small, large = options.rounds, cifar(), photographs()
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores",
        "versions": versions(),
        "cifar": "50,000 JPEGs of CIFAR-10, 0.9 kB each, batches of 256",
        "photographs": f"{len(large.samples):,} crops of scikit-learn's two sample photographs, "
        f"{sum(len(j) for j, _ in large.samples) / len(large.samples) / 1e3:.0f} kB each, "
        "batches of 32",
        "what is counted": "whole epochs from warm page cache, samples_per_s behind the first "
        "batch, with_start from the call on; CPU time is that of all processes, their start "
        "included; contenders take turns; medians; spread is (most - least) / median",
        "what differs": "a plain DataLoader hands out references to samples in memory; buffers of "
        "Hugging Face streaming and WebDataset hold a fifth of the samples, litdata mixes one "
        "chunk; JSON Lines hold base64; a first batch at the start of an epoch comes from one "
        "window, later ones come from two and so from more blocks",
    }
    for name in ("hardware", "versions", "photographs"):
        print(f"{name}: {result[name]}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        for name, corpus in (("cifar", small), ("photographs", large)):
            (folder / name).mkdir()
            for workers in options.workers:
                title = f"{name}, {workers} workers"
                result[title] = delivery(corpus, folder / name, workers, rounds)
                show(title, result[title])
        measured: dict[str, Callable[[], list[Row]]] = {
            "decode and crop, 2 workers": lambda: decoding(large, folder / "photographs", rounds),
            "token rows": lambda: tokens(folder, rounds),
            "order of 1e9 samples": order_cost,
            "what a batch of 256 is worth": shuffle_quality,
            "state": lambda: states(small, folder / "cifar", rounds),
            "first batch": lambda: first_batches(small, folder / "cifar", rounds),
        }
        for title, measure in measured.items():
            result[title] = measure()
            show(title, result[title])
    result["goals"] = goals(result)
    show("goals", result["goals"])
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
