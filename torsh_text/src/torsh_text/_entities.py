"""Entities: from the scores of a text's tokens to named things with their characters."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ._crf import CRF
from ._spans import TagScheme, Transitions, legal_paths
from ._tokenizing import Window
from ._words import Aggregation, aggregate, find_words


@dataclass(frozen=True)
class Entity:
    """A named thing in a text.

    Attributes:
        text: Its characters: ``document[start:end]``.
        label: What it is.
        start: Index of its first character.
        end: Index behind its last character.
        score: Mean over its words of the probability of the word's tag.
    """

    text: str
    label: str
    start: int
    end: int
    score: float


def find_entities(
    texts: Sequence[str],
    groups: Sequence[Sequence[Window]],
    scores: np.ndarray,
    starts: np.ndarray,
    *,
    scheme: TagScheme,
    legal: Transitions,
    crf: CRF | None,
    stride: int,
    aggregation: Aggregation,
) -> dict[str, list[Entity]]:
    """Decode the words of each text into its entities.

    Args:
        texts: Different texts.
        groups: The windows of each, in reading order.
        scores: Log-probabilities of the tags of all windows' tokens ``(tokens, tags)``.
        starts: Where each window's tokens start in ``scores`` ``(windows,)``.
        scheme: What the tags mean.
        legal: Which tags may be neighbours.
        crf: What decides among legal tags; None for the words' own scores.
        stride: Tokens that neighbouring windows share.
        aggregation: Which tokens speak for a word.
    """
    whole = aggregation != "token"
    words = [
        find_words(text, parts, stride=stride, whole=whole)
        for text, parts in zip(texts, groups, strict=True)
    ]
    tokens: list[int] = []
    row = 0
    for parts, found in zip(groups, words, strict=True):
        tokens += [
            int(starts[row + window]) + place for word in found.tokens for window, place in word
        ]
        row += len(parts)
    counts = np.array([len(word) for found in words for word in found.tokens], np.int64)
    lengths = [len(found.spans) for found in words]
    emissions = torch.from_numpy(aggregate(scores[np.array(tokens, np.int64)], counts, aggregation))
    if crf is None:
        tags, chances = legal_paths(emissions, lengths, legal), emissions.exp()
    else:
        emissions = emissions.to(crf.first.device)
        tags = crf.viterbi(emissions, lengths).tags.cpu()
        chances = crf.marginals(emissions, lengths).cpu()
    chance = chances.gather(1, tags.unsqueeze(1)).squeeze(1).tolist()
    path = tags.tolist()
    found_in: dict[str, list[Entity]] = {}
    word = 0
    for text, found in zip(texts, words, strict=True):
        stop = word + len(found.spans)
        entities = []
        for label, first, last in scheme.spans(path[word:stop]):
            start, end = found.spans[first][0], found.spans[last - 1][1]
            score = sum(chance[word + first : word + last]) / (last - first)
            entities.append(Entity(text[start:end], label, start, end, score))
        found_in[text] = entities
        word = stop
    return found_in
