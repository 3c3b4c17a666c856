import numpy as np
import pytest
import torch

from torsh_data._rng import generator
from torsh_data.vision._keys import as_keys


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_the_key_of_a_generator_is_found(key):
    rng = generator(key)
    rng.standard_normal(3)
    assert as_keys(None, rng, 1).tolist() == [key]


def test_a_generator_draws_for_several_images():
    drawn = as_keys(None, generator(4), 3)
    assert torch.equal(drawn, as_keys(None, generator(4), 3))
    assert len(set(drawn.tolist()) | {4}) == 4


def test_a_generator_seeded_by_numpy_is_not_a_sample():
    rng = np.random.Generator(np.random.Philox(7))
    assert as_keys(None, rng, 1).tolist() != as_keys(None, rng, 1).tolist()


def test_numbers_and_tensors_are_keys():
    assert as_keys(3, None, 1).tolist() == [3]
    assert as_keys(torch.tensor(3), None, 1).tolist() == [3]
    assert as_keys(torch.tensor([[3], [4]]), None, 2).tolist() == [3, 4]
    assert as_keys(None, None, 0).tolist() == []
