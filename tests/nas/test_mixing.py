import itertools

import pytest
import torch
from torch import Tensor

from torsh_nas._mixing import mix, mix_reference


def problem(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    tensors = [torch.randn(()) for _ in range(count)] + [torch.randn(shape) for _ in range(count)]
    return [t.to(dtype).requires_grad_() for t in tensors]


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 5, 1)])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_equals_autograd(count: int, shape: tuple[int, ...]) -> None:
    tensors = problem(count, shape, torch.float64)
    grad = torch.randn(shape, dtype=torch.float64)
    results = []
    for form in (mix, mix_reference):
        out = form(tensors[count:], tensors[:count])
        results.append([out, *torch.autograd.grad(out, tensors, grad)])
    for fast, slow in zip(*results, strict=True):
        # Same float64 sums in another order.
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("count", [1, 3])
def test_first_and_second_derivatives(count: int) -> None:
    tensors = problem(count, (2, 3), torch.float64)

    def form(*t: Tensor) -> Tensor:
        return mix(t[count:], t[:count])

    assert torch.autograd.gradcheck(form, tensors)
    assert torch.autograd.gradgradcheck(form, tensors)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "expanded"])
def test_strides(layout: str) -> None:
    make = {
        "transposed": lambda: torch.randn(5, 4, 3, 2).permute(3, 2, 1, 0),
        "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": lambda: torch.randn(1, 3, 1, 5).expand(2, 3, 4, 5),
    }[layout]
    outputs = [make().double() for _ in range(3)]
    weights = [torch.randn((), dtype=torch.float64, requires_grad=True) for _ in range(3)]
    # sum() gives an expanded gradient, the other one a dense one.
    for reduce in (torch.sum, lambda t: (t * torch.arange(5.0)).sum()):
        fast = torch.autograd.grad(reduce(mix(outputs, weights)), weights)
        slow = torch.autograd.grad(reduce(mix_reference(outputs, weights)), weights)
        for a, b in zip(fast, slow, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # as above


@pytest.mark.parametrize(
    "dtypes", list(itertools.product([torch.float32, torch.bfloat16], repeat=2))
)
def test_mixed_dtypes_as_under_autocast(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    outputs = [torch.randn(64, dtype=dtype, requires_grad=True) for dtype in dtypes]
    weights = [torch.tensor(w, requires_grad=True) for w in (0.3, 0.7)]
    out = mix(outputs, weights)
    assert out.dtype == torch.promote_types(*dtypes)
    out.float().square().sum().backward()
    exact = mix_reference(
        [o.detach().double() for o in outputs], [w.detach().double() for w in weights]
    )
    eps = torch.finfo(out.dtype).eps
    # The weight, each product and the sum are rounded once, to eps / 2 relative of about 3.
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=3 * 2 * eps)
    for output, weight in zip(outputs, weights, strict=True):
        assert output.grad is not None
        assert weight.grad is not None
        assert (output.grad.dtype, weight.grad.dtype) == (output.dtype, torch.float32)
        expected = (2 * exact * output.detach().double()).sum()
        # Up to 64 terms of size 2 to 6 added in the output's precision.
        torch.testing.assert_close(weight.grad.double(), expected, rtol=4 * eps, atol=64 * eps)


def test_constant_weights_get_no_gradient() -> None:
    tensors = problem(2, (3,), torch.float32)
    weights = [t.detach() for t in tensors[:2]]
    mix(tensors[2:], weights).sum().backward()
    assert all(w.grad is None for w in weights)
    assert torch.equal(tensors[2].grad, weights[0].expand(3))
