import itertools

import pytest
import torch

from torsh_text._crf import CRF
from torsh_text._paths import TimeSteps
from torsh_text._spans import TagScheme


def filled(num_tags, constraints=None, dtype=torch.float32):
    crf = CRF(num_tags, constraints).to(dtype)
    for parameter in crf.parameters():
        torch.nn.init.normal_(parameter)
    return crf


def path_score(crf, scores, path):
    """The definition, term by term; None where a constraint forbids the path."""
    between = crf.legal[list(path[:-1]), list(path[1:])].all()
    if not (between and crf.legal_first[path[0]] and crf.legal_last[path[-1]]):
        return None
    total = crf.first[path[0]] + crf.last[path[-1]]
    for i, tag in enumerate(path):
        total = total + scores[i, tag]
    for a, b in itertools.pairwise(path):
        total = total + crf.transitions[a, b]
    return total


def brute_force(crf, scores):
    """All legal paths of one sequence and their scores."""
    paths = itertools.product(range(crf.num_tags), repeat=len(scores))
    found = [(path, path_score(crf, scores, path)) for path in paths]
    return [(path, score) for path, score in found if score is not None]


BIO2 = TagScheme.from_labels(["O", "B-x", "I-x", "B-y", "I-y"]).transitions()
BIOES = TagScheme.from_labels(["O", "B-x", "I-x", "E-x", "S-x"]).transitions()
CASES = [(2, None), (6, None), (5, BIO2), (5, BIOES)]


@pytest.mark.parametrize(("num_tags", "constraints"), CASES)
def test_equals_all_paths(num_tags, constraints):
    crf = filled(num_tags, constraints, torch.float64)
    lengths = [4, 1, 0, 5 if num_tags > 2 else 6, 2]
    scores = torch.randn(len(lengths), 6, num_tags, dtype=torch.float64)
    best = crf.viterbi(scores, lengths)
    marginals = crf.marginals(scores, lengths)
    for row, length in enumerate(lengths):
        assert best.tags[row, length:].eq(-100).all()
        assert marginals[row, length:].eq(0).all()
        if length == 0:
            assert best.scores[row] == 0
            continue
        found = brute_force(crf, scores[row, :length])
        totals = torch.stack([score for _, score in found])
        path, score = max(found, key=lambda pair: pair[1])
        assert best.tags[row, :length].tolist() == list(path)
        assert best.scores[row].item() == pytest.approx(score.item(), abs=1e-12)
        weights = totals.softmax(0)
        expected = torch.zeros(length, num_tags, dtype=torch.float64)
        for (tags, _), weight in zip(found, weights, strict=True):
            expected[range(length), list(tags)] += weight.detach()
        torch.testing.assert_close(marginals[row, :length], expected, atol=1e-12, rtol=0)
        for tags, total in itertools.islice(found, 0, None, max(1, len(found) // 5)):
            likelihood = crf(scores[row : row + 1, :length], torch.tensor([tags]))
            expected_log = total - totals.logsumexp(0)
            assert likelihood.item() == pytest.approx(expected_log.item(), abs=1e-10)


@pytest.mark.parametrize(("num_tags", "constraints"), CASES)
def test_gradients(num_tags, constraints):
    crf = filled(num_tags, constraints, torch.float64)
    lengths = [3, 0, 4, 1, 0]
    scores = torch.randn(sum(lengths), num_tags, dtype=torch.float64, requires_grad=True)
    tags = crf.viterbi(scores, lengths).tags

    def total(scores, *parameters):
        names = [name for name, _ in crf.named_parameters()]
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(crf, state, (scores, tags, lengths))

    assert torch.autograd.gradcheck(total, (scores, *crf.parameters()))
    crf.zero_grad()
    crf(scores, tags, lengths).sum().backward()
    assert crf.transitions.grad[~crf.legal].abs().sum() == 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_packed_equals_padded_and_float64(device):
    lengths = [7, 1, 0, 40, 12, 40]
    crf = filled(5, BIO2).to(device)
    padded = (torch.randn(len(lengths), 45, 5, device=device) * 3).requires_grad_()
    mask = torch.arange(45, device=device) < torch.tensor(lengths, device=device).unsqueeze(1)
    best = crf.viterbi(padded, mask.sum(1))
    tags = best.tags
    packed = padded[mask].detach().requires_grad_()
    mine = crf.log_likelihood(packed, tags[mask], lengths)
    other = crf.log_likelihood(padded, tags, mask.sum(1))
    exact = CRF(5, BIO2).double().to(device)
    exact.load_state_dict(crf.state_dict())
    truth = exact(packed.double(), tags[mask], lengths)
    assert mine.dtype == torch.float32
    assert torch.equal(mine, other)
    # path scores of some hundreds in float32, of which two nearly equal ones are subtracted
    torch.testing.assert_close(mine.double(), truth, atol=2e-4, rtol=0)
    assert torch.equal(crf.viterbi(packed, lengths).tags, tags[mask])
    (gradient,) = torch.autograd.grad(mine.sum(), packed)
    (expected,) = torch.autograd.grad(truth.sum(), packed)
    # probabilities from differences of such scores
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=0)
    (of_padded,) = torch.autograd.grad(other.sum(), padded)
    assert of_padded[~mask].eq(0).all()
    torch.testing.assert_close(of_padded[mask], gradient)


def test_half_precision_is_summed_in_float32():
    crf = filled(5)
    scores = torch.randn(2, 30, 5, dtype=torch.bfloat16)
    tags = torch.zeros(2, 30, dtype=torch.int64)
    assert torch.equal(crf(scores, tags), crf(scores.float(), tags))
    assert crf.viterbi(scores).scores.dtype == torch.float32


def test_padding_is_not_read():
    crf = filled(3)
    scores = torch.randn(2, 4, 3)
    tags = torch.tensor([[0, 1, 2, 0], [1, -100, -100, -100]])
    before = crf(scores, tags, [4, 1])
    scores[1, 1:] = float("nan")
    assert torch.equal(crf(scores, tags, [4, 1]), before)


def test_likelihoods_of_all_tags_add_up_to_one():
    crf = filled(5, BIO2)
    scores = torch.randn(1, 4, 5)
    legal = [p for p in itertools.product(range(5), repeat=4) if BIO2.allow(p)]
    total = crf(scores.expand(len(legal), 4, 5), torch.tensor(legal)).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-5)


