"""RandAugment(2, 9): our batch with a policy per image, beside torchvision image by image.

On the CPU one thread is timed, as in a loader's worker. On a GPU torchvision gets the batch at
once, with one policy for all of it, and image by image for what is comparable. Keys are on in all
our runs.

    python tests/benchmarks/bench_data_randaugment.py --rounds 9 --json result.json
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

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "torsh_data" / "src"))

from torsh_data import vision  # noqa: E402
from torsh_data.vision import _policy  # noqa: E402


def pictures(batch: int, size: int) -> torch.Tensor:
    torch.manual_seed(0)
    coarse = torch.rand(batch, 3, size // 8, size // 8)
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    return (fine + 0.05 * torch.randn_like(fine)).mul(255).clamp(0, 255).to(torch.uint8)


def check(images: torch.Tensor, transforms: object) -> None:
    """Our operations, with the magnitudes drawn, are torchvision's."""
    base = transforms._auto_augment._AutoAugmentBase()
    table = _policy.magnitudes(31, *images.shape[-2:])
    mode = transforms.InterpolationMode.NEAREST
    for number, name in enumerate(_policy.OPS):
        power = table[name][9]
        ours = images.clone()
        strength = [torch.full((len(images),), power, dtype=torch.float64)] * 14
        _policy.apply_ops(ours, torch.full((len(images),), number), strength, None, "nearest")
        theirs = torch.stack(
            [
                base._apply_image_or_video_transform(i, name, power, mode, {torch.Tensor: None})
                for i in images
            ]
        )
        different = (ours != theirs).float().mean().item()
        if different > (1e-3 if name in _policy._WARPS else 0):
            raise RuntimeError(f"{name} differs from torchvision in {different:.2%} of the pixels")


def host_time(run: Callable[[], object]) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def device_time(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def copy_time(images: torch.Tensor, clock: Callable[[Callable[[], object]], float]) -> float:
    """The limit: read and write each image once for each of two layers."""

    def copy() -> None:
        for _ in range(2):
            images.clone()

    return min(clock(copy) for _ in range(10))


def measure(images: torch.Tensor, rounds: int, transforms: object) -> dict:
    clock = device_time if images.is_cuda else host_time
    ours, theirs = vision.RandAugment(), transforms.RandAugment()
    keys = torch.arange(len(images))
    contenders: dict[str, Callable[[], object]] = {
        "torsh, a policy per image": lambda: ours(images, keys),
        "torchvision, image by image": lambda: [theirs(image) for image in images],
    }
    if images.is_cuda:
        contenders["torchvision, one policy per batch"] = lambda: theirs(images)
    for run in contenders.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            times[name].append(clock(run) / len(images) * 1e6)
    limit = copy_time(images, clock) / len(images) * 1e6
    return {
        "limit_us": limit,
        "us_per_image": {
            name: {"median": statistics.median(t), "lowest": min(t), "highest": max(t)}
            for name, t in times.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        from torchvision.transforms import v2 as transforms
    except (ImportError, RuntimeError) as error:
        raise SystemExit(f"needs torchvision: {error}") from None
    cuda = options.device == "cuda"
    torch.set_num_threads(1)
    machine = {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(machine)
    result = {"command": " ".join(sys.argv), "machine": machine, "sizes": {}}
    for batch, size in ((256, 32), (256 if cuda else 32, 224)):
        images = pictures(batch, size)
        check(images[:16], transforms)
        measured = measure(images.to(options.device), options.rounds, transforms)
        result["sizes"][f"{batch}x3x{size}x{size}"] = measured
        moved = size * size * 12 / 1e6
        print(f"\n{batch} x 3 x {size} x {size} uint8, us per image; {moved:.2f} MB moved")
        print(f"{'':36}{'median':>9}{'lowest':>9}{'highest':>9}{'% limit':>9}")
        for name, line in measured["us_per_image"].items():
            share = 100 * measured["limit_us"] / line["median"]
            print(
                f"{name:36}{line['median']:>9.2f}{line['lowest']:>9.2f}{line['highest']:>9.2f}{share:>9.1f}"
            )
        medians = [line["median"] for line in measured["us_per_image"].values()]
        print(f"{medians[1] / medians[0]:.2f} times torchvision image by image")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
