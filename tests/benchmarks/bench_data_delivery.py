"""Delivery of JPEG bytes: StreamLoader, a plain DataLoader and whichever peers are installed.

CIFAR-10's 50,000 training images as JPEG bytes (0.9 kB each), from warm page cache, in random
order, in batches of 256, without decoding. What is not the same: the plain DataLoader holds all
samples in memory and hands out references (0 workers), so it is the bound for Python code rather
than a peer; webdataset mixes a buffer of 10,000 samples, litdata one chunk at a time.

    python tests/benchmarks/bench_data_delivery.py --rounds 7 --json result.json
"""

import argparse
import json
import logging
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "torsh_data" / "src"))

from torsh_data import ShardedDataset, StreamLoader, write_shards  # noqa: E402
from torsh_data._order import Order, effective_batch  # noqa: E402

BATCH = 256
Samples = list[tuple[bytes, int]]
Epoch = Callable[[], Iterator[list[bytes]]]


def cifar() -> Samples:
    path = Path(os.environ.get("TORSH_TEST_DATA", ROOT / "../shared/data")) / "cifar10/train.npz"
    if not path.exists():
        raise SystemExit(f"needs {path}; set TORSH_TEST_DATA")
    stored = np.load(path)
    data, offset = stored["data"].tobytes(), stored["offset"].tolist()
    return [
        (data[a:b], int(label))
        for a, b, label in zip(offset[:-1], offset[1:], stored["label"], strict=True)
    ]


class InMemory:
    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, n: int) -> dict:
        jpeg, label = self.samples[n]
        return {"jpeg": jpeg, "label": label}


def torsh(samples: Samples, folder: Path, workers: int) -> Epoch:
    if not (folder / "index.json").exists():
        write_shards(
            ({"jpeg": j, "label": y} for j, y in samples),
            folder,
            shard_bytes="8MB",
            block_bytes="64kB",
        )
    loader = StreamLoader(ShardedDataset(folder), BATCH, window="4MB", num_workers=workers)
    return lambda: (batch["jpeg"] for batch in loader)


def in_memory(samples: Samples, folder: Path, workers: int) -> Epoch:
    del folder
    loader = DataLoader(InMemory(samples), BATCH, shuffle=True, drop_last=True, num_workers=workers)
    return lambda: (batch["jpeg"] for batch in loader)


def hf_datasets(samples: Samples, folder: Path, workers: int) -> Epoch:
    from datasets import Dataset, load_from_disk

    if not folder.exists():
        columns = {"jpeg": [j for j, _ in samples], "label": [y for _, y in samples]}
        Dataset.from_dict(columns).save_to_disk(str(folder))
    data = load_from_disk(str(folder))
    loader = DataLoader(data, BATCH, shuffle=True, drop_last=True, num_workers=workers)
    return lambda: (batch["jpeg"] for batch in loader)


def _pass_on(sample: dict) -> dict:
    return sample


def litdata(samples: Samples, folder: Path, workers: int) -> Epoch:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    if not folder.exists():
        writer = BinaryWriter(str(folder), chunk_bytes="8MB")
        for n, (jpeg, label) in enumerate(samples):
            writer[n] = {"jpeg": jpeg, "label": label}
        writer.done()
        writer.merge()
    data = StreamingDataset(str(folder), shuffle=True, drop_last=True)
    loader = StreamingDataLoader(data, batch_size=BATCH, drop_last=True, num_workers=workers)
    return lambda: (batch["jpeg"] for batch in loader)


def webdataset(samples: Samples, folder: Path, workers: int) -> Epoch:
    import webdataset as wds

    if not folder.exists():
        folder.mkdir()
        with wds.ShardWriter(str(folder / "%05d.tar"), maxsize=8e6, verbose=0) as sink:
            for n, (jpeg, label) in enumerate(samples):
                sink.write({"__key__": f"{n:06d}", "jpg": jpeg, "cls": str(label)})
    shards = sorted(map(str, folder.glob("*.tar")))
    data = wds.WebDataset(shards, shardshuffle=len(shards), empty_check=False)
    data = data.shuffle(10_000).to_tuple("jpg", "cls").batched(BATCH, partial=False)
    loader = wds.WebLoader(data, batch_size=None, num_workers=workers)
    return lambda: (batch[0] for batch in loader)


CONTENDERS = {
    "torsh StreamLoader": torsh,
    "torch DataLoader, list in memory": in_memory,
    "HF datasets + DataLoader": hf_datasets,
    "litdata": litdata,
    "webdataset": webdataset,
}


