"""Write the training images as a stream, augment it, stop in the middle and resume."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from digits import digits
from report import Section, Table
from torsh_data import ShardedDataset, StreamLoader, vision, write_shards

BATCH = 64
augment = vision.RandAugment(num_ops=2, magnitude=7)
cutmix = vision.MixupCutmix(num_classes=10, mixup_alpha=0.0, cutmix_alpha=1.0)


def open_stream(folder: Path) -> StreamLoader:
    """The training images in random order, 64 at a time."""
    return StreamLoader(ShardedDataset(str(folder)), BATCH, seed=0, window="64kB")


def augmented(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """RandAugment, then CutMix, both drawn from each sample's own key."""
    images = augment(batch["image"], keys=batch["key"])
    return cutmix(images.float() / 255, batch["label"], keys=batch["key"])


def fingerprints(loader: StreamLoader) -> Iterator[str]:
    """One hash for each batch of the rest of the epoch, over augmented pixels and soft labels."""
    for batch in loader:
        images, targets = augmented(batch)
        content = images.numpy().tobytes() + targets.numpy().tobytes()
        yield hashlib.blake2b(content, digest_size=8).hexdigest()


def resume(folder: Path, state: Path) -> None:
    """What a restarted program does: open the stream anew, load the state, go on."""
    loader = open_stream(folder)
    loader.load_state_dict(json.loads(state.read_text()))
    print(json.dumps(list(fingerprints(loader))))


def run(demo) -> Section:
    data = digits()
    folder = demo.out / "digits"
    shutil.rmtree(folder, ignore_errors=True)
    samples = ({"image": i, "label": int(y)} for i, y in zip(data.images, data.labels, strict=True))
    write_shards(samples, str(folder), shard_bytes="100kB", block_bytes="10kB")
    shards = list(folder.glob("*.arrow"))

    unbroken = list(fingerprints(open_stream(folder)))
    loader, stopped = open_stream(folder), []
    for stopped_at, fingerprint in enumerate(fingerprints(loader), 1):
        stopped.append(fingerprint)
        if stopped_at == len(unbroken) // 2:
            break
    state = demo.out / "stream.json"
    state.write_text(json.dumps(loader.state_dict()))
    script = [sys.executable, __file__, str(folder), str(state)]
    process = subprocess.run(script, capture_output=True, text=True, check=True)
    resumed = json.loads(process.stdout)
    if stopped + resumed != unbroken:
        raise RuntimeError("the resumed stream differs from the unbroken one")

    kilobytes = sum(shard.stat().st_size for shard in shards) / 1e3
    section = Section(
        f"stopped after {len(stopped)} of {len(unbroken)} batches, resumed in another process: "
        f"all {len(resumed)} remaining batches identical, pixels and labels",
        [
            f"{len(data.images):,} images in {len(shards)} shards, {kilobytes:.0f} kB",
            f"the whole saved position is {state.stat().st_size} bytes of JSON",
        ],
    )
    rows = [
        ["unbroken", str(len(unbroken)), *unbroken[len(stopped) - 1 : len(stopped) + 2]],
        ["stopped, then resumed", f"{len(stopped)} + {len(resumed)}", stopped[-1], *resumed[:2]],
    ]
    columns = ["run", "batches", "before the stop", "first after it", "second after it"]
    section.tables.append(Table(columns, rows))
    section.add_figure("RandAugment and CutMix on one batch of the stream", sheet(folder))
    return section


def sheet(folder: Path) -> Figure:
    """Twelve images as stored, after RandAugment and after CutMix."""
    batch = next(iter(open_stream(folder)))
    mixed, targets = augmented(batch)
    rows = [batch["image"], augment(batch["image"], keys=batch["key"]), mixed]
    names = ["as stored", "RandAugment", "+ CutMix"]
    figure = Figure(figsize=(9, 2.7))
    for axes, (r, c) in zip(
        figure.subplots(3, 12).flat, ((r, c) for r in range(3) for c in range(12)), strict=True
    ):
        axes.imshow(rows[r][c, 0], cmap="gray_r", interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if c == 0:
            axes.set_ylabel(names[r], rotation=0, ha="right", va="center")
        if r == 2:
            share, label = targets[c].topk(2)
            parts = [f"{label[k]}: {share[k]:.0%}" for k in range(2) if share[k] > 0.005]
            axes.set_xlabel("\n".join(parts), fontsize=7)
    return figure


if __name__ == "__main__":
    resume(Path(sys.argv[1]), Path(sys.argv[2]))
