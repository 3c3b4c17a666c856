import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from torsh_data import vision
from torsh_data._rng import sample_keys
from torsh_data.vision import _mix


def keys(count, epoch=0):
    return torch.from_numpy(sample_keys(0, epoch, np.arange(count)))


def probes(count, size=16):
    """Image k is filled with 2**k, so that a mixture tells its parts."""
    return (2.0 ** torch.arange(count)).view(-1, 1, 1, 1).expand(-1, 1, size, size).double()


def partners(mix, count):
    """Who is mixed with whom, from targets with one class for each image."""
    images = torch.zeros(count, 1, 32, 32)
    _, targets = mix(images, torch.arange(count), keys(count))
    own = targets.diagonal()
    other = (targets - torch.diag(own)).max(1)
    return own, other.values, other.indices


@pytest.mark.parametrize("mode", ["sample", "batch"])
@pytest.mark.parametrize("count", [2, 3, 7, 16])
def test_cutmix_boxes_are_whole_and_their_area_is_the_weight(mode, count):
    mix = vision.MixupCutmix(count, mixup_alpha=0.0, mode=mode)
    for epoch in range(10):
        images = probes(count)
        mixed, targets = mix(images, torch.arange(count), keys(count, epoch))
        for k in range(count):
            values = mixed[k].unique().tolist()
            assert len(values) <= 2
            assert torch.allclose(  # exactly the share of visible pixels, in float32
                targets[k], torch.stack([(mixed[k] == 2.0**c).float().mean() for c in range(count)])
            )
            for value in values:
                if value == 2.0**k:
                    continue
                rows, columns = (mixed[k, 0] == value).nonzero().unbind(1)
                box = mixed[k, 0, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
                assert (box == value).all()


@pytest.mark.parametrize("mode", ["sample", "batch"])
@pytest.mark.parametrize("count", [2, 5, 16])
def test_mixup_weights_are_those_of_the_targets(mode, count):
    mix = vision.MixupCutmix(count, mixup_alpha=0.8, cutmix_alpha=0.0, mode=mode)
    mixed, targets = mix(probes(count), torch.arange(count), keys(count))
    expected = targets.double() @ (2.0 ** torch.arange(count)).double()
    # the targets are float32, with 24 bits
    assert torch.allclose(mixed[:, 0, 3, 5], expected, rtol=1e-6)
    assert (mixed == mixed[:, :, :1, :1]).all()
    assert len(set(targets.diagonal().tolist())) == (1 if mode == "batch" else count)


@pytest.mark.parametrize("count", [2, 3, 100])
def test_no_image_is_its_own_partner_and_each_is_used_once(count):
    own, other, indices = partners(vision.MixupCutmix(count, cutmix_alpha=0.0), count)
    assert torch.allclose(own + other, torch.ones(count))
    assert sorted(indices.tolist()) == list(range(count))


def test_targets_sum_to_one_and_are_smoothed():
    mix = vision.MixupCutmix(10, label_smoothing=0.1)
    labels = torch.arange(33) % 10
    _, targets = mix(torch.rand(33, 3, 8, 8), labels, keys(33))
    assert (targets.sum(1) - 1).abs().max() < 1e-6
    assert targets.min() >= 0.01 - 1e-6
    assert targets.dtype == torch.float32


def test_soft_labels_are_mixed_like_hard_ones():
    mix = vision.MixupCutmix(5, label_smoothing=0.2)
    images, labels = torch.rand(9, 3, 8, 8), torch.arange(9) % 5
    hard = mix(images, labels, keys(9))
    soft = mix(images, torch.nn.functional.one_hot(labels, 5).double(), keys(9))
    assert torch.equal(hard[0], soft[0])
    assert torch.equal(hard[1], soft[1])


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_mixup_weights_follow_the_beta_distribution(alpha):
    mix = vision.MixupCutmix(2, mixup_alpha=alpha, cutmix_alpha=0.0)
    weight, box = mix._draw(keys(20_000).numpy(), 8, 8)
    assert stats.kstest(weight, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert not box.any()


def test_cutmix_boxes_cover_one_minus_lambda_where_nothing_is_clipped():
    weight, box = vision.MixupCutmix(2, mixup_alpha=0.0)._draw(keys(20_000).numpy(), 1000, 1000)
    assert (weight == 1).all()
    assert (box >= 0).all()
    assert (box <= 1000).all()
    top, bottom, left, right = box.T
    inner = (top > 0) & (left > 0) & (bottom < 1000) & (right < 1000)
    area = ((bottom - top) * (right - left) / 1e6)[inner]
    # a box of side s is inside with probability (1 - s)^2, and its area is uniform for alpha = 1:
    # the density of the side among those is 2 s (1 - s)^2 * 6
    side = np.sqrt(area)
    density = stats.beta(2, 3)
    # sides are rounded down to even numbers of pixels, by 1 of 1000 in the mean
    assert stats.kstest(side + 1e-3, density.cdf).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_centres_of_boxes_are_uniform_over_the_image(alpha):
    """Not over the places where the box fits: one in the corner shows a quarter of itself."""
    mix = vision.MixupCutmix(2, mixup_alpha=0.0, cutmix_alpha=alpha)
    _, box = mix._draw(keys(20_000).numpy(), 1000, 1000)
    for near, far, low, high in ((0, 1, 2, 3), (2, 3, 0, 1)):
        whole = (box[:, near] > 0) & (box[:, far] < 1000) & (box[:, far] > box[:, near])
        half = (box[whole, far] - box[whole, near]) // 2  # not clipped along this side, so that
        left, right = box[whole, low], box[whole, high]  # the other's clipped box tells its centre
        centre = np.where(left > 0, left + half, right - half)
        jitter = np.random.default_rng(0).random(len(centre))  # pixels are whole
        assert stats.kstest((centre + jitter) / 1000, "uniform").pvalue > 1e-3
        assert (left == 0).any()
        assert (right == 1000).any()


def test_in_evaluation_mode_nothing_is_mixed():
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    mix = vision.MixupCutmix(4, label_smoothing=0.1)
    mixed, targets = mix.eval()(images, labels)
    assert mixed is images
    assert targets is labels
    assert not torch.equal(mix.train()(images, labels)[0], images)


def test_targets_of_several_classes_are_mixed_with_their_weights():
    several = torch.tensor([[True, True, False], [False, False, True]])
    images, numbers = torch.rand(2, 1, 8, 8), keys(2)
    mixed, targets = vision.MixupCutmix(3)(images, several, numbers)
    again = vision.MixupCutmix(3)(images, several.float(), numbers)
    assert torch.equal(mixed, again[0])
    assert torch.equal(targets, again[1])
    assert torch.equal(targets[:, 0], targets[:, 1])
    assert torch.allclose(targets[:, 1] + targets[:, 2], torch.ones(2))


def test_shares_of_mixed_and_cut_images_are_as_asked():
    mix = vision.MixupCutmix(2, prob=0.7, switch_prob=0.3)
    weight, box = mix._draw(keys(20_000).numpy(), 64, 64)
    blended, pasted = (weight < 1).sum(), (box[:, 1] > box[:, 0]).sum()
    assert blended / 20_000 == pytest.approx(0.7 * 0.7, abs=0.02)  # six standard errors
    assert pasted / 20_000 == pytest.approx(0.7 * 0.3, abs=0.025)  # less the boxes of no pixel
    nothing = vision.MixupCutmix(2, prob=0.0)
    images = torch.rand(4, 1, 5, 5)
    assert torch.equal(nothing(images, torch.tensor([0, 1, 0, 1]))[0], images)


def test_a_result_does_not_depend_on_the_order_of_the_batch():
    images, labels = torch.rand(33, 3, 8, 8), torch.arange(33)
    for mode in ("sample", "batch"):
        mix = vision.MixupCutmix(33, mode=mode)
        mixed, targets = mix(images, labels, keys(33))
        order = torch.randperm(33)
        again = mix(images[order], labels[order], keys(33)[order])
        assert torch.equal(again[0], mixed[order])
        assert torch.equal(again[1], targets[order])


def test_without_keys_the_generator_of_torch_decides():
    images, labels, mix = torch.rand(6, 1, 8, 8), torch.arange(6), vision.MixupCutmix(6)
    torch.manual_seed(1)
    first, second = mix(images, labels)[0], mix(images, labels)[0]
    torch.manual_seed(1)
    assert torch.equal(mix(images, labels)[0], first)
    assert not torch.equal(first, second)


def test_uint8_can_be_cut_but_not_averaged():
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    mixed, _ = vision.MixupCutmix(5, mixup_alpha=0.0)(images, torch.arange(5), keys(5))
    assert mixed.dtype == torch.uint8
    with pytest.raises(TypeError, match=r"images has dtype torch.uint8, but Mixup averages"):
        vision.MixupCutmix(5)(images, torch.arange(5))


@pytest.mark.parametrize("count", [0, 1])
def test_a_batch_without_partners_is_left_as_it_is(count):
    images = torch.rand(count, 1, 4, 4)
    mixed, targets = vision.MixupCutmix(3)(images, torch.zeros(count).long())
    assert torch.equal(mixed, images)
    assert targets.shape == (count, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_keep_their_dtype(dtype):
    mixed, targets = vision.MixupCutmix(4)(torch.rand(4, 1, 8, 8).to(dtype), torch.arange(4))
    assert mixed.dtype == dtype
    assert targets.dtype == torch.float32


def test_the_module_shows_its_settings():
    assert "num_classes=7, mixup_alpha=0.8" in repr(vision.MixupCutmix(7))


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int32, torch.uint16, torch.uint32, torch.uint64]
)
def test_class_numbers_have_any_whole_dtype(dtype):
    images, labels, mix = torch.rand(5, 1, 8, 8), torch.arange(5), vision.MixupCutmix(5)
    assert torch.equal(mix(images, labels.to(dtype), keys(5))[1], mix(images, labels, keys(5))[1])
    with pytest.raises(ValueError, match="values from 0 to 4, but num_classes=4"):
        vision.MixupCutmix(4)(images, labels.to(dtype), keys(5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"mixup_alpha": -1.0}, "mixup_alpha=-1.0 and cutmix_alpha=1.0 must not be negative"),
        ({"mixup_alpha": 0.0, "cutmix_alpha": 0.0}, "one of them above 0"),
        ({"mixup_alpha": float("nan")}, "mixup_alpha=nan must be finite"),
        ({"cutmix_alpha": float("inf")}, "cutmix_alpha=inf must be finite"),
        ({"prob": float("nan")}, "prob=nan must be finite"),
        ({"prob": 1.1}, r"prob=1.1 must be in \[0, 1\]"),
        ({"switch_prob": -0.1}, "switch_prob=-0.1"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0 must be in \[0, 1\)"),
        ({"mode": "pair"}, "mode='pair'; use 'sample' or 'batch'"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        vision.MixupCutmix(**{"num_classes": 3, **options})


@pytest.mark.parametrize(
    ("images", "labels", "options", "message"),
    [
        (torch.zeros(3, 4, 4), torch.zeros(3).long(), {}, r"images has shape \(3, 4, 4\)"),
        (
            torch.zeros(2, 1, 4, 4),
            torch.tensor([0, 3]),
            {},
            "values from 0 to 3, but num_classes=3",
        ),
        (torch.zeros(2, 1, 4, 4), torch.tensor([-1, 0]), {}, "values from -1 to 0"),
        (
            torch.zeros(2, 1, 4, 4),
            torch.zeros(3).long(),
            {},
            r"labels has shape \(3,\) for 2 images",
        ),
        (
            torch.zeros(2, 1, 4, 4),
            torch.zeros(2),
            {},
            "dtype torch.float32, expected class numbers",
        ),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, 4), {}, r"or targets \(batch, 3\)"),
        (
            torch.zeros(2, 1, 4, 4),
            torch.zeros(2).long(),
            {"keys": torch.zeros(1).long()},
            "keys has",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(images, labels, options, message):
    with pytest.raises(ValueError, match=message):
        vision.MixupCutmix(3)(images, labels, **options)


@pytest.mark.parametrize(
    "labels", [torch.tensor([True, False]), torch.zeros(2).cfloat(), torch.zeros(2, 3).cfloat()]
)
def test_labels_that_are_no_numbers_of_classes_are_refused(labels):
    with pytest.raises(ValueError, match=f"and dtype {labels.dtype}, expected class numbers"):
        vision.MixupCutmix(3)(torch.zeros(2, 1, 4, 4), labels)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 4, 4), [0, 1], r"labels is a list; use a tensor of class numbers"),
        ([b"\xff\xd8"], torch.zeros(1).long(), r"images\[0\] is bytes"),
        ("ab", torch.zeros(1).long(), r"images is a str; use a tensor \(batch, channels"),
    ],
)
def test_other_kinds_than_tensors_are_refused(images, labels, message):
    with pytest.raises(TypeError, match=message):
        vision.MixupCutmix(3)(images, labels)


