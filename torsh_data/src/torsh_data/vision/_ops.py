"""The operations of automatic augmentation, each over a batch with one magnitude per image.

These are the definitions: `images` is `(n, channels, height, width)`, uint8 or float in [0, 1], and
the results are those of torchvision's functional operations on one image. Every image's result is
computed from integers, from single rounded float operations, or in float64 where a fused
multiply-add would otherwise decide the last bit; so it depends neither on the rest of the batch nor
on the device (bilinear sampling leaves the last bit to the device's `grid_sample`).
"""

from collections.abc import Callable

import torch
from torch.nn.functional import grid_sample

Tensor = torch.Tensor

_GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601 luma


def _bound(images: Tensor) -> float:
    return 255.0 if images.dtype == torch.uint8 else 1.0


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _by_channel(images: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Run on one channel after the other on the CPU, where small buffers are faster."""
    if not images.is_cpu or images.shape[1] == 1:
        return run(images)
    out = torch.empty_like(images)
    for c in range(images.shape[1]):
        out[:, c : c + 1] = run(images[:, c : c + 1])
    return out


def divided(values: Tensor, divisor: float) -> Tensor:
    """Divide with one rounding; by a number, CUDA multiplies with its inverse instead."""
    return values / values.new_full((1,), divisor)


def _to_dtype(values: Tensor, images: Tensor) -> Tensor:
    """Clamp to the range of `images` and convert; for uint8, cut to whole numbers."""
    values = values.clamp_(0, _bound(images))
    if images.dtype == torch.uint8 and values.is_cpu:
        values = values.to(torch.int16)  # with the detour it takes a third of the time
    return values.to(images.dtype)


_LONG = 4096  # from so many values on, one call for each row pays on the CPU
_LEVELS = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)


def _levels(images: Tensor) -> Tensor:
    """All values of uint8 as one small image, where `images` are."""
    return _LEVELS.to(images.device, non_blocking=True)


def _look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replace each value of uint8 images.

    Args:
        images: `(n, channels, height, width)`.
        tables: 256 values for each image, or for each of its channels; uint8, one row for each.
    """
    rows = images.reshape(tables.numel() // 256, -1)
    tables = tables.reshape(-1, 256)
    if not images.is_cpu or rows.shape[1] < _LONG:
        return tables.gather(1, rows.long()).view(images.shape)
    out = torch.empty_like(rows)
    for done, row, table in zip(out, rows, tables, strict=True):  # twice as fast as an index
        content = row.numpy().tobytes().translate(table.numpy().tobytes())
        done.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    return out.view(images.shape)


def _blend(images: Tensor, other: Tensor, ratio: Tensor) -> Tensor:
    """Weigh `images` with `ratio` `(n,)` float64, `other` with the rest."""
    own = _per_image(ratio.float())
    rest = other.double().mul_(_per_image((1 - ratio).float()).double())

    def run(some: Tensor) -> Tensor:
        # the product is exact, so the sum rounds once, as a fused multiply-add does
        return _to_dtype(rest.add(some.float() * own).float(), some)

    return _by_channel(images, run)


def gray(images: Tensor) -> Tensor:
    """Luma `(n, 1, height, width)`, float32; whole numbers for uint8 images."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = (images[:, c : c + 1] for c in range(3))
    weights = torch.tensor(_GRAY, dtype=torch.float32).tolist()
    luma = (red.float() * weights[0]).double()
    luma = (green.double() * weights[1]).add_(luma).float().double()
    luma = (blue.double() * weights[2]).add_(luma).float()
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
    if images.dtype == torch.uint8:  # whatever the image, it has 256 values
        levels = _levels(images).expand(len(images), -1, -1, -1)
        return _look_up(images, _blend(levels, mean.float(), factor))
    return _blend(images, mean.float(), factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Move from the smoothed image (0) to beyond the image (above 1); the border stays."""
    if min(images.shape[-2:]) <= 2:
        return images
    return _by_channel(images, lambda some: _sharpen(some, factor))


def _sharpen(images: Tensor, factor: Tensor) -> Tensor:
    whole = images.dtype == torch.uint8
    values = images.to(torch.int16) if whole else images.float()
    rows = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inside = values[..., 1:-1, 1:-1]
    total.add_(inside, alpha=4)
    # a 3 x 3 kernel of ones with a 5 in the middle; 13 is odd, so no quotient is near a tie
    smooth = divided(total.float(), 13)
    smooth = smooth.round_() if whole else smooth
    center = inside.float()
    out = images.clone()
    moved = (smooth - center).double().mul_(_per_image((1 - factor).float()).double())
    moved = moved.add_(center).float()
    out[..., 1:-1, 1:-1] = _to_dtype(moved, images)
    return out


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest `bits` `(n,)` of each value."""
    bits = _per_image(bits.long())
    if images.dtype == torch.uint8:
        return images & (0xFF00 >> bits & 0xFF).to(torch.uint8)
    levels = 2.0**bits
    return ((images * levels).floor().clamp(max=levels - 1) / levels).to(images.dtype)


def invert(images: Tensor) -> Tensor:
    """The negative."""
    return images.bitwise_not() if images.dtype == torch.uint8 else 1 - images


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert what is at or above `threshold` `(n,)`, a share of the range."""
    limit = _per_image((threshold * _bound(images)).float())
    if images.dtype == torch.uint8:
        levels = _levels(images)
        return _look_up(images, torch.where(levels >= limit, ~levels, levels))
    return torch.where(images >= limit, 1 - images, images)


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel to the whole range; a flat channel stays."""
    low, high = images.amin((2, 3), keepdim=True).float(), images.amax((2, 3), keepdim=True).float()
    flat = low == high
    scale = torch.where(flat, 1.0, (high - low) * (1 / _bound(images)))
    low = torch.where(flat, 0.0, low)
    if images.dtype == torch.uint8:
        return _look_up(images, _to_dtype((_levels(images).float() - low) / scale, images))
    return _to_dtype((images.float() - low) / scale, images)


def equalize(images: Tensor) -> Tensor:
    """Make all levels of a channel equally frequent; floats go through 256 levels."""
    if images.dtype != torch.uint8:
        # scaled to just below 256, so that equal shares of [0, 1] fall into each level
        levels = (images.float() * (255 + 1 - 1e-3)).to(torch.uint8)
        return divided(equalize(levels).to(images.dtype), 255)
    counts = _histogram(images)
    below = counts.cumsum(2)
    brightest = counts.gather(2, below.argmax(2, keepdim=True))  # pixels of the largest value
    step = (below[..., -1:] - brightest) // 255
    table = torch.zeros_like(counts)
    table[..., 1:] = ((below[..., :-1] + step // 2) // step.clamp(min=1)).clamp(0, 255)
    unchanged = torch.arange(256, device=images.device).expand_as(table)
    return _look_up(images, torch.where(step > 0, table, unchanged).to(torch.uint8))


def _histogram(images: Tensor) -> Tensor:
    """How often each value occurs in each channel of uint8 images, `(n, channels, 256)` int64."""
    flat = images.flatten(2)
    if (
        images.is_cpu and flat.shape[2] >= _LONG
    ):  # faster one by one; on a GPU it would wait for the device
        rows = [torch.bincount(row, minlength=256) for row in flat.flatten(0, 1)]
        return torch.stack(rows).view(*flat.shape[:2], 256)
    one = torch.ones((), dtype=torch.int64, device=images.device)
    counts = one.new_zeros(*flat.shape[:2], 256)
    return counts.scatter_add_(2, flat.long(), one.expand(flat.shape))


def translate(images: Tensor, right: int, down: int, fill: Tensor | None) -> Tensor:
    """Move all images by whole pixels: what `warp` does for these, by copying rectangles."""
    height, width = images.shape[-2:]
    out = torch.zeros_like(images) if fill is None else torch.empty_like(images)
    if fill is not None:
        out.copy_(fill.view(1, -1, 1, 1))
    if abs(right) < width and abs(down) < height:
        to_x, from_x = slice(max(right, 0), width + min(right, 0)), slice(max(-right, 0), None)
        to_y, from_y = slice(max(down, 0), height + min(down, 0)), slice(max(-down, 0), None)
        moved = images[..., from_y, from_x]
        part = out[..., to_y, to_x]
        part.copy_(moved[..., : part.shape[-2], : part.shape[-1]])
    return out


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
    grid = torch.stack((divided(source_x, width / 2), divided(source_y, height / 2)), dim=-1)
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
    # a frame of one pixel shows for all that is outside; masks would take most of the time
    framed = images.new_zeros(*images.shape[:2], height + 2, width + 2)
    if fill is not None:
        framed.copy_(fill.view(1, -1, 1, 1))
    framed[..., 1:-1, 1:-1] = images
    columns = x.clamp_(-1, width).int().add_(1)
    index = y.clamp_(-1, height).int().add_(1).mul_(width + 2).add_(columns).long().flatten(1)
    flat = framed.flatten(2)
    return flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1)).view_as(images)
