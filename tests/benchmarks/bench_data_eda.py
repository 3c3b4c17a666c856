"""EDA on sentences: ours beside nlpaug, if that is installed, on one core.

nlpaug's RandomWordAug swaps or deletes words of one sentence a call; its synonym augmenter wants to
download a tagger and WordNet, so it cannot run offline. eda_nlp is a script and no package. Ours
makes results from all four operations. A result is one augmented sentence.

    python tests/benchmarks/bench_data_eda.py --rounds 7 --json result.json
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "torsh_data" / "src"))

import torch  # noqa: E402

from torsh_data import text  # noqa: E402

_WORDS = (12, 22)


def sentences(folder: Path) -> list[str]:
    lines = (folder / "text/sst2/train.tsv").read_text().splitlines()
    found = [line.split("\t")[0] for line in lines]
    return [one for one in found if _WORDS[0] <= len(one.split()) <= _WORDS[1]]


def contenders(given: list[str]) -> dict[str, tuple[int, Callable[[], list]]]:
    one, four = text.EDA(num_aug=1), text.EDA(num_aug=4)
    replace = text.SynonymReplacer(p=0.1)
    runs: dict[str, tuple[int, Callable[[], list]]] = {
        "torsh EDA, 4 of a text": (4, lambda: four(given)),
        "torsh EDA, 1 of a text": (1, lambda: one(given)),
        "torsh EDA, 1, text by text": (1, lambda: [one(t) for t in given]),
        "torsh SynonymReplacer": (1, lambda: replace(given)),
    }
    try:
        import nlpaug.augmenter.word as naw
    except ImportError as error:
        print(f"nlpaug is left out: {error}")
        return runs
    for action in ("swap", "delete"):
        theirs = naw.RandomWordAug(action=action)
        runs[f"nlpaug RandomWordAug {action}"] = (
            1,
            lambda theirs=theirs: [theirs.augment(t) for t in given],
        )
    return runs


def check(given: list[str]) -> None:
    """Batches and single texts give the same."""
    eda = text.EDA(num_aug=4)
    if eda(given[:100]) != [eda(one) for one in given[:100]]:
        raise RuntimeError("results depend on the batch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    data = Path(os.environ.get("TORSH_TEST_DATA", ROOT.parent / "shared/data"))
    given = sentences(data)[:1000]
    machine = {
        "device": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    words = sum(len(one.split()) for one in given) / len(given)
    print(machine, f"{len(given)} sentences of SST-2, {words:.1f} words each")
    check(given)
    runs = contenders(given)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _, run in runs.values():
        run()
    for _ in range(options.rounds):
        for name, (_, run) in runs.items():
            begin = time.process_time()
            run()
            times[name].append(time.process_time() - begin)
    rates = {name: [runs[name][0] * len(given) / t for t in taken] for name, taken in times.items()}
    peers = [statistics.median(r) for name, r in rates.items() if name.startswith("nlpaug")]
    print(f"{'':32s} {'results/s/core':>15s} {'lowest':>9s} {'highest':>9s} {'/ best peer':>12s}")
    result = {}
    for name, found in rates.items():
        middle = statistics.median(found)
        ratio = f"{middle / max(peers):.1f}" if peers else "-"
        print(f"{name:32s} {middle:15,.0f} {min(found):9,.0f} {max(found):9,.0f} {ratio:>12s}")
        result[name] = {"median": middle, "lowest": min(found), "highest": max(found)}
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine, "results_per_s_per_core": result}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
