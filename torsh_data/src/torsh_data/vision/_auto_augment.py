"""AutoAugment."""

from typing import Literal, TypeAlias

import torch

from torsh_data._rng import uniform
from torsh_data.vision._engine import Drawn, with_sign
from torsh_data.vision._policy import Fill, Interpolation, Policy
from torsh_data.vision._tables import AUTO_AUGMENT, CODES

PolicyName: TypeAlias = Literal["imagenet", "cifar10", "svhn"]

_BINS = 10

# Found by search on each data set; a line is "operation probability magnitude" twice, and a
# magnitude of 0 stands where an operation has none.
_IMAGENET = """
Posterize 0.4 8, Rotate 0.6 9
Solarize 0.6 5, AutoContrast 0.6 0
Equalize 0.8 0, Equalize 0.6 0
Posterize 0.6 7, Posterize 0.6 6
Equalize 0.4 0, Solarize 0.2 4
Equalize 0.4 0, Rotate 0.8 8
Solarize 0.6 3, Equalize 0.6 0
Posterize 0.8 5, Equalize 1.0 0
Rotate 0.2 3, Solarize 0.6 8
Equalize 0.6 0, Posterize 0.4 6
Rotate 0.8 8, Color 0.4 0
Rotate 0.4 9, Equalize 0.6 0
Equalize 0.0 0, Equalize 0.8 0
Invert 0.6 0, Equalize 1.0 0
Color 0.6 4, Contrast 1.0 8
Rotate 0.8 8, Color 1.0 2
Color 0.8 8, Solarize 0.8 7
Sharpness 0.4 7, Invert 0.6 0
ShearX 0.6 5, Equalize 1.0 0
Color 0.4 0, Equalize 0.6 0
Equalize 0.4 0, Solarize 0.2 4
Solarize 0.6 5, AutoContrast 0.6 0
Invert 0.6 0, Equalize 1.0 0
Color 0.6 4, Contrast 1.0 8
Equalize 0.8 0, Equalize 0.6 0
"""
_CIFAR10 = """
Invert 0.1 0, Contrast 0.2 6
Rotate 0.7 2, TranslateX 0.3 9
Sharpness 0.8 1, Sharpness 0.9 3
ShearY 0.5 8, TranslateY 0.7 9
AutoContrast 0.5 0, Equalize 0.9 0
ShearY 0.2 7, Posterize 0.3 7
Color 0.4 3, Brightness 0.6 7
Sharpness 0.3 9, Brightness 0.7 9
Equalize 0.6 0, Equalize 0.5 0
Contrast 0.6 7, Sharpness 0.6 5
Color 0.7 7, TranslateX 0.5 8
Equalize 0.3 0, AutoContrast 0.4 0
TranslateY 0.4 3, Sharpness 0.2 6
Brightness 0.9 6, Color 0.2 8
Solarize 0.5 2, Invert 0.0 0
Equalize 0.2 0, AutoContrast 0.6 0
Equalize 0.2 0, Equalize 0.6 0
Color 0.9 9, Equalize 0.6 0
AutoContrast 0.8 0, Solarize 0.2 8
Brightness 0.1 3, Color 0.7 0
Solarize 0.4 5, AutoContrast 0.9 0
TranslateY 0.9 9, TranslateY 0.7 9
AutoContrast 0.9 0, Solarize 0.8 3
Equalize 0.8 0, Invert 0.1 0
TranslateY 0.7 9, AutoContrast 0.9 0
"""
_SVHN = """
ShearX 0.9 4, Invert 0.2 0
ShearY 0.9 8, Invert 0.7 0
Equalize 0.6 0, Solarize 0.6 6
Invert 0.9 0, Equalize 0.6 0
Equalize 0.6 0, Rotate 0.9 3
ShearX 0.9 4, AutoContrast 0.8 0
ShearY 0.9 8, Invert 0.4 0
ShearY 0.9 5, Solarize 0.2 6
Invert 0.9 0, AutoContrast 0.8 0
Equalize 0.6 0, Rotate 0.9 3
ShearX 0.9 4, Solarize 0.3 3
ShearY 0.8 8, Invert 0.7 0
Equalize 0.9 0, TranslateY 0.6 6
Invert 0.9 0, Equalize 0.6 0
Contrast 0.3 3, Rotate 0.8 4
Invert 0.8 0, TranslateY 0.0 2
ShearY 0.7 6, Solarize 0.4 8
Invert 0.6 0, Rotate 0.8 4
ShearY 0.3 7, TranslateX 0.9 3
ShearX 0.1 6, Invert 0.6 0
Solarize 0.7 2, TranslateY 0.6 7
ShearY 0.8 4, Invert 0.8 0
ShearX 0.7 9, TranslateY 0.8 3
ShearY 0.8 5, AutoContrast 0.7 0
ShearX 0.7 2, Invert 0.1 0
"""
_TABLES: dict[PolicyName, str] = {"imagenet": _IMAGENET, "cifar10": _CIFAR10, "svhn": _SVHN}


