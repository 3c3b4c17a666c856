import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torsh_text import search, similarity


def test_cosine_by_hand():
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    b = torch.tensor([[4.0, 3.0], [0.0, -2.0], [0.0, 0.0]])
    expected = torch.tensor([[0.96, -0.8, 0.0], [0.8, 0.0, 0.0]])
    torch.testing.assert_close(similarity(a, b), expected)
    torch.testing.assert_close(similarity(a[0], b), expected[0])
    torch.testing.assert_close(similarity(a, b[0]), expected[:, 0])
    assert similarity(a[0], b[0]).ndim == 0
    torch.testing.assert_close(similarity(a, b, "dot"), a @ b.T)


def test_similarity_is_differentiable_and_float32():
    a = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    scores = similarity(a, torch.randn(2, 4, dtype=torch.bfloat16))
    assert scores.dtype == torch.float32
    scores.sum().backward()
    assert a.grad is not None


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 40), st.integers(1, 50), st.booleans())
def test_search_equals_brute_force(queries, rows, k, block, cosine):
    generator = torch.Generator().manual_seed(rows * 100 + k)
    q = torch.randn(queries, 8, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    k = min(k, rows)
    metric = "cosine" if cosine else "dot"
    scores, ids = search(q, x, k, metric=metric, block=block)
    expected = similarity(q, x, metric).topk(k)
    assert torch.equal(ids, expected.indices)  # random doubles have no ties
    torch.testing.assert_close(scores, expected.values, atol=1e-12, rtol=0)


def test_equal_scores_come_in_order_of_rows():
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    found = search(torch.tensor([[1.0, 0.0]]), x, k=4, block=2)
    assert found.ids.tolist() == [[0, 1, 3, 2]]


def test_half_precision_corpus_and_one_query():
    x = torch.randn(100, 16)
    found = search(x[7], x.to(torch.bfloat16), k=3)
    assert found.scores.dtype == torch.float32
    assert found.ids.shape == (3,)
    assert found.ids[0] == 7


def test_search_takes_no_gradient_and_no_queries():
    x = torch.randn(5, 4, requires_grad=True)
    assert not search(x, x, 2).scores.requires_grad
    assert search(x[:0], x, 2).ids.shape == (0, 2)


@pytest.mark.gpu
def test_corpus_may_stay_on_the_host():
    q, x = torch.randn(4, 32), torch.randn(1000, 32)
    found = search(q.cuda(), x, 5, block=64)
    assert found.ids.is_cuda
    assert torch.equal(found.ids.cpu(), search(q, x, 5).ids)


def test_refuses_what_does_not_fit():
    x = torch.randn(5, 4)
    with pytest.raises(ValueError, match="k=6 is not between 1 and the 5 rows"):
        search(x, x, 6)
    with pytest.raises(ValueError, match="queries have 3 entries a vector, the corpus has 4"):
        search(x[:, :3], x, 1)
    with pytest.raises(ValueError, match="metric='l2'"):
        search(x, x, 1, metric="l2")
    with pytest.raises(ValueError, match="block=0"):
        search(x, x, 1, block=0)
    with pytest.raises(ValueError, match="a has 4 entries a vector, b has 2"):
        similarity(x, x[:, :2])
    with pytest.raises(ValueError, match="shape"):
        similarity(x.unsqueeze(0), x)
    with pytest.raises(TypeError, match="a is a list"):
        similarity([1.0], x)
