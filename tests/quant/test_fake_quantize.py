import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torsh_quant import IntSpec
from torsh_quant._fake_quantize import (
    fake_quantize_rows,
    fake_quantize_static,
    fake_quantize_weight,
    learned_scale,
    search_range,
)
from torsh_quant._numerics import (
    dequantize_weight,
    quantize_rows,
    quantize_static,
    quantize_weight,
    range_qparams,
    weight_qparams,
)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 8), st.booleans(), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6)
)
def test_weights_are_what_the_integers_stand_for(bits, symmetric, groups, size, seed):
    weight = torch.randn(3, groups * size, generator=torch.Generator().manual_seed(seed))
    spec = IntSpec(bits, symmetric)
    scale, zero_point = weight_qparams(weight, spec, size)
    found = fake_quantize_weight(weight, scale * 0.7, zero_point, spec)
    q = quantize_weight(weight, scale * 0.7, zero_point, spec)
    assert torch.equal(found, dequantize_weight(q, scale * 0.7, zero_point))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_are_torchs_per_channel(bits):
    spec = IntSpec(bits)
    torch.manual_seed(bits)
    weight = torch.randn(5, 16, requires_grad=True)
    scale = (torch.rand(5, 1) / 2**bits * 4 + 0.01).requires_grad_()
    grad = torch.randn(5, 16)
    found = fake_quantize_weight(weight, scale, None, spec)
    ours = torch.autograd.grad(found, (weight, scale), grad)
    plain = scale.detach()[:, 0].requires_grad_()
    expected = torch._fake_quantize_learnable_per_channel_affine(
        weight, plain, torch.zeros(5), 0, spec.qmin, spec.qmax, 1.0
    )
    theirs = torch.autograd.grad(expected, (weight, plain), grad)
    torch.testing.assert_close(found, expected)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1][:, 0], theirs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scale_gradient_is_the_papers(symmetric, sign):
    # Equation 3: round(v) - v inside, the limit outside; here in float64, element by element.
    spec, size = IntSpec(3, symmetric), 4
    torch.manual_seed(0)
    weight = torch.randn(2, 8) * 2
    scale = (torch.full((2, 2), 0.4) * sign).requires_grad_()
    zero_point = None if symmetric else torch.tensor([[1, -2], [0, 3]], dtype=torch.int8)
    grad = torch.randn(2, 8)
    fake_quantize_weight(weight, scale, zero_point, spec).backward(grad)
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for row in range(2):
        for column in range(8):
            group = column // size
            offset = 0 if symmetric else int(zero_point[row, group])
            v = weight[row, column].double() / scale[row, group].double()
            low, high = spec.qmin - offset, spec.qmax - offset
            step = low if v < low - 0.5 else high if v > high + 0.5 else torch.round(v) - v
            expected[row, group] += grad[row, column].double() * step
    torch.testing.assert_close(scale.grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_learned_scale_moves_as_the_papers_under_sgd():
    # One scale: a step of SGD on the factor is one on the scale itself, with 1 / sqrt(N Q).
    weight, spec, lr = torch.randn(4, 8), IntSpec(4, group="tensor"), 0.01
    unit, factor = torch.full((1, 1), 0.03), torch.ones(1, 1, requires_grad=True)
    made = learned_scale(factor, unit, weight.numel(), spec.qmax)
    fake_quantize_weight(weight, made.expand(4, 1), None, spec).square().sum().backward()
    moved = unit * (factor.detach() - lr * factor.grad)
    plain = unit.clone().requires_grad_()
    fake_quantize_weight(weight, plain.expand(4, 1), None, spec).square().sum().backward()
    expected = unit - lr * plain.grad / (weight.numel() * spec.qmax) ** 0.5
    torch.testing.assert_close(moved, expected)


def test_learned_scale_keeps_its_sign():
    unit = torch.tensor([0.5, -0.25])
    assert learned_scale(torch.tensor([-3.0, -3.0]), unit, 1, 1).sign().tolist() == [1, -1]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_activations(bits, dtype):
    x = (torch.randn(6, 7) * 2).to(dtype).requires_grad_()
    scale, zero_point = range_qparams(torch.tensor(-1.0), torch.tensor(2.0), bits)
    scale.requires_grad_()
    found = fake_quantize_static(x, scale, zero_point, bits)
    q = quantize_static(x.detach(), scale.detach(), zero_point, bits)
    assert found.dtype == dtype
    assert torch.equal(found, ((q + zero_point) * scale).to(dtype))
    grad = torch.randn(6, 7).to(dtype)
    found.backward(grad)
    v = x.detach().double() / scale.detach().double() - zero_point.double()
    limit = 2 ** (bits - 1)
    inside = (v >= -limit) & (v <= limit - 1)
    assert torch.equal(x.grad, torch.where(inside, grad, 0.0))
    # d/ds of s * (q + z): q + z - x / s inside, q + z outside.
    step = torch.where(inside, torch.round(v) - v, v.clamp(-limit, limit - 1) + zero_point)
    expected = (grad.double() * step).sum()
    torch.testing.assert_close(scale.grad.double(), expected, rtol=1e-4, atol=1e-4)


def test_scale_gradient_of_clamped_values_is_the_slope():
    # Where all is clamped nothing jumps: finite differences see the same slope.
    x, zero_point = torch.tensor([9.0, -8.0, 30.0]), torch.tensor(1.0)
    scale = torch.tensor(0.5, requires_grad=True)
    fake_quantize_static(x, scale, zero_point, 3).sum().backward()

    def at(s):
        return fake_quantize_static(x, torch.tensor(s), zero_point, 3).double().sum().item()

    assert scale.grad.item() == pytest.approx((at(0.501) - at(0.499)) / 0.002, rel=1e-3)


def test_rows_pass_their_gradient():
    x = torch.randn(5, 3, 4, requires_grad=True)
    found = fake_quantize_rows(x, 4)
    q, scale, zero_point = quantize_rows(x.detach(), 4)
    assert torch.equal(found, (q + zero_point) * scale)
    grad = torch.randn(5, 3, 4)
    found.backward(grad)
    assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_searched_range_is_no_worse_than_the_extremes(bits):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).pow(3)

    def error(scale, zero_point):
        return (fake_quantize_static(x, scale, zero_point, bits) - x).square().sum()

    best, plain = search_range(x, bits), range_qparams(x.min(), x.max(), bits)
    assert error(*best) <= error(*plain)
    assert bits == 8 or error(*best) < 0.9 * error(*plain)
