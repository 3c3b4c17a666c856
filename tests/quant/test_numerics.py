import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.ao.quantization.observer import PerChannelMinMaxObserver

from torsh_quant._numerics import (
    ConvShape,
    dequantize_weight,
    exact_convolution,
    exact_linear,
    fold_groups,
    low_bytes,
    pack_int4,
    packed_width,
    quantize_rows,
    quantize_weight,
    unpack_int4,
    weight_qparams,
)
from torsh_quant._spec import IntSpec

few = settings(deadline=None, max_examples=40)


@given(
    rows=st.integers(0, 5),
    groups=st.integers(1, 4),
    size=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
@few
def test_pack_round_trip(rows, groups, size, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-8, 8, (rows, groups * size), generator=generator, dtype=torch.int8)
    packed = pack_int4(q, size)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_width(groups * size, size))
    assert torch.equal(unpack_int4(packed, groups * size, size), q)


def test_pack_is_half_a_byte_a_weight():
    assert pack_int4(torch.zeros(3, 128, dtype=torch.int8), 32).nbytes == 3 * 64


def test_channel_qparams_equal_torch_observers():
    weight = torch.randn(13, 40) * torch.logspace(-3, 3, 13)[:, None]
    for symmetric in (True, False):
        spec = IntSpec(8, symmetric=symmetric)
        observer = PerChannelMinMaxObserver(
            ch_axis=0,
            dtype=torch.int8,
            qscheme=torch.per_channel_symmetric if symmetric else torch.per_channel_affine,
            quant_min=spec.qmin,
            quant_max=spec.qmax,
            eps=torch.finfo(torch.float32).tiny,
        )
        observer(weight)
        expected_scale, expected_zero = observer.calculate_qparams()
        scale, zero_point = weight_qparams(weight, spec, 40)
        # One division against two: a last-place difference.
        torch.testing.assert_close(scale[:, 0], expected_scale, rtol=3e-7, atol=0)
        if zero_point is not None:
            assert torch.equal(zero_point[:, 0].int(), expected_zero.int())
        zeros = torch.zeros(13, dtype=torch.int32) if zero_point is None else zero_point[:, 0].int()
        q = quantize_weight(weight, scale, zero_point, spec)
        expected = torch.fake_quantize_per_channel_affine(
            weight, scale[:, 0], zeros, 0, spec.qmin, spec.qmax
        )
        change = dequantize_weight(q, scale, zero_point) - expected
        # torch multiplies by a rounded reciprocal: a value beside a tie may take the other step.
        assert (change.abs() <= scale * 1.001).all()
        assert (change.abs() > scale * 0.5).sum() <= 2


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    size=st.sampled_from([1, 3, 8, 24]),
    exponent=st.integers(-42, 30),
    seed=st.integers(0, 2**31),
)
@few
def test_weight_error_is_at_most_half_a_step(bits, symmetric, size, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 24, generator=generator) * 10.0**exponent
    weight[0] = 0
    spec = IntSpec(bits, symmetric=symmetric)
    scale, zero_point = weight_qparams(weight, spec, size)
    q = quantize_weight(weight, scale, zero_point, spec)
    assert spec.qmin <= q.min()
    assert q.max() <= spec.qmax
    back = dequantize_weight(q, scale, zero_point)
    assert (back[0] == 0).all()
    if bits > 4:  # below, clipping the ends is part of the search
        step = scale.abs().repeat_interleave(size, 1)
        # half a step, or a whole one at the far end where the zero point was rounded too
        limit = 0.501 if symmetric else 1.001
        assert ((back - weight).abs() <= limit * step).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_searched_range_is_never_worse_than_the_extremes(symmetric):
    weight = torch.randn(64, 96)
    spec = IntSpec(4, symmetric=symmetric)
    scale, zero_point = weight_qparams(weight, spec, 32)
    q = quantize_weight(weight, scale, zero_point, spec)
    error = (dequantize_weight(q, scale, zero_point) - weight).square().sum()
    groups = weight.view(64, 3, 32).double()
    if symmetric:
        step = groups.abs().amax(2, keepdim=True) / 7
        plain = torch.round(groups / step).clamp(-7, 7) * step
    else:
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        step = (high - low) / 15
        shift = torch.round(low / step)
        plain = (torch.round(groups / step) - shift).clamp(0, 15).add(shift) * step
    assert error < (plain - groups).square().sum() * (0.85 if symmetric else 1.0)


