import pytest
import torch

from torsh_quant import IntSpec
from torsh_quant._hqq import HQQ, _shrink
from torsh_quant._rounding import Rounded, round_to_nearest

SPECS = [
    IntSpec(4, group=32),
    IntSpec(4, symmetric=False, group=32),
    IntSpec(2, symmetric=False, group=32),
    IntSpec(3),
    IntSpec(8),
    IntSpec(4, group="tensor"),
]


def heavy_tailed(shape=(16, 64), seed=0):
    torch.manual_seed(seed)
    return torch.distributions.StudentT(3.0).sample(shape) * 0.02


def loss(weight, rounded, size):
    return (rounded.floats() - weight).abs().pow(0.7).unflatten(1, (-1, size)).sum(2)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_group_is_worse_than_rounded_to_nearest(spec):
    weight = heavy_tailed()
    size = spec.group if isinstance(spec.group, int) else 64
    plain, found = round_to_nearest(weight, spec, size), HQQ().round(weight, spec, size, None)
    before, after = loss(weight, plain, size), loss(weight, found, size)
    assert found.scale.shape == plain.scale.shape
    assert spec.qmin <= found.q.min()
    assert found.q.max() <= spec.qmax
    if spec.group == "tensor":
        assert len(found.scale.unique()) == 1
        assert after.sum() <= before.sum() * (1 + 1e-6)
        return
    assert (after <= before * (1 + 1e-6)).all()
    if spec.bits == 2:
        assert after.sum() < 0.98 * before.sum()


def test_the_shrinkage_is_the_minimum():
    # by brute force: |e|**p + beta / 2 (e - x)**2, where the linear step of the paper is close
    for x in (3.0, -1.5):
        grid = torch.linspace(-4, 4, 800_001, dtype=torch.float64)
        cost = grid.abs().pow(0.7) + 50 * (grid - x) ** 2
        expected = grid[cost.argmin()].item()
        found = _shrink(torch.tensor([x], dtype=torch.float64), 100 / 0.7, 0.7).item()
        assert found == pytest.approx(expected, abs=2e-4)
    assert _shrink(torch.tensor([1e-3]), 10.0, 0.7).item() == 0


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**30])
def test_the_unit_of_the_weights_does_not_matter(spec, factor):
    weight = heavy_tailed()
    size = spec.group if isinstance(spec.group, int) else 64
    one = HQQ().round(weight, spec, size, None)
    other = HQQ().round(weight * factor, spec, size, None)
    assert torch.equal(one.q, other.q)
    assert torch.equal(one.scale * factor, other.scale)


def slow(group, rounded, spec, p=0.7, beta=10.0):
    """One group in float64, one turn after the other, with the best kept."""
    w, scale = group.double(), rounded.scale.double().item()
    zero = 0.0 if rounded.zero_point is None else float(rounded.zero_point.item())
    least = float("inf")
    for _ in range(21):
        q = (torch.round(w / scale) + zero).clamp(spec.qmin, spec.qmax)
        error = w - (q - zero) * scale
        least = min(least, error.abs().pow(p).sum().item())
        size = (error / scale).abs()
        less = size.clamp(min=1e-30) ** (p - 1) / beta
        kept = w - error.sign() * (size - less).clamp(min=0) * abs(scale)
        if rounded.zero_point is not None:
            zero = float((q - kept / scale).mean().round().clamp(spec.qmin, spec.qmax))
        scale = (((q - zero) * kept).sum() / (q - zero).square().sum()).item()
        beta *= 1.01
    return least


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_against_the_slow_way(bits, symmetric):
    weight, spec = heavy_tailed((12, 32)), IntSpec(bits, symmetric, group=32)
    found = HQQ().round(weight, spec, 32, None)
    plain = round_to_nearest(weight, spec, 32)
    for row in range(12):
        one = Rounded(
            plain.q[row : row + 1],
            plain.scale[row],
            None if symmetric else plain.zero_point[row],
        )
        # a float32 tie may lead elsewhere, which costs or gains little
        wanted = slow(weight[row], one, spec)
        assert loss(weight, found, 32)[row].item() == pytest.approx(wanted, rel=0.01)


def test_real_weights(digits):
    weight = digits.net[8].weight.detach()
    for bits, symmetric in ((2, True), (2, False), (3, False), (4, True)):
        spec = IntSpec(bits, symmetric, group=64)
        plain, found = round_to_nearest(weight, spec, 64), HQQ().round(weight, spec, 64, None)
        # measured .94, .89, .976, .983
        assert loss(weight, found, 64).sum() < 0.99 * loss(weight, plain, 64).sum()


def test_zeros_and_odd_groups():
    weight = torch.zeros(2, 6)
    weight[1, 2] = 5
    found = HQQ().round(weight, IntSpec(4, symmetric=False, group=3), 3, None)
    assert torch.isfinite(found.floats()).all()
    torch.testing.assert_close(found.floats(), weight, rtol=0.05, atol=0)


@pytest.mark.parametrize("options", [{"p": 0}, {"p": 1.5}, {"steps": 0}, {"kappa": 0.9}])
def test_options_are_checked(options):
    with pytest.raises(ValueError, match="out of range"):
        HQQ(**options)
