"""Language of many lines: torsh_text's detector against fastText's own engine.

    python tests/benchmarks/bench_text_language.py [--device cpu|cuda] [--model PATH] [--json PATH]

CPU: one thread, CPU seconds (they do not see other programs). CUDA: wall time from strings to
results. "predict" makes Python objects; "scores" leaves log-probabilities on the device. Before
timing, labels are compared with the engine's line by line; where its package is not installed,
CUDA is compared with the CPU.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "torsh_text" / "src"))
DATA = Path(os.environ.get("TORSH_TEST_DATA", ROOT.parent / "shared" / "data")) / "text"


def _lines(count: int) -> list[str]:
    """Tatoeba's lines, numbered so that no two are equal."""
    source = (DATA / "tatoeba" / "sentences.tsv").read_text(encoding="utf-8").splitlines()[1:]
    texts = [line.split("\t")[1] for line in source]
    return [f"{texts[i % len(texts)]} {i // len(texts)}" for i in range(count)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _gather_rate(device: torch.device, clock: Callable[[], float]) -> float:
    """Random 4-byte reads a second from a table of 2,000,000, the hashing's tightest limit."""
    table = torch.arange(2_000_000, dtype=torch.int32, device=device)
    size = 1 << (16 if device.type == "cpu" else 24)
    places = torch.randint(len(table), (size,), device=device)
    best = float("inf")
    for _ in range(20):
        _wait(device)
        start = clock()
        table.index_select(0, places)
        _wait(device)
        best = min(best, clock() - start)
    return size / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", type=Path, default=None, help="lid.176.ftz, if not installed")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--lines", type=int, default=None)
    arguments = parser.parse_args()
    from torsh_text._language import LanguageDetector, _installed_model

    device = torch.device(arguments.device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    if device.type == "cpu":
        torch.set_num_threads(1)
    hardware = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU, one thread"
    )
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    path = arguments.model or _installed_model()
    texts = _lines(arguments.lines or (1_000_000 if device.type == "cuda" else 25_200))
    size = sum(len(text.encode()) for text in texts)
    print(hardware, versions)

    detector = LanguageDetector.from_fasttext(path, device=device)
    window = 65_536 if device.type == "cuda" else 2048

    @torch.inference_mode()
    def scores() -> None:
        for start in range(0, len(texts), window):
            detector(*detector.pack(texts[start : start + window])).max(1)

    contenders: dict[str, Callable[[], Any]] = {
        "torsh_text, predict": lambda: detector.predict(texts),
        "torsh_text, scores": scores,
    }
    try:
        import fasttext
    except ImportError:
        expected = [
            x.code for x in LanguageDetector.from_fasttext(path, device="cpu").predict(texts)
        ]
    else:
        engine = fasttext.load_model(str(path))
        contenders["fasttext-predict"] = lambda: [engine.predict(text) for text in texts]
        expected = [labels[0][9:] for labels, _ in contenders["fasttext-predict"]()]
    found = [x.code for x in contenders["torsh_text, predict"]()]
    wrong = sum(a != b for a, b in zip(found, expected, strict=True))
    print(f"labels that differ from {'fastText' if 'fasttext' in sys.modules else 'CPU'}: {wrong}")
    if device.type == "cpu" and wrong:
        raise SystemExit("the labels are not fastText's")
    if wrong > len(texts) / 100_000:  # two languages within float32 rounding of each other
        raise SystemExit("the labels are not the CPU's")
    ids, _ = detector.pack(texts[:window])
    features = len(ids) / min(window, len(texts))
    # a look-up for each n-gram of 2 to 4 characters, whether the model kept it or not
    lookups = 3 * sum(len(text) + 2 for text in texts)
    limit = len(texts) * _gather_rate(device, clock) / lookups
    times: dict[str, list[float]] = {key: [] for key in contenders}
    for _ in range(arguments.repeats):
        for key, run in contenders.items():
            gc.collect()
            _wait(device)
            start = clock()
            run()
            _wait(device)
            times[key].append(clock() - start)
    peer = times.get("fasttext-predict")
    best_peer = statistics.median(peer) if peer else None
    unit = "s" if device.type == "cuda" else "core-s"
    print(f"{len(texts):,} lines, {size:,} bytes, {features:.0f} features a line")
    print(
        f"{'':<22}{'median':>9}{'spread':>8}{'lines/' + unit:>16}{'MB/' + unit:>12}"
        f"{'% of gather':>13}{'to peer':>9}"
    )
    rows = []
    for key, taken in times.items():
        median = statistics.median(taken)
        row = {
            "contender": key,
            "median_s": median,
            "spread": (max(taken) - min(taken)) / median,
            "lines_per_s": len(texts) / median,
            "bytes_per_s": size / median,
            "gather_fraction": len(texts) / median / limit,
            "ratio_to_peer": best_peer / median if best_peer else None,
        }
        rows.append(row)
        ratio = f"{best_peer / median:.2f}x" if best_peer else "-"
        print(
            f"{key:<22}{median:>9.3f}{row['spread']:>8.0%}{row['lines_per_s']:>16,.0f}"
            f"{size / median / 1e6:>12.1f}{row['gather_fraction']:>13.0%}{ratio:>9}"
        )
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    if arguments.json:
        result = {
            "command": "python tests/benchmarks/bench_text_language.py",
            "hardware": hardware,
            "versions": versions,
            "lines": len(texts),
            "bytes": size,
            "labels_that_differ": wrong,
            "rows": rows,
        }
        temporary = arguments.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        temporary.replace(arguments.json)


if __name__ == "__main__":
    main()
