"""What quantization with data costs on a CPU, in forward passes of the float model.

A Llama of the sizes of SmolLM2-135M, with random weights made on the spot and random tokens: times
do not depend on what they are, results would. Each method is timed between float32 forward passes
of the same data, on one thread, in CPU time of the process; ``in forwards`` is over the median of
the passes before and after it. The limits:

* GPTQ: each block runs twice for each batch, once to look at its inputs and once to hand on what it
  gives when it is quantized; its moments are products of matrices, timed here by themselves at the
  same sizes. The head of the model does not run.
* calibration: one forward pass without the head, and reading each input.
* sensitivity: one forward and one backward pass to the outputs of all layers. The other way to
  score, a forward pass for each layer and scheme, is counted beside it and not run.

torchao's GPTQ wants CUDA, and its calibration is an observer for each layer's input too: those of
torch.ao run in its place, hooked to the same layers in one forward pass.

    python tests/benchmarks/bench_quant_methods_cpu.py --json result.json
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bench_quant_linear_cpu import processor, write
from torch import Tensor, nn

from torsh_quant import GPTQ, quantize, sensitivity
from torsh_quant._layers import quantizable_layers

Batch = dict[str, Tensor]
SCHEMES = ("w8a8", "w4a16-g32")
HIDDEN, INTERMEDIATE = 576, 1536


def make_model(blocks: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def forward(model: nn.Module, batches: list[Batch]) -> None:
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def passes(model: nn.Module, batches: list[Batch]) -> None:
    """One forward and backward pass to the outputs of all layers, without gradients of weights."""
    calls: list[Tensor] = []

    def note(_: nn.Module, __: object, output: Tensor) -> Tensor:
        calls.append(output.requires_grad_() if output.is_leaf else output)
        return output.clone()

    with hooked(model, note, after=True):
        for batch in batches:
            calls.clear()
            with torch.enable_grad():
                out = model(**batch).logits
            torch.autograd.grad(out, calls, torch.ones_like(out), allow_unused=True)


@contextmanager
def hooked(model: nn.Module, call: Callable[..., Any], *, after: bool = False) -> Iterator[None]:
    handles = [
        layer.register_forward_hook(call) if after else layer.register_forward_pre_hook(call)
        for name, layer in quantizable_layers(model)
        if name != "lm_head"
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def torch_observers(kind: str) -> Callable[[nn.Module, list[Batch]], None]:
    def run(model: nn.Module, batches: list[Batch]) -> None:
        from torch.ao import quantization

        observers: dict[nn.Module, nn.Module] = {}

        def watch(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            if layer not in observers:
                observers[layer] = getattr(quantization, kind)()
            observers[layer](args[0])

        with hooked(model, watch):
            forward(model, batches)
        for observer in observers.values():
            observer.calculate_qparams()

    return run


def moments(model: nn.Module, batches: list[Batch]) -> None:
    """The products that GPTQ's moments take: three inputs of 576 a block and one of 1536."""
    rows = sum(batch["input_ids"].numel() for batch in batches)
    per_call = rows // len(batches)
    inputs = {width: torch.randn(per_call, width) for width in (HIDDEN, INTERMEDIATE)}
    layers = (HIDDEN, HIDDEN, HIDDEN, INTERMEDIATE)
    for _ in range(model.config.num_hidden_layers * len(batches)):
        for width in layers:
            inputs[width].T @ inputs[width]


def ours(scheme: str, **options: Any) -> Callable[[nn.Module, list[Batch]], None]:
    def run(model: nn.Module, batches: list[Batch]) -> None:
        quantize(model, scheme, data=batches, progress=False, **options)

    return run


def by_gradient(*schemes: str) -> Callable[[nn.Module, list[Batch]], None]:
    def run(model: nn.Module, batches: list[Batch]) -> None:
        sensitivity(model, batches, schemes, score="grad", progress=False)

    return run


# What runs on the first few sequences only: a backward pass keeps every activation.
FEW: dict[str, Callable[[nn.Module, list[Batch]], None]] = {
    "one forward and backward": passes,
    "torsh sensitivity, gradients, w8a8": by_gradient(SCHEMES[0]),
    "torsh sensitivity, gradients, w8a8 and w4a16-g32": by_gradient(*SCHEMES),
}
ALL: dict[str, Callable[[nn.Module, list[Batch]], None]] = {
    "the products of GPTQ's moments": moments,
    "torsh GPTQ, w4a16-g32": ours("w4a16-g32", method=GPTQ()),
    "torsh w8a8-static, minmax": ours("w8a8-static", observer="minmax"),
    "torsh w8a8-static, mse": ours("w8a8-static", observer="mse"),
    "torch.ao MinMaxObserver": torch_observers("MinMaxObserver"),
    "torch.ao HistogramObserver": torch_observers("HistogramObserver"),
}


def seconds(call: Callable[[], None]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--few", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="parts of names", default=[""])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = make_model(options.blocks)
    layers = sum(name != "lm_head" for name, _ in quantizable_layers(model))
    tokens = torch.randint(0, 49152, (options.sequences, options.length))
    batches = [{"input_ids": part} for part in tokens.split(2)]
    few = batches[: max(1, options.few // 2)]
    header = {
        **processor(),
        "model": f"Llama, {options.blocks} blocks of {HIDDEN}, random weights and tokens",
        "layers": layers,
        "tokens": tokens.numel(),
    }
    print(", ".join(f"{key} {value}" for key, value in header.items()))
    forward(model, batches[:1])
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        for data, cases in ((batches, ALL), (few, FEW)):
            chosen = [name for name in cases if any(part in name for part in options.only)]
            if not chosen:
                continue
            before = seconds(lambda data=data: forward(model, data))
            for name in chosen:
                took = seconds(lambda run=cases[name], data=data: run(model, data))
                after = seconds(lambda data=data: forward(model, data))
                found.setdefault(name, []).append((took, 2 * took / (before + after)))
                print(f"{name}: {took:.1f} s, {found[name][-1][1]:.2f} forwards", flush=True)
                before = after
    swaps = layers * len(SCHEMES)
    rows = []
    print(f"\n{'':52}{'median s':>10}{'in forwards':>12}{'spread':>8}")
    for name, results in found.items():
        times, forwards = [[pair[k] for pair in results] for k in (0, 1)]
        middle = statistics.median(forwards)
        row = {
            "contender": name,
            "sequences": sum(len(b["input_ids"]) for b in (few if name in FEW else batches)),
            "median_s": statistics.median(times),
            "in_forwards": middle,
            "spread": (max(forwards) - min(forwards)) / middle if len(forwards) > 1 else None,
        }
        if "sensitivity" in name:
            row["forwards_one_by_one"] = swaps if name.endswith(SCHEMES[1]) else layers
            row["in_forwards_and_backwards"] = None
            if FEW_PASS in found:
                both = statistics.median(pair[0] for pair in found[FEW_PASS])
                row["in_forwards_and_backwards"] = row["median_s"] / both
        rows.append(row)
        shown = "" if row["spread"] is None else f"{row['spread']:.0%}"
        print(f"{name:52}{row['median_s']:10.1f}{middle:12.2f}{shown:>8}")
    if options.json:
        write(options.json, header, rows)


FEW_PASS = "one forward and backward"

if __name__ == "__main__":
    main()
