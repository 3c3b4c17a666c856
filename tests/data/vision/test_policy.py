import math

import numpy as np
import pytest
import torch
from scipy import stats

from torsh_data import vision
from torsh_data._rng import sample_keys
from torsh_data.vision import _policy
from torsh_data.vision._policy import OPS, apply_ops, magnitudes

MOVES = [name for name in OPS if name.startswith(("Shear", "Rotate"))]


def pictures(channels=3, height=37, width=30):
    """Smooth, noisy, flat, dark and two-level images."""
    torch.manual_seed(5)
    size = (height, width)
    smooth = torch.nn.functional.interpolate(torch.rand(3, channels, 5, 5), size, mode="bicubic")
    smooth = smooth.mul(255).clamp(0, 255).to(torch.uint8)
    noise = torch.randint(0, 256, (3, channels, *size), dtype=torch.uint8)
    dark = torch.randint(3, 9, (1, channels, *size), dtype=torch.uint8)
    flat = torch.full((1, channels, *size), 77, dtype=torch.uint8)
    levels = torch.where(noise[:1] > 200, 255, 0).to(torch.uint8)
    return torch.cat([smooth, noise, dark, flat, levels])


def ours(images, name, magnitude, interpolation="nearest", fill=None):
    out = images.clone()
    chosen = torch.full((len(images),), OPS.index(name))
    strength = [torch.full((len(images),), magnitude, dtype=torch.float64)] * len(OPS)
    apply_ops(out, chosen, strength, fill, interpolation)
    return out


def theirs(images, name, magnitude, interpolation="nearest", fill=None):
    transforms = pytest.importorskip("torchvision.transforms.v2")
    base = transforms._auto_augment._AutoAugmentBase()
    mode = transforms.InterpolationMode(interpolation)
    return torch.stack(
        [
            base._apply_image_or_video_transform(
                image, name, magnitude, interpolation=mode, fill={torch.Tensor: fill}
            )
            for image in images
        ]
    )


def cases(name):
    for index in (0, 1, 9, 16, 30):
        yield magnitudes(31, 37, 30)[name][index]
        if name in _policy._SIGNED:
            yield -magnitudes(31, 37, 30)[name][index]


def share_of_different_pixels(a, b):
    return (a != b).float().mean().item()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPS)
def test_each_operation_is_that_of_torchvision(name, channels):
    images = pictures(channels)
    for magnitude in cases(name):
        a, b = ours(images, name, magnitude), theirs(images, name, magnitude)
        if name in MOVES:  # a coordinate half-way between pixels may round to either
            assert share_of_different_pixels(a, b) <= 1e-3
        else:
            assert torch.equal(a, b)
    if name != "Identity" and (name, channels) != ("Color", 1):  # and it does something at all
        strongest = ours(images, name, magnitudes(31, 37, 30)[name][30])
        assert share_of_different_pixels(strongest, images) > 0.1


@pytest.mark.parametrize("name", [name for name in OPS if name in _policy._WARPS])
def test_bilinear_warps_are_within_one_level(name):
    images = pictures()
    for magnitude in cases(name):
        a, b = (f(images, name, magnitude, "bilinear").int() for f in (ours, theirs))
        # one level where a sum of four products lies next to a half
        assert (a - b).abs().max() <= 1
        assert share_of_different_pixels(a, b) < 0.02


@pytest.mark.parametrize("fill", [[7.0], [1.0, 200.0, 30.0]])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_fill_shows_where_there_is_no_image(fill, interpolation):
    images = pictures()
    a = ours(images, "TranslateX", 9.0, interpolation, torch.tensor(fill).expand(3))
    b = theirs(images, "TranslateX", 9.0, interpolation, fill)
    assert torch.equal(a, b)
    assert torch.equal(a[0, :, 0, 0], torch.tensor(fill).expand(3).to(torch.uint8))


