import pytest
import torch

from torsh_dist import Cast, Int8


@pytest.mark.parametrize("size", [0, 16, 100, 8192])
def test_refuses_group_sizes(size):
    with pytest.raises(ValueError, match=f"group_size={size} is not a power of 2 from 32 to 4096"):
        Int8(group_size=size)


def test_refuses_dtypes():
    with pytest.raises(ValueError, match=r"dtype=torch\.int8 is not one of"):
        Cast(torch.int8)


def test_equal_methods_are_equal_and_say_what_they_are():
    assert Int8() == Int8(256)
    assert repr(Cast()) == "Cast(dtype=torch.bfloat16)"
