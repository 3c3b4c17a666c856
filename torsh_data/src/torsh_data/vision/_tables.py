"""The operations of automatic augmentation, and how strong each policy family makes them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

# torchvision's order for RandAugment, with Invert behind; a code is an index into this.
OPS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness",
    "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize", "Invert",
)  # fmt: skip
CODES = {name: code for code, name in enumerate(OPS)}
WARPS = frozenset(OPS[1:6])
SIGNED = frozenset(OPS[1:10])  # strength may be negative: to the left, darker
_ENHANCEMENTS = OPS[6:10]


def _share_of_331(side: int) -> float:
    return 150.0 / 331.0 * side


def _third(side: int) -> float:
    return side / 3.0


def _pixels_32(side: int) -> float:
    return 32.0


@dataclass(frozen=True)
class Space:
    """What a policy may draw, and the strongest of each.

    Attributes:
        ops: Names from `OPS`; a drawn number is an index into these.
        reach: Longest translation, in pixels, of a side of so many pixels.
        shear: Tangent of the largest angle.
        rotation: Largest angle, in degrees.
        enhancement: Largest change of the factor 1 of brightness, colour, contrast, sharpness.
        bits: Bits that Posterize keeps at the weakest and at the strongest.
    """

    ops: tuple[str, ...]
    reach: Callable[[int], float] = _share_of_331
    shear: float = 0.3
    rotation: float = 30.0
    enhancement: float = 0.9
    bits: tuple[int, int] = (8, 4)

    @property
    def codes(self) -> torch.Tensor:
        """Index into `OPS` of each of `ops`, int64."""
        return torch.tensor([CODES[name] for name in self.ops])

    def magnitudes(self, bins: int, height: int, width: int) -> torch.Tensor:
        """Strength of each operation at each of `bins` magnitudes, without sign.

        Args:
            bins: How many magnitudes there are, at least 2.
            height: Of the images, in pixels.
            width: Of the images, in pixels.

        Returns:
            `(len(ops), bins)` float64; 0 where an operation has no strength.

        Example:
            >>> table = RAND_AUGMENT.magnitudes(31, height=331, width=331)
            >>> names = ("ShearX", "TranslateX", "Posterize")
            >>> [round(table[RAND_AUGMENT.ops.index(n), 30].item(), 4) for n in names]
            [0.3, 150.0, 4.0]
        """
        tops = {
            "ShearX": self.shear,
            "ShearY": self.shear,
            "TranslateX": self.reach(width),
            "TranslateY": self.reach(height),
            "Rotate": self.rotation,
            **dict.fromkeys(_ENHANCEMENTS, self.enhancement),
        }
        rows = {name: torch.linspace(0.0, top, bins) for name, top in tops.items()}
        most, fewest = self.bits
        rows["Posterize"] = (most - torch.arange(bins) / ((bins - 1) / (most - fewest))).round()
        rows["Solarize"] = torch.linspace(1.0, 0.0, bins)
        none = torch.zeros(bins)
        return torch.stack([rows.get(name, none) for name in self.ops]).double()


AUTO_AUGMENT = Space(OPS[1:])
RAND_AUGMENT = Space(OPS[:14])
TRIVIAL_AUGMENT = Space(
    OPS[:14], reach=_pixels_32, shear=0.99, rotation=135.0, enhancement=0.99, bits=(8, 2)
)
# The original leaves out what its robustness benchmarks test for.
AUGMIX_PARTIAL = Space(
    (*OPS[1:6], "Posterize", "Solarize", "AutoContrast", "Equalize"), reach=_third, bits=(4, 0)
)
AUGMIX = Space((*AUGMIX_PARTIAL.ops, *_ENHANCEMENTS), reach=_third, bits=(4, 0))
