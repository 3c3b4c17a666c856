"""A cached decoded sample against decoding it, 224 x 224 uint8.

CIFAR-10 pictures are enlarged and encoded as JPEG once: at 224 px, to be decoded, and at
500 x 375 px, as photographs are stored, to be decoded, cropped and resized to 224.

    python tests/benchmarks/bench_data_cache.py --rounds 7 --json result.json
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
from typing import Any

import numpy as np
import torch
import torchvision
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
from torchvision.transforms.v2.functional import resized_crop

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "torsh_data" / "src"))

from torsh_data._sample_cache import SampleCache  # noqa: E402

COUNT = 256


class Pictures:
    def __init__(self, size: tuple[int, int], crop: bool) -> None:
        data = Path(os.environ.get("TORSH_TEST_DATA", ROOT / "../shared/data"))
        stored = np.load(data / "cifar10/train.npz")
        raw, offset = stored["data"], stored["offset"]
        self.crop, self.files = crop, []
        for n in range(COUNT):
            small = decode_jpeg(torch.from_numpy(raw[offset[n] : offset[n + 1]].copy()))
            large = interpolate(small[None].float(), size, mode="bicubic").clamp(0, 255)
            noisy = large[0] + torch.randn(large.shape[1:]) * 8  # photographs have detail
            self.files.append(encode_jpeg(noisy.clamp(0, 255).to(torch.uint8), quality=90))

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, n: int) -> dict[str, Any]:
        image = decode_jpeg(self.files[n], ImageReadMode.RGB)
        if self.crop:
            image = resized_crop(image, 20, 40, 320, 320, [224, 224])
        return {"image": image, "label": n}


def microseconds(read: Callable[[list[int]], object]) -> float:
    order = np.random.default_rng(0).permutation(COUNT).tolist()
    begin = time.process_time()
    for first in range(0, COUNT, 32):
        read(order[first : first + 32])
    return (time.process_time() - begin) / COUNT * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain, photo = Pictures((224, 224), False), Pictures((375, 500), True)
    caches = {where: SampleCache(photo, where, "1GB", key="bench") for where in ("ram", "shm")}
    blocks = torch.randint(0, 256, (COUNT, 3, 224, 224), dtype=torch.uint8)
    contenders: dict[str, Callable[[list[int]], object]] = {
        "copy of 150 kB (limit)": lambda ids: [blocks[n].clone() for n in ids],
        "decode 224 px": lambda ids: [plain[n] for n in ids],
        "decode 500 x 375, crop, resize": lambda ids: [photo[n] for n in ids],
        **{f"SampleCache {where}": cache.__getitems__ for where, cache in caches.items()},
    }
    for cache in caches.values():
        for sample, n in zip(cache.__getitems__(range(COUNT)), range(COUNT), strict=True):
            if not torch.equal(sample["image"], photo[n]["image"]):
                raise RuntimeError(f"sample {n} differs")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, read in contenders.items():
            times[name].append(microseconds(read))
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    print(machine)
    medians = {name: statistics.median(each) for name, each in times.items()}
    limit = medians["copy of 150 kB (limit)"]
    print(f"{'CPU time a sample':34}{'us':>8}{'least':>8}{'most':>8}{'% limit':>9}{'GB/s':>7}")
    for name, each in times.items():
        median = medians[name]
        print(
            f"{name:34}{median:>8.1f}{min(each):>8.1f}{max(each):>8.1f}"
            f"{100 * limit / median:>9.1f}{150.528 / median:>7.2f}"
        )
    hit = medians["SampleCache ram"]
    for name in ("decode 224 px", "decode 500 x 375, crop, resize"):
        print(f"a hit is {medians[name] / hit:.1f} times as fast as: {name}")
    for cache in caches.values():
        cache.close()
    if options.json:
        result = {"command": " ".join(sys.argv), "machine": machine, "us": times}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
