import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torsh_text._spans import (
    SCHEMES,
    Span,
    TagScheme,
    Transitions,
    constrained_paths,
    legal_paths,
)

LETTERS = {"IO": "I", "BIO": "BI", "IOB1": "BI", "BIOES": "BIES", "BILOU": "BILU"}


def labels_of(scheme, kinds=("x", "y")):
    return ["O"] + [f"{letter}-{kind}" for kind in kinds for letter in LETTERS[scheme]]


def conlleval(tags):
    """Chunks by the published rules of conlleval.pl: where one starts and where one ends."""
    tags = [tag.replace("L-", "E-").replace("U-", "S-") for tag in tags] + ["O"]
    chunks, begin, before, before_kind = [], 0, "O", ""
    for i, tag in enumerate(tags):
        part, _, kind = tag.partition("-")
        ends = (
            (before == "B" and part in ("B", "S", "O"))
            or (before == "I" and part in ("B", "S", "O"))
            or before in ("E", "S")
            or (before != "O" and before_kind != kind)
        )
        starts = (
            part in ("B", "S")
            or (before in ("E", "S", "O") and part in ("E", "I"))
            or (part != "O" and before_kind != kind)
        )
        if ends:
            chunks.append(Span(before_kind, begin, i))
        if starts:
            begin = i
        before, before_kind = part, kind
    return chunks


@pytest.mark.parametrize("scheme", SCHEMES)
def test_spans_are_those_of_conlleval(scheme):
    labels = labels_of(scheme)
    parsed = TagScheme.from_labels(labels, scheme)

    @settings(deadline=None, max_examples=200)
    @given(st.lists(st.sampled_from(labels), max_size=12))
    def check(tags):
        assert parsed.spans(tags) == conlleval(tags)
        assert parsed.spans([labels.index(tag) for tag in tags]) == conlleval(tags)

    check()


def test_known_chunks():
    """Worked out by hand, with the illegal tags that conlleval reads leniently."""
    scheme = TagScheme.from_labels(labels_of("BIOES", ("PER", "LOC")))
    tags = ["I-PER", "I-LOC", "E-LOC", "E-LOC", "S-PER", "I-PER", "B-PER", "B-PER", "O", "E-LOC"]
    assert scheme.spans(tags) == [
        Span("PER", 0, 1),
        Span("LOC", 1, 3),
        Span("LOC", 3, 4),
        Span("PER", 4, 5),
        Span("PER", 5, 6),
        Span("PER", 6, 7),
        Span("PER", 7, 8),
        Span("LOC", 9, 10),
    ]
    assert scheme.spans([]) == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_spans_to_tags_and_back(scheme):
    parsed = TagScheme.from_labels(labels_of(scheme), scheme)
    legal = parsed.transitions()

    @settings(deadline=None, max_examples=200)
    @given(st.lists(st.tuples(st.sampled_from("xyO"), st.integers(1, 3)), max_size=6))
    def check(parts):
        spans, end = [], 0
        for kind, length in parts:
            joined = scheme == "IO" and spans and spans[-1][0::2] == (kind, end)
            if kind != "O" and not joined:  # IO cannot tell neighbours of one label apart
                spans.append(Span(kind, end, end + length))
                end += length
            else:
                end += 1
        tags = parsed.tags(spans, end)
        if joined_neighbours(spans) and scheme == "IO":
            return
        assert parsed.spans(tags) == spans
        assert legal.allow([parsed.labels.index(tag) for tag in tags])

    check()


