"""Augmentation policies: our batch with a draw per image, beside torchvision image by image.

On the CPU one thread is timed, as in a loader's worker, and Pillow images too. On a GPU torchvision
gets the batch at once, with one policy for all of it, and image by image for what is comparable.
Keys are on in all our runs.

    python tests/benchmarks/bench_data_randaugment.py --rounds 9 --json result.json
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
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
from torsh_data.vision._engine import apply_ops  # noqa: E402
from torsh_data.vision._tables import AUTO_AUGMENT, CODES, OPS, WARPS  # noqa: E402

# Images read and written per image: layers twice, and AugMix's chains with their sum.
PASSES = {"RandAugment": 4, "TrivialAugmentWide": 2, "AutoAugment": 4, "AugMix": 18}


def pictures(batch: int, size: int) -> torch.Tensor:
    torch.manual_seed(0)
    coarse = torch.rand(batch, 3, size // 8, size // 8)
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    return (fine + 0.05 * torch.randn_like(fine)).mul(255).clamp(0, 255).to(torch.uint8)


def check(images: torch.Tensor, transforms: object) -> None:
    """Our operations, with the magnitudes drawn, are torchvision's."""
    base = transforms._auto_augment._AutoAugmentBase()
    mode = transforms.InterpolationMode.NEAREST
    table = AUTO_AUGMENT.magnitudes(31, *images.shape[-2:])
    for name, row in zip(AUTO_AUGMENT.ops, table, strict=True):
        power = row[9].item()
        ours = images.clone()
        codes = torch.full((len(images),), CODES[name])
        apply_ops(ours, codes, row[9].expand(len(images)), None, "nearest")
        theirs = torch.stack(
            [
                base._apply_image_or_video_transform(i, name, power, mode, {torch.Tensor: None})
                for i in images
            ]
        )
        different = (ours != theirs).float().mean().item()
        if different > (1e-3 if name in WARPS else 0):
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
    """Seconds to read and write the whole batch once."""
    return min(clock(images.clone) for _ in range(20))


def _kornia(name: str, images: torch.Tensor) -> Callable[[], object] | None:
    """Kornia's policy of this name: for floats, one for all images; there is no AugMix."""
    try:
        from kornia.augmentation import auto
    except ImportError:
        return None
    made = {
        "RandAugment": lambda: auto.RandAugment(2, 9),
        "TrivialAugmentWide": lambda: auto.TrivialAugment(),
        "AutoAugment": lambda: auto.AutoAugment("imagenet"),
    }
    if name not in made:
        return None
    augment, floats = made[name](), images.float() / 255
    return lambda: augment(floats)


def measure(name: str, images: torch.Tensor, rounds: int, transforms: object) -> dict:
    clock = device_time if images.is_cuda else host_time
    ours, theirs = getattr(vision, name)(), getattr(transforms, name)()
    numbers = itertools.count(step=len(images))

    def keys() -> torch.Tensor:
        """Of new samples in each round, as torchvision draws anew in each."""
        return next(numbers) + torch.arange(len(images))

    contenders: dict[str, Callable[[], object]] = {
        "torsh, a policy per image": lambda: ours(images, keys()),
        "torchvision, image by image": lambda: [theirs(image) for image in images],
    }
    if images.is_cuda:
        contenders["torchvision, one policy per batch"] = lambda: theirs(images)
    if kornia := _kornia(name, images):
        contenders["Kornia, one policy per batch, floats"] = kornia
    if not images.is_cuda:
        pillow = [transforms.functional.to_pil_image(image) for image in images]
        contenders["torsh, list of Pillow images"] = lambda: ours(pillow, keys())
        contenders["torchvision, Pillow images"] = lambda: [theirs(image) for image in pillow]
    for run in contenders.values():
        run()
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    for _ in range(rounds):
        for contender, run in contenders.items():
            times[contender].append(clock(run) / len(images) * 1e6)
    passes = PASSES[name] / 2
    return {
        "limit_us": passes * copy_time(images, clock) / len(images) * 1e6,
        "us_per_image": {
            contender: {"median": statistics.median(t), "lowest": min(t), "highest": max(t)}
            for contender, t in times.items()
        },
    }