def available(samples: Samples, folder: Path, workers: int) -> dict[str, Epoch]:
    made = {}
    for number, (name, make) in enumerate(CONTENDERS.items()):
        try:
            made[name] = make(samples, folder / str(number), workers)
        except ImportError as error:
            print(f"{name}: left out, {error}")
    return made


def check(epoch: Epoch, samples: Samples, name: str) -> None:
    """Every image that comes is one of the stored ones, and hardly any is missing."""
    stored = {jpeg for jpeg, _ in samples}
    seen = {bytes(jpeg) for batch in epoch() for jpeg in batch}
    if not seen <= stored or len(seen) < 0.97 * len(stored):
        raise RuntimeError(f"{name} delivered other contents")


def timed(epoch: Epoch) -> tuple[float, float]:
    """Samples per second, and microseconds of this process's CPU time per sample."""
    wall, cpu, count = time.perf_counter(), time.process_time(), 0
    for batch in epoch():
        count += len(batch)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return count / wall, cpu / count * 1e6


def copy_limit(samples: Samples) -> float:
    """Samples per second of copying each image's bytes and no more."""
    views = [memoryview(jpeg) for jpeg, _ in samples]
    begin = time.perf_counter()
    for view in views:
        bytes(view)
    return len(views) / (time.perf_counter() - begin)


def shuffle_quality(rows: int = 65_536, block: int = 64, epochs: int = 16) -> list[dict]:
    """What a batch of 256 is worth on data stored in sorted order, by window."""
    lines = []
    for window in (2048, 4096, 8192, 16_384, rows):
        order = Order(rows, 0, window, block)
        values = [effective_batch(order, BATCH, rows // BATCH, epoch) for epoch in range(epochs)]
        mean = 1 / statistics.mean(1 / value for value in values)
        in_use = min(1.0, 2 * window / rows)
        lines.append({"window": window, "in_use": in_use, "worth": mean, "epochs": values})
    return lines


def order_cost() -> dict[str, float]:
    order, chunks = Order(10**9, 0, 2_000_000, 4000), 30
    begin = time.perf_counter()
    order(0, np.arange(8192) + 500_000_000)
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    for chunk in range(chunks):
        order(0, np.arange(8192) + chunk * 8192)
    each = (time.perf_counter() - begin) / chunks / 8192
    return {"first_chunk_ms": first * 1e3, "us_per_sample": each * 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    samples = cifar()
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(machine)
    limit = copy_limit(samples)
    result = {
        "command": " ".join(sys.argv),
        "machine": machine,
        "copy_limit": limit,
        "delivery": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for workers in options.workers:
            contenders = available(samples, folder, workers)
            for name, epoch in contenders.items():
                check(epoch, samples, name)
            rates: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
            for _ in range(options.rounds):
                for name, epoch in contenders.items():
                    rates[name].append(timed(epoch))
            lines = {
                name: {
                    "samples_per_s": statistics.median(r for r, _ in pairs),
                    "lowest": min(r for r, _ in pairs),
                    "highest": max(r for r, _ in pairs),
                    "host_cpu_us": statistics.median(c for _, c in pairs),
                }
                for name, pairs in rates.items()
            }
            ours = lines["torsh StreamLoader"]["samples_per_s"]
            peers = [
                line["samples_per_s"]
                for name, line in lines.items()
                if not name.startswith(("torsh", "torch"))
            ]
            print(f"\n{workers} workers; copying the bytes alone: {limit:,.0f} samples/s")
            print(
                f"{'':34}{'samples/s':>10}{'lowest':>10}{'highest':>10}{'% limit':>9}{'CPU us':>8}"
            )
            for name, line in lines.items():
                share = 100 * line["samples_per_s"] / limit
                print(
                    f"{name:34}{line['samples_per_s']:>10,.0f}{line['lowest']:>10,.0f}"
                    f"{line['highest']:>10,.0f}{share:>9.1f}{line['host_cpu_us']:>8.2f}"
                )
            if peers:
                print(f"{ours / max(peers):.2f} times the best peer that reads from disk")
            result["delivery"][str(workers)] = lines
        shutil.rmtree(folder, ignore_errors=True)
    result["shuffle"], result["order"] = shuffle_quality(), order_cost()
    print("\nwindow  in use  a batch of 256 is worth (65,536 sorted rows, blocks of 64)")
    for line in result["shuffle"]:
        print(f"{line['window']:>6}{line['in_use']:>8.1%}{line['worth']:>8.0f}")
    print(f"order of 1e9 samples: {result['order']}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
