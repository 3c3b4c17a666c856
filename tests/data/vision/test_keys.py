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


@pytest.mark.parametrize(
    "keys",
    [
        [3, -4],
        (3, -4),
        np.array([3, -4]),
        np.array([3, -4], dtype=np.int32),
        np.array([3, 2**64 - 4], dtype=np.uint64),  # the same 64 bits
        [np.int64(3), -4],
        [torch.tensor(3), torch.tensor(-4)],
        torch.tensor([3, -4], dtype=torch.int16),
    ],
)
def test_whole_numbers_of_any_kind_are_keys(keys):
    numbers = as_keys(keys, None, 2)
    assert numbers.dtype == torch.int64
    assert numbers.tolist() == [3, -4]


def test_none_for_none():
    assert as_keys([], None, 0).tolist() == []
    assert as_keys(np.array(7), None, 1).tolist() == [7]


@pytest.mark.parametrize(
    ("keys", "shape"), [([1, 2, 3], r"\(3,\)"), (np.zeros((1, 2), int), r"\(1, 2\)"), (5, r"\(\)")]
)
def test_another_number_of_keys_is_refused(keys, shape):
    message = f"keys has shape {shape}, expected one whole number for each of 4 images"
    with pytest.raises(ValueError, match=message):
        as_keys(keys, None, 4)


@pytest.mark.parametrize(
    ("keys", "held"),
    [
        (True, "True"),
        (1.5, "1.5"),
        ("ab", "'ab'"),
        ([1.0, 2.0], r"\[1.0, 2.0\]"),
        (2**64, str(2**64)),
        ([[1], [2, 3]], r"\[\[1\], \[2, 3\]\]"),
        (np.array([0.5]), "dtype float64"),
        (torch.tensor([True]), "dtype torch.bool"),
        (torch.zeros(1), "dtype torch.float32"),
    ],
)
def test_keys_that_are_no_whole_numbers_are_refused(keys, held):
    with pytest.raises(TypeError, match=f"keys has {held}; use whole numbers"):
        as_keys(keys, None, 1)