class AutoAugment(Policy):
    """Apply one of 25 pairs of operations to each image, drawn anew for each image of a batch.

    The pairs, with a probability and a strength for each operation, were searched for on a data
    set. They are those of `torchvision.transforms.v2.AutoAugment`, and so are the operations, on
    uint8 tensors; what decides the draws is said at `Policy`.

    Args:
        policy: The data set of the search: `"imagenet"`, `"cifar10"` or `"svhn"`.
        interpolation: `"nearest"` or `"bilinear"`, for shear, translation and rotation.
        fill: Value of pixels from outside the image, one number or one per channel, in the images'
            units (0 to 255 for uint8, 0 to 1 for floats); 0 by default.

    Raises:
        TypeError: If `fill` holds something else than numbers.
        ValueError: If an argument is unknown or out of range.

    Example:
        >>> images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).to(torch.uint8)
        >>> augment = AutoAugment("cifar10")
        >>> both = augment(images, keys=torch.tensor([11, 12]))
        >>> torch.equal(both[1], augment(images[1], keys=12))
        True

    Reference:
        Cubuk, Zoph, Mane, Vasudevan, Le, AutoAugment: Learning Augmentation Policies from Data,
        2018, arXiv 1805.09501. As in torchvision, signed operations take either sign.
    """

    def __init__(
        self,
        policy: PolicyName = "imagenet",
        interpolation: Interpolation = "nearest",
        fill: Fill = None,
    ) -> None:
        super().__init__(interpolation, fill)
        if policy not in list(_TABLES):
            raise ValueError(f"policy={policy!r}; use 'imagenet', 'cifar10' or 'svhn'")
        self.policy: PolicyName = policy

    def extra_repr(self) -> str:
        return f"policy={self.policy!r}, interpolation={self.interpolation!r}, fill={self.fill}"

    def draw(self, keys: torch.Tensor, height: int, width: int) -> Drawn:
        pairs = sub_policies(self.policy)
        table = AUTO_AUGMENT.magnitudes(_BINS, height, width)
        rows = dict(zip(AUTO_AUGMENT.ops, table, strict=True))
        chosen = (uniform(keys, 0) * len(pairs)).long()
        layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer in range(2):
            steps = [pair[layer] for pair in pairs]
            codes = torch.tensor([CODES[name] for name, _, _ in steps])[chosen]
            probability = torch.tensor([p for _, p, _ in steps], dtype=torch.float64)[chosen]
            strength = torch.stack([rows[name][m] for name, _, m in steps])[chosen]
            applied = uniform(keys, 1 + 2 * layer) < probability
            codes = torch.where(applied, codes, CODES["Identity"])
            layers.append((codes, with_sign(codes, strength, keys, 2 + 2 * layer)))
        return Drawn.stack(layers, len(keys))


def sub_policies(policy: PolicyName) -> list[list[tuple[str, float, int]]]:
    """The pairs of a policy, each operation with its probability and magnitude out of 10.

    Example:
        >>> sub_policies("imagenet")[0]
        [('Posterize', 0.4, 8), ('Rotate', 0.6, 9)]
    """
    pairs: list[list[tuple[str, float, int]]] = []
    for line in _TABLES[policy].strip().splitlines():
        steps = [step.split() for step in line.split(",")]
        pairs.append([(name, float(p), int(magnitude)) for name, p, magnitude in steps])
    return pairs