def test_a_new_crf_tags_each_word_alone():
    scores = torch.randn(3, 5, 4)
    crf = CRF(4)
    assert torch.equal(crf.viterbi(scores).tags, scores.argmax(2))
    torch.testing.assert_close(crf.marginals(scores), scores.softmax(2))


def test_it_learns():
    """Tags that alternate whatever the emissions say: only transitions can know."""
    crf = CRF(2)
    optimizer = torch.optim.Adam(crf.parameters(), lr=0.3)
    tags = torch.tensor([[0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0]])
    for _ in range(60):
        optimizer.zero_grad()
        loss = -crf(0.1 * torch.randn(2, 6, 2), tags).mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1  # 0.69, ln 2, is left: which of the two
    start = torch.zeros(1, 6, 2)
    start[0, 0, 1] = 3
    assert crf.viterbi(start).tags.tolist() == [[1, 0, 1, 0, 1, 0]]


def test_works_under_inference_mode():
    crf = filled(3)
    with torch.inference_mode():
        scores = torch.randn(2, 3, 3)
        chances = crf.marginals(scores, [3, 2])
        crf.viterbi(scores, [3, 2])
        crf(scores, torch.zeros(2, 3, dtype=torch.int64))
    torch.testing.assert_close(chances.sum(2), torch.tensor([[1.0, 1, 1], [1, 1, 0]]))


def test_state_goes_there_and_back():
    crf = filled(5, BIO2)
    other = CRF(5)
    other.load_state_dict(crf.state_dict())
    scores = torch.randn(4, 9, 5)
    assert torch.equal(other.viterbi(scores).tags, crf.viterbi(scores).tags)
    assert torch.equal(other.legal, BIO2.between)


def test_empty_batches():
    crf = filled(3)
    for scores, lengths in ((torch.empty(0, 3), [0, 0]), (torch.empty(2, 0, 3), None)):
        tags = torch.empty(scores.shape[:-1], dtype=torch.int64)
        assert crf(scores, tags, lengths).tolist() == [0, 0]
        assert crf.viterbi(scores, lengths).tags.shape == tags.shape
        assert crf.marginals(scores, lengths).shape == scores.shape


def test_steps_hold_every_token_once():
    lengths = [3, 0, 5, 1, 5]
    steps = TimeSteps.of(lengths)
    assert steps.sizes == [4, 3, 3, 2, 2]
    assert sorted(steps.where) == list(range(14))
    assert steps.order.tolist() == [2, 4, 0, 3]
    assert steps.where.tolist() == [3, 9, 0, 8, 4, 10, 1, 5, 11, 2, 6, 12, 7, 13]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.viterbi(torch.zeros(4, 3)), "need lengths, one for each row"),
        (lambda c: c.viterbi(torch.zeros(4, 3), [2, 1]), "lengths add up to 3, emissions has 4"),
        (lambda c: c.viterbi(torch.zeros(2, 4, 3), [2, 5]), "lengths has 2 rows of up to 5"),
        (lambda c: c.viterbi(torch.zeros(2, 4, 3), [2, -1]), "holds what is no length"),
        (lambda c: c.viterbi(torch.zeros(4), [4]), r"emissions has shape \(4,\)"),
        (lambda c: c.viterbi(torch.zeros(2, 4, 2)), "emissions has 2 tags .* the CRF 3"),
        (
            lambda c: c(torch.zeros(1, 2, 3), torch.tensor([[0, -100]])),
            "tags holds -100, which is not between 0 and 2",
        ),
        (
            lambda c: c(torch.zeros(1, 3, 3), torch.tensor([[0, 0, 2]])),
            "tag 2 of token 2, .* is illegal beside its neighbours",
        ),
        (lambda c: c(torch.zeros(1, 2, 3), torch.zeros(2, dtype=torch.int64)), "tags has shape"),
        (lambda _: CRF(0), "num_tags=0 is not positive"),
        (lambda _: CRF(4, BIO2), "constraints are for 5 tags, num_tags=4"),
    ],
)
def test_refuses(call, message):
    crf = CRF(3, TagScheme.from_labels(["O", "B-x", "I-x"]).transitions())
    with pytest.raises(ValueError, match=message):
        call(crf)
