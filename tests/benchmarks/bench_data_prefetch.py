"""A training step with `DevicePrefetcher` against the same step on a batch that is resident.

Batches of 256 x 3 x 224 x 224 uint8 come from memory; the step is a number of matrix products on
the device. Beside it, what people write without a prefetcher: `.to(device)` in the loop, pageable
and pinned.

    python tests/benchmarks/bench_data_prefetch.py --rounds 5 --json result.json
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "torsh_data" / "src"))

from torsh_data._prefetch import DevicePrefetcher  # noqa: E402

Batch = dict[str, torch.Tensor]


class Loader:
    """Batches that are ready on the host, so that only their way to the device is measured."""

    def __init__(self, steps: int, size: tuple[int, ...], *, pin: bool = False) -> None:
        images = [torch.randint(0, 256, size, dtype=torch.uint8) for _ in range(4)]
        labels = torch.arange(size[0])
        made = [{"image": image, "label": labels + k} for k, image in enumerate(images)]
        self.made = [{n: t.pin_memory() for n, t in b.items()} for b in made] if pin else made
        self.steps = steps

    def __iter__(self) -> Iterator[Batch]:
        return (self.made[step % len(self.made)] for step in range(self.steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--products", type=int, default=12, help="8192 x 8192 products in a step")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    size = (256, 3, 224, 224)
    plain, pinned = Loader(options.steps, size), Loader(options.steps, size, pin=True)
    resident = {name: t.cuda() for name, t in plain.made[0].items()}
    weight = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = torch.empty_like(weight)

    def step(batch: Batch) -> torch.Tensor:
        for _ in range(options.products):
            torch.mm(weight, weight, out=product)
        return batch["image"].sum(dtype=torch.int64) + batch["label"].sum()

    def moved(loader: Loader, *, later: bool) -> Iterator[Batch]:
        for batch in loader:
            yield {n: t.cuda(non_blocking=later) for n, t in batch.items()}

    prefetchers = {
        f"DevicePrefetcher depth={depth}": DevicePrefetcher(plain, "cuda", depth=depth)
        for depth in (1, 2, 4)
    }
    contenders: dict[str, Callable[[], Iterator[Batch]]] = {
        "resident batch (limit)": lambda: iter([resident] * options.steps),
        **{name: each.__iter__ for name, each in prefetchers.items()},
        "DevicePrefetcher, pinned loader": DevicePrefetcher(pinned, "cuda").__iter__,
        ".cuda() in the loop": lambda: moved(plain, later=False),
        ".cuda(non_blocking), pinned": lambda: moved(pinned, later=True),
    }
    expected = [step({n: t.cuda() for n, t in batch.items()}).item() for batch in plain]
    for name, batches in contenders.items():
        got = torch.stack([step(batch) for batch in batches()]).tolist()
        if not name.startswith("resident") and name.find("pinned") < 0 and got != expected:
            raise RuntimeError(f"{name} delivered other contents")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, batches in contenders.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for batch in batches():
                step(batch)
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - begin) / options.steps * 1e3)
    machine = {
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    print(machine)
    limit = statistics.median(times["resident batch (limit)"])
    moved_mb = sum(t.nbytes for t in plain.made[0].values()) / 1e6
    print(f"{moved_mb:.1f} MB a batch")
    print(f"{'a step':34}{'ms':>9}{'least':>9}{'most':>9}{'x limit':>9}")
    for name, each in times.items():
        median = statistics.median(each)
        print(f"{name:34}{median:>9.3f}{min(each):>9.3f}{max(each):>9.3f}{median / limit:>9.3f}")
    if options.json:
        result = {"command": " ".join(sys.argv), "machine": machine, "ms": times}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