def test_bilinear_borders_blend_with_the_fill_once():
    white = torch.full((1, 1, 8, 8), 200, dtype=torch.uint8)
    filled = ours(white, "Rotate", 20.0, "bilinear", torch.tensor([200.0]))
    assert torch.equal(filled, white)
    black = ours(white, "Rotate", 20.0, "bilinear", torch.tensor([0.0]))
    assert torch.equal(black, ours(white, "Rotate", 20.0, "bilinear"))


@pytest.mark.parametrize("name", OPS)
def test_floats_are_augmented_like_torchvision_does_it(name):
    images = pictures() / 255
    for magnitude in cases(name):
        a, b = ours(images, name, magnitude), theirs(images, name, magnitude)
        if name in MOVES:
            assert share_of_different_pixels(a, b) <= 1e-3
        else:  # sums in another order; a level more or less where Posterize cuts
            different = (a - b).abs() > 1e-5
            assert different.float().mean() <= (1e-3 if name == "Posterize" else 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_keep_their_dtype(dtype):
    images = (pictures() / 255).to(dtype)
    keys = torch.arange(len(images))
    out = vision.RandAugment()(images, keys)
    assert out.dtype == dtype
    assert out.min() >= 0
    assert out.max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (5, 2), (3, 3)])
def test_tiny_images_go_through_every_operation(size):
    images = pictures(3, *size)
    for name in OPS:
        magnitude = magnitudes(31, *size)[name][9]
        if name in MOVES:
            ours(images, name, magnitude)
        else:
            assert torch.equal(ours(images, name, magnitude), theirs(images, name, magnitude)), name


@pytest.mark.parametrize("bins", [2, 10, 31])
def test_magnitude_tables_are_those_of_torchvision(bins):
    transforms = pytest.importorskip("torchvision.transforms.v2")
    table = magnitudes(bins, 224, 200)
    assert list(table) == list(transforms.RandAugment._AUGMENTATION_SPACE)
    for name, (make, signed) in transforms.RandAugment._AUGMENTATION_SPACE.items():
        expected = make(bins, 224, 200)
        assert table[name] == ([0.0] * bins if expected is None else expected.tolist())
        assert signed == (name in _policy._SIGNED)


def test_a_result_depends_on_key_and_image_alone():
    images = pictures().repeat(4, 1, 1, 1)
    keys = torch.from_numpy(sample_keys(0, 0, np.arange(len(images))))
    augment = vision.RandAugment(num_ops=3, interpolation="bilinear")
    whole = augment(images, keys)
    order = torch.randperm(len(images))
    assert torch.equal(augment(images[order], keys[order]), whole[order])
    assert torch.equal(
        torch.cat([augment(images[:5], keys[:5]), augment(images[5:], keys[5:])]), whole
    )
    for k in range(len(images)):
        assert torch.equal(augment(images[k], keys[k]), whole[k])
    copy = images.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(augment(copy, keys), whole)


def test_images_of_a_batch_draw_their_own_policies():
    images = pictures()[:1].expand(64, -1, -1, -1)
    out = vision.RandAugment()(images, torch.arange(64))
    assert len({image.numpy().tobytes() for image in out}) > 48
    assert torch.equal(images, pictures()[:1].expand(64, -1, -1, -1))  # the input is left alone


