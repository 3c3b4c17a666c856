import numpy as np
import pytest
import torch
from scipy import stats

from torsh_data.vision._erase import erase_boxes, erase_noise

SCALE, RATIO = (0.02, 0.33), (0.3, 3.3)


def sides(box):
    return (box[:, 1] - box[:, 0]), (box[:, 3] - box[:, 2])


def test_boxes_have_the_areas_and_ratios_of_torchvision(keys):
    transforms = pytest.importorskip("torchvision.transforms.v2")
    box = erase_boxes(keys(4000).numpy(), 1.0, SCALE, RATIO, 200, 300)
    tall, wide = sides(box)
    assert tall.min() > 0
    assert ((box >= 0) & (box[:, [1, 1, 3, 3]] <= [200, 200, 300, 300])).all()
    for edge in (box[:, 0] == 0, box[:, 1] == 200, box[:, 2] == 0, box[:, 3] == 300):
        assert edge.any()
    erase = transforms.RandomErasing(p=1.0, scale=SCALE, ratio=RATIO)
    image = torch.zeros(1, 200, 300)
    theirs = [erase.make_params([image]) for _ in range(4000)]
    for mine, other in (
        (tall * wide, [p["h"] * p["w"] for p in theirs]),
        (tall / wide, [p["h"] / p["w"] for p in theirs]),
        (box[:, 0] / (200 - tall + 1), [p["i"] / (200 - p["h"] + 1) for p in theirs]),
        (box[:, 2] / (300 - wide + 1), [p["j"] / (300 - p["w"] + 1) for p in theirs]),
    ):
        assert stats.ks_2samp(mine, other).pvalue > 1e-3


def test_the_share_of_images_is_as_asked(keys):
    tall, wide = sides(erase_boxes(keys(20_000).numpy(), 0.25, SCALE, RATIO, 64, 64))
    assert stats.binomtest(int((tall * wide > 0).sum()), 20_000, 0.25).pvalue > 1e-3


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 3), (70, 2)])
def test_boxes_never_cover_a_small_image(size, keys):
    box = erase_boxes(keys(500).numpy(), 1.0, (0.3, 1.0), RATIO, *size)
    tall, wide = sides(box)
    assert (tall >= 0).all()
    assert ((tall < size[0]) & (wide < size[1])).all()
    assert ((box[:, 1] <= size[0]) & (box[:, 3] <= size[1])).all()


def test_a_box_depends_on_its_key_alone(keys):
    whole = erase_boxes(keys(100).numpy(), 0.7, SCALE, RATIO, 40, 50)
    single = [
        erase_boxes(keys(100).numpy()[k, None], 0.7, SCALE, RATIO, 40, 50) for k in range(100)
    ]
    assert np.array_equal(whole, np.concatenate(single))
    assert erase_boxes(keys(0).numpy(), 1.0, SCALE, RATIO, 9, 9).shape == (0, 4)


def test_noise_has_mean_zero_and_deviation_one(keys):
    noise = erase_noise(keys(20), torch.empty(20, 3, 64, 64)).double()
    count = noise.numel()
    assert noise.mean().abs() < 4 / count**0.5  # four standard errors
    assert (noise.var() - 1).abs() < 4 * (2 / count) ** 0.5
    uniform = np.random.default_rng(0).random((4, 50_000)).sum(0)
    sample = noise.flatten()[:: count // 50_000].numpy()
    assert stats.ks_2samp(sample, (uniform - 2) / (4 / 12) ** 0.5).pvalue > 1e-3
    flat = noise.view(20, -1)
    neighbours = (flat[:, :-1] * flat[:, 1:]).mean().abs()
    assert neighbours < 4 / count**0.5
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 5 / flat.shape[1] ** 0.5


def test_noise_depends_on_key_and_place_alone(keys):
    noise = erase_noise(keys(5), torch.empty(5, 3, 8, 9))
    assert noise.dtype == torch.float32
    assert torch.equal(erase_noise(keys(5)[3:4], torch.empty(1, 3, 8, 9))[0], noise[3])
