import numpy as np
import pytest
import torch
from scipy import stats

from torsh_data._rng import beta, fold, generator, mix, mix_int, sample_keys, uniform


def test_the_finalizer_is_that_of_splitmix64():
    # first outputs of the published generator for the seed 1234567
    state, outputs = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        outputs.append(mix_int(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_python_and_numpy_mix_alike():
    numbers = np.random.default_rng(0).integers(0, 2**64, 200, dtype=np.uint64)
    assert mix(numbers).tolist() == [mix_int(n) for n in numbers.tolist()]


@pytest.mark.parametrize("draw", [0, 1, 17, 5000])
def test_numpy_and_torch_draw_the_same_numbers(draw):
    keys = np.random.default_rng(1).integers(-(2**63), 2**63, 1000)
    drawn = uniform(keys, draw)
    np.testing.assert_array_equal(drawn, uniform(torch.from_numpy(keys), draw).numpy())
    assert 0 <= drawn.min() <= drawn.max() < 1


def test_draws_of_neighbouring_samples_and_numbers_are_uniform_and_uncorrelated():
    keys = sample_keys(0, 0, np.arange(20_000))
    a, b = uniform(keys, 0), uniform(keys, 1)
    for drawn in (a, b):
        assert stats.kstest(drawn, "uniform").pvalue > 1e-3
    for other in (b, np.roll(a, 1), uniform(sample_keys(0, 1, np.arange(20_000)), 0)):
        assert abs(np.corrcoef(a, other)[0, 1]) < 4 / np.sqrt(20_000)  # four standard errors


def test_keys_differ_by_seed_epoch_and_sample_and_not_by_their_neighbours():
    ids = np.arange(1000)
    keys = [sample_keys(s, e, ids) for s in (0, 1) for e in (0, 1)]
    assert len(np.unique(np.concatenate(keys))) == 4000
    np.testing.assert_array_equal(keys[3][500:510], sample_keys(1, 1, ids[500:510]))


def test_fold_tells_the_order_of_its_parts_apart():
    assert len({fold(1, 2), fold(2, 1), fold(1), fold(0, 1), fold(1, 0), fold(-1)}) == 6


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 5.0, 200.0])
def test_beta_variates_follow_the_distribution(alpha):
    drawn = beta(sample_keys(3, 0, np.arange(20_000)), alpha, 2000)
    assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_beta_of_a_tiny_parameter_is_finite():
    drawn = beta(sample_keys(3, 0, np.arange(2000)), 1e-3, 0)
    assert np.isfinite(drawn).all()
    assert 0.4 < (drawn > 0.5).mean() < 0.6


def test_beta_depends_on_the_key_alone():
    keys = sample_keys(5, 0, np.arange(3001))
    whole = beta(keys, 0.8, 2000)
    chosen = np.random.default_rng(0).permutation(3001)[:777]
    np.testing.assert_array_equal(beta(keys[chosen], 0.8, 2000), whole[chosen])


def test_a_negative_key_starts_a_generator():
    assert generator(-5).random() == generator(-5).random() != generator(5).random()


@pytest.mark.gpu
def test_the_gpu_draws_the_same_numbers():
    keys = torch.from_numpy(sample_keys(0, 0, np.arange(1000)))
    assert torch.equal(uniform(keys.cuda(), 3).cpu(), uniform(keys, 3))
