"""One operation of its own for each image of a batch.

A policy draws codes and magnitudes on the CPU; here the images that drew the same kind of operation
are computed together, layer after layer. What arrives is plain numbers per image and layer, so this
file is what another engine would replace.
"""

import math
from typing import NamedTuple

import torch

from torsh_data._rng import uniform
from torsh_data.vision import _ops
from torsh_data.vision._tables import CODES, OPS, SIGNED, WARPS, Space

CACHED_VALUES = 1 << 17
_IS_SIGNED = torch.tensor([name in SIGNED for name in OPS])


class Drawn(NamedTuple):
    """What happens to `n` images in each layer, on the CPU.

    `codes` are operations as indices into `OPS`, `(layers, n)` int64, `magnitudes` their strengths
    with sign, `(layers, n)` float64.
    """

    codes: torch.Tensor
    magnitudes: torch.Tensor

    @staticmethod
    def stack(layers: list[tuple[torch.Tensor, torch.Tensor]], n: int) -> "Drawn":
        """Join layers of codes `(n,)` and magnitudes `(n,)`."""
        if not layers:
            return Drawn(torch.empty(0, n, dtype=torch.int64), torch.empty(0, n).double())
        codes, magnitudes = zip(*layers, strict=True)
        return Drawn(torch.stack(codes), torch.stack(magnitudes))


def draw_layer(
    space: Space,
    table: torch.Tensor,
    keys: torch.Tensor,
    draw: int,
    magnitude: int | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one operation for each key, all equally likely, with either sign.

    Args:
        space: What to draw from.
        table: Its `magnitudes`.
        keys: `(n,)` int64, on the CPU.
        draw: Number of the key's draw for the operation; that for the sign follows.
        magnitude: Column of the table, one for all or `(n,)` int64.

    Returns:
        Codes `(n,)` int64 and magnitudes `(n,)` float64.
    """
    drawn = (uniform(keys, draw) * len(space.ops)).long()
    codes = space.codes[drawn]
    return codes, with_sign(codes, table[drawn, magnitude], keys, draw + 1)


def with_sign(
    codes: torch.Tensor, strength: torch.Tensor, keys: torch.Tensor, draw: int
) -> torch.Tensor:
    """Turn half of the strengths `(n,)` of operations that have a direction."""
    turned = _IS_SIGNED[codes] & (uniform(keys, draw) <= 0.5)
    return torch.where(turned, -strength, strength)


def apply_layers(
    images: torch.Tensor, drawn: Drawn, fill: torch.Tensor | None, interpolation: str
) -> None:
    """Apply all layers, in place; arguments as for `apply_ops`."""
    for codes, magnitudes in zip(drawn.codes, drawn.magnitudes, strict=True):
        apply_ops(images, codes, magnitudes, fill, interpolation)


def apply_ops(
    images: torch.Tensor,
    codes: torch.Tensor,
    magnitudes: torch.Tensor,
    fill: torch.Tensor | None,
    interpolation: str,
) -> None:
    """Apply one operation to each image, in place.

    Args:
        images: `(n, channels, height, width)`, any device.
        codes: The operation of each image, an index into `OPS`, `(n,)` int64, on the CPU.
        magnitudes: Its strength `(n,)`, float64, on the CPU.
        fill: `(channels,)`, on the images' device; None is 0.
        interpolation: `"nearest"` or `"bilinear"`.
    """
    members: dict[str, list[int]] = {}
    # whole pixels need no interpolation; for floats it leaves its rounding error
    slides = images.is_cpu and (interpolation == "nearest" or images.dtype == torch.uint8)
    for k, code in enumerate(codes.tolist()):
        if code == CODES["Identity"]:
            continue
        if slides and OPS[code] in ("TranslateX", "TranslateY"):
            way = int(magnitudes[k])
            right, down = (way, 0) if OPS[code] == "TranslateX" else (0, way)
            images[k] = _ops.translate(images[k, None], right, down, fill)[0]
            continue
        # a GPU has the fewest launches, a CPU the least to compute
        name = "Warp" if images.is_cuda and OPS[code] in WARPS else OPS[code]
        members.setdefault(name, []).append(k)
    # On the CPU, what a part needs on the way stays in the cache; a GPU wants all at once.
    pixels = max(1, images.shape[1] * images.shape[2] * images.shape[3])
    together = len(images) if images.is_cuda else max(1, CACHED_VALUES // pixels)
    for name, whole in sorted(members.items()):
        for first in range(0, len(whole), together):
            part = whole[first : first + together]
            rows = torch.tensor(part)
            here = rows.to(images.device, non_blocking=True)
            some = images[part[0], None] if len(part) == 1 else images.index_select(0, here)
            power = magnitudes[rows]
            if name == "Warp" or name in WARPS:
                matrix = warp_matrices(codes[rows], power, *images.shape[-2:])
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
    if name == "AutoContrast":
        return _ops.autocontrast(images)
    if name == "Equalize":
        return _ops.equalize(images)
    if name == "Invert":
        return _ops.invert(images)
    power = power.to(images.device, non_blocking=True)
    if name == "Posterize":
        return _ops.posterize(images, power)
    if name == "Solarize":
        return _ops.solarize(images, power)
    enhance = {
        "Brightness": _ops.brightness,
        "Color": _ops.color,
        "Contrast": _ops.contrast,
        "Sharpness": _ops.sharpness,
    }
    return enhance[name](images, 1 + power)


def warp_matrices(
    codes: torch.Tensor, magnitudes: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Where each output pixel comes from, `(n, 2, 3)`; shear keeps the upper left corner."""
    return torch.tensor(
        [
            _matrix(OPS[code], power, height, width)
            for code, power in zip(codes.tolist(), magnitudes.tolist(), strict=True)
        ],
        dtype=torch.float32,  # all numbers of a translation are whole
    )


def _matrix(name: str, power: float, height: int, width: int) -> list[list[float]]:
    if name == "ShearX":
        return [[1, power, power * height / 2], [0, 1, 0]]
    if name == "ShearY":
        return [[1, 0, 0], [power, 1, power * width / 2]]
    if name == "TranslateX":
        return [[1, 0, -int(power)], [0, 1, 0]]
    if name == "TranslateY":
        return [[1, 0, 0], [0, 1, -int(power)]]
    cos, sin = math.cos(math.radians(power)), math.sin(math.radians(power))
    return [[cos, -sin, 0], [sin, cos, 0]]
