import math

import numpy as np
import pytest
import torch
from torch.nn.functional import grid_sample

from torsh_data.vision._engine import apply_ops, warp_matrices
from torsh_data.vision._tables import (
    AUGMIX,
    AUTO_AUGMENT,
    CODES,
    OPS,
    SIGNED,
    TRIVIAL_AUGMENT,
    WARPS,
)

MOVES = [name for name in OPS if name.startswith(("Shear", "Rotate"))]


def ours(images, name, magnitude, interpolation="nearest", fill=None):
    out = images.clone()
    codes = torch.full((len(images),), CODES[name])
    powers = torch.full((len(images),), magnitude, dtype=torch.float64)
    apply_ops(out, codes, powers, fill, interpolation)
    return out


def cases(name, height=37, width=30):
    """Weak and strong magnitudes of all policies, with both signs."""
    found = {0.0}
    for space, bins in ((AUTO_AUGMENT, 31), (TRIVIAL_AUGMENT, 31), (AUGMIX, 10)):
        if name in space.ops:
            row = space.magnitudes(bins, height, width)[space.ops.index(name)].tolist()
            found |= {row[0], row[1], row[3], row[bins // 2], row[-1]}
    return sorted(found | {-m for m in found if name in SIGNED})


def different(a, b):
    return (a != b).float().mean().item()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPS)
def test_each_operation_is_that_of_torchvision(name, channels, pictures, torchvision_op):
    images = pictures(channels)
    for magnitude in cases(name):
        a, b = ours(images, name, magnitude), torchvision_op(images, name, magnitude)
        if name in MOVES:  # a coordinate half-way between pixels may round to either
            assert different(a, b) <= 1e-3
        else:
            assert torch.equal(a, b), magnitude
    if name != "Identity" and (name, channels) != ("Color", 1):  # and it does something at all
        assert max(different(ours(images, name, m), images) for m in cases(name)) > 0.1


def torchvision_rounds_products():
    """Whether matrix products round each product, or fuse it with the sum, as some CPUs do."""
    values = torch.tensor([1.0, 1 + 2**-12]).expand(1, 1000, 2).contiguous()
    return values.bmm(torch.tensor([[[-1.0], [1 + 2**-12]]]))[0, 0].item() == 2**-11


@pytest.mark.parametrize("size", [(37, 30), (28, 28), (160, 161)])
@pytest.mark.parametrize("name", MOVES)
def test_pixels_from_half_way_between_two_are_those_of_torchvision(name, size, torchvision_op):
    """A shear of 0.2 has one row in five of them, a quarter turn of an uneven picture all."""
    if not torchvision_rounds_products():
        pytest.skip("torchvision's coordinates have fused products on this CPU")
    images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    tops = {"Rotate": (30.0, 135.0)}.get(name, (0.3, 0.99))
    strengths = {m for top in tops for m in torch.linspace(0, top, 31).tolist()}
    strengths |= set(np.random.default_rng(0).uniform(-tops[1], tops[1], 40).tolist())
    for magnitude in strengths | {-m for m in strengths}:
        a, b = ours(images, name, magnitude), torchvision_op(images, name, magnitude)
        assert torch.equal(a, b), magnitude


def exact_bilinear(images, name, magnitude):
    """The warp in float64, without rounding to whole levels."""
    height, width = images.shape[-2:]
    codes, power = torch.tensor([CODES[name]]), torch.tensor([magnitude], dtype=torch.float64)
    matrix = warp_matrices(codes, power, height, width).double()[0]
    y, x = torch.meshgrid(
        torch.arange(height) - (height - 1) / 2,
        torch.arange(width) - (width - 1) / 2,
        indexing="ij",
    )
    source = torch.stack((x, y, torch.ones_like(x)), dim=-1).double() @ matrix.T
    grid = source / torch.tensor([width / 2, height / 2]).double()
    grid = grid.expand(len(images), -1, -1, -1)
    return grid_sample(images.double(), grid, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("name", sorted(WARPS))
def test_bilinear_warps_differ_only_where_a_level_is_half_way(name, pictures, torchvision_op):
    images = pictures()
    for magnitude in cases(name):
        a = ours(images, name, magnitude, "bilinear").int()
        b = torchvision_op(images, name, magnitude, "bilinear").int()
        exact = exact_bilinear(images, name, magnitude)
        # Coordinates up to 37 have a float32 step of 4e-6; a handful of roundings makes each wrong
        # by at most 2e-5, and a pixel further along x and y changes the value by up to 255 each.
        half_way = (exact - exact.floor() - 0.5).abs() < 2 * 255 * 2e-5
        assert torch.equal(a[~half_way], exact.round().int()[~half_way])
        assert torch.equal(a[~half_way], b[~half_way])
        assert (a - b).abs().max() <= 1


@pytest.mark.parametrize("size", [(37, 30), (1, 1), (5, 2)])
@pytest.mark.parametrize("name", sorted(WARPS))
def test_bilinear_warps_of_floats_are_those_of_torchvision(name, size, pictures, torchvision_op):
    images = pictures(3, *size) / 255
    for magnitude in cases(name, *size):
        a = ours(images, name, magnitude, "bilinear")
        b = torchvision_op(images, name, magnitude, "bilinear")
        # coordinates are wrong by at most 2e-5, along x and along y
        assert torch.allclose(a, b, rtol=0, atol=2 * 2e-5)


@pytest.mark.parametrize("size", [(8, 11), (224, 224)])
def test_whole_translations_are_equal_at_other_sizes(size, pictures, torchvision_op):
    images = pictures(3, *size)[2:4]
    for name in ("TranslateX", "TranslateY"):
        for magnitude in (*cases(name, *size), 1.99, -300.0):
            a, b = ours(images, name, magnitude), torchvision_op(images, name, magnitude)
            assert torch.equal(a, b)


@pytest.mark.parametrize("fill", [[7.0], [1.0, 200.0, 30.0]])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_fill_shows_where_there_is_no_image(fill, interpolation, pictures, torchvision_op):
    images = pictures()
    a = ours(images, "TranslateX", 9.0, interpolation, torch.tensor(fill).expand(3))
    b = torchvision_op(images, "TranslateX", 9.0, interpolation, fill)
    assert torch.equal(a, b)
    assert torch.equal(a[0, :, 0, 0], torch.tensor(fill).expand(3).to(torch.uint8))


def test_fill_shows_in_rotated_corners(pictures, torchvision_op):
    images, fill = pictures(), [1.0, 200.0, 30.0]
    a = ours(images, "Rotate", 30.0, "nearest", torch.tensor(fill))
    assert different(a, torchvision_op(images, "Rotate", 30.0, "nearest", fill)) <= 1e-3
    assert a[0, :, 0, 0].tolist() == fill


def test_bilinear_borders_blend_with_the_fill_once():
    white = torch.full((1, 1, 8, 8), 200, dtype=torch.uint8)
    filled = ours(white, "Rotate", 20.0, "bilinear", torch.tensor([200.0]))
    assert torch.equal(filled, white)
    black = ours(white, "Rotate", 20.0, "bilinear", torch.tensor([0.0]))
    assert torch.equal(black, ours(white, "Rotate", 20.0, "bilinear"))


@pytest.mark.parametrize("name", OPS)
def test_floats_are_augmented_like_torchvision_does_it(name, pictures, torchvision_op):
    images = pictures() / 255
    for magnitude in cases(name):
        a, b = ours(images, name, magnitude), torchvision_op(images, name, magnitude)
        if name in MOVES:
            assert different(a, b) <= 1e-3
        else:  # sums in another order; a level more or less where Posterize cuts
            apart = (a - b).abs() > 1e-5
            assert apart.float().mean() <= (1e-3 if name == "Posterize" else 0)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (5, 2), (3, 3)])
