import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torsh_quant import IntSpec, Scheme, default_group_size, quantize


def test_presets_say_what_they_are():
    w8a8 = Scheme.parse("w8a8")
    assert w8a8.weight == IntSpec(8, group="channel")
    assert w8a8.act == IntSpec(8, symmetric=False, group="token", dynamic=True)
    assert Scheme.parse("w4a16") == Scheme(IntSpec(4, group=None))
    assert Scheme.parse("w4a16-g64-asym").weight == IntSpec(4, symmetric=False, group=64)
    assert Scheme.parse("w8a7-tensor").weight.group == "tensor"
    assert Scheme.parse(w8a8) is w8a8


@given(
    bits=st.integers(2, 8),
    act=st.sampled_from([4, 5, 6, 7, 8, 16]),
    unit=st.sampled_from(["", "-g32", "-g7", "-channel", "-tensor"]),
    asymmetric=st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_names_round_trip(bits, act, unit, asymmetric):
    name = f"w{bits}a{act}{unit}" + ("-asym" if asymmetric and act == 16 else "")
    scheme = Scheme.parse(name)
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize("name", ["w8", "w1a8", "w9a16", "w8a1", "w4a16-g", "W8A8", "w8a8 ", ""])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=r"is not known; use for example 'w8a8'"):
        Scheme.parse(name)


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=rf"bits={bits} is not an integer format; use 2 to 8"):
        IntSpec(bits)


def test_group_out_of_range():
    with pytest.raises(ValueError, match=r"group=0 is not a group size"):
        IntSpec(4, group=0)
    with pytest.raises(ValueError, match=r"group='row' is not known"):
        IntSpec(4, group="row")  # type: ignore[arg-type]


def test_formats_that_cannot_be_multiplied():
    act = IntSpec(8, symmetric=False, group="token", dynamic=True)
    with pytest.raises(ValueError, match="weight has zero points"):
        Scheme(IntSpec(8, symmetric=False), act)
    with pytest.raises(ValueError, match="is not supported; use IntSpec"):
        Scheme(IntSpec(8), IntSpec(8, group="tensor"))
    with pytest.raises(ValueError, match="changes with the input"):
        Scheme(IntSpec(8, group="token"))


@pytest.mark.parametrize(
    ("in_features", "group", "valid"),
    [(512, 96, "32, 64 or 128"), (576, 128, "16, 32 or 64"), (9, 4, "3 or 9"), (13, 4, "13")],
)
def test_group_that_does_not_divide(in_features, group, valid):
    net = nn.Sequential(nn.Linear(in_features, 4)).eval()
    message = f"group_size={group} does not divide in_features={in_features} of '0'; use {valid}$"
    with pytest.raises(ValueError, match=message):
        quantize(net, f"w4a16-g{group}")


@given(st.integers(1, 5000))
@settings(deadline=None, max_examples=200)
def test_default_group_divides(in_features):
    size = default_group_size(in_features)
    assert in_features % size == 0
    assert size <= 128 or size == in_features
