"""The operations of automatic augmentation, each over a batch with one magnitude per image.

These are the definitions: `images` is `(n, channels, height, width)`, uint8 or float in [0, 1], and
the results are those of torchvision's functional operations on one image. Every image's result is
computed from integers, from single rounded float operations, or in float64 where a fused
multiply-add would otherwise decide the last bit; so it depends neither on the rest of the batch nor
on the device (bilinear sampling leaves the last bit to the device's `grid_sample`).
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
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
    out = np.empty(rows.shape, dtype=np.uint8)
    for k, (row, table) in enumerate(zip(rows.numpy(), tables.numpy(), strict=True)):
        # twice as fast as an index, and a bytearray half as fast again as bytes are
        out[k] = np.frombuffer(bytearray(row).translate(table.tobytes()), dtype=np.uint8)
    return torch.from_numpy(out).view(images.shape)


def _blend(images: Tensor, other: Tensor, ratio: Tensor) -> Tensor:
    """Weigh `images` with `ratio` `(n,)` float64, `other` with the rest."""
    own = _per_image(ratio.float())
    rest = other.double().mul_(_per_image((1 - ratio).float()).double())

    def run(some: Tensor) -> Tensor:
        # the product is exact, so the sum rounds once, as a fused multiply-add does
        return _to_dtype(some.float().mul(own).double().add_(rest).float(), some)

    return _by_channel(images, run)


def gray(images: Tensor) -> Tensor:
    """Luma `(n, 1, height, width)`, float32; whole numbers for uint8 images."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = (images[:, c : c + 1] for c in range(3))
    weights = torch.tensor(_GRAY, dtype=torch.float32).tolist()
    luma = (red.float() * weights[0]).double()
    for channel, weight in ((green, weights[1]), (blue, weights[2])):
        # by way of float32, which is faster than from uint8 at once
        luma = channel.float().double().mul_(weight).add_(luma).float().double()
    luma = luma.float()
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
    change = _per_image((1 - factor).float())
    run = _sharpen_whole if images.dtype == torch.uint8 else _sharpen
    return _by_channel(images, lambda some: run(some, change))


def _sharpen(images: Tensor, change: Tensor) -> Tensor:
    values = images.float()
    rows = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inside = values[..., 1:-1, 1:-1]
    total.add_(inside, alpha=4)
    # a 3 x 3 kernel of ones with a 5 in the middle
    moved = (divided(total, 13) - inside).double().mul_(change.double()).add_(inside).float()
    out = images.clone()
    out[..., 1:-1, 1:-1] = _to_dtype(moved, images)
    return out


def _sharpen_whole(images: Tensor, change: Tensor) -> Tensor:
    # All pixels lie in one row here: around an inner one, sums are those of its own image, and the
    # others are put back at the end.
    values = images.reshape(-1).to(torch.int16)
    width = images.shape[-1]
    row = values.clone()
    row[1:-1].add_(values[:-2]).add_(values[2:])
    total = row.clone()
    total[width:-width].add_(row[: -2 * width]).add_(row[2 * width :])
    # a 3 x 3 kernel of ones with a 5 in the middle; 13 is odd, so no quotient is near a tie
    smooth = total.add_(values, alpha=4).float().mul_(1 / 13).round_().view(images.shape)
    center = images.float()
    smooth -= center
    # Both products are exact, and so is the first sum: 10 and 14 bits. The second sum rounds once,
    # as a fused multiply-add with the whole of `change` does.
    high = change.mul(2**14).round_().div_(2**14)
    moved = torch.addcmul(center, smooth, high).addcmul_(smooth, change - high)
    out = _to_dtype(moved, images)
    for edge in (..., 0), (..., -1), (..., 0, slice(None)), (..., -1, slice(None)):
        out[edge] = images[edge]
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
    if images.dtype != torch.uint8:
        return torch.where(images >= limit, 1 - images, images)
    # Comparing bytes takes ten times as long as their minimum. What lies below the limit leaves a
    # difference, what does not leaves 0, which becomes 255.
    least = limit.ceil().clamp(0, 255).to(torch.uint8)
    flip = (least - torch.minimum(images, least)).clamp_(max=1).sub_(1)
    return flip.mul_((limit <= 255).to(torch.uint8)).bitwise_xor_(images)


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
    if interpolation == "nearest":
        if len(images) == 1 and images.is_cpu and height * width <= _KEPT_PIXELS:
            index = _kept_index(tuple(matrix.flatten().tolist()), height, width)
        else:
            index = _index(matrix, height, width)
        return _nearest(images, index, fill)
    source_x, source_y = _sources(matrix, height, width)
    grid = torch.stack(torch.broadcast_tensors(source_x, source_y), dim=-1)
    values = images.float()
    if fill is None:
        sampled = grid_sample(values, grid, mode="bilinear", align_corners=False)
    else:
        covered = torch.cat((values, torch.ones_like(values[:, :1])), dim=1)
        sampled = grid_sample(covered, grid, mode="bilinear", align_corners=False)
        sampled = sampled[:, :-1] + (1 - sampled[:, -1:]) * fill.view(1, -1, 1, 1)
    return _to_dtype(sampled.round_() if images.dtype == torch.uint8 else sampled, images)


def _sources(matrix: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Where pixels come from, x and y from -1 to 1, `(n, height or 1, width or 1)`.

    With a shear of 0.2, one row in five comes from half-way between pixels, where the last bit
    decides; so these are the roundings of torchvision, one by one.
    """
    device = matrix.device
    x = torch.arange(width, device=device, dtype=torch.float32) - (width - 1) / 2
    y = torch.arange(height, device=device, dtype=torch.float32)[:, None] - (height - 1) / 2

    def source(line: Tensor, side: int) -> Tensor:
        a, b, c = divided(line, side / 2)[..., None, None].unbind(1)
        # what is 0 everywhere need not be spread over all pixels; a GPU cannot look without waiting
        across = a if line.is_cpu and not a.any() else a * x
        down = b if line.is_cpu and not b.any() else b * y
        return (across + down).add_(c)

    return source(matrix[:, 0], width), source(matrix[:, 1], height)


_KEPT_PIXELS = 1 << 17  # a megabyte for each index


def _index(matrix: Tensor, height: int, width: int) -> Tensor:
    """Which pixels of framed images `_nearest` takes, `(n, height * width)`."""
    source_x, source_y = _sources(matrix, height, width)
    x = source_x.add_(1).mul_(width / 2).sub_(0.5).round_().clamp_(-1, width).int().add_(1)
    y = source_y.add_(1).mul_(height / 2).sub_(0.5).round_().clamp_(-1, height).int().add_(1)
    return y.mul_(width + 2).add(x).long().expand(-1, height, width).flatten(1)


@lru_cache(maxsize=8)
def _kept_index(matrix: tuple[float, ...], height: int, width: int) -> Tensor:
    # RandAugment has six of these, and half of the time of a warp goes into them
    with torch.inference_mode(False):  # what is kept must serve in any mode
        return _index(torch.tensor(matrix, device="cpu").view(1, 2, 3), height, width)


def _nearest(images: Tensor, index: Tensor, fill: Tensor | None) -> Tensor:
    """Take pixels of images in a frame of one pixel, which shows for all that is outside."""
    height, width = images.shape[-2:]
    framed = images.new_zeros(*images.shape[:2], height + 2, width + 2)
    if fill is not None:
        framed.copy_(fill.view(1, -1, 1, 1))
    framed[..., 1:-1, 1:-1] = images
    flat = framed.flatten(2)
    return flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1)).view_as(images)
