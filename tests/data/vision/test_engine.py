import numpy as np
import pytest
import torch
from scipy import stats

from torsh_data.vision._engine import Drawn, apply_layers, apply_ops, draw_layer
from torsh_data.vision._tables import CODES, OPS, RAND_AUGMENT, SIGNED


def test_all_operations_of_one_batch_at_once(pictures):
    images = pictures()[:1].expand(len(OPS), -1, -1, -1).clone()
    powers = torch.full((len(OPS),), 0.3).double()
    powers[CODES["Posterize"]] = 3
    done = images.clone()
    apply_ops(done, torch.arange(len(OPS)), powers, None, "nearest")
    for code in range(len(OPS)):
        one = images[code, None].clone()
        apply_ops(one, torch.tensor([code]), powers[code, None], None, "nearest")
        assert torch.equal(done[code], one[0])
    assert torch.equal(done[CODES["Invert"]], 255 - images[0])


def test_layers_follow_one_another(pictures):
    image = pictures()[:1]
    codes = torch.tensor([[CODES["Invert"]], [CODES["Solarize"]]])
    done = image.clone()
    apply_layers(done, Drawn(codes, torch.tensor([[0.0], [0.5]]).double()), None, "nearest")
    inverted = 255 - image
    assert torch.equal(done, torch.where(inverted >= 127.5, 255 - inverted, inverted))


def test_no_layers_leave_the_images_alone(pictures):
    images = pictures()
    done = images.clone()
    apply_layers(done, Drawn.stack([], len(images)), None, "nearest")
    assert torch.equal(done, images)


def test_operations_and_signs_are_equally_frequent(keys):
    table = RAND_AUGMENT.magnitudes(31, 32, 32)
    codes, powers = draw_layer(RAND_AUGMENT, table, keys(14_000), 0, 9)
    assert stats.chisquare(np.bincount(codes.numpy(), minlength=14)).pvalue > 1e-3
    for name in SIGNED:
        drawn = powers[codes == CODES[name]]
        assert stats.binomtest(int((drawn > 0).sum()), len(drawn)).pvalue > 1e-3
        assert drawn.abs().unique().tolist() == [table[RAND_AUGMENT.ops.index(name), 9]]


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu(pictures, forbid_synchronisation):
    images = pictures().repeat(2, 1, 1, 1)[: len(OPS)].cuda()
    apply_ops(
        images, torch.arange(len(OPS)), torch.full((len(OPS),), 0.3).double(), None, "nearest"
    )
    with forbid_synchronisation():
        for interpolation in ("nearest", "bilinear"):
            powers = torch.full((len(OPS),), 0.3).double()
            apply_ops(images, torch.arange(len(OPS)), powers, None, interpolation)