def measure_operations(images: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median microseconds per image of each operation."""
    clock = device_time if images.is_cuda else host_time
    table = AUTO_AUGMENT.magnitudes(31, *images.shape[-2:])[:, 9]
    out, result = images.clone(), {}
    for name, power in zip(AUTO_AUGMENT.ops, table, strict=True):
        codes, powers = torch.full((len(out),), OPS.index(name)), power.expand(len(out))

        def run(codes: torch.Tensor = codes, powers: torch.Tensor = powers) -> None:
            apply_ops(out, codes, powers, None, "nearest")

        run()
        result[name] = statistics.median(clock(run) for _ in range(rounds)) / len(out) * 1e6
    return result


def show(name: str, measured: dict, pixels: int) -> None:
    moved = PASSES[name] * pixels * 3 / 1e6
    print(f"\n{name:36}{'median':>9}{'lowest':>9}{'highest':>9}{'% limit':>9}   {moved:.2f} MB")
    lines = measured["us_per_image"]
    for contender, line in lines.items():
        share = 100 * measured["limit_us"] / line["median"]
        times = f"{line['median']:>9.2f}{line['lowest']:>9.2f}{line['highest']:>9.2f}"
        print(f"{contender:36}{times}{share:>9.1f}")
    ours = next(iter(lines.values()))["median"]
    pictures = lines.get("torsh, list of Pillow images", {}).get("median")
    for contender, line in lines.items():
        if not contender.startswith("torsh"):
            base = pictures if pictures and contender.endswith("Pillow images") else ours
            print(f"{line['median'] / base:.2f} times the speed of {contender}")


def as_tables(result: dict) -> dict:
    """What is written: facts, and one row for each measurement."""
    policies: list[dict] = []
    operations: list[dict] = []
    for size, measured in result["sizes"].items():
        for policy, found in measured["policies"].items():
            lines = found["us_per_image"]
            ours = lines["torsh, a policy per image"]["median"]
            pictures = lines.get("torsh, list of Pillow images", {}).get("median")
            for contender, line in lines.items():
                base = pictures if contender.endswith("Pillow images") else ours
                row = {"images": size, "policy": policy, "contender": contender}
                times = {f"{name}_us": value for name, value in line.items()}
                share = found["limit_us"] / line["median"]
                policies.append(row | times | {"of_copy": share, "ours": line["median"] / base})
        operations.append({"images": size, **measured["operations"]})
    versions = dict(result["machine"])
    hardware = f"{versions.pop('device')}, {versions.pop('cpus')} cores"
    note = (
        "microseconds per image; `of_copy` is the time of as many copies as the policy has passes, "
        "as a share of the median; `ours` is how many times faster ours is (its Pillow path beside "
        "Pillow). Ours draws for each image, Kornia once for the whole batch and on floats."
    )
    return {
        "command": f"python {result['command']}",
        "hardware": hardware,
        "versions": versions,
        "note": note,
        "us per image": policies,
        "each operation": operations,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--policies", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        from torchvision.transforms import v2 as transforms
    except (ImportError, RuntimeError) as error:
        raise SystemExit(f"needs torchvision: {error}") from None
    cuda = options.device == "cuda"
    torch.set_num_threads(1)
    machine = {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, one thread",
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{
            name: importlib.metadata.version(name)
            for name in ("torch", "torchvision", "pillow", "kornia")
            if importlib.util.find_spec({"pillow": "PIL"}.get(name, name))
        },
    }
    print(machine)
    if importlib.util.find_spec("kornia") is None:
        print("Kornia is not installed: left out")
    result = {"command": " ".join(sys.argv), "machine": machine, "sizes": {}}
    for batch, size in ((256, 32), (256 if cuda else 32, 224)):
        images = pictures(batch, size)
        check(images[:16], transforms)
        images = images.to(options.device)
        print(f"\n{batch} x 3 x {size} x {size} uint8, us per image")
        sizes = result["sizes"][f"{batch}x3x{size}x{size}"] = {"policies": {}}
        for name in options.policies:
            measured = measure(name, images, options.rounds, transforms)
            sizes["policies"][name] = measured
            show(name, measured, size * size)
        sizes["operations"] = measure_operations(images, options.rounds)
        each = (f"{name} {time:.1f}" for name, time in sizes["operations"].items())
        print("\neach operation: " + ", ".join(each))
    if options.json:
        options.json.write_text(json.dumps(as_tables(result), indent=1) + "\n")


if __name__ == "__main__":
    main()
