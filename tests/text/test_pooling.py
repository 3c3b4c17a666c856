import pytest
import torch

from torsh_text._pooling import POOLINGS, pool_packed, pool_padded

LENGTHS = torch.tensor([4, 1, 6])


def _formula(row, mode):
    """What each mode means, row by row in float64."""
    row = row.double()
    n = len(row)
    rank = torch.arange(1, n + 1, dtype=torch.float64).unsqueeze(1)
    return {
        "mean": row.mean(0),
        "cls": row[0],
        "max": row.amax(0),
        "lasttoken": row[-1],
        "weightedmean": (row * rank).sum(0) / rank.sum(),
        "mean_sqrt_len_tokens": row.sum(0) / n**0.5,
    }[mode]


def _batch(side):
    states = torch.randn(3, 6, 5)
    place = torch.arange(6)
    ends = LENGTHS.unsqueeze(1)
    mask = place >= 6 - ends if side == "left" else place < ends
    rows = [s[m] for s, m in zip(states, mask, strict=True)]
    return states, mask, rows


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_modes_follow_their_formulas(mode, side):
    states, mask, rows = _batch(side)
    expected = torch.stack([_formula(row, mode) for row in rows])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), LENGTHS.cumsum(0)])
    # float32 sums of at most 6 numbers of about 1
    for pooled in (
        pool_padded(states, mask, (mode,)),
        pool_packed(torch.cat(rows), offsets, (mode,)),
    ):
        assert pooled.dtype == torch.float32
        torch.testing.assert_close(pooled.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", POOLINGS)
def test_gradients_agree(mode):
    states, mask, _ = _batch("right")
    states.requires_grad_()
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), LENGTHS.cumsum(0)])
    weights = torch.randn(3, 5)
    (padded,) = torch.autograd.grad((pool_padded(states, mask, (mode,)) * weights).sum(), states)
    flat = states[mask]
    (packed,) = torch.autograd.grad((pool_packed(flat, offsets, (mode,)) * weights).sum(), states)
    torch.testing.assert_close(packed, padded, atol=1e-6, rtol=0)


def test_accumulates_in_float32():
    states = torch.full((4097, 1), 1.0, dtype=torch.bfloat16)
    offsets = torch.tensor([0, 4097])
    assert pool_packed(states, offsets, ("mean_sqrt_len_tokens",)).item() == pytest.approx(
        4097**0.5
    )
    mask = torch.ones(1, 4097)
    assert pool_padded(states.unsqueeze(0), mask, ("mean",)).item() == 1.0


def test_several_modes_lie_side_by_side():
    x = torch.tensor([[1.0], [5.0]])
    assert pool_packed(x, torch.tensor([0, 2]), ("mean", "cls")).tolist() == [[3.0, 1.0]]
