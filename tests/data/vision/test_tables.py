import pytest
import torch

from torsh_data.vision import _tables
from torsh_data.vision._tables import CODES, OPS, SIGNED

SPACES = {
    "RandAugment": _tables.RAND_AUGMENT,
    "TrivialAugmentWide": _tables.TRIVIAL_AUGMENT,
    "AutoAugment": _tables.AUTO_AUGMENT,
    "AugMix": _tables.AUGMIX,
}


def spaces_of_torchvision():
    transforms = pytest.importorskip("torchvision.transforms.v2")
    for name, space in SPACES.items():
        yield space, getattr(transforms, name)._AUGMENTATION_SPACE
    yield _tables.AUGMIX_PARTIAL, transforms.AugMix._PARTIAL_AUGMENTATION_SPACE


@pytest.mark.parametrize("bins", [2, 10, 31])
@pytest.mark.parametrize("size", [(1, 1), (32, 32), (224, 200), (331, 517), (999, 64)])
def test_each_strength_is_that_of_torchvision(bins, size):
    for space, theirs in spaces_of_torchvision():
        table = space.magnitudes(bins, *size)
        assert list(space.ops) == list(theirs)
        assert table.dtype == torch.float64
        for row, (name, (make, signed)) in zip(table, theirs.items(), strict=True):
            expected = make(bins, *size)
            assert row.tolist() == ([0.0] * bins if expected is None else expected.tolist()), name
            assert signed == (name in SIGNED)


def test_a_code_is_the_place_of_its_operation():
    for space, _ in spaces_of_torchvision():
        assert [OPS[code] for code in space.codes] == list(space.ops)
    assert CODES["Identity"] == 0
