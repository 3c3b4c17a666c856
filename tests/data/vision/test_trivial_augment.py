import numpy as np
import pytest
import torch
from scipy import stats

from torsh_data import vision
from torsh_data.vision._tables import CODES, OPS, TRIVIAL_AUGMENT


def test_operations_and_strengths_are_equally_frequent(keys):
    codes, powers = vision.TrivialAugmentWide().draw(keys(28_000), 64, 64)
    assert codes.shape == powers.shape == (1, 28_000)
    assert stats.chisquare(np.bincount(codes[0].numpy(), minlength=14)).pvalue > 1e-3
    row = TRIVIAL_AUGMENT.magnitudes(31, 64, 64)[CODES["Solarize"]]
    drawn = powers[0][codes[0] == CODES["Solarize"]]
    counts = [(drawn == m).sum().item() for m in row]
    assert sum(counts) == len(drawn)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_one_operation_of_torchvision_is_applied(pictures, keys, torchvision_op):
    images = pictures().repeat(8, 1, 1, 1)
    augment, numbers = vision.TrivialAugmentWide(), keys(72)
    codes, powers = augment.draw(numbers, *images.shape[-2:])
    done = augment(images, numbers)
    for k, (code, power) in enumerate(zip(codes[0], powers[0].tolist(), strict=True)):
        expected = torchvision_op(images[k, None], OPS[code], power)[0]
        # rotation and shear may round to either of two pixels
        assert (done[k] != expected).float().mean() <= (2e-3 if 1 <= code <= 5 else 0)


def test_the_module_shows_its_settings():
    assert "num_magnitude_bins=17" in repr(vision.TrivialAugmentWide(17))


def test_a_table_of_one_strength_is_refused():
    with pytest.raises(ValueError, match="num_magnitude_bins=1 must be at least 2"):
        vision.TrivialAugmentWide(1)
    with pytest.raises(ValueError, match="interpolation='cubic'"):
        vision.TrivialAugmentWide(interpolation="cubic")


def test_draws_differ_between_layers_of_meaning(keys):
    """Operation, sign and strength of an image are independent."""
    codes, powers = vision.TrivialAugmentWide().draw(keys(28_000), 64, 64)
    rotated = powers[0][codes[0] == CODES["Rotate"]]
    assert stats.binomtest(int((rotated > 0).sum()), int((rotated != 0).sum())).pvalue > 1e-3
    strong = [
        (powers[0][codes[0] == CODES[name]].abs() > limit).float().mean().item()
        for name, limit in (("Rotate", 67.5), ("ShearX", 0.495), ("Color", 0.495))
    ]
    assert torch.tensor(strong).sub(15 / 31).abs().max() < 0.05  # five standard errors