def joined_neighbours(spans):
    return any(a.end == b.start and a.label == b.label for a, b in itertools.pairwise(spans))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_legal_is_what_spans_can_write(scheme):
    """Every tag sequence of three words is legal if and only if it is how its spans are written."""
    labels = labels_of(scheme)
    parsed = TagScheme.from_labels(labels, scheme)
    legal = parsed.transitions()
    seen = 0
    for path in itertools.product(range(len(labels)), repeat=3):
        tags = [labels[i] for i in path]
        assert legal.allow(path) == (parsed.tags(parsed.spans(tags), 3) == tags), tags
        seen += legal.allow(path)
    assert seen > 0
    assert (seen == len(labels) ** 3) == (scheme == "IO")


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        ("O B-PER I-PER", "BIO"),
        ("B_PER I_PER B_LOC I_LOC O", "BIO"),
        ("O B-LOC B-MISC I-LOC I-MISC I-PER", "IOB1"),  # no B-PER, as in CoNLL-2003
        ("O B-PER", "BIO"),
        ("O I-PER I-LOC", "IO"),
        ("O PER LOC", "IO"),
        ("NOUN VERB", "IO"),
        ("O B-a I-a E-a S-a", "BIOES"),
        ("O S-a", "BIOES"),
        ("O B-a I-a L-a U-a", "BILOU"),
        ("O", "IO"),
    ],
)
def test_schemes_are_detected(labels, name):
    assert TagScheme.from_labels(labels.split()).name == name


def test_labels_with_dashes():
    scheme = TagScheme.from_labels(["O", "B-creative-work", "I-creative-work"])
    assert scheme.types == ("", "creative-work", "creative-work")
    assert TagScheme.from_labels(["O", "E-mail", "PER"], "IO").types == ("", "E-mail", "PER")


@pytest.mark.parametrize(
    ("labels", "scheme", "message"),
    [
        ([], "auto", "must be one or more names"),
        (["O", ""], "auto", "must be one or more names"),
        (["O", "B-x", "B-x"], "auto", "'B-x' twice"),
        (["O", "B-x", "PER"], "auto", "mix names with a prefix and without, such as 'PER'"),
        (["O", "PER-B", "PER-I"], "auto", "carry the scheme behind the name"),
        (["O", "B-x", "E-x"], "BIO", "'E-x' does not fit scheme 'BIO', whose tags are O and B-x"),
        (["O", "S-x", "L-x"], "auto", "'L-x' does not fit scheme 'BIOES'"),
        (["O", "B-x"], "IOB3", "scheme='IOB3' is none of 'auto', 'IO', 'BIO'"),
    ],
)
def test_refuses_labels(labels, scheme, message):
    with pytest.raises(ValueError, match=message):
        TagScheme.from_labels(labels, scheme)


def test_refuses_spans_without_tags():
    scheme = TagScheme.from_labels(["O", "B-x", "I-x"])
    with pytest.raises(ValueError, match="overlaps"):
        scheme.tags([Span("x", 0, 2), Span("x", 1, 3)], 3)
    with pytest.raises(ValueError, match="is not within 3 words"):
        scheme.tags([Span("x", 2, 4)], 3)
    with pytest.raises(ValueError, match="needs a tag B-y, which is no label"):
        scheme.tags([Span("y", 0, 1)], 3)
    with pytest.raises(ValueError, match="labels has no 'O'"):
        TagScheme.from_labels(["B-x", "I-x"]).tags([Span("x", 0, 1)], 3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_legal_paths_are_the_best_legal_ones(scheme):
    """Against trying all paths of up to four words."""
    labels = labels_of(scheme, ("x",))
    legal = TagScheme.from_labels(labels, scheme).transitions()
    lengths = [4, 0, 1, 3, 4, 2, 0]
    scores = torch.randn(sum(lengths), len(labels), dtype=torch.float64)
    tags = legal_paths(scores, lengths, legal)
    searched = constrained_paths(scores, lengths, legal)
    assert torch.equal(tags, searched.tags)
    for score, row, total in zip(
        scores.split(lengths), tags.split(lengths), searched.scores, strict=True
    ):
        every = itertools.product(range(len(labels)), repeat=len(score))
        best = max(
            (p for p in every if legal.allow(p)),
            key=lambda p: sum(score[i, tag] for i, tag in enumerate(p)),
        )
        assert row.tolist() == list(best)
        expected = sum(score[i, tag] for i, tag in enumerate(best))
        assert float(total) == pytest.approx(float(expected))


def test_no_words_and_no_way():
    legal = TagScheme.from_labels(["O", "B-x", "I-x"]).transitions()
    assert legal_paths(torch.empty(0, 3), [0, 0], legal).tolist() == []
    assert legal.allow([])
    nothing = torch.zeros(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="no legal path"):
        legal_paths(torch.zeros(1, 2), [1], Transitions(nothing.repeat(2, 1), nothing, nothing))
