"""The operations of automatic augmentation, each over a batch with one magnitude per image.

These are the definitions: `images` is `(n, channels, height, width)`, uint8 or float in [0, 1], and
the results are those of torchvision's functional operations on one image. Every image's result is
computed from integers, from single rounded float operations, or in float64 where a fused
multiply-add would otherwise decide the last bit; so it depends neither on the rest of the batch nor
on the device (bilinear sampling leaves the last bit to the device's `grid_sample`).
"""

import torch
from torch.nn.functional import grid_sample

Tensor = torch.Tensor

_GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601 luma


def _bound(images: Tensor) -> float:
    return 255.0 if images.dtype == torch.uint8 else 1.0


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _fused(product: Tensor, factor: Tensor, addend: Tensor) -> Tensor:
    """Multiply and add with one rounding, as the fused instruction does."""
    return (product.double() * factor.double() + addend.double()).float()


def _to_dtype(values: Tensor, images: Tensor) -> Tensor:
    return values.clamp_(0, _bound(images)).to(images.dtype)


def _blend(images: Tensor, other: Tensor, ratio: Tensor) -> Tensor:
    """Weigh `images` with `ratio` `(n,)` float64, `other` with the rest."""
    scaled = images.float() * _per_image(ratio.float())
    return _to_dtype(_fused(other, _per_image((1 - ratio).float()), scaled), images)


def gray(images: Tensor) -> Tensor:
    """Luma `(n, 1, height, width)`, float32; whole numbers for uint8 images."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = (images[:, c : c + 1].float() for c in range(3))
    weights = torch.tensor(_GRAY, dtype=torch.float32).tolist()
    luma = (green.double() * weights[1] + (red * weights[0]).double()).float()
    luma = (blue.double() * weights[2] + luma.double()).float()
    return luma.floor_() if images.dtype == torch.uint8 else luma


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale by `factor` `(n,)` float64."""
    return _to_dtype(images.float() * _per_image(factor.float()), images)


