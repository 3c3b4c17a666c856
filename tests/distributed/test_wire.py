import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torsh_dist._wire import coded_bytes, plan

KINDS = [torch.int8, torch.float32, torch.bfloat16]


@settings(deadline=None, max_examples=50)
@given(
    params=st.lists(
        st.tuples(st.integers(1, 3000), st.sampled_from(KINDS)), min_size=1, max_size=8
    ),
    world_size=st.integers(1, 5),
    group_size=st.sampled_from([32, 256]),
)
def test_every_value_has_one_place_in_the_rows(params, world_size, group_size):
    named = [(str(number), numel, dtype) for number, (numel, dtype) in enumerate(params)]
    layout = plan(named, world_size, group_size)
    seen = torch.zeros(sum(numel for numel, _ in params), dtype=torch.int64)
    for section in (layout.codes, *layout.plain):
        taken = torch.zeros(world_size, section.width, dtype=torch.int64)
        for run in section.runs:
            for row, columns, values in run.pieces():
                seen[values] += 1
                taken[row, columns] += 1
                if section is layout.codes:
                    assert columns.start % group_size == 0
        assert int(taken.max()) <= 1 if taken.numel() else True
    assert bool((seen == 1).all())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sections_share_a_row_without_overlap(world_size):
    params = [
        ("a", 700, torch.int8), ("b", 7, torch.bfloat16), ("c", 5, torch.float32),
        ("d", 300, torch.int8), ("e", 3, torch.float32),
    ]  # fmt: skip
    layout = plan(params, world_size)
    rows = torch.zeros(world_size, layout.row_bytes, dtype=torch.uint8)
    views = [layout.code_view(rows), layout.scale_view(rows)]
    views += [section.view(rows) for section in layout.plain]
    for view in views:
        view.view(torch.uint8).bitwise_not_()  # in place: a byte touched twice is 0 again
    used = sum(view[0].numel() * view.element_size() for view in views)
    assert bool((rows.sum(1) == 255 * used).all())
    assert used <= layout.row_bytes < used + 32


def test_neighbours_in_plain_sections_travel_as_one():
    layout = plan([("a", 3, torch.float32), ("b", 4, torch.float32)], 2)
    assert [(run.start, run.numel) for run in layout.plain[0].runs] == [(0, 7)]


def test_coded_bytes_is_what_the_rows_take():
    for numel in (1, 255, 256, 257, 100_000):
        for world_size in (1, 3, 8):
            layout = plan([("w", numel, torch.int8)], world_size)
            taken = world_size * (layout.codes.width + 4 * layout.groups)
            assert taken == coded_bytes(numel, world_size, 256)
