"""ResNet-20 on CIFAR-10: accuracy of float, post-training INT8/INT4/INT3 and trained integers.

Trains the net of He et al. (2016, arXiv 1512.03385, section 4.2; 1x1 convolutions as shortcuts) on
the images of ``--data``, then quantizes it. Integer accuracies are those of the real integer layers
on the same device, not of a simulation; for quantization-aware training both are given, with the
share of images on which they name the same class.

    python tests/benchmarks/bench_quant_resnet20.py --data cifar10 --json result.json
    python tests/benchmarks/bench_quant_resnet20.py --data cifar10 --smoke
"""

import argparse
import io
import json
import platform
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "torsh_quant" / "src"))

import torsh_quant as tq  # noqa: E402

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1:
            short = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(short, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        plan = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)]
        self.blocks = nn.Sequential(*(Block(*sizes) for sizes in [*plan, *[(64, 64, 1)] * 2]))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.fc(y.mean((2, 3)))


def decoded(path: Path, every: int) -> tuple[Tensor, Tensor]:
    archive = np.load(path)
    data, offset = archive["data"], archive["offset"]
    rows = range(0, len(offset) - 1, every)

    def image(i: int) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data[offset[i] : offset[i + 1]].tobytes())))

    with ThreadPoolExecutor() as pool:
        images = np.stack(list(pool.map(image, rows)))
    labels = torch.tensor(archive["label"][::every].astype(np.int64))
    return torch.from_numpy(images).permute(0, 3, 1, 2), labels


def normalized(images: Tensor) -> Tensor:
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def augmented(images: Tensor) -> Tensor:
    """Crop 32 of 40 pixels at a place of each image's own, and turn half of them round."""
    n, device = len(images), images.device
    padded = F.pad(images, (4, 4, 4, 4))
    y, x = torch.randint(0, 9, (2, n, 1, 1), device=device)
    step = torch.arange(32, device=device)
    flip = torch.rand(n, 1, 1, device=device) < 0.5
    columns = x + torch.where(flip, 31 - step, step)
    rows = y + step.view(1, 32, 1)
    which = torch.arange(n, device=device).view(n, 1, 1)
    return padded.permute(0, 2, 3, 1)[which, rows, columns].permute(0, 3, 1, 2)


