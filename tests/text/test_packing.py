from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torsh_text import PackedBatch
from torsh_text._packing import plan_batches


def test_layout_of_a_batch():
    batch = PackedBatch.pack([[5, 6, 7], [8], [9, 1], [2, 3]], first_position=2)
    assert batch.buffer.dtype == torch.int32
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 2, 3]]
    assert batch.position_ids.tolist() == [[2, 3, 4, 2, 2, 3, 2, 3]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6, 8]
    assert (len(batch), batch.num_tokens, batch.max_length) == (4, 8, 3)
    assert batch.runs == ((1, 3), (1, 1), (2, 2))


def test_moving_keeps_everything():
    batch = PackedBatch.pack([[5, 6], [7]], first_position=1)
    moved = batch.to("cpu", copy=True)
    assert moved.buffer.data_ptr() != batch.buffer.data_ptr()
    assert torch.equal(moved.buffer, batch.buffer)
    assert (moved.lengths, moved.first_position) == ((2, 1), 1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=9))
def test_padding_is_the_inverse_of_packing(rows):
    padded = PackedBatch.pack(rows).padded(pad_id=0)
    ids, mask = padded["input_ids"], padded["attention_mask"].bool()
    assert [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)] == rows
    assert not ids[~mask].any()


def test_refuses_nothing_and_empty_rows():
    with pytest.raises(ValueError, match="rows is empty"):
        PackedBatch.pack([])
    with pytest.raises(ValueError, match="row 1 has no tokens"):
        PackedBatch.pack([[1], []])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 40), max_size=60), st.integers(1, 80), st.integers(1, 9), st.booleans()
)
def test_plan_covers_every_row_once_within_the_budget(lengths, max_tokens, max_rows, padded):
    sizes = np.array(lengths, dtype=np.int64)
    plan = plan_batches(sizes, max_tokens=max_tokens, max_rows=max_rows, padded=padded)
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
    flat = [lengths[i] for batch in plan for i in batch]
    assert flat == sorted(lengths, reverse=True)

    def cost(rows):
        return len(rows) * max(rows) if padded else sum(rows)

    batches = [sizes[batch].tolist() for batch in plan]
    for rows in batches:
        assert len(rows) == 1 or (cost(rows) <= max_tokens and len(rows) <= max_rows)
    for rows, later in pairwise(batches):  # no batch could have taken the next row too
        longer = [*rows, later[0]]
        assert cost(longer) > max_tokens or len(longer) > max_rows


def test_plan_keeps_input_order_among_equals():
    plan = plan_batches(np.array([3, 3, 3, 3]), max_tokens=6, max_rows=99)
    assert [batch.tolist() for batch in plan] == [[0, 1], [2, 3]]
