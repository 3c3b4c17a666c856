from collections import Counter

import pytest
import torch
from scipy.optimize import nnls
from sklearn.feature_extraction.text import TfidfVectorizer

from torsh_text._factors import _rows, factor_terms, term_shares

TEXTS = ["red apple pie", "green apple pie pie", "fast car", "red car race", "car race race", ""]
COUNTS = [Counter(text.split()) for text in TEXTS]


def test_rows_are_sklearns_tf_idf():
    factors = factor_terms(COUNTS, 2, seed=0)
    peer = TfidfVectorizer()
    expected = peer.fit_transform(TEXTS).toarray()
    assert factors.vocabulary == peer.vocabulary_
    found = _rows(COUNTS, factors.vocabulary, factors.rarity).toarray()
    assert found == pytest.approx(expected, abs=1e-12)


def test_shares_solve_non_negative_least_squares():
    factors = factor_terms(COUNTS, 3, seed=0)
    shares = term_shares(factors, COUNTS)
    rows = _rows(COUNTS, factors.vocabulary, factors.rarity).toarray()
    for row, share in zip(rows[:-1], shares[:-1], strict=True):
        weights, _ = nnls(factors.parts.T.numpy(), row)
        explained = torch.from_numpy(weights) * factors.parts.sum(1)
        # coordinate descent stops at a relative change of 1e-4
        torch.testing.assert_close(share.double(), explained / explained.sum(), atol=5e-3, rtol=0)
    assert shares[:-1].sum(1).tolist() == pytest.approx([1] * 5)
    assert shares[-1].tolist() == [0, 0, 0]
    assert len({tuple(row) for row in shares.argmax(1)[[0, 1]].reshape(2, 1).tolist()}) == 1


def test_every_topic_has_documents_and_the_largest_is_first():
    factors = factor_terms(COUNTS, 5, seed=0)
    shares = term_shares(factors, COUNTS)
    sizes = torch.bincount(shares.argmax(1)[:-1], minlength=len(factors.parts))
    assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)
    assert (sizes > 0).all()
    assert (factors.parts >= 0).all()


def test_no_words_and_no_documents():
    nothing = factor_terms([Counter(), Counter()], 3, seed=0)
    assert nothing.parts.shape == (0, 0)
    assert term_shares(nothing, [Counter("ab")]).shape == (1, 0)
    assert term_shares(factor_terms(COUNTS, 2, seed=0), []).shape == (0, 2)
