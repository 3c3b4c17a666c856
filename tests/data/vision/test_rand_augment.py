import numpy as np
import pytest
import torch
from scipy import stats

from torsh_data import vision
from torsh_data.vision._engine import apply_ops
from torsh_data.vision._tables import OPS, RAND_AUGMENT


def test_layers_are_drawn_independently(keys):
    codes, _ = vision.RandAugment(num_ops=2).draw(keys(14_000), 32, 32)
    for layer in codes:
        assert stats.chisquare(np.bincount(layer.numpy(), minlength=14)).pvalue > 1e-3
    table = np.zeros((14, 14))
    np.add.at(table, tuple(codes.numpy()), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_one_image_of_zero_magnitude_is_only_equalized_or_stretched(pictures):
    image = pictures()[0]
    possible = []
    for code, power in enumerate(RAND_AUGMENT.magnitudes(31, 37, 30)[:, 0]):
        one = image[None].clone()
        apply_ops(one, torch.tensor([code]), power[None], None, "nearest")
        possible.append(one[0])
    for key in range(40):
        out = vision.RandAugment(num_ops=1, magnitude=0)(image, key)
        assert any(torch.equal(out, one) for one in possible)


def test_draws_stay_what_they_were():
    """A resumed run must draw as the one that was stopped."""
    codes, powers = vision.RandAugment(num_ops=2, magnitude=9).draw(torch.arange(4), 32, 32)
    assert [[OPS[c] for c in layer] for layer in codes.tolist()] == [
        ["AutoContrast", "Color", "Contrast", "ShearX"],
        ["ShearX", "Brightness", "TranslateY", "TranslateX"],
    ]
    assert powers.shape == (2, 4)


def test_no_operations_change_nothing(pictures):
    images = pictures()
    assert torch.equal(vision.RandAugment(num_ops=0)(images), images)


def test_the_module_shows_its_settings_and_has_no_state():
    augment = vision.RandAugment(3, 5, fill=(1, 2, 3))
    assert "num_ops=3, magnitude=5" in repr(augment)
    assert augment.state_dict() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ops": -1}, "num_ops=-1 must be at least 0"),
        ({"num_ops": 501}, "num_ops=501 must be at least 0, and at most 500"),
        ({"magnitude": 31}, r"magnitude=31 must be in \[0, num_magnitude_bins=31\)"),
        ({"num_magnitude_bins": 1}, "num_magnitude_bins=1 must be at least 2"),
        ({"interpolation": "cubic"}, "interpolation='cubic'; use 'nearest' or 'bilinear'"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        vision.RandAugment(**options)
