"""BackTranslator beside a plain loop over transformers, with Marian-size random weights.

The peer is nlpaug's MtTransformers recipe stated as a loop: float32, texts in the order they come,
batches of 32 padded by the tokenizer, `model.generate` greedily, there and back. Ours sorts, fills
batches by tokens, translates equal texts once and is bfloat16 on CUDA; a row in float32 says what
the number type alone gives.

Random weights would end answers anywhere. So every answer is made as long as its own input: a
logits processor, the same for both, lets a row end at the step that its count of input tokens says
and at no other, and bars the other special tokens. Both thus write the same number of tokens for a
text. Tokens that only pad count for nobody. The texts are real: lines of WikiText-2 and sentences
of SST-2, 1 to 100 words, one in ten of them twice; so is the vocabulary, made of them on the spot.

    python tests/benchmarks/bench_data_back_translation.py --json result.json
    python tests/benchmarks/bench_data_back_translation.py --small --device cpu
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "torsh_data" / "src"))

import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from transformers import (  # noqa: E402
    LogitsProcessor,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
)

from torsh_data.text import BackTranslator, Translator  # noqa: E402

_PAD, _END, _UNKNOWN = 0, 1, 2
_BATCH = 32


def real_texts(data: Path, count: int) -> list[str]:
    """Mixed lengths in random order, one in ten of them a second time."""
    wiki = (data / "text/wikitext2/valid.txt").read_text().splitlines()
    rows = (data / "text/sst2/train.tsv").read_text().splitlines()
    lines = [*wiki, *(row.split("\t")[0] for row in rows)]
    different = list(dict.fromkeys(" ".join(one.split()[:100]) for one in lines if one.strip()))
    generator = random.Random(0)
    generator.shuffle(different)
    found = different[: count - count // 10]
    found += found[: count - len(found)]
    generator.shuffle(found)
    return found


def made_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Whole words of the texts, as many as there are, up to the size of the vocabulary."""
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {"<pad>": _PAD, "</s>": _END, "<unk>": _UNKNOWN}
    names = [*words, *(f"extra{n}" for n in range(size))]
    for name in names[: size - 3]:
        vocabulary.setdefault(name, len(vocabulary))
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", _END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


class EndsWithInput(LogitsProcessor):
    """Ends each answer when it is as long as its row of input, and never before."""

    def __init__(self) -> None:
        self.lengths = torch.zeros(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, [_PAD, _UNKNOWN]] = -torch.inf
        ends = input_ids.shape[1] >= self.lengths  # with the start, an answer of n tokens has n + 1
        scores[:, _END] = torch.where(ends, torch.inf, -torch.inf)
        return scores


class SteeredMarian(MarianMTModel):
    """Marian whose answers are as long as their inputs."""

    def generate(self, *args: Any, logits_processor: Any = None, **options: Any) -> Any:
        ends = EndsWithInput()
        ends.lengths = options["attention_mask"].sum(1)
        return super().generate(*args, logits_processor=[ends], **options)


def made_model(seed: int, config: dict[str, int], device: str) -> SteeredMarian:
    torch.manual_seed(seed)
    marian = MarianConfig(
        **config, pad_token_id=_PAD, eos_token_id=_END, decoder_start_token_id=_PAD,
        forced_eos_token_id=None, max_position_embeddings=512, init_std=0.1,
    )  # fmt: skip
    return SteeredMarian(marian).eval().to(device)


@torch.inference_mode()
def plain_loop(texts: list[str], ways: list[tuple[Any, Any]]) -> list[str]:
    """The recipe: unsorted batches of 32, padded by the tokenizer, greedy."""
    for model, tokenizer in ways:
        answers: list[str] = []
        for start in range(0, len(texts), _BATCH):
            batch = tokenizer(texts[start : start + _BATCH], padding=True, return_tensors="pt")
            batch = batch.to(model.device)
            out = model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                do_sample=False, num_beams=1, max_new_tokens=256,
            )  # fmt: skip
            answers += tokenizer.batch_decode(out, skip_special_tokens=True)
        texts = answers
    return texts


