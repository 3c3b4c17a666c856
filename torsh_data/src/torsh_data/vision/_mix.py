"""Mixup and CutMix for a whole batch, with soft targets."""

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from torsh_data._rng import Keys, beta, fold, uniform
from torsh_data.vision._images import refuse
from torsh_data.vision._keys import SomeKeys, as_keys
from torsh_data.vision._settings import check_finite, check_whole

# Draws of a key: RandAugment uses those from 0 on, these lie far behind.
_APPLY, _SWITCH, _X, _Y, _PARTNER, _LAMBDA = 1000, 1001, 1002, 1003, 1004, 2000


@dataclass(frozen=True)
class Mixture:
    """What each of `n` images gets from its partner; on the CPU.

    Attributes:
        partner: Place of the other image `(n,)`, int64.
        weight: The image's own share outside the box `(n,)`, float64.
        box: What shows the partner alone, (top, bottom, left, right) `(n, 4)`, int64.
    """

    partner: torch.Tensor
    weight: torch.Tensor
    box: torch.Tensor

    def visible(self, height: int, width: int) -> torch.Tensor:
        """The image's own share of the whole picture `(n,)`, float64."""
        top, bottom, left, right = self.box.unbind(1)
        return self.weight * (1 - (bottom - top) * (right - left) / (height * width))


