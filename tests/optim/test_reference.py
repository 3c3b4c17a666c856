import math

import pytest
import torch

from torsh_optim._reference import adam_

OPTIONS = {"lr": 0.02, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "decay": 0.1}


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_equals_torchs_loop_in_double(dtype: torch.dtype, amsgrad: bool, maximize: bool) -> None:
    ours = torch.randn(7, 5, dtype=dtype)
    theirs = torch.nn.Parameter(ours.clone())
    opt = torch.optim.AdamW(
        [theirs], 0.02, (0.8, 0.95), 1e-6, 0.1, amsgrad, maximize=maximize, foreach=False
    )
    m, v = torch.zeros_like(ours), torch.zeros_like(ours)
    largest = torch.zeros_like(ours) if amsgrad else None
    for step in range(1, 21):
        grad = torch.randn_like(ours) / step  # shrinking, so that AMSGrad's maximum matters
        theirs.grad = grad.clone()
        opt.step()
        adam_(ours, grad, m, v, largest, step=step, scale=-1.0 if maximize else 1.0, **OPTIONS)
    # the same formula in another order of operations: a few units in the last place
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(m, opt.state[theirs]["exp_avg"], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(v, opt.state[theirs]["exp_avg_sq"], rtol=1e-13, atol=1e-14)


def test_two_steps_by_hand() -> None:
    param, m, v = (torch.tensor(x, dtype=torch.float64) for x in (2.0, 0.0, 0.0))
    options = {"lr": 0.5, "beta1": 0.5, "beta2": 0.75, "eps": 0.0, "decay": 0.2}
    adam_(param, torch.tensor(3.0, dtype=torch.float64), m, v, step=1, **options)
    # decay to 1.8, then lr * sign(grad)
    assert param.item() == pytest.approx(1.3, abs=1e-15)
    adam_(param, torch.tensor(-1.0, dtype=torch.float64), m, v, step=2, **options)
    m2 = (0.25 * 3 - 0.5 * 1) / (1 - 0.25)
    v2 = (0.75 * 0.25 * 9 + 0.25 * 1) / (1 - 0.75**2)
    assert param.item() == pytest.approx(1.3 * 0.9 - 0.5 * m2 / math.sqrt(v2), abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_float32_rounded_once(dtype: torch.dtype) -> None:
    stored = [torch.randn(100).to(dtype), *torch.rand(2, 100).to(dtype)]
    exact = [t.float() for t in stored]
    grad = torch.randn(100).to(dtype)
    adam_(stored[0], grad, stored[1], stored[2], step=3, **OPTIONS)
    adam_(exact[0], grad.float(), exact[1], exact[2], step=3, **OPTIONS)
    for mine, theirs in zip(stored, exact, strict=True):
        assert torch.equal(mine, theirs.to(dtype))


def test_gradient_is_not_changed() -> None:
    grad = torch.randn(5)
    before = grad.clone()
    adam_(torch.randn(5), grad, torch.zeros(5), torch.zeros(5), step=1, scale=-1.0, **OPTIONS)
    assert torch.equal(grad, before)
