import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torsh_dist import _codec
from torsh_dist._wire import plan

WIDE = torch.finfo(torch.float32)


def groups(values, size=32):
    padded = torch.zeros(-(-len(values) // size) * size)
    padded[: len(values)] = torch.tensor(values)
    return padded.view(-1, size)


def quantize(values):
    rest = values.clone()
    codes = torch.empty(values.shape, dtype=torch.int8)
    scales = torch.empty(values.shape[0])
    _codec.quantize_(rest, codes, scales)
    return codes, scales, rest


finite = st.floats(-(2.0**127), 2.0**127, width=32)


@settings(deadline=None, max_examples=200)
@given(st.lists(finite, min_size=1, max_size=100))
def test_codes_and_rest_make_the_value_exactly(values):
    values = groups(values)
    codes, scales, rest = quantize(values)
    assert torch.equal(codes * scales[:, None] + rest, values)
    # The exact sum, not only the rounded one: fp32 values and products fit in float64.
    assert torch.equal((codes * scales[:, None]).double() + rest.double(), values.double())
    assert int(codes.min()) >= -127
    largest = values.abs().amax(1)
    step = torch.where(largest / 127 < WIDE.tiny, 2 * largest, largest / 127)
    assert bool((rest.abs() <= step[:, None] * 0.5 * (1 + 1e-5)).all())


@pytest.mark.parametrize(
    ("value", "code"),
    [(0.0, 0), (3.0, 127), (-3.0, -127), (1e-40, 0), (2.0**127, 127), (WIDE.tiny * 200, 127)],
)
def test_constant_groups(value, code):
    codes, scales, rest = quantize(torch.full((2, 32), value))
    assert bool((codes == code).all())
    assert bool((scales == (torch.tensor(value).abs() / 127 if code else 0)).all())
    assert rest.abs().max() <= abs(value) * (1 if code == 0 else 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, WIDE.max])
def test_a_bad_value_spoils_its_group_only(bad):
    values = torch.ones(3, 32)
    values[1, 5] = bad
    codes, scales, rest = quantize(values)
    assert scales.isnan().tolist() == [False, True, False]
    assert bool((codes[1] == 0).all())
    assert bool((rest[1] == 0).all())
    assert bool((codes[[0, 2]] == 127).all())


def everyone(gradients, residuals, layout):
    """All ranks' parts in one process: the oracle of what the collectives do."""
    world = layout.world_size
    sent = [torch.zeros(world, layout.row_bytes, dtype=torch.uint8) for _ in range(world)]
    for rank in range(world):
        _codec.encode(gradients[rank], residuals[rank], sent[rank], layout, rank)
    gathered = torch.zeros(world, layout.row_bytes, dtype=torch.uint8)
    for rank in range(world):
        received = torch.stack([sent[other][rank] for other in range(world)])
        _codec.reduce(residuals[rank], received, layout, rank)
        gathered[rank] = received[rank]
    return gathered


@settings(deadline=None, max_examples=30)
@given(
    world=st.integers(1, 4),
    numel=st.integers(1, 700),
    group=st.sampled_from([32, 256]),
    seed=st.integers(0, 99),
)
def test_averages_arrive_but_for_what_is_owed(world, numel, group, seed):
    generator = torch.Generator().manual_seed(seed)
    layout = plan([("w", numel, torch.int8)], world, group)
    residuals = [torch.zeros(world, layout.codes.width) for _ in range(world)]
    arrived, meant = torch.zeros(numel).double(), torch.zeros(numel).double()
    for _ in range(5):
        gradients = [torch.randn(numel, generator=generator) for _ in range(world)]
        rows = everyone(gradients, residuals, layout)
        out = torch.empty(numel)
        _codec.decode(out, rows, layout)
        arrived += out
        meant += torch.stack(gradients).double().mean(0)
    (run,) = layout.codes.runs
    owed = torch.stack(residuals).double().mean(0)
    owed = torch.cat([owed[row, columns] for row, columns, _ in run.pieces()])
    # 5 sums of up to 4 fp32 values below 5: their rounding.
    torch.testing.assert_close(arrived + owed, meant, rtol=0, atol=2e-5)


def test_large_sections_are_worked_off_in_slabs():
    layout = plan([("w", 200_000, torch.int8)], 1, 32)
    gradient = torch.randn(200_000)
    out = torch.empty(200_000)
    residual = torch.zeros(1, layout.codes.width)
    _codec.decode(out, everyone([gradient], [residual], layout), layout)
    assert torch.equal(out + residual[0], gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_plain_sections_are_averaged_in_rank_order(dtype):
    layout = plan([("a", 5, dtype), ("w", 40, torch.int8), ("b", 3, dtype)], 3, 32)
    (section,) = layout.plain
    buckets = [torch.randn(48).to(dtype) for _ in range(3)]
    sent = torch.zeros(3, 3, layout.row_bytes, dtype=torch.uint8)
    for rank in range(3):
        _codec.pack(buckets[rank], sent[rank], section)
    gathered = torch.zeros(3, layout.row_bytes, dtype=torch.uint8)
    for rank in range(3):
        received = sent[:, rank].clone()
        _codec.average(received, section, rank)
        gathered[rank] = received[rank]
    out = torch.full((48,), 9.0, dtype=dtype)
    _codec.unpack(out, gathered, section)
    wide = [bucket.to(torch.promote_types(dtype, torch.float32)) for bucket in buckets]
    mean = ((wide[0] + wide[1] + wide[2]) / 3).to(dtype)
    plain = [*range(5), *range(45, 48)]
    assert torch.equal(out[plain], mean[plain])
    assert bool((out[5:45] == 9).all())