def ours(ways: list[tuple[Any, Any]], batch_tokens: int) -> BackTranslator:
    pair = [Translator(model, tokenizer) for model, tokenizer in ways]
    return BackTranslator(
        *pair, temperature=0, batch_tokens=batch_tokens, min_similarity=0, max_ratio=1e9
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--texts", type=int)
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a small model and 200 texts")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    count = options.texts or (200 if options.small else 5000)
    size, width, layers, inner, vocab = (
        (4, 128, 2, 256, 8000) if options.small else (8, 512, 6, 2048, 58101)
    )
    config = {
        "vocab_size": vocab, "d_model": width, "encoder_layers": layers, "decoder_layers": layers,
        "encoder_ffn_dim": inner, "decoder_ffn_dim": inner, "encoder_attention_heads": size,
        "decoder_attention_heads": size,
    }  # fmt: skip
    data = Path(os.environ.get("TORSH_TEST_DATA", ROOT.parent / "shared/data"))
    texts = real_texts(data, count)
    tokenizer = made_tokenizer(texts, vocab)
    ways = [(made_model(seed, config, options.device), tokenizer) for seed in (0, 1)]
    lengths = [len(row) for row in tokenizer(texts)["input_ids"]]
    written = 2 * sum(lengths)  # there and back, copies and ends included

    sample = texts[: 64 if options.small else 256]
    expected = plain_loop(sample, ways)
    checked = ours(ways, options.batch_tokens[0])
    found = checked(sample, n=1)
    equal = sum(a == [b] for a, b in zip(found, expected, strict=True))
    print(f"greedy float32 texts equal: {equal} of {len(sample)}, dropped {checked.report.dropped}")
    if equal < 0.98 * len(sample):  # near ties of random weights fall either way
        raise RuntimeError("the texts of the two ways differ")

    runs: dict[str, Callable[[], Any]] = {"plain loop, float32": lambda: plain_loop(texts, ways)}
    for tokens in options.batch_tokens:
        runs[f"BackTranslator, float32, {tokens}"] = lambda t=tokens: ours(ways, t)(texts, n=1)
    if cuda:
        half = [(made_model(seed, config, options.device).bfloat16(), tokenizer) for seed in (0, 1)]
        runs["plain loop, bfloat16"] = lambda: plain_loop(texts, half)
        for tokens in options.batch_tokens:
            runs[f"BackTranslator, bfloat16, {tokens}"] = lambda t=tokens: ours(half, t)(texts, n=1)
    times: dict[str, list[float]] = {name: [] for name in runs}
    plain_loop(sample, ways)
    if cuda:
        ours(half, options.batch_tokens[0])(sample, n=1)
    for _ in range(options.repeats):
        for name, run in runs.items():
            begin = time.perf_counter() if cuda else time.process_time()
            run()
            if cuda:
                torch.cuda.synchronize()
            end = time.perf_counter() if cuda else time.process_time()
            times[name].append(end - begin)
    middle = {name: statistics.median(taken) for name, taken in times.items()}
    peer = next(iter(middle.values()))
    result = {
        "command": "python tests/benchmarks/bench_data_back_translation.py "
        + " ".join(sys.argv[1:]),
        "hardware": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, CPU time",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "input": f"{len(texts)} texts, {len(set(texts))} different; tokens: median "
        f"{statistics.median(lengths):.0f}, longest {max(lengths)}, written {written}",
        "equal_greedy_float32_texts": f"{equal} of {len(sample)}",
        "rows": [
            {
                "contender": name,
                "median_s": middle[name],
                "spread": (max(taken) - min(taken)) / middle[name],
                "tokens_per_s": written / middle[name],
                "ratio_to_plain_loop": peer / middle[name],
            }
            for name, taken in times.items()
        ],
    }
    print(result["hardware"], result["versions"], result["input"], sep="\n")
    print(f"{'':36s} {'seconds':>9s} {'spread':>7s} {'tokens/s':>10s} {'/ loop':>7s}")
    for row in result["rows"]:
        print(
            f"{row['contender']:36s} {row['median_s']:9.2f} {row['spread']:7.0%} "
            f"{row['tokens_per_s']:10,.0f} {row['ratio_to_plain_loop']:7.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