def test_tiny_images_go_through_every_operation(size, pictures, torchvision_op):
    images = pictures(3, *size)
    for name in OPS:
        for magnitude in cases(name, *size):
            done = ours(images, name, magnitude)
            if name in MOVES:
                continue
            expected = torchvision_op(images, name, magnitude)
            if name in ("Color", "Contrast"):
                # torchvision adds the last values of an image, fewer than 16, without fusing
                assert (done.int() - expected.int()).abs().max() <= 1
                assert different(done, expected) < 0.02
            else:
                assert torch.equal(done, expected), name


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_an_image_comes_out_alike_alone_and_in_a_batch(name, dtype, pictures):
    images = pictures()
    images = images if dtype == torch.uint8 else images.to(dtype) / 255
    for magnitude in cases(name)[::3]:
        for interpolation in ("nearest", "bilinear") if name in WARPS else ("nearest",):
            whole = ours(images, name, magnitude, interpolation)
            single = [ours(i[None], name, magnitude, interpolation) for i in images]
            assert torch.equal(whole, torch.cat(single))


def test_rotation_turns_counter_clockwise_as_torchvision_does():
    image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    image[0, 0, 4, 8] = 255  # to the right of the centre
    turned = ours(image, "Rotate", 30.0)
    row, column = divmod(turned.flatten().argmax().item(), 9)
    assert row == 4 - round(4 * math.sin(math.radians(30)))
    assert column == 4 + round(4 * math.cos(math.radians(30)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_gpu_computes_the_same(name, dtype, pictures):
    images = pictures()
    images = images if dtype == torch.uint8 else images.to(dtype) / 255
    for magnitude in cases(name):
        a, b = ours(images, name, magnitude), ours(images.cuda(), name, magnitude).cpu()
        assert torch.equal(a, b), magnitude
