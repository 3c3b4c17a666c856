import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from torsh_data import vision


def test_each_image_is_drawn_at_its_place():
    gray = torch.linspace(0, 1, 3).view(3, 1, 1, 1).expand(-1, 1, 8, 8)
    color = (gray.repeat(1, 3, 1, 1) * 255).to(torch.uint8)
    ax = vision.plot_sheet({"a": gray, "b": color}, titles=["x", "y", "z"], columns=2)
    drawn = ax.images[0].get_array()
    assert drawn.shape == (17, 17, 3)
    assert drawn[4, 4].tolist() == [0, 0, 0]
    assert drawn[4, 12].tolist() == [0.5, 0.5, 0.5]
    assert drawn[8].min() == 1  # the gap
    assert [t.get_text() for t in ax.get_xticklabels()] == ["x", "y"]


def test_axes_of_the_caller_are_used():
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    assert vision.plot_sheet({"a": torch.zeros(1, 3, 4, 4)}, ax=ax) is ax


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ({}, {}, "there is no image to draw"),
        ({"a": torch.zeros(0, 1, 4, 4)}, {}, "there is no image to draw"),
        ({"a": torch.zeros(1, 1, 4, 4)}, {"columns": 0}, "columns=0"),
        ({"a": torch.zeros(1, 2, 4, 4)}, {}, "draw images of one size, 1 or 3 channels"),
        (
            {"a": torch.zeros(1, 1, 4, 4), "b": torch.zeros(1, 1, 5, 4)},
            {},
            r"rows has shapes {'a': \(1, 1, 4, 4\)",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        vision.plot_sheet(rows, **options)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'torsh-data\[plot\]'"):
        vision.plot_sheet({"a": torch.zeros(1, 1, 4, 4)})


def jpeg(image):
    out = io.BytesIO()
    image.save(out, format="JPEG")
    return out.getvalue()


def test_a_sheet_shows_each_policy_on_each_image(pictures):
    images = pictures(3, 16, 16)
    policies = {"rand": vision.RandAugment(), "trivial": vision.TrivialAugmentWide()}
    ax = vision.augmentation_sheet(images, policies, columns=4, titles=list("abcdef"))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["as stored", "rand", "trivial"]
    assert [t.get_text() for t in ax.get_xticklabels()] == list("abcd")
    drawn = torch.as_tensor(np.asarray(ax.images[0].get_array())).permute(2, 0, 1)
    assert drawn.shape == (3, 3 * 17 - 1, 4 * 17 - 1)
    for k in range(4):
        column = slice(17 * k, 17 * k + 16)
        assert torch.equal(drawn[:, :16, column], images[k] / 255)
        done = vision.RandAugment()(images[k], k)
        assert torch.equal(drawn[:, 17:33, column], done / 255)
    again = vision.augmentation_sheet(images, policies, torch.arange(9), columns=4)
    assert np.array_equal(again.images[0].get_array(), ax.images[0].get_array())
    other = vision.augmentation_sheet(images, policies, torch.arange(9) + 9, columns=4)
    assert not np.array_equal(other.images[0].get_array(), ax.images[0].get_array())


def test_images_of_any_size_and_kind_make_a_sheet(pictures):
    tall = Image.fromarray(pictures(3, 200, 40)[0].permute(1, 2, 0).numpy())
    images = [pictures(1, 9, 12)[0], tall, jpeg(tall), pictures(3, 9, 12)[1] / 255]
    ax = vision.augmentation_sheet(images, [vision.AutoAugment(), vision.AugMix()])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["as stored", "AutoAugment", "AugMix"]
    drawn = ax.images[0].get_array()
    assert drawn.shape == (3 * (128 + 8) - 8, 4 * (26 + 8) - 8, 3)  # the longest side is 128
    assert (drawn[0, :26] == 1).all()  # white above a smaller image
    large = vision.augmentation_sheet(images, [vision.AugMix()], size=64).images[0].get_array()
    assert large.shape[0] == 2 * (64 + 4) - 4


@pytest.mark.parametrize(
    ("images", "policies", "options", "error", "message"),
    [
        ([], [vision.AugMix()], {}, ValueError, "columns=8 of 0 images: there is no image"),
        (torch.zeros(1, 3, 4, 4), [], {"columns": 0}, ValueError, "columns=0 of 1 images"),
        (
            torch.zeros(1, 3, 4, 4),
            [vision.AugMix(), vision.AugMix()],
            {},
            ValueError,
            "two of one class",
        ),
        (["a"], [vision.AugMix()], {}, TypeError, "images holds a str; use tensors"),
        ([torch.zeros(4, 4)], [vision.AugMix()], {}, ValueError, r"a tensor of shape \(4, 4\)"),
        (
            torch.zeros(2, 3, 4, 4),
            [vision.AugMix()],
            {"keys": torch.arange(1)},
            ValueError,
            "keys has shape",
        ),
    ],
)
def test_what_makes_no_sheet_is_refused(images, policies, options, error, message):
    with pytest.raises(error, match=message):
        vision.augmentation_sheet(images, policies, **options)


def test_one_policy_makes_a_sheet():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    axes = vision.augmentation_sheet(images, vision.AugMix())
    assert [text.get_text() for text in axes.get_yticklabels()] == ["as stored", "AugMix"]


@pytest.mark.parametrize("policies", [[vision.AugMix], {"mix": "augmix"}])
def test_rows_of_a_sheet_are_policies(policies):
    with pytest.raises(TypeError, match=r"policies has .*; use policies such as RandAugment\(\)"):
        vision.augmentation_sheet(torch.zeros(2, 3, 8, 8), policies)


@pytest.mark.parametrize("name", ["columns", "size"])
@pytest.mark.parametrize("value", [True, 2.0, "2"])
def test_numbers_of_columns_and_pixels_are_whole(name, value):
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(TypeError, match=f"{name}={value!r} must be a whole number"):
        vision.augmentation_sheet(images, [vision.RandAugment()], **{name: value})
    with pytest.raises(ValueError, match=f"{name}=0"):
        vision.augmentation_sheet(images, [vision.RandAugment()], **{name: 0})


def test_keys_of_a_sheet_may_be_a_list():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert vision.augmentation_sheet(images, [vision.RandAugment()], [3, 4, 5])
    for key in (3, np.int64(3), torch.tensor(3)):
        assert vision.augmentation_sheet(images[:1], [vision.RandAugment()], key)
    with pytest.raises(TypeError, match=r"keys has \[\{3, 4\}\]; use whole numbers"):
        vision.augmentation_sheet(images, [vision.RandAugment()], {3, 4})
    with pytest.raises(ValueError, match=r"keys has shape \(1,\), expected .* each of 2 images"):
        vision.augmentation_sheet(images, [vision.RandAugment()], [3])
