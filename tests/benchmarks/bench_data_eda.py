"""EDA on sentences: ours beside nlpaug and the algorithm of eda_nlp, on one core.

nlpaug's RandomWordAug swaps or deletes words of one sentence a call; its synonym augmenter wants to
download a tagger and WordNet, so it cannot run offline. eda_nlp is a script and no package: its
algorithm is stated again here over nltk's WordNet reader, which needs the environment variable
TORSH_WORDNET to name a folder with the data files of WordNet 3.0. Ours makes results from all four
operations. A result is one augmented sentence. What is not installed is left out and named.

    python tests/benchmarks/bench_data_eda.py --rounds 7 --json result.json
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "torsh_data" / "src"))

import torch  # noqa: E402

from torsh_data import text  # noqa: E402
from torsh_data.text._stop_words import ENGLISH as STOP_WORDS  # noqa: E402

_WORDS = (12, 22)


def sentences(folder: Path) -> list[str]:
    lines = (folder / "text/sst2/train.tsv").read_text().splitlines()
    found = [line.split("\t")[0] for line in lines]
    return [one for one in found if _WORDS[0] <= len(one.split()) <= _WORDS[1]]


class EdaNlp:
    """Wei and Zou's recipe: lower case, no punctuation, synonyms of all senses, look-ups each time.

    For 4 results it makes 2 by each of the four operations and keeps 4 of the 8.
    """

    def __init__(self, folder: Path) -> None:
        import nltk
        from nltk.corpus.reader.wordnet import WordNetCorpusReader

        # nltk wants one more file than Debian's package has: names of topics, not used here
        self._own = tempfile.TemporaryDirectory()
        own = Path(shutil.copytree(folder, self._own.name, dirs_exist_ok=True))
        if not (own / "lexnames").exists():
            lines = [f"{n:02d}\ttopic{n}\t0\n" for n in range(45)]
            (own / "lexnames").write_text("".join(lines))
        nltk.data.path.append(str(own))

        class Reader(WordNetCorpusReader):
            def map_wn(self, version: str = "wordnet") -> None:
                """The data is of version 3.0: nothing is to be mapped."""

        self._reader = Reader(str(own), object())
        self._random = random.Random(0)

    def __call__(self, sentence: str, num_aug: int) -> list[str]:
        clean = re.sub(r"[^a-z ]", "", re.sub(r"[-\t\n]", " ", sentence.replace("'", "").lower()))
        words = clean.split()
        edits = max(1, int(0.1 * len(words)))
        found: list[list[str]] = []
        for _ in range(num_aug // 4 + 1):
            found.append(self._replaced(words, edits))
            found.append(self._inserted(words, edits))
            swapped = list(words)
            for _ in range(edits):
                i, j = self._random.sample(range(len(words)), 2)
                swapped[i], swapped[j] = swapped[j], swapped[i]
            found.append(swapped)
            found.append([w for w in words if self._random.random() > 0.1] or words[:1])
        self._random.shuffle(found)
        return [" ".join(one) for one in found[:num_aug]]

    def _replaced(self, words: list[str], edits: int) -> list[str]:
        found = words
        candidates = list({w for w in words if w not in STOP_WORDS})
        self._random.shuffle(candidates)
        for word in candidates:
            if synonyms := self._synonyms(word):
                chosen = self._random.choice(synonyms)
                found = [chosen if w == word else w for w in found]
                edits -= 1
            if not edits:
                break
        return found

    def _inserted(self, words: list[str], edits: int) -> list[str]:
        found = list(words)
        for _ in range(edits):
            for _ in range(10):
                if synonyms := self._synonyms(self._random.choice(found)):
                    found.insert(self._random.randrange(len(found)), synonyms[0])
                    break
        return found

    def _synonyms(self, word: str) -> list[str]:
        senses = self._reader.synsets(word)
        found = {lemma.name().replace("_", " ").lower() for one in senses for lemma in one.lemmas()}
        return list(found - {word})


def contenders(given: list[str]) -> dict[str, tuple[int, Callable[[], list]]]:
    one, four = text.EDA(num_aug=1), text.EDA(num_aug=4)
    replace = text.SynonymReplacer(p=0.1)
    runs: dict[str, tuple[int, Callable[[], list]]] = {
        "torsh EDA, 4 of a text": (4, lambda: four(given)),
        "torsh EDA, 1 of a text": (1, lambda: one(given)),
        "torsh EDA, 1, text by text": (1, lambda: [one(t) for t in given]),
        "torsh SynonymReplacer": (1, lambda: replace(given)),
    }
    folder = os.environ.get("TORSH_WORDNET")
    try:
        if not folder:
            raise ImportError("TORSH_WORDNET names no folder")
        recipe = EdaNlp(Path(folder))
        runs["eda_nlp's algorithm, 4 of a text"] = (4, lambda: [recipe(t, 4) for t in given])
        runs["eda_nlp's algorithm, 1 of a text"] = (1, lambda: [recipe(t, 1) for t in given])
    except ImportError as error:
        print(f"eda_nlp's algorithm is left out: {error}")
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
    torch.set_num_threads(1)
    data = Path(os.environ.get("TORSH_TEST_DATA", ROOT.parent / "shared/data"))
    given = sentences(data)[:1000]
    words = sum(len(one.split()) for one in given) / len(given)
    check(given)
    runs = contenders(given)
    times: dict[str, list[float]] = {name: [] for name in runs}
    first: dict[str, float] = {}  # the words are looked up for the first time
    for name, (count, run) in runs.items():
        begin = time.process_time()
        run()
        first[name] = count * len(given) / (time.process_time() - begin)
    for _ in range(options.rounds):
        for name, (_, run) in runs.items():
            begin = time.process_time()
            run()
            times[name].append(time.process_time() - begin)
    rates = {name: [runs[name][0] * len(given) / t for t in taken] for name, taken in times.items()}
    middle = {name: statistics.median(found) for name, found in rates.items()}
    peers = {
        f"ratio_to_{short}": max((m for n, m in middle.items() if n.startswith(short)), default=0.0)
        for short in ("nlpaug", "eda_nlp")
    }
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("nlpaug", "nltk"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    result = {
        "command": f"python tests/benchmarks/bench_data_eda.py --rounds {options.rounds}",
        "hardware": f"{platform.machine()} CPU, one thread, CPU time",
        "versions": versions,
        "input": f"{len(given)} sentences of SST-2, {words:.1f} words each",
        "reading": "results a second; first_pass is before caches are filled; eda_nlp's algorithm "
        "is stated again over nltk's WordNet reader, which keeps the synsets it has read",
        "rows": [
            {
                "contender": name,
                "results_per_s": middle[name],
                "lowest": min(found),
                "highest": max(found),
                "first_pass": first[name],
                **{peer: middle[name] / rate for peer, rate in peers.items() if rate},
            }
            for name, found in rates.items()
        ],
    }
    print(result["hardware"], versions, result["input"])
    for row in result["rows"]:
        print("  ".join(f"{v:34s}" if isinstance(v, str) else f"{v:10,.1f}" for v in row.values()))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
