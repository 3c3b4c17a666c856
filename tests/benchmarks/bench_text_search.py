"""Exact search: memory and speed of float32, int8 and binary vectors.

    python tests/benchmarks/bench_text_search.py [--device cpu|cuda] [--rows N] [--json PATH]

Random vectors of length one, 384 entries, the 10 best rows. CPU: one thread, CPU seconds; CUDA:
wall time. Peers: sentence_transformers.util.semantic_search and, if there is one, faiss (flat).
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "torsh_text" / "src"))
DIM = 384
BEST = 10


def _peers(x: Tensor) -> dict[str, Callable[[Tensor], Any]]:
    found: dict[str, Callable[[Tensor], Any]] = {}
    try:
        from sentence_transformers.util import dot_score, semantic_search
    except ImportError:
        pass
    else:
        found["sentence-transformers, float32"] = lambda q: semantic_search(
            q, x, top_k=BEST, score_function=dot_score
        )
    try:
        import faiss
    except ImportError:
        return found
    faiss.omp_set_num_threads(1)
    flat = faiss.IndexFlatIP(DIM)
    flat.add(x.cpu().numpy())
    found["faiss flat, float32"] = lambda q: flat.search(q.cpu().numpy(), BEST)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=100_000)
    arguments = parser.parse_args()
    from torsh_text import quantize, search

    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    if not cuda:
        torch.set_num_threads(1)
    hardware = torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU, 1 thread"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    print(hardware, versions)
    torch.manual_seed(0)
    x = F.normalize(torch.randn(arguments.rows, DIM), dim=1).to(device)
    fine, signs = quantize(x, "int8"), quantize(x, "binary")
    jobs: dict[str, tuple[int, Callable[[Tensor], Any]]] = {
        "float32": (x.nbytes, lambda q: search(q, x, BEST, metric="dot")),
        "int8": (fine.nbytes, lambda q: search(q, fine, BEST, metric="dot")),
        "binary": (signs.nbytes, lambda q: search(q, signs, BEST, metric="dot")),
        "binary, rescored with int8": (
            signs.nbytes + fine.nbytes,
            lambda q: search(q, signs, BEST, metric="dot", rescore=fine),
        ),
        "binary queries (Hamming)": (
            signs.nbytes,
            lambda q: search(quantize(q, "binary"), signs, BEST, metric="dot"),
        ),
    }
    peers = _peers(x)
    jobs |= {name: (x.nbytes, job) for name, job in peers.items()}
    clock = time.perf_counter if cuda else time.process_time
    measured = []
    for count in (1, 32, 256):
        q = F.normalize(torch.randn(count, DIM), dim=1).to(device)
        exact = search(q, x, BEST, metric="dot").ids
        decoded = search(q, fine.dequantize(), BEST, metric="dot").ids
        if not torch.equal(search(q, fine, BEST, metric="dot").ids, decoded):
            raise SystemExit("int8 search differs from search in the decoded vectors")
        for name, job in peers.items():
            rows = job(q)
            if name.startswith("faiss"):
                theirs = rows[1].tolist()
            else:
                theirs = [[hit["corpus_id"] for hit in row] for row in rows]
            if theirs != exact.tolist():
                raise SystemExit(f"{name} finds other rows")
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for repeat in range(arguments.repeats + 1):
            for name, (_, job) in jobs.items():
                if cuda:
                    torch.cuda.synchronize()
                start = clock()
                job(q)
                if cuda:
                    torch.cuda.synchronize()
                if repeat:
                    times[name].append(clock() - start)
        best_peer = min((statistics.median(times[name]) for name in peers), default=float("nan"))
        print(f"\n{count} queries, {arguments.rows:,} x {DIM}")
        print(
            f"{'':<32}{'MB':>8}{'median ms':>11}{'spread':>8}{'queries/s':>11}{'to best peer':>14}"
        )
        for name, t in times.items():
            median = statistics.median(t)
            row = {
                "queries": count,
                "contender": name,
                "bytes": jobs[name][0],
                "median_s": median,
                "spread": (max(t) - min(t)) / median,
                "queries_per_s": count / median,
                "ratio_to_best_peer": best_peer / median,
            }
            measured.append(row)
            print(
                f"{name:<32}{row['bytes'] / 1e6:>8.1f}{median * 1e3:>11.2f}{row['spread']:>8.0%}"
                f"{row['queries_per_s']:>11,.0f}{row['ratio_to_best_peer']:>13.2f}x"
            )
    if arguments.json:
        result = {"command": "python tests/benchmarks/bench_text_search.py", "hardware": hardware}
        result |= {"versions": versions, "rows": measured}
        temporary = arguments.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        temporary.replace(arguments.json)


if __name__ == "__main__":
    main()