def inside(box: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Which pixels of `images` lie in each one's box `(n, 4)`: `(n, 1, height, width)` bool."""
    device = images.device
    y = torch.arange(images.shape[2], device=device).view(1, 1, -1, 1)
    x = torch.arange(images.shape[3], device=device).view(1, 1, 1, -1)
    bounds = box.to(device, non_blocking=True)
    top, bottom, left, right = bounds.view(-1, 4, 1, 1, 1).unbind(1)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


def mix_images(images: torch.Tensor, mixture: Mixture) -> torch.Tensor:
    """Average and paste; half precision is averaged in float32."""
    device = images.device
    others = images.index_select(0, mixture.partner.to(device, non_blocking=True))
    mixed = images
    if (mixture.weight < 1).any():
        dtype = torch.promote_types(images.dtype, torch.float32)
        share = mixture.weight.to(dtype).to(device, non_blocking=True).view(-1, 1, 1, 1)
        mixed = (images.to(dtype) * share + others.to(dtype) * (1 - share)).to(images.dtype)
    return torch.where(inside(mixture.box, images), others, mixed)


def mix_targets(targets: torch.Tensor, mixture: Mixture, height: int, width: int) -> torch.Tensor:
    """Weigh targets `(n, classes)` float32 with what is visible of images of this size."""
    device = targets.device
    kept = mixture.visible(height, width).float().to(device, non_blocking=True)[:, None]
    others = targets.index_select(0, mixture.partner.to(device, non_blocking=True))
    return targets * kept + others * (1 - kept)


class MixupCutmix(nn.Module):
    """Mix each image of a batch with another, and the labels with them.

    Mixup averages two images with weight lambda ~ Beta(alpha, alpha); CutMix pastes a box that
    covers 1 - lambda of the other image. The targets are weighted with what is visible: for CutMix,
    lambda is corrected for the part of the box beyond the border. The partners of a batch form one
    random ring, so no image is mixed with itself, and any batch of two or more will do.

    With `keys` the result depends on the set of keys in the batch, not on the images' order or
    device. In evaluation mode (`mix.eval()`) images and labels are returned as they are, so that a
    validation loss is neither mixed nor smoothed; `torch.nn.functional.cross_entropy` takes class
    numbers and targets alike.

    Args:
        num_classes: Width of the targets.
        mixup_alpha: Beta parameter of Mixup; 0 switches it off.
        cutmix_alpha: Beta parameter of CutMix; 0 switches it off.
        prob: Share of the images (of the batches in mode "batch") that are mixed, in [0, 1].
        switch_prob: Share of these that get CutMix when both are on, in [0, 1].
        label_smoothing: Weight of the uniform distribution in the targets, in [0, 1).
        mode: `"sample"` draws for each image, `"batch"` once for the whole batch.

    Raises:
        TypeError: If an argument is no number of its kind.
        ValueError: If an argument is out of range.

    Example:
        >>> images = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
        >>> mix = MixupCutmix(2, mixup_alpha=0.0, cutmix_alpha=1.0)
        >>> mixed, targets = mix(images, torch.tensor([0, 1]), keys=torch.tensor([3, 4]))
        >>> torch.equal(mixed.mean(dim=(1, 2, 3)), targets[:, 1])  # the share of ones
        True

    Reference:
        Zhang, Cisse, Dauphin, Lopez-Paz, mixup: Beyond Empirical Risk Minimization, 2017, arXiv
        1710.09412. Yun, Han, Oh, Chun, Choe, Yoo, CutMix: Regularization Strategy to Train Strong
        Classifiers with Localizable Features, 2019, arXiv 1905.04899. Both draw one lambda for a
        batch, as mode "batch" does.
    """

    def __init__(
        self,
        num_classes: int,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        label_smoothing: float = 0.0,
        mode: Literal["sample", "batch"] = "sample",
    ) -> None:
        super().__init__()
        check_whole(num_classes=num_classes)
        check_finite(
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            prob=prob,
            switch_prob=switch_prob,
            label_smoothing=label_smoothing,
        )
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1")
        if mixup_alpha < 0 or cutmix_alpha < 0 or mixup_alpha + cutmix_alpha == 0:
            raise ValueError(
                f"mixup_alpha={mixup_alpha} and cutmix_alpha={cutmix_alpha} must not be negative, "
                "and one of them above 0"
            )
        for name, value in (("prob", prob), ("switch_prob", switch_prob)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must be in [0, 1]")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1)")
        if mode not in ("sample", "batch"):
            raise ValueError(f"mode={mode!r}; use 'sample' or 'batch'")
        self.num_classes = num_classes
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.prob = prob
        self.switch_prob = switch_prob
        self.label_smoothing = label_smoothing
        self.mode = mode

    def extra_repr(self) -> str:
        names = (
            "num_classes", "mixup_alpha", "cutmix_alpha", "prob", "switch_prob",
            "label_smoothing", "mode",
        )  # fmt: skip
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(
        self, images: torch.Tensor, labels: torch.Tensor, keys: SomeKeys = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix a batch.

        Args:
            images: `(batch, channels, height, width)`, floating point; uint8 if Mixup is off.
            labels: Class numbers `(batch,)`, or targets `(batch, num_classes)`.
            keys: Whole numbers `(batch,)` as a tensor, array or list; keep a tensor on the CPU,
                where boxes and weights are drawn. Without keys, torch's global CPU generator draws
                them.

        Returns:
            Mixed images, and targets `(batch, num_classes)` float32, whose rows sum to 1 if those
            of given targets do. In evaluation mode, `images` and `labels`.

        Raises:
            TypeError: If something is no tensor or of a dtype that cannot be mixed.
            ValueError: If a shape does not fit, or a class number is not below `num_classes`.
        """
        if not isinstance(images, torch.Tensor):
            raise refuse(images, kinds="use a tensor (batch, channels, height, width)")
        if not self.training:
            return images, labels
        if images.ndim != 4:
            raise ValueError(f"images has shape {tuple(images.shape)}, expected 4 dimensions")
        if self.mixup_alpha and not images.is_floating_point():
            raise TypeError(
                f"images has dtype {images.dtype}, but Mixup averages; convert to floating point "
                "or use mixup_alpha=0"
            )
        targets = self.targets(labels, images)
        numbers = as_keys(keys, None, len(images))
        if len(images) < 2:
            return images.clone(), targets
        mixture = self.draw(numbers, *images.shape[-2:])
        return mix_images(images, mixture), mix_targets(targets, mixture, *images.shape[-2:])

    def draw(self, keys: torch.Tensor, height: int, width: int) -> Mixture:
        """What happens to the images of a batch.

        Args:
            keys: `(n,)` int64, on the CPU.
            height: Of the images, in pixels.
            width: Of the images, in pixels.
        """
        numbers = cast("Keys", keys.numpy())
        ring = np.argsort(uniform(numbers, _PARTNER), kind="stable")
        partner = np.empty_like(ring)
        partner[ring] = np.roll(ring, -1)
        weight, box = self._draw(numbers, height, width)
        return Mixture(*(torch.from_numpy(part) for part in (partner, weight, box)))

    def targets(self, labels: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Smoothed targets `(batch, num_classes)` float32 of images that are not mixed yet.

        Args:
            labels: Class numbers `(batch,)`, or targets `(batch, num_classes)`.
            images: Where the targets go: one for each, on their device.
        """
        batch, device = len(images), images.device
        if not isinstance(labels, torch.Tensor):
            raise TypeError(
                f"labels is a {type(labels).__name__}; use a tensor of class numbers (batch,) or "
                f"targets (batch, {self.num_classes})"
            )
        if labels.shape[:1] != (batch,):
            raise ValueError(f"labels has shape {tuple(labels.shape)} for {batch} images")
        real = not labels.is_complex()
        whole = real and not labels.is_floating_point() and labels.dtype != torch.bool
        if labels.ndim == 2 and labels.shape[1] == self.num_classes and real:
            targets = labels.float()
        elif labels.ndim == 1 and whole:
            labels = labels.long()
            # on a GPU the check would wait for the device, which reports a wrong index itself
            on_cpu = batch > 0 and not labels.is_cuda
            if on_cpu and not 0 <= labels.min() <= labels.max() < self.num_classes:
                raise ValueError(
                    f"labels has values from {labels.min()} to {labels.max()}, but "
                    f"num_classes={self.num_classes}"
                )
            targets = torch.zeros(batch, self.num_classes, device=labels.device)
            targets.scatter_(1, labels[:, None], 1.0)
        else:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}, expected class "
                f"numbers (batch,) or targets (batch, {self.num_classes})"
            )
        off = self.label_smoothing / self.num_classes
        return (targets * (1 - self.label_smoothing) + off).to(device)

    def _draw(
        self, keys: Keys, height: int, width: int
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Each image's weight for Mixup `(n,)` and box (top, bottom, left, right) `(n, 4)`."""
        n = len(keys)
        if self.mode == "batch":  # a sum, for it must not depend on the order of the keys
            total = int(keys.sum(dtype=np.int64))
            keys = np.array([fold(total)], dtype=np.uint64).view(np.int64)
        mixes = uniform(keys, _APPLY) < self.prob
        if self.mixup_alpha and self.cutmix_alpha:
            cuts = uniform(keys, _SWITCH) < self.switch_prob
        else:
            cuts = np.full(len(keys), bool(self.cutmix_alpha))
        weight = np.ones(len(keys))
        box = np.zeros((len(keys), 4), dtype=np.int64)
        blended, pasted = mixes & ~cuts, mixes & cuts
        if blended.any():
            weight[blended] = beta(keys[blended], self.mixup_alpha, _LAMBDA)
        if pasted.any():
            chosen = keys[pasted]
            side = np.sqrt(1 - beta(chosen, self.cutmix_alpha, _LAMBDA))
            for column, length, draw in ((0, height, _Y), (2, width, _X)):
                half = (length * side).astype(np.int64) // 2
                center = (uniform(chosen, draw) * length).astype(np.int64)
                box[pasted, column] = np.clip(center - half, 0, length)
                box[pasted, column + 1] = np.clip(center + half, 0, length)
        return np.broadcast_to(weight, n).copy(), np.broadcast_to(box, (n, 4)).copy()