def test_operations_and_signs_are_equally_frequent(monkeypatch):
    drawn, strengths = [], []

    def record(images, ops, strength, fill, interpolation):
        drawn.append(ops)
        strengths.append(strength[OPS.index("Rotate")])

    monkeypatch.setattr(_policy, "apply_ops", record)
    images = torch.zeros(14_000, 1, 1, 1, dtype=torch.uint8)
    vision.RandAugment(num_ops=2)(images, torch.from_numpy(sample_keys(1, 0, np.arange(14_000))))
    for ops, rotation in zip(drawn, strengths, strict=True):
        assert stats.chisquare(np.bincount(ops.numpy(), minlength=14)).pvalue > 1e-3
        assert stats.binomtest(int((rotation > 0).sum()), 14_000).pvalue > 1e-3
        signs = np.stack([np.bincount(ops[rotation > 0]), np.bincount(ops[rotation < 0])])
        assert stats.chi2_contingency(signs).pvalue > 1e-3
    table = np.zeros((14, 14))
    np.add.at(table, (drawn[0].numpy(), drawn[1].numpy()), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3  # the layers are independent


def test_without_keys_the_generator_of_torch_decides():
    images, augment = pictures(), vision.RandAugment()
    torch.manual_seed(3)
    first, second = augment(images), augment(images)
    torch.manual_seed(3)
    assert torch.equal(augment(images), first)
    assert not torch.equal(first, second)


def test_no_operations_and_empty_batches_change_nothing():
    images = pictures()
    assert torch.equal(vision.RandAugment(num_ops=0)(images), images)
    assert vision.RandAugment()(images[:0]).shape == (0, 3, 37, 30)


def test_one_image_of_zero_magnitude_is_only_equalized_or_stretched():
    image = pictures()[0]
    possible = [ours(image[None], n, magnitudes(31, 37, 30)[n][0])[0] for n in OPS]
    for key in range(40):
        out = vision.RandAugment(num_ops=1, magnitude=0)(image, torch.tensor(key))
        assert any(torch.equal(out, one) for one in possible)


def test_the_module_shows_its_settings_and_has_no_state():
    augment = vision.RandAugment(3, 5, fill=(1, 2, 3))
    assert "num_ops=3, magnitude=5" in repr(augment)
    assert augment.state_dict() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ops": -1}, "num_ops=-1 must be at least 0"),
        ({"magnitude": 31}, r"magnitude=31 must be in \[0, num_magnitude_bins=31\)"),
        ({"num_magnitude_bins": 1}, "num_magnitude_bins=1 must be at least 2"),
        ({"interpolation": "cubic"}, "interpolation='cubic'; use 'nearest' or 'bilinear'"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        vision.RandAugment(**options)


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        ([1], {}, TypeError, "images is a list"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int32), {}, TypeError, "dtype torch.int32; use uint8"),
        (torch.zeros(2, 4, 4, 4), {}, ValueError, r"shape \(2, 4, 4, 4\), expected"),
        (torch.zeros(4, 4), {}, ValueError, r"shape \(4, 4\)"),
        (torch.full((1, 3, 4, 4), 2.0), {}, ValueError, "values from 2 to 2; floats must be in"),
        (
            torch.zeros(2, 3, 4, 4),
            {"keys": torch.zeros(3).long()},
            ValueError,
            r"keys has shape \(3,\)",
        ),
        (
            torch.zeros(2, 3, 4, 4),
            {"keys": torch.zeros(2)},
            ValueError,
            "dtype torch.float32, expected",
        ),
    ],
)
def test_inputs_that_are_not_images_are_refused(images, options, error, message):
    with pytest.raises(error, match=message):
        vision.RandAugment()(images, **options)
    with pytest.raises(ValueError, match=r"fill=\[1, 2\] has 2 values for 3 channels"):
        vision.RandAugment(fill=[1, 2])(pictures())


def test_rotation_turns_counter_clockwise_as_torchvision_does():
    image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    image[0, 0, 4, 8] = 255  # to the right of the centre
    turned = ours(image, "Rotate", 30.0)
    row, column = divmod(turned.flatten().argmax().item(), 9)
    assert row == 4 - round(4 * math.sin(math.radians(30)))
    assert column == 4 + round(4 * math.cos(math.radians(30)))


@pytest.mark.gpu
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_gpu_gives_the_same_images(channels, interpolation):
    images = pictures(channels).repeat(30, 1, 1, 1)
    keys = torch.from_numpy(sample_keys(0, 0, np.arange(len(images))))
    augment = vision.RandAugment(interpolation=interpolation)
    here, there = augment(images, keys), augment(images.cuda(), keys).cpu()
    if interpolation == "nearest":
        assert torch.equal(here, there)
    else:  # the last bit of grid_sample, seldom next to a half, and what a second layer makes of it
        assert (here != there).float().mean() < 1e-3
