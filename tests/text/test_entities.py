import pytest

from tests.text.architectures import random_texts
from tests.text.taggers import make_tagger


@pytest.fixture
def tiny():
    return make_tagger()


def test_every_entity_is_its_own_text(tiny):
    text = "  w5 w6\tw7  \n\n w8   w499 w77 unknown w12 "
    for aggregation in ("first", "max", "mean", "token"):
        found = tiny.predict(text, stride=4, aggregation=aggregation)
        assert found
        for entity in found:
            assert text[entity.start : entity.end] == entity.text == entity.text.strip() != ""
            assert 0 < entity.score <= 1


def test_tags_follow_the_rules(tiny):
    """Where the best tag of each word breaks them, the best legal sequence is taken."""
    texts = random_texts([30] * 8)
    illegal = 0
    for text, found in zip(texts, tiny.predict(texts, stride=8), strict=True):
        batch = tiny.collate([(text.split(), ["O"] * 30)])
        tags = tiny(batch.tokens)[batch.places].argmax(1).tolist()
        illegal += not tiny.scheme.transitions().allow(tags)
        if tiny.scheme.transitions().allow(tags):
            spans = tiny.scheme.spans(tags)
            words = text.split()
            assert [e.text for e in found] == [" ".join(words[s.start : s.end]) for s in spans]
    assert illegal > 0


def test_crf_decides_and_scores():
    """Entities are those of the CRF's path over the model's scores, with its marginals."""
    tagger = make_tagger(crf=True)
    words = random_texts([25])[0].split()
    batch = tagger.collate([(words, ["O"] * 25)])
    logits = tagger(batch.tokens)[batch.places]
    path = tagger.crf.viterbi(logits, [25]).tags
    chances = tagger.crf.marginals(logits, [25]).gather(1, path.unsqueeze(1)).squeeze(1)
    found = tagger.predict(" ".join(words), stride=8)
    spans = tagger.scheme.spans(path.tolist())
    assert [(e.label, e.text) for e in found] == [
        (s.label, " ".join(words[s.start : s.end])) for s in spans
    ]
    for entity, span in zip(found, spans, strict=True):
        expected = chances[span.start : span.end].mean().item()
        assert entity.score == pytest.approx(expected, abs=1e-4)
