import numpy as np
import pytest
import torch
from scipy import stats

from torsh_data import vision
from torsh_data._rng import dirichlet
from torsh_data.vision._tables import AUGMIX, AUGMIX_PARTIAL, OPS


def chains_of(drawn, image, width):
    """Each chain's operations on one image, as (name, magnitude)."""
    for chain in range(width):
        column = image * width + chain
        yield [
            (OPS[code], power)
            for code, power in zip(
                drawn.codes[:, column].tolist(), drawn.magnitudes[:, column].tolist(), strict=True
            )
        ]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    "options", [{}, {"severity": 10, "mixture_width": 2, "chain_depth": 2, "all_ops": False}]
)
def test_the_mixture_is_that_of_torchvisions_operations(
    options, dtype, pictures, keys, step_by_step
):
    images = pictures().repeat(3, 1, 1, 1)
    images = images if dtype == torch.uint8 else images / 255
    augment, numbers = vision.AugMix(**options, interpolation="nearest"), keys(27)
    drawn = augment.draw(numbers, *images.shape[-2:])
    own, others = augment.weights(numbers)
    done = augment(images, numbers)
    for k, image in enumerate(images):
        mixed = own[k] * image  # the order of torchvision's AugMix
        chains = chains_of(drawn, k, augment.mixture_width)
        for weight, chain in zip(others[k], chains, strict=True):
            mixed = mixed + weight * step_by_step(image, chain)
        # weights may sum to one bit above 1
        if dtype != torch.uint8:
            mixed = mixed.clamp(max=1)
        assert torch.equal(done[k], mixed.to(dtype))


def test_weights_follow_the_beta_and_the_dirichlet_distribution(keys):
    for alpha in (0.3, 1.0):
        own, others = vision.AugMix(alpha=alpha, mixture_width=3).weights(keys(20_000))
        assert (own + others.sum(1) - 1).abs().max() < 1e-6  # float32
        assert stats.kstest(own.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-3
        shares = dirichlet(keys(20_000).numpy(), alpha, 3, 20_000)
        for share in shares.T:
            assert stats.kstest(share, stats.beta(alpha, 2 * alpha).cdf).pvalue > 1e-3
        assert abs(np.corrcoef(own, shares[:, 0])[0, 1]) < 0.03  # four standard errors


def test_chains_draw_one_to_three_operations(keys):
    drawn = vision.AugMix().draw(keys(4000), 32, 32)
    assert drawn.codes.shape == (3, 12_000)
    used = drawn.codes != 0
    assert used[0].all()
    lengths = used.sum(0)
    assert (used == (torch.arange(3)[:, None] < lengths)).all()
    assert stats.chisquare(np.bincount(lengths.numpy())[1:]).pvalue > 1e-3
    three = lengths.view(-1, 3)
    table = np.zeros((3, 3))
    np.add.at(table, (three[:, 0].numpy() - 1, three[:, 1].numpy() - 1), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3  # the chains are independent
    first = drawn.codes[0, 0::3]
    counts = np.bincount(first.numpy(), minlength=len(OPS))[AUGMIX.codes.numpy()]
    assert counts.sum() == 4000
    assert stats.chisquare(counts).pvalue > 1e-3


def test_strengths_stay_below_the_severity(keys):
    for severity in (1, 4, 10):
        drawn = vision.AugMix(severity, chain_depth=1).draw(keys(3000), 30, 60)
        table = AUGMIX.magnitudes(10, 30, 60)[:, :severity]
        for name, row in zip(AUGMIX.ops, table, strict=True):
            powers = drawn.magnitudes[drawn.codes == OPS.index(name)]
            assert set(powers.abs().tolist()) == set(row.tolist()), name


def test_a_part_of_the_operations_can_be_left_out(keys):
    drawn = vision.AugMix(all_ops=False, chain_depth=4).draw(keys(500), 32, 32)
    assert drawn.codes.shape == (4, 1500)
    assert set(drawn.codes.unique().tolist()) == set(AUGMIX_PARTIAL.codes.tolist())


def test_a_mixture_of_itself_is_the_image():
    flat = torch.full((6, 3, 8, 8), 0.5)
    done = vision.AugMix(severity=1, all_ops=False)(flat, torch.arange(6))
    unmoved = [k for k in range(6) if torch.allclose(done[k], flat[k], atol=1e-6)]
    assert unmoved  # Posterize to four bits, Solarize at 1 and the like leave 0.5 as it is


def test_the_module_shows_its_settings():
    assert "severity=2, mixture_width=3, chain_depth=-1" in repr(vision.AugMix(2))
    assert vision.AugMix().interpolation == "bilinear"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"severity": 0}, r"severity=0 must be in \[1, 10\]"),
        ({"severity": 11}, "severity=11"),
        ({"mixture_width": 0}, r"mixture_width=0 must be in \[1, 100\]"),
        ({"mixture_width": 101}, "mixture_width=101"),
        ({"chain_depth": 0}, "chain_depth=0 does nothing; use 1 or more"),
        ({"alpha": 0.0}, "alpha=0.0 must be above 0"),
        ({"alpha": float("nan")}, "alpha=nan must be finite"),
        ({"alpha": float("inf")}, "alpha=inf must be finite"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        vision.AugMix(**options)


def test_a_text_does_not_switch_operations_off():
    with pytest.raises(TypeError, match="all_ops='no' must be True or False"):
        vision.AugMix(all_ops="no")