@pytest.mark.parametrize("option", ["mixup_alpha", "prob", "label_smoothing"])
def test_settings_of_another_kind_are_refused(option):
    with pytest.raises(TypeError, match=f"{option}='0.1' must be a number, not a str"):
        vision.MixupCutmix(3, **{option: "0.1"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_in_float32(dtype):
    images, mix = torch.rand(8, 1, 4, 4).to(dtype), vision.MixupCutmix(8, cutmix_alpha=0.0)
    mixed, targets = mix(images, torch.arange(8), keys(8))
    exact, same = mix(images.float(), torch.arange(8), keys(8))
    assert torch.equal(mixed, exact.to(dtype))
    assert torch.equal(targets, same)


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(0, 9),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    mode=st.sampled_from(["sample", "batch"]),
    smoothing=st.sampled_from([0.0, 0.1]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    soft=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_what_is_visible_is_in_the_targets(
    count, channels, height, width, mode, smoothing, dtype, soft, seed
):
    """One class for each image, whose pixels are its number: the mean tells the targets."""
    mix = vision.MixupCutmix(9, label_smoothing=smoothing, mode=mode)
    images = torch.arange(count).view(-1, 1, 1, 1).expand(-1, channels, height, width).to(dtype)
    labels = torch.arange(count)
    labels = torch.nn.functional.one_hot(labels, 9).float() if soft else labels
    mixed, targets = mix(images, labels, keys(count, seed))
    assert mixed.shape == images.shape
    assert mixed.dtype == dtype
    assert torch.allclose(targets.sum(1), torch.ones(count), rtol=0, atol=1e-6)
    plain = (targets - smoothing / 9) / (1 - smoothing)
    expected = plain.double() @ torch.arange(9).double()
    mean = mixed.double().mean(dim=(1, 2, 3)) if mixed.numel() else torch.zeros(count).double()
    # bfloat16 keeps eight bits of a number up to 8
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
    assert torch.allclose(mean, expected, rtol=0, atol=tolerance)


def test_draws_lie_behind_those_of_the_policy():
    assert min(_mix._APPLY, _mix._SWITCH, _mix._X, _mix._Y, _mix._PARTNER, _mix._LAMBDA) >= 1000


@pytest.mark.gpu
def test_the_gpu_gives_the_same_mixtures():
    images, labels = torch.rand(33, 3, 16, 16), torch.arange(33)
    mix = vision.MixupCutmix(33)
    here = mix(images, labels, keys(33))
    there = mix(images.cuda(), labels.cuda(), keys(33))
    assert torch.equal(here[0], there[0].cpu())
    assert torch.equal(here[1], there[1].cpu())
