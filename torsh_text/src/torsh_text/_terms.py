"""Words that tell clusters of texts apart."""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from torch import Tensor

from ._tokenizing import checked_texts

# Function words of English, plus the pieces that apostrophes leave behind.
_ENGLISH = """
    a about above after again against all also am an and any are aren't as at be because been
    before being below between both but by can can't cannot could couldn't did didn't do does
    doesn't doing don't down during each either else ever every few for from further had hadn't
    has hasn't have haven't having he he's her here hers herself him himself his how however i i'm
    i've if in into is isn't it it's its itself just let's many may me might more most much must
    my myself neither no nor not now of off on once one only onto or other others our ours
    ourselves out over own per same shall she she's should shouldn't since so some such than that
    that's the their theirs them themselves then there there's these they they're this those
    though through to too toward two under until up upon us very via was wasn't we we're were
    weren't what when where whether which while who whom whose why will with within without won't
    would wouldn't yet you you're your yours yourself yourselves
"""
_SCRIPTS_WITHOUT_SPACES = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(
    rf"[{_SCRIPTS_WITHOUT_SPACES}]+|[^\W_{_SCRIPTS_WITHOUT_SPACES}]+(?:['\u2019\-][^\W_]+)*"
)
_IDEOGRAPH = re.compile(rf"[{_SCRIPTS_WITHOUT_SPACES}]")

StopWords = Literal["english"] | Collection[str] | None
_Key = TypeVar("_Key", bound=Hashable)


def words_of(text: str) -> list[str]:
    """Split a text of any language into lower-case words.

    A word is a run of letters and digits, with apostrophes and hyphens inside. Chinese characters
    and Japanese kana, which are written without spaces, give each pair of neighbours.

    Example:
        >>> words_of("Don't re-use GPU_2! 機械学習")
        ["don't", 're-use', 'gpu', '2', '機械', '械学', '学習']
    """
    found: list[str] = []
    for word in _WORD.findall(text.lower()):
        if _IDEOGRAPH.match(word):
            pairs = [word[i : i + 2] for i in range(len(word) - 1)]
            found += pairs or [word]
        else:
            found.append(word.replace("\u2019", "'"))
    return found


@dataclass(frozen=True)
class TopicTerms:
    """The words that mark one cluster.

    Attributes:
        label: The cluster's number.
        size: Texts in it.
        words: Its words, most telling first; fewer than asked if it has no more.
        scores: Their c-TF-IDF weights.
    """

    label: int
    size: int
    words: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def name(self) -> str:
        """The first three words, for a legend; the number if there are none."""
        return ", ".join(self.words[:3]) or f"cluster {self.label}"


def stopped_words(stop_words: StopWords) -> frozenset[str]:
    """Return the words that never name a cluster."""
    if stop_words == "english":
        return frozenset(_ENGLISH.split())
    if isinstance(stop_words, str):
        raise ValueError(
            f"stop_words={stop_words!r}; pass 'english', a collection of words or None"
        )
    return frozenset(stop_words or ())


def weighted_terms(
    counts: Mapping[_Key, Counter[str]], k: int
) -> dict[_Key, list[tuple[str, float]]]:
    """Return the ``k`` words of highest c-TF-IDF of each group, best first, with their weights.

    Args:
        counts: How often each word occurs in each group.
        k: Words for each group.

    Example:
        >>> counts = {0: Counter(red=1, apple=3), 1: Counter(red=1, car=1)}
        >>> [[word for word, _ in terms] for terms in weighted_terms(counts, k=1).values()]
        [['apple'], ['car']]
    """
    everywhere: Counter[str] = Counter()
    for count in counts.values():
        everywhere.update(count)
    mean_words = everywhere.total() / max(len(counts), 1)
    rarity = {word: math.log1p(mean_words / n) for word, n in everywhere.items()}
    found: dict[_Key, list[tuple[str, float]]] = {}
    for key, count in counts.items():
        total = max(count.total(), 1)
        weights = [(word, n / total * rarity[word]) for word, n in count.items()]
        found[key] = sorted(weights, key=lambda term: (-term[1], term[0]))[:k]
    return found


def topic_terms(
    texts: Sequence[str],
    labels: Tensor | np.ndarray | Sequence[int],
    k: int = 5,
    *,
    stop_words: StopWords = "english",
    tokenize: Callable[[str], Iterable[str]] = words_of,
) -> list[TopicTerms]:
    """Name clusters by the words that are frequent in them and rare elsewhere (c-TF-IDF).

    A word's weight in a cluster is its share of the cluster's words times
    ``log(1 + A / f)``, with ``A`` the mean number of words in a cluster and ``f`` how often the
    word occurs at all. Equal weights are ordered by the word.

    Args:
        texts: The texts.
        labels: Cluster of each text; texts with negative labels (noise) are left out.
        k: Words for each cluster.
        stop_words: Words that never name a cluster: ``"english"`` for a built-in list of function
            words, words of your own in lower case, or None for no such words.
        tokenize: Splits a text into words.

    Returns:
        One entry for each cluster, by label.

    Example:
        >>> topics = topic_terms(["red apple", "green apple", "a fast car"], [0, 0, 1], k=1)
        >>> [(topic.words, topic.size) for topic in topics]
        [(('apple',), 2), (('car',), 1)]

    Reference:
        Grootendorst, "BERTopic: Neural topic modeling with a class-based TF-IDF procedure", 2022,
        arXiv:2203.05794. Stop words are removed before counting.
    """
    texts = checked_texts(texts)
    numbers = [int(n) for n in (labels.tolist() if isinstance(labels, Tensor) else labels)]
    if len(numbers) != len(texts):
        raise ValueError(f"{len(texts)} texts came with {len(numbers)} labels")
    if k < 1:
        raise ValueError(f"k={k} is not positive")
    stopped = stopped_words(stop_words)
    counts: dict[int, Counter[str]] = {}
    sizes: Counter[int] = Counter()
    for text, label in zip(texts, numbers, strict=True):
        if label >= 0:
            sizes[label] += 1
            words = (word for word in tokenize(text) if word not in stopped)
            counts.setdefault(label, Counter()).update(words)
    topics = []
    for label, terms in sorted(weighted_terms(counts, k).items()):
        words, scores = tuple(word for word, _ in terms), tuple(score for _, score in terms)
        topics.append(TopicTerms(label, sizes[label], words, scores))
    return topics