def test_symmetric_search_tries_both_signs():
    weight = torch.randn(200, 8)
    scale, _ = weight_qparams(weight, IntSpec(4), 8)
    q = quantize_weight(weight, scale, None, IntSpec(4))
    error = (dequantize_weight(q, scale) - weight).double().square().sum(1)
    extreme = weight.double().abs().amax(1, keepdim=True)
    least = torch.full((200,), torch.inf, dtype=torch.float64)
    for sign in (1, -1):
        for percent in range(80, 120, 5):
            step = sign * percent / 100 * extreme / 8
            back = torch.round(weight / step).clamp(-8, 7) * step
            least = torch.minimum(least, (back - weight).square().sum(1))
    # float32 against float64: a tie may go to the neighbouring candidate.
    torch.testing.assert_close(error, least, rtol=1e-4, atol=0)


def test_tensor_scale_is_one_number():
    scale, _ = weight_qparams(torch.randn(5, 8), IntSpec(8, group="tensor"), 8)
    assert scale.shape == (5, 1)
    assert len(scale.unique()) == 1


def test_folding_groups_costs_less_than_half_an_8_bit_step():
    weight = torch.randn(32, 256) * (1 + 3 * torch.rand(32, 1))
    spec = IntSpec(4)
    scale, _ = weight_qparams(weight, spec, 64)
    q = quantize_weight(weight, scale, None, spec)
    folded, channel = fold_groups(q, scale)
    change = folded.float() * channel[:, None] - dequantize_weight(q, scale)
    assert (change.abs() <= 0.501 * channel[:, None]).all()
    assert folded.abs().max() <= 127


def test_folding_one_group_changes_nothing():
    q = torch.randint(-8, 8, (3, 10), dtype=torch.int8)
    folded, channel = fold_groups(q, torch.tensor([[-1.0], [2.0], [3.0]]))
    assert torch.equal(folded, q)
    assert channel.tolist() == [-1, 2, 3]


@given(bits=st.integers(2, 8), exponent=st.integers(-45, 37), seed=st.integers(0, 2**31))
@few
def test_activation_rows(bits, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 17, generator=generator) * 10.0**exponent
    x[1] = 0
    x[2] = x[2].abs()
    x[3] = -x[3].abs()
    q, scale, zero_point = quantize_rows(x, bits)
    qmax = 2 ** (bits - 1) - 1
    assert torch.equal(q.double(), torch.round((x / scale).double() - zero_point))
    assert -qmax - 1 <= q.min()
    assert q.max() <= qmax
    assert -qmax <= zero_point.min()  # so zero has an integer
    assert zero_point.max() <= qmax + 1
    back = (q + zero_point).double() * scale.double()
    assert ((back - x).abs() <= scale.double() * 0.501).all()
    assert (back[1] == 0).all()
    out = torch.empty(x.shape, dtype=torch.uint8)
    low_bytes(x, scale, 2.0 ** (bits - 1) - zero_point, out)
    assert torch.equal(out.float(), q + 2.0 ** (bits - 1))


def test_activation_rows_that_are_not_finite_spoil_only_themselves():
    x = torch.ones(3, 4)
    x[0, 1], x[1, 2] = torch.nan, torch.inf
    _, scale, _ = quantize_rows(x, 8)
    assert torch.isfinite(scale).flatten().tolist() == [False, False, True]


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_tie_at_the_top_stays_within_the_bits(bits):
    qmax = 2 ** (bits - 1) - 1
    top = torch.arange(2 * qmax) + 0.5
    x = torch.stack([top, top - 2 * qmax, torch.zeros_like(top)], 1)
    q, scale, zero_point = quantize_rows(x, bits)
    assert (x[:, :1] / scale % 2 == 0.5).any()  # half above an even number, as it was meant
    assert -qmax - 1 <= q.min()
    assert q.max() <= qmax
    back = (q + zero_point) * scale
    assert ((back - x).abs() <= 0.501 * scale).all()
    out = torch.empty(x.shape, dtype=torch.uint8)
    low_bytes(x, scale, 2.0 ** (bits - 1) - zero_point, out)
    assert torch.equal(out.float(), q + 2.0 ** (bits - 1))


def test_rounding_is_half_to_even():
    x = torch.tensor([[0.0, 0.5, 1.5, 2.5, 254.0]])
    q, scale, zero_point = quantize_rows(x, 8)
    assert (scale.item(), zero_point.item()) == (1, 127)
    assert q.tolist() == [[-127, -126, -126, -124, 127]]


def test_exact_products_against_python_integers():
    q = torch.randint(-127, 128, (3, 7))
    weight = torch.randint(-128, 128, (4, 7))
    expected = [
        [sum(a * b for a, b in zip(x, w, strict=True)) for w in weight.tolist()] for x in q.tolist()
    ]
    assert exact_linear(q.float(), weight.to(torch.int8)).tolist() == expected
    image, kernel = q[:1].reshape(1, 1, 1, 7), weight[:2].reshape(2, 1, 1, 7)
    out = exact_convolution(image, kernel, ConvShape((1, 1), (0, 0), (1, 1), 1))
    assert out.flatten().tolist() == expected[0][:2]
