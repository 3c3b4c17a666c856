"""RandAugment with a policy of its own for every image of a batch."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from torsh_data._rng import uniform
from torsh_data.vision import _ops

# In torchvision's order, so that a drawn number means the same operation in both.
OPS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness",
    "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
_SIGNED = frozenset(OPS[1:10])
_WARPS = frozenset(OPS[1:6])
_ALL_KEYS = (-(2**63), 2**63 - 1)
_CACHED_VALUES = 1 << 17


class RandAugment(nn.Module):
    """Apply `num_ops` random operations to each image, drawn anew for each image of a batch.

    Batched augmentation elsewhere draws one policy for the whole batch; here the images of a batch
    that drew the same kind of operation are computed together. Operations and magnitudes are those
    of `torchvision.transforms.v2.RandAugment` on uint8 tensors.

    With `keys` an image's result depends on its key and its pixels alone: not on its place in the
    batch, the size of the batch or the device. `StreamLoader` puts such keys into its batches.

    Args:
        num_ops: Operations per image, one after the other, at least 0.
        magnitude: Strength of all operations, in [0, num_magnitude_bins).
        num_magnitude_bins: How many strengths there are, at least 2.
        interpolation: `"nearest"` or `"bilinear"`, for shear, translation and rotation.
        fill: Value of pixels from outside the image, one number or one per channel, in the images'
            units (0 to 255 for uint8); 0 by default.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).to(torch.uint8)
        >>> augment = RandAugment(num_ops=2, magnitude=9)
        >>> both = augment(images, keys=torch.tensor([11, 12]))
        >>> torch.equal(both[1], augment(images[1], keys=torch.tensor(12)))
        True

    Reference:
        Cubuk, Zoph, Shlens, Le, RandAugment: Practical automated data augmentation with a reduced
        search space, 2019, arXiv 1909.13719. As in torchvision, signed operations take either sign,
        and bilinear sampling beyond the border blends with `fill` (torchvision darkens such pixels
        twice when a `fill` is given).
    """

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: int = 9,
        num_magnitude_bins: int = 31,
        interpolation: Literal["nearest", "bilinear"] = "nearest",
        fill: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if num_ops < 0:
            raise ValueError(f"num_ops={num_ops} must be at least 0")
        if num_magnitude_bins < 2:
            raise ValueError(f"num_magnitude_bins={num_magnitude_bins} must be at least 2")
        if not 0 <= magnitude < num_magnitude_bins:
            raise ValueError(
                f"magnitude={magnitude} must be in [0, num_magnitude_bins={num_magnitude_bins})"
            )
        if interpolation not in ("nearest", "bilinear"):
            raise ValueError(f"interpolation={interpolation!r}; use 'nearest' or 'bilinear'")
        self.num_ops = num_ops
        self.magnitude = magnitude
        self.num_magnitude_bins = num_magnitude_bins
        self.interpolation = interpolation
        self.fill = fill

    def extra_repr(self) -> str:
        return (
            f"num_ops={self.num_ops}, magnitude={self.magnitude}, "
            f"num_magnitude_bins={self.num_magnitude_bins}, interpolation={self.interpolation!r}, "
            f"fill={self.fill}"
        )

    def forward(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """Augment a batch, or one image.

        Args:
            images: `(batch, channels, height, width)` or `(channels, height, width)`, with 1 or 3
                channels, uint8 or floating point in [0, 1]; CPU or CUDA.
            keys: LongTensor `(batch,)`, or a single one for one image; keep it on the CPU, where
                policies are drawn. Without keys, torch's global CPU generator draws them.

        Returns:
            New images of the same shape, dtype and device.
        """
        batch = _as_batch(images)
        if keys is None:
            keys = torch.randint(*_ALL_KEYS, (len(batch),))
        keys = keys.reshape(-1).cpu()
        if len(keys) != len(batch) or keys.dtype != torch.int64:
            raise ValueError(
                f"keys has shape {tuple(keys.shape)} and dtype {keys.dtype}, expected one int64 "
                f"number for each of {len(batch)} images"
            )
        out = batch.clone()
        for layer in range(self.num_ops):
            drawn = (uniform(keys, 2 * layer) * len(OPS)).long()
            sign = torch.where(uniform(keys, 2 * layer + 1) <= 0.5, -1.0, 1.0)
            apply_ops(
                out,
                drawn,
                [m * (sign if OPS[op] in _SIGNED else 1.0) for op, m in self._magnitudes(batch)],
                self._fill(batch),
                self.interpolation,
            )
        return out.view_as(images)

    def _magnitudes(self, images: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        table = magnitudes(self.num_magnitude_bins, *images.shape[-2:])
        one = torch.ones(len(images), dtype=torch.float64)
        return [(op, one * table[name][self.magnitude]) for op, name in enumerate(OPS)]

    def _fill(self, images: torch.Tensor) -> torch.Tensor | None:
        if self.fill is None:
            return None
        channels = images.shape[1]
        fill = torch.tensor(self.fill, dtype=torch.float32).reshape(-1)
        if len(fill) not in (1, channels):
            raise ValueError(f"fill={self.fill} has {len(fill)} values for {channels} channels")
        return fill.expand(channels).to(images.device, non_blocking=True)


def magnitudes(bins: int, height: int, width: int) -> dict[str, list[float]]:
    """Strengths of each operation by magnitude, torchvision's tables.

    Example:
        >>> table = magnitudes(31, height=331, width=331)
        >>> round(table["ShearX"][30], 4), table["TranslateX"][30], table["Posterize"][30]
        (0.3, 150.0, 4.0)
    """
    none = [0.0] * bins
    ramps = {
        "ShearX": 0.3,
        "ShearY": 0.3,
        "TranslateX": 150.0 / 331.0 * width,
        "TranslateY": 150.0 / 331.0 * height,
        "Rotate": 30.0,
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.9),
    }
    table = {name: torch.linspace(0.0, top, bins).tolist() for name, top in ramps.items()}
    table["Posterize"] = (8 - torch.arange(bins) / ((bins - 1) / 4)).round().tolist()
    table["Solarize"] = torch.linspace(1.0, 0.0, bins).tolist()
    return {name: table.get(name, none) for name in OPS}


def apply_ops(
    images: torch.Tensor,
    drawn: torch.Tensor,
    strength: Sequence[torch.Tensor],
    fill: torch.Tensor | None,
    interpolation: str,
) -> None:
    """Apply one operation to each image, in place.

    Args:
        images: `(n, channels, height, width)`, any device.
        drawn: The operation of each image, an index into `OPS` `(n,)`, on the CPU.
        strength: For each operation the magnitude of each image `(n,)`, float64, on the CPU.
        fill: `(channels,)`, on the images' device; None is 0.
        interpolation: `"nearest"` or `"bilinear"`.
    """
    chosen = torch.stack(list(strength)).gather(0, drawn[None])[0]
    names = ["Warp" if OPS[op] in _WARPS else OPS[op] for op in drawn.tolist()]
    # On the CPU, what a part needs on the way stays in the cache; a GPU wants all at once.
    pixels = max(1, images.shape[1] * images.shape[2] * images.shape[3])
    together = len(images) if images.is_cuda else max(1, _CACHED_VALUES // pixels)
    for name in sorted(set(names) - {"Identity"}):
        members = [k for k, drawn_name in enumerate(names) if drawn_name == name]
        for first in range(0, len(members), together):
            part = members[first : first + together]
            rows = torch.tensor(part)
            here = rows.to(images.device, non_blocking=True)
            some, power = images.index_select(0, here), chosen[rows]
            if name == "Warp":
                kinds = [OPS[op] for op in drawn[rows].tolist()]
                matrix = _matrices(kinds, power.tolist(), *images.shape[-2:])
                matrix = matrix.to(images.device, non_blocking=True)
                done = _ops.warp(some, matrix, fill, interpolation)
            else:
                done = apply_pointwise(some, name, power)
            if images.is_cuda:
                images.index_copy_(0, here, done)
            else:  # index_copy_ is twenty times slower here
                for k, image in zip(part, done, strict=True):
                    images[k].copy_(image)


def apply_pointwise(images: torch.Tensor, name: str, power: torch.Tensor) -> torch.Tensor:
    """One operation that moves no pixels, on all images.

    Args:
        images: `(n, channels, height, width)`.
        name: One of `OPS`.
        power: Magnitudes `(n,)`, float64, on the CPU.
    """
    power = power.to(images.device, non_blocking=True)
    if name == "Contrast":
        return _ops.contrast(images, 1 + power)
    if name == "AutoContrast":
        return _ops.autocontrast(images)
    if name == "Equalize":
        return _ops.equalize(images)
    if name == "Posterize":
        return _ops.posterize(images, power)
    if name == "Solarize":
        return _ops.solarize(images, power)
    enhance = {"Brightness": _ops.brightness, "Color": _ops.color, "Sharpness": _ops.sharpness}
    return enhance[name](images, 1 + power)


def _matrices(kinds: list[str], power: list[float], height: int, width: int) -> torch.Tensor:
    """Where each output pixel comes from, `(n, 2, 3)`; shear keeps the upper left corner."""
    return torch.tensor(
        [_matrix(kind, p, height, width) for kind, p in zip(kinds, power, strict=True)]
    )


def _matrix(kind: str, power: float, height: int, width: int) -> list[list[float]]:
    if kind == "ShearX":
        return [[1, power, power * height / 2], [0, 1, 0]]
    if kind == "ShearY":
        return [[1, 0, 0], [power, 1, power * width / 2]]
    if kind == "TranslateX":
        return [[1, 0, -int(power)], [0, 1, 0]]
    if kind == "TranslateY":
        return [[1, 0, 0], [0, 1, -int(power)]]
    cos, sin = math.cos(math.radians(power)), math.sin(math.radians(power))
    return [[cos, -sin, 0], [sin, cos, 0]]


def _as_batch(images: torch.Tensor) -> torch.Tensor:
    if not isinstance(images, torch.Tensor):
        raise TypeError(
            f"images is a {type(images).__name__}; use a uint8 tensor "
            "(batch, channels, height, width)"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images has dtype {images.dtype}; use uint8, or floats in [0, 1]")
    if images.ndim not in (3, 4) or images.shape[-3] not in (1, 3):
        raise ValueError(
            f"images has shape {tuple(images.shape)}, expected ([batch,] channels, height, width) "
            "with 1 or 3 channels"
        )
    # on a GPU the check would wait for the device
    if images.is_floating_point() and not images.is_cuda and images.numel():
        low, high = images.aminmax()
        if low < 0 or high > 1:
            raise ValueError(
                f"images has values from {low.item():.3g} to {high.item():.3g}; floats must be in "
                "[0, 1], augment before normalizing"
            )
    return images if images.ndim == 4 else images[None]