def color(images: Tensor, factor: Tensor) -> Tensor:
    """Move the colours from gray (0) to beyond the image (above 1)."""
    return images if images.shape[1] == 1 else _blend(images, gray(images), factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Move from the image's mean luma (0) to beyond the image (above 1)."""
    # float64 sums whole numbers exactly, in whatever order
    mean = gray(images).double().mean(dim=(1, 2, 3), keepdim=True)
    return _blend(images, mean.float(), factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Move from the smoothed image (0) to beyond the image (above 1); the border stays."""
    height, width = images.shape[-2:]
    if height <= 2 or width <= 2:
        return images
    whole = images.dtype == torch.uint8
    values = images.to(torch.int16) if whole else images.float()
    rows = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inside = values[..., 1:-1, 1:-1]
    total = total + 4 * inside
    # a 3 x 3 kernel of ones with a 5 in the middle; 13 is odd, so no quotient is near a tie
    smooth = total.float().div_(13)
    smooth = smooth.round_() if whole else smooth
    center = inside.float()
    out = images.clone()
    moved = _fused(smooth - center, _per_image((1 - factor).float()), center)
    out[..., 1:-1, 1:-1] = _to_dtype(moved, images)
    return out


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest `bits` `(n,)` of each value."""
    bits = _per_image(bits.long())
    if images.dtype == torch.uint8:
        return images & (0xFF00 >> bits & 0xFF).to(torch.uint8)
    levels = 2.0**bits
    return ((images * levels).floor().clamp(max=levels - 1) / levels).to(images.dtype)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert what is at or above `threshold` `(n,)`, a share of the range."""
    limit = _per_image((threshold * _bound(images)).float())
    if images.dtype == torch.uint8:
        bright = images >= limit.ceil().to(torch.uint8)
        return images ^ bright.view(torch.uint8).neg()  # 1 becomes 255; `where` takes longer
    return torch.where(images >= limit, 1 - images, images)


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel to the whole range; a flat channel stays."""
    low, high = images.flatten(2).aminmax(dim=2)
    low, high = low.float()[..., None, None], high.float()[..., None, None]
    flat = low == high
    scale = torch.where(flat, 1.0, (high - low) * (1 / _bound(images)))
    return _to_dtype((images.float() - torch.where(flat, 0.0, low)) / scale, images)


def equalize(images: Tensor) -> Tensor:
    """Make all levels of a channel equally frequent; floats go through 256 levels."""
    if images.dtype != torch.uint8:
        # scaled to just below 256, so that equal shares of [0, 1] fall into each level
        levels = (images.float() * (255 + 1 - 1e-3)).to(torch.uint8)
        return equalize(levels).to(images.dtype) / 255
    flat = images.flatten(2).long()
    one = torch.ones((), dtype=torch.int64, device=images.device)
    counts = one.new_zeros(*flat.shape[:2], 256).scatter_add_(2, flat, one.expand_as(flat))
    below = counts.cumsum(2)
    brightest = counts.gather(2, below.argmax(2, keepdim=True))  # pixels of the largest value
    step = (flat.shape[2] - brightest) // 255
    table = torch.zeros_like(counts)
    table[..., 1:] = ((below[..., :-1] + step // 2) // step.clamp(min=1)).clamp(0, 255)
    unchanged = torch.arange(256, device=images.device).expand_as(table)
    table = torch.where(step > 0, table, unchanged).to(torch.uint8)
    return table.gather(2, flat).view_as(images)


def warp(images: Tensor, matrix: Tensor, fill: Tensor | None, interpolation: str) -> Tensor:
    """Move pixels: output (x, y), from the centre, shows input `matrix` (x, y, 1).

    Args:
        images: `(n, channels, height, width)`.
        matrix: `(n, 2, 3)` float32, in pixels.
        fill: What lies outside the image, `(channels,)` in the images' units; None is 0.
        interpolation: `"nearest"` or `"bilinear"`.
    """
    height, width = images.shape[-2:]
    x = torch.arange(width, device=images.device, dtype=torch.float32) - (width - 1) / 2
    y = torch.arange(height, device=images.device, dtype=torch.float32)[:, None] - (height - 1) / 2
    m = matrix[..., None, None]
    source_x = (m[:, 0, 0] * x + m[:, 0, 1] * y) + m[:, 0, 2]
    source_y = (m[:, 1, 0] * x + m[:, 1, 1] * y) + m[:, 1, 2]
    if interpolation == "nearest":
        source_x, source_y = source_x + (width - 1) / 2, source_y + (height - 1) / 2
        return _nearest(images, source_x.round_(), source_y.round_(), fill)
    grid = torch.stack((source_x / (width / 2), source_y / (height / 2)), dim=-1)
    values = images.float()
    if fill is None:
        sampled = grid_sample(values, grid, mode="bilinear", align_corners=False)
    else:
        covered = torch.cat((values, torch.ones_like(values[:, :1])), dim=1)
        sampled = grid_sample(covered, grid, mode="bilinear", align_corners=False)
        sampled = sampled[:, :-1] + (1 - sampled[:, -1:]) * fill.view(1, -1, 1, 1)
    return _to_dtype(sampled.round_() if images.dtype == torch.uint8 else sampled, images)


def _nearest(images: Tensor, x: Tensor, y: Tensor, fill: Tensor | None) -> Tensor:
    """The pixels at whole coordinates `(n, height, width)`."""
    height, width = images.shape[-2:]
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    index = (y * width + x).masked_fill_(outside, 0).long().flatten(1)
    flat = images.flatten(2)
    found = flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1)).view_as(images)
    if fill is None:
        return found.masked_fill_(outside[:, None], 0)
    return torch.where(outside[:, None], fill.to(images.dtype).view(1, -1, 1, 1), found)
