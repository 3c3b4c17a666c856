"""How well the words of topics belong together."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations


def npmi(topics: Sequence[Sequence[str]], documents: Iterable[Iterable[str]]) -> list[float]:
    """Return the mean normalized pointwise mutual information of each topic's pairs of words.

    Probabilities are shares of documents that hold a word, or both. A pair that no document holds
    counts -1, a pair that all documents hold counts 1; a topic of fewer than two words has none
    (nan).

    Args:
        topics: Words of each topic.
        documents: Words of each document.

    Example:
        >>> npmi([["a", "b"], ["a", "c"]], [["a", "b"], ["a", "b"], ["c"], ["c"]])
        [1.0, -1.0]

    Reference:
        Lau, Newman and Baldwin, "Machine Reading Tea Leaves", 2014 (there, windows of a corpus
        take the place of documents).
    """
    wanted = {word for words in topics for word in words}
    pairs = {tuple(sorted(pair)) for words in topics for pair in combinations(set(words), 2)}
    single: Counter[str] = Counter()
    both: Counter[tuple[str, ...]] = Counter()
    count = 0
    for document in documents:
        count += 1
        present = sorted(wanted.intersection(document))
        single.update(present)
        both.update(pair for pair in combinations(present, 2) if pair in pairs)

    def score(pair: tuple[str, ...]) -> float:
        together = both[pair]
        if together in (0, count):
            return 1.0 if together else -1.0
        independent = single[pair[0]] * single[pair[1]]
        return math.log(together * count / independent) / -math.log(together / count)

    found: list[float] = []
    for words in topics:
        own = [score(pair) for pair in combinations(sorted(set(words)), 2)]
        found.append(math.fsum(own) / len(own) if own else math.nan)
    return found


def diversity(topics: Sequence[Sequence[str]]) -> float:
    """Return the share of different words among all words of all topics; nan without words.

    Example:
        >>> diversity([["a", "b"], ["a", "c"]])
        0.75

    Reference:
        Dieng, Ruiz and Blei, "Topic Modeling in Embedding Spaces", 2020.
    """
    words = [word for topic in topics for word in topic]
    return len(set(words)) / len(words) if words else math.nan
