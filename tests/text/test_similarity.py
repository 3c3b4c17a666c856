import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torsh_text import mine_pairs, search, similarity


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
    for bad in (True, 2.0, "3"):
        with pytest.raises(TypeError, match=f"k={bad!r} is no integer"):
            search(x, x, bad)
    with pytest.raises(ValueError, match="k=0 is not positive"):
        search(x, x, 0)
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


def _all_pairs(x, metric, threshold, k):
    """Every pair in a plain loop, sorted by score, then by rows."""
    table = similarity(x, x, metric).tolist()
    rows = range(len(x))
    pairs = [(-table[i][j], i, j) for i in rows for j in rows if i < j]
    found = [(i, j) for score, i, j in sorted(pairs) if threshold is None or -score >= threshold]
    return found[:k]


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 25),
    block=st.integers(1, 30),
    threshold=st.none() | st.integers(-6, 8),
    k=st.none() | st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_mined_pairs_equal_a_plain_loop(rows, block, threshold, k, seed):
    if threshold is None and k is None:
        k = 7
    generator = torch.Generator().manual_seed(seed)
    # small whole numbers: products are exact, and there are many ties
    x = torch.randint(-2, 3, (rows, 3), generator=generator).float()
    scores, ids = mine_pairs(x, threshold=threshold, k=k, metric="dot", block=block)
    assert [tuple(pair) for pair in ids.tolist()] == _all_pairs(x, "dot", threshold, k)
    torch.testing.assert_close(scores, (x[ids[:, 0]] * x[ids[:, 1]]).sum(1), atol=0, rtol=0)


def test_mined_cosines():
    x = torch.randn(300, 16, dtype=torch.float64)
    found = mine_pairs(x * torch.rand(300, 1, dtype=torch.float64), threshold=0.5, block=77)
    expected = similarity(x, x).triu(1)
    assert len(found.pairs) == int((expected >= 0.5).sum()) > 50
    got = expected[found.pairs[:, 0], found.pairs[:, 1]]
    torch.testing.assert_close(found.scores, got, atol=1e-12, rtol=0)
    assert found.scores.dtype == torch.float64
    assert (found.scores.diff() <= 0).all()


def test_best_pairs_of_half_precision():
    x = torch.randn(50, 8).to(torch.bfloat16)
    found = mine_pairs(x, k=5, block=16)
    assert found.scores.dtype == torch.float32
    expected = similarity(x, x).triu(1).flatten().topk(5).values
    torch.testing.assert_close(found.scores, expected, atol=1e-6, rtol=0)  # sums in another order


def test_mining_a_thousand_equal_rows_holds_no_more_than_asked():
    found = mine_pairs(torch.ones(1000, 4), k=3, block=64)
    assert found.pairs.tolist() == [[0, 1], [0, 2], [0, 3]]
    assert mine_pairs(torch.ones(1, 4), k=3).pairs.shape == (0, 2)


@pytest.mark.gpu
def test_mining_on_a_gpu():
    x = torch.randn(3000, 32, dtype=torch.float64)
    found, expected = mine_pairs(x.cuda(), k=50, block=512), mine_pairs(x, k=50)
    assert found.pairs.is_cuda
    assert torch.equal(found.pairs.cpu(), expected.pairs)


def test_mining_refuses_what_does_not_fit():
    x = torch.randn(5, 4)
    with pytest.raises(ValueError, match="neither threshold nor k is given"):
        mine_pairs(x)
    with pytest.raises(ValueError, match="k=0 is not positive"):
        mine_pairs(x, k=0)
    with pytest.raises(ValueError, match="block=0 is not positive"):
        mine_pairs(x, k=1, block=0)
    with pytest.raises(ValueError, match="threshold is not a number"):
        mine_pairs(x, threshold=float("nan"))
    with pytest.raises(ValueError, match="metric='l2'"):
        mine_pairs(x, k=1, metric="l2")
    with pytest.raises(ValueError, match=r"expected \(rows, dim\)"):
        mine_pairs(x[0], k=1)
    with pytest.raises(TypeError, match="x is a list"):
        mine_pairs([[1.0]], k=1)
    x[3, 0] = float("inf")
    with pytest.raises(ValueError, match=r"x\[3\] is not finite"):
        mine_pairs(x, k=1, block=2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_search_refuses_what_is_not_finite(bad, metric):
    x = torch.rand(9, 4) + 0.1
    x[6, 2] = bad
    for queries in (x[:2], x[0]):
        with pytest.raises(ValueError, match=r"corpus\[6\] is not finite"):
            search(queries, x, 1, metric=metric, block=4)
    with pytest.raises(ValueError, match=r"queries\[1\] is not finite"):
        search(x[5:7], x[:5], 1, metric=metric)


def test_search_allows_scores_beyond_float32():
    x = torch.full((3, 4), 1e30)
    assert search(x[0], x, 2, metric="dot").scores.isinf().all()


def test_arrays_are_vectors_too(tmp_path):
    x = torch.randn(20, 8)
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")  # read-only
    for array in (x.numpy(), mapped, np.asfortranarray(x.numpy())):
        assert torch.equal(similarity(array, x), similarity(x, array))
        torch.testing.assert_close(similarity(array, array), similarity(x, x))
        assert search(array[3], array, 2).ids.tolist() == search(x[3], x, 2).ids.tolist()
        assert torch.equal(mine_pairs(array, k=5).pairs, mine_pairs(x, k=5).pairs)
    backwards = x.numpy()[::-1]
    assert search(x[3], backwards, 1).ids.tolist() == [16]
    assert search(x.double().numpy(), x.double(), 1).scores.dtype == torch.float64
    for bad in (np.array([["a"]]), np.array([[None]]), np.ones((2, 2), ">f4"), np.ones(2) * 1j):
        with pytest.raises(TypeError, match=r"corpus holds .*; pass an array of floats"):
            search(x[0], bad, 1)
    with pytest.raises(ValueError, match=r"expected \(rows, dim\)"):
        mine_pairs(x.numpy()[0], k=1)


def test_a_small_corpus_comes_back_whole():
    x = torch.randn(12, 4)
    assert search(x, x).ids.shape == (12, 10)
    found = search(x[0], x, k=50)
    assert found.ids.tolist() == search(x[0], x, k=12).ids.tolist()
    assert search(x, x[:0], rescore=x[:0]).scores.shape == (12, 0)
