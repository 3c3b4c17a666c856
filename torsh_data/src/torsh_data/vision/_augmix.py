"""AugMix."""

from typing import cast

import torch

from torsh_data._rng import Keys, beta, dirichlet, uniform
from torsh_data.vision._engine import CACHED_VALUES, Drawn, apply_layers, draw_layer
from torsh_data.vision._policy import Fill, Interpolation, Policy
from torsh_data.vision._settings import check_finite, check_whole
from torsh_data.vision._tables import AUGMIX, AUGMIX_PARTIAL, CODES

_BINS = 10
_MAX_WIDTH = 100
# Draws of a key, where no other part of the package draws.
_SHARE, _WEIGHTS, _LENGTH, _OPS = 10_000, 20_000, 200_000, 300_000


class AugMix(Policy):
    """Average each image with chains of operations on it, drawn anew for each image of a batch.

    An image becomes `(1 - m) * image + m * mixture`, where the mixture weighs `mixture_width`
    copies with Dirichlet weights, each of which went through a chain of random operations, and m is
    drawn from a Beta distribution. Operations and magnitudes are those of
    `torchvision.transforms.v2.AugMix` on uint8 tensors, and as there the average is taken in
    float32 and cut to whole numbers for uint8; what decides the draws is said at `Policy`.

    Args:
        severity: Operations draw a strength below this, in [1, 10].
        mixture_width: Number of chains, in [1, 100].
        chain_depth: Operations in a chain; a negative number draws 1, 2 or 3 for each chain.
        alpha: Parameter of the Dirichlet and the Beta distribution, above 0.
        all_ops: False leaves out brightness, colour, contrast and sharpness, as the authors do to
            judge robustness against these.
        interpolation: `"nearest"` or `"bilinear"`, for shear, translation and rotation.
        fill: Value of pixels from outside the image, one number or one per channel, in the images'
            units (0 to 255 for uint8, 0 to 1 for floats); 0 by default.

    Raises:
        TypeError: If an argument is of another kind than those above.
        ValueError: If an argument is out of range.

    Example:
        >>> images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).to(torch.uint8)
        >>> augment = AugMix(severity=3)
        >>> both = augment(images, keys=torch.tensor([11, 12]))
        >>> torch.equal(both[1], augment(images[1], keys=12))
        True

    Reference:
        Hendrycks, Mu, Cubuk, Zoph, Gilmer, Lakshminarayanan, AugMix: A Simple Data Processing
        Method to Improve Robustness and Uncertainty, 2019, arXiv 1912.02781.
    """

    def __init__(
        self,
        severity: int = 3,
        mixture_width: int = 3,
        chain_depth: int = -1,
        alpha: float = 1.0,
        all_ops: bool = True,
        interpolation: Interpolation = "bilinear",
        fill: Fill = None,
    ) -> None:
        super().__init__(interpolation, fill)
        check_whole(severity=severity, mixture_width=mixture_width, chain_depth=chain_depth)
        check_finite(alpha=alpha)
        if not isinstance(all_ops, bool):
            raise TypeError(f"all_ops={all_ops!r} must be True or False")
        if not 1 <= severity <= _BINS:
            raise ValueError(f"severity={severity} must be in [1, {_BINS}]")
        if not 1 <= mixture_width <= _MAX_WIDTH:
            raise ValueError(f"mixture_width={mixture_width} must be in [1, {_MAX_WIDTH}]")
        if chain_depth == 0:
            raise ValueError("chain_depth=0 does nothing; use 1 or more, or -1 to draw 1 to 3")
        if not alpha > 0:
            raise ValueError(f"alpha={alpha} must be above 0")
        self.severity = severity
        self.mixture_width = mixture_width
        self.chain_depth = chain_depth
        self.alpha = alpha
        self.all_ops = all_ops

    def extra_repr(self) -> str:
        names = (
            "severity", "mixture_width", "chain_depth", "alpha", "all_ops", "interpolation", "fill",
        )  # fmt: skip
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def draw(self, keys: torch.Tensor, height: int, width: int) -> Drawn:
        """The operations of all chains: `(layers, n * mixture_width)`, an image's side by side."""
        space = AUGMIX if self.all_ops else AUGMIX_PARTIAL
        table = space.magnitudes(_BINS, height, width)
        depth = max(self.chain_depth, 0) or 3
        chains: list[Drawn] = []
        for chain in range(self.mixture_width):
            layers: list[tuple[torch.Tensor, torch.Tensor]] = []
            if self.chain_depth > 0:
                length = torch.full((len(keys),), depth)
            else:
                length = 1 + (uniform(keys, _LENGTH + chain) * depth).long()
            for layer in range(depth):
                draw = _OPS + 3 * (layer * _MAX_WIDTH + chain)
                strength = (uniform(keys, draw + 2) * self.severity).long()
                codes, magnitudes = draw_layer(space, table, keys, draw, strength)
                codes = torch.where(layer < length, codes, CODES["Identity"])
                layers.append((codes, magnitudes))
            chains.append(Drawn.stack(layers, len(keys)))
        return Drawn(
            torch.stack([c.codes for c in chains], dim=2).flatten(1),
            torch.stack([c.magnitudes for c in chains], dim=2).flatten(1),
        )

    def weights(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How much of the image, and of each chain, goes into the result.

        Args:
            keys: `(n,)` int64, on the CPU.

        Returns:
            Weights `(n,)` and `(n, mixture_width)` float32, whose sum is 1 for each image.
        """
        numbers = cast("Keys", keys.numpy())
        share = beta(numbers, self.alpha, _SHARE)
        chains = dirichlet(numbers, self.alpha, self.mixture_width, _WEIGHTS)
        return torch.from_numpy(1 - share).float(), torch.from_numpy(
            chains * share[:, None]
        ).float()

    def augment(self, batch: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        chains = batch.repeat_interleave(self.mixture_width, dim=0)
        drawn = self.draw(keys, *batch.shape[-2:])
        apply_layers(chains, drawn, self._fill(batch), self.interpolation)
        shares = torch.column_stack(self.weights(keys)).to(batch.device, non_blocking=True)
        if batch.is_cuda:
            return _mixed(batch, chains, shares)
        out = torch.empty_like(batch)
        # on the CPU, the float32 sum of few images stays in the cache
        parts = (out, batch, chains.unflatten(0, (-1, self.mixture_width)), shares)
        step = max(1, CACHED_VALUES // max(1, batch[0].numel() if len(batch) else 1))
        for done, images, copies, weights in zip(*(p.split(step) for p in parts), strict=True):
            done.copy_(_mixed(images, copies.flatten(0, 1), weights))
        return out


def _mixed(images: torch.Tensor, chains: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Weigh `n` images and their chains, `n * width`, with `shares` `(n, 1 + width)`."""
    own, *others = shares[..., None, None, None].unbind(1)
    mixed = images.float().mul_(own) if images.dtype != torch.float32 else images * own
    for chain, share in enumerate(others):
        # product and sum rounded one by one, which every device does alike
        mixed += chains[chain :: len(others)] * share
    if images.is_floating_point():
        mixed = mixed.clamp_(0, 1)  # the weights' sum may be off 1 in the last bit
    elif images.is_cpu:
        mixed = mixed.to(torch.int16)  # with the detour it takes a third of the time
    return mixed.to(images.dtype)
