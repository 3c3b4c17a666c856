from fractions import Fraction

import numpy as np
import pytest
import torch

from torsh_data.vision._settings import as_pair, as_series, check_finite, check_whole


@pytest.mark.parametrize("value", [0, -3, 2**70, np.int8(3), np.uint64(3)])
def test_whole_numbers_pass(value):
    check_whole(count=value)


@pytest.mark.parametrize("value", [True, np.bool_(False), 1.0, "1", None, [1], torch.tensor(1)])
def test_nothing_else_is_a_whole_number(value):
    kind = type(value).__name__
    with pytest.raises(TypeError, match=rf"count=.* must be a whole number, not a {kind}"):
        check_whole(other=1, count=value)


@pytest.mark.parametrize("value", [0, -1.5, np.float32(0.5), np.int64(2), Fraction(1, 3)])
def test_finite_numbers_pass(value):
    check_finite(share=value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_numbers_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match=r"share=.* must be finite"):
        check_finite(share=value)
    with pytest.raises(ValueError, match=r"shares=.* must be finite"):
        as_series("shares", [0.5, value])


@pytest.mark.parametrize("value", [True, "0.5", None, 1j, [0.5]])
def test_nothing_else_is_a_number(value):
    with pytest.raises(TypeError, match=r"share=.* must be a number, not a "):
        check_finite(share=value)
    with pytest.raises(TypeError, match=r"shares=.* must hold numbers, not a "):
        as_series("shares", (0.5, value))


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
def test_series_become_tuples_of_floats(make):
    assert as_series("mean", make([0.5, 0.25])) == (0.5, 0.25)
    assert as_pair("scale", make([1, 1])) == (1.0, 1.0)


@pytest.mark.parametrize("value", [(1.0,), (1.0, 2.0, 3.0), (2.0, 1.0)])
def test_pairs_are_two_numbers_in_order(value):
    with pytest.raises(ValueError, match=r"scale=.* must be two numbers, the smaller first"):
        as_pair("scale", value)
