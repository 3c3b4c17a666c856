import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.architectures import make_tokenizer, random_texts
from torsh_text._runtime import Budget, compute_rows, default_max_tokens, join_pieces
from torsh_text._tokenizing import RowTokenizer, TokenRows

CPU = torch.device("cpu")


def _rows(lengths):
    sizes = np.array(lengths, dtype=np.int64)
    return TokenRows(np.arange(sizes.sum(), dtype=np.int32), sizes, np.ones_like(sizes), [])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(30, 60), st.booleans())
def test_every_row_is_computed_once_whatever_runs_out_of_memory(lengths, room, padded):
    rows = _rows(lengths)
    starts = np.cumsum(rows.lengths) - rows.lengths
    seen = []

    def compute(batch, indices):
        cost = len(batch) * batch.max_length if padded else batch.num_tokens
        if cost > room:
            raise torch.OutOfMemoryError("full")
        ids = batch.input_ids[0].tolist()
        expected = [i for r in indices for i in range(starts[r], starts[r] + lengths[r])]
        assert ids == expected
        assert batch.position_ids[0].max() < batch.max_length + 3
        seen.extend(indices.tolist())

    budget = Budget(10_000, max_rows=1000)
    compute_rows(rows, compute, budget=budget, device=CPU, first_position=3, padded=padded)
    assert sorted(seen) == list(range(len(lengths)))
    assert budget.max_tokens == 10_000 or budget.max_tokens < 10_000 // 2


def test_rows_beyond_the_budget_run_alone():
    sizes = []
    compute_rows(
        _rows([50, 3, 3]),
        lambda batch, indices: sizes.append(len(batch)),
        budget=Budget(8),
        device=CPU,
        first_position=0,
        padded=False,
    )
    assert sizes == [1, 2]


def test_join_pieces_weighs_by_tokens():
    rows = RowTokenizer(make_tokenizer(), max_length=6).rows(random_texts([6, 1]), long="mean")
    assert rows.lengths.tolist() == [6, 4, 3]
    joined = join_pieces(torch.tensor([[1.0], [2.0], [5.0]]), rows)
    assert joined.flatten().tolist() == pytest.approx([(6 * 1 + 4 * 2) / 10, 5.0])


def test_default_budgets():
    cuda = torch.device("cuda")
    assert default_max_tokens(CPU, torch.float32) == 768
    assert default_max_tokens(cuda, torch.bfloat16) == 65_536
    assert default_max_tokens(cuda, torch.float32) == 16_384
