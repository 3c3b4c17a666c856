"""From a stored batch to a model's input."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import nn

from torsh_data._rng import Keys, uniform
from torsh_data.vision._erase import erase_boxes
from torsh_data.vision._final import FinalPlan, final_pass
from torsh_data.vision._images import as_batch, refuse
from torsh_data.vision._keys import SomeKeys, as_keys
from torsh_data.vision._mix import Mixture, MixupCutmix, mix_targets
from torsh_data.vision._policy import Policy
from torsh_data.vision._settings import as_pair, as_series, check_finite

_FLIP = 1005  # the draw of a key, beside those of mixing and erasing
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class BatchPipeline(nn.Module):
    """All that happens to a batch of images between the loader and the model, where the batch is.

    In this order: the policy, on the images as they are stored (uint8, so that a quarter of the
    bytes travels to the device); then one pass that flips, normalizes, erases a box, mixes with
    another image and converts. Everything is drawn for each image from its key, so that a batch
    comes out alike on any device and after any resume.

    In evaluation mode (`pipeline.eval()`) it only normalizes and converts, and labels are returned
    as they are, so that the same object serves validation.

    Args:
        policy: What to draw operations from, for instance `RandAugment()`; None for nothing.
        flip: Share of the images that are mirrored, in [0, 1].
        erase: Share of the images of which a box is erased, in [0, 1].
        mix: Mixup and CutMix; None for nothing.
        mean: Of each channel, as a share of the range (0 to 255 for uint8); ImageNet's by default.
        std: Of each channel, likewise.
        dtype: Of the result; the arithmetic is that of float32. Give a model in bfloat16 its own
            type, which halves the bytes that are written.
        memory_format: Of the result.
        erase_scale: Least and greatest share of the image that an erased box covers.
        erase_ratio: Least and greatest height divided by width of such a box.
        erase_value: What is there afterwards: a number in normalized units (0 is the mean), or
            `"random"` for noise of mean 0 and standard deviation 1 in each value.
        image: Name of the images in batches that are mappings.
        label: Name of the labels in these.

    Raises:
        TypeError: If an argument is of another kind than those above.
        ValueError: If an argument is out of range.

    Example:
        >>> images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
        >>> pipeline = BatchPipeline(mix=MixupCutmix(10))
        >>> batch = {"image": images, "label": torch.arange(4), "key": torch.arange(4)}
        >>> done = pipeline(batch)
        >>> done["image"].dtype, tuple(done["label"].shape)
        (torch.float32, (4, 10))
        >>> torch.equal(pipeline.eval()(batch)["label"], batch["label"])
        True

    Reference:
        Zhong, Zheng, Kang, Li, Yang, Random Erasing Data Augmentation, 2017, arXiv 1708.04896. As
        in torchvision, ten boxes are tried and the image is left alone if none fits. Here the box
        is erased after normalizing, the noise is a sum of uniform numbers, and another part of a
        mixed image may show its own erased box.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        flip: float = 0.5,
        erase: float = 0.25,
        mix: MixupCutmix | None = None,
        mean: Sequence[float] = _IMAGENET_MEAN,
        std: Sequence[float] = _IMAGENET_STD,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.channels_last,
        *,
        erase_scale: tuple[float, float] = (0.02, 0.33),
        erase_ratio: tuple[float, float] = (0.3, 3.3),
        erase_value: float | Literal["random"] = 0.0,
        image: str = "image",
        label: str = "label",
    ) -> None:
        super().__init__()
        _check_kinds(policy, mix, dtype, memory_format, image, label)
        check_finite(flip=flip, erase=erase)
        mean, std = as_series("mean", mean), as_series("std", std)
        erase_scale = as_pair("erase_scale", erase_scale)
        erase_ratio = as_pair("erase_ratio", erase_ratio)
        for name, value in (("flip", flip), ("erase", erase)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must be in [0, 1]")
        if len(mean) != len(std) or len(mean) not in (1, 3):
            raise ValueError(f"mean={mean} and std={std} need one value each for 1 or 3 channels")
        if not all(value > 0 for value in std):
            raise ValueError(f"std={std} must be above 0")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype} holds no normalized values; use a floating point type")
        if not 0 <= erase_scale[0] <= erase_scale[1] <= 1:
            raise ValueError(f"erase_scale={erase_scale} must be in [0, 1]")
        if not erase_ratio[0] > 0:
            raise ValueError(f"erase_ratio={erase_ratio} must be above 0")
        if not isinstance(erase_value, str):
            check_finite(erase_value=erase_value)
        elif erase_value != "random":
            raise ValueError(f"erase_value={erase_value!r}; use a number or 'random'")
        self.policy = policy
        self.flip = flip
        self.erase = erase
        self.mix = mix
        self.mean = mean
        self.std = std
        self.dtype = dtype
        self.memory_format = memory_format
        self.erase_scale = erase_scale
        self.erase_ratio = erase_ratio
        self.erase_value: float | Literal["random"] = erase_value
        self.image = image
        self.label = label

    def extra_repr(self) -> str:
        names = (
            "flip", "erase", "mean", "std", "dtype", "memory_format", "erase_scale", "erase_ratio",
            "erase_value", "image", "label",
        )  # fmt: skip
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(
        self,
        images: torch.Tensor | Mapping[str, Any],
        labels: torch.Tensor | None = None,
        keys: SomeKeys = None,
    ) -> Any:
        """Prepare a batch.

        Args:
            images: `(batch, channels, height, width)`, uint8 or floating point in [0, 1]. Or a
                mapping with the entry `image`, perhaps `label`, and perhaps `key` as `StreamLoader`
                makes it; then labels and keys are left out.
            labels: Class numbers `(batch,)`, or targets `(batch, num_classes)`; needed by `mix`.
            keys: Whole numbers `(batch,)` as a tensor, array or list; keep a tensor on the CPU,
                where everything is drawn. Without keys, torch's global CPU generator draws them.

        Returns:
            Images `(batch, channels, height, width)` of `dtype` and `memory_format`; with labels, a
            pair of these and the labels, or the mixed targets `(batch, num_classes)` float32. For a
            mapping, a dict with these in their places and everything else as it was.

        Raises:
            TypeError: If the images are no tensor, or of a dtype that is none of images.
            ValueError: If a shape, a range or a number of keys or labels does not fit.
        """
        if isinstance(images, Mapping):
            return self._mapping(images, labels, keys)
        if not isinstance(images, torch.Tensor):
            raise refuse(
                images,
                kinds="use a tensor (batch, channels, height, width), or a mapping with one; the "
                "data set's transform brings images to one size",
            )
        plain = as_batch(images)
        if images.ndim != 4:
            raise ValueError(f"images has shape {tuple(images.shape)}, expected 4 dimensions")
        channels = images.shape[1]
        if len(self.mean) not in (1, channels):
            raise ValueError(
                f"mean={self.mean} has {len(self.mean)} values for {channels} channels"
            )
        mix = self.mix if self.training else None
        if mix is not None and labels is None:
            raise ValueError("labels is missing, but mix changes the labels with the images")
        targets = labels
        plan = FinalPlan()
        if self.training:
            numbers = as_keys(keys, None, len(images))
            if self.policy is not None:
                plain = self.policy.augment(plain, numbers)
            plan = self.draw(numbers, *images.shape[-2:])
            if mix is not None and labels is not None:
                targets = mix.targets(labels, images)
                if plan.mixture is not None:
                    targets = mix_targets(targets, plan.mixture, *images.shape[-2:])
        done = final_pass(
            plain,
            plan,
            self.mean,
            self.std,
            erase_value=0.0 if isinstance(self.erase_value, str) else self.erase_value,
            dtype=self.dtype,
            memory_format=self.memory_format,
        )
        return done if targets is None else (done, targets)

    def draw(self, keys: torch.Tensor, height: int, width: int) -> FinalPlan:
        """What the last pass does to the images of a batch.

        Args:
            keys: `(n,)` int64, on the CPU.
            height: Of the images, in pixels.
            width: Of the images, in pixels.
        """
        numbers = cast("Keys", keys.numpy())
        flip = erase = noise = None
        mixture: Mixture | None = None
        if self.flip:
            flip = uniform(keys, _FLIP) < self.flip
        if self.erase:
            boxes = erase_boxes(
                numbers, self.erase, self.erase_scale, self.erase_ratio, height, width
            )
            erase = torch.from_numpy(boxes)
            noise = keys if self.erase_value == "random" else None
        if self.mix is not None and len(keys) > 1:  # one image has no partner
            mixture = self.mix.draw(keys, height, width)
        return FinalPlan(flip, erase, noise, mixture)

    def _mapping(
        self,
        batch: Mapping[str, Any],
        labels: torch.Tensor | None,
        keys: SomeKeys,
    ) -> dict[str, Any]:
        if labels is not None or keys is not None:
            raise ValueError("labels and keys come from the batch when it is a mapping")
        if self.image not in batch:
            raise ValueError(
                f"the batch has {sorted(map(str, batch))} and no {self.image!r}; name the images "
                "with image="
            )
        found = batch.get(self.label)
        done = self.forward(batch[self.image], found, batch.get("key"))
        if found is None:
            return {**batch, self.image: done}
        return {**batch, self.image: done[0], self.label: done[1]}


def _check_kinds(
    policy: object, mix: object, dtype: object, memory_format: object, image: object, label: object
) -> None:
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(
            f"policy is a {type(policy).__name__}; use a Policy such as RandAugment(), or None; "
            "other transforms of single images belong into the data set's transform"
        )
    if mix is not None and not isinstance(mix, MixupCutmix):
        raise TypeError(f"mix is a {type(mix).__name__}; use MixupCutmix(num_classes), or None")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype={dtype!r} is no torch.dtype; use one such as torch.float32")
    if memory_format not in (torch.channels_last, torch.contiguous_format):
        raise TypeError(
            f"memory_format={memory_format!r}; use torch.channels_last or torch.contiguous_format"
        )
    for name, value in (("image", image), ("label", label)):
        if not isinstance(value, str):
            raise TypeError(f"{name}={value!r} must be the name of an entry of the batch, a text")