def batches(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(images), device=images.device)
    for rows in order.split(size)[: max(1, len(images) // size)]:
        yield normalized(augmented(images[rows])), labels[rows]


def train(
    model: nn.Module, images: Tensor, labels: Tensor, epochs: int, lr: float, size: int
) -> None:
    """Train with SGD and one cycle of the learning rate; scales and norms without weight decay."""
    half = images.is_cuda and not tq.scale_parameters(model)
    decayed = [p for p in model.parameters() if p.ndim >= 2 and p.requires_grad]
    scales = tq.scale_parameters(model)
    decayed = [p for p in decayed if all(p is not scale for scale in scales)]
    rest = [
        p
        for p in model.parameters()
        if all(p is not other for other in (*decayed, *scales)) and p.requires_grad
    ]
    groups = [
        {"params": decayed, "weight_decay": 5e-4},
        {"params": rest, "weight_decay": 0.0},
    ]
    peaks = [lr, lr]
    if scales:
        groups.append({"params": scales, "weight_decay": 0.0})
        peaks.append(lr)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    steps = epochs * max(1, len(images) // size)
    warm = 0.15 if not scales else 0.05
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peaks, total_steps=steps + 1, pct_start=warm, cycle_momentum=False
    )
    model.train()
    for epoch in range(epochs):
        if scales and epoch == epochs * 3 // 4:
            tq.freeze_batch_norm(model)
        for x, y in batches(images, labels, size):
            optimizer.zero_grad()
            with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def classes(model: nn.Module, images: Tensor, size: int = 2500) -> Tensor:
    return torch.cat([model(normalized(part)).argmax(1) for part in images.split(size)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--qat-epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--checkpoint", type=Path, help="float weights: read if there, else written"
    )
    parser.add_argument("--smoke", action="store_true", help="one epoch of few images")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.smoke:
        options.epochs = options.qat_epochs = 1
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 64 if options.smoke else 512
    images, labels = decoded(options.data / "train.npz", 50 if options.smoke else 1)
    tests, truth = decoded(options.data / "test.npz", 50 if options.smoke else 1)
    images, labels, tests, truth = (t.to(device) for t in (images, labels, tests, truth))
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    print(f"{name}, torch {torch.__version__}, torsh_quant {tq.__version__}")

    model = ResNet20().to(device, memory_format=torch.channels_last)
    start = time.perf_counter()
    if options.checkpoint and options.checkpoint.exists():
        model.load_state_dict(load_file(options.checkpoint, device=str(device)))
        model.eval()
    else:
        train(model, images, labels, options.epochs, 0.4 if not options.smoke else 0.1, size)
        if options.checkpoint:
            save_file(
                {k: v.contiguous() for k, v in model.state_dict().items()}, options.checkpoint
            )
    rows: list[dict[str, object]] = []

    def note(scheme: str, method: str, predicted: Tensor, since: float, **more: object) -> None:
        accuracy = (predicted == truth).float().mean().item()
        seconds = time.perf_counter() - since
        rows.append(
            {"scheme": scheme, "method": method, "accuracy": accuracy, "seconds": seconds, **more}
        )
        rest = "  ".join(f"{key} {value:.4f}" for key, value in more.items())
        print(f"{scheme:14}{method:34}{accuracy:8.4f}{seconds:8.1f} s  {rest}", flush=True)

    note("fp32", f"{options.epochs} epochs", classes(model, tests), start)
    chosen = torch.randperm(len(images), device=device)[:512]
    data = list(normalized(images[chosen]).split(64))
    plain = [
        ("w8a8", "rtn", {}),
        ("w8a8-static", "minmax", {"observer": "minmax"}),
        ("w8a8-static", "mse", {"observer": "mse"}),
        ("w8a8-static", "percentile", {"observer": "percentile"}),
        ("w8a8-static", "entropy", {"observer": "entropy"}),
        ("w4a16", "rtn", {"method": "rtn"}),
        ("w4a16", "gptq", {"method": "gptq"}),
        ("w4a16", "gptq, bias correction", {"method": ["gptq", "bias_correction"]}),
        ("w4a16", "adaround", {"method": "adaround"}),
        ("w4a8", "gptq, bias correction", {"method": ["gptq", "bias_correction"]}),
        ("w3a16", "rtn", {"method": "rtn"}),
        ("w3a16", "gptq", {"method": "gptq"}),
        ("w3a16", "gptq, bias correction", {"method": ["gptq", "bias_correction"]}),
        ("w3a16", "adaround", {"method": "adaround"}),
    ]
    for scheme, method, settings in plain:
        since = time.perf_counter()
        torch.manual_seed(options.seed)
        try:
            quantized = tq.quantize(model, scheme, data=data, **settings)
            note(scheme, method, classes(quantized, tests), since)
        except Exception as error:
            print(f"{scheme:14}{method:34}{type(error).__name__}: {error}"[:300], flush=True)
    ends = dict.fromkeys(("stem", "fc"), "w8a8-static")
    trained = [
        ("w8a8-static", "lsq", 0.01, max(1, options.qat_epochs // 3), None),
        ("w8a8-static", "ste", 0.01, max(1, options.qat_epochs // 3), None),
        ("w4a4-static", "lsq", 0.04, options.qat_epochs, ends),
        ("w2a4-static", "lsq", 0.04, options.qat_epochs, ends),
        ("w2a2-static", "lsq", 0.04, options.qat_epochs, ends),
    ]
    for scheme, method, lr, epochs, overrides in trained:
        since = time.perf_counter()
        torch.manual_seed(options.seed)
        try:
            net = tq.prepare_qat(model, scheme, data=data[0], method=method, overrides=overrides)
            train(net, images, labels, epochs, lr, 256 if not options.smoke else size)
            simulated = classes(net, tests)
            integer = classes(tq.convert(net), tests)
            note(
                scheme,
                f"QAT {method}, {epochs} epochs, lr {lr}",
                integer,
                since,
                simulated=(simulated == truth).float().mean().item(),
                same=(simulated == integer).float().mean().item(),
            )
        except Exception as error:
            print(f"{scheme:14}{method:34}{type(error).__name__}: {error}"[:300], flush=True)
    if options.json:
        result = {
            "device": name,
            "torch": torch.__version__,
            "torsh_quant": tq.__version__,
            "seed": options.seed,
            "images": len(tests),
            "note": "CIFAR-10 as JPEG copies (about quality 75): not the published benchmark",
            "command": "python " + " ".join(sys.argv),
            "results": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
