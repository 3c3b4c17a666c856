"""What is said of topics and of documents in them."""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Topic:
    """What is known of one topic.

    Attributes:
        id: Its number: the label of its documents and its place in ``TopicModel.topics``.
        size: Documents seen in it.
        words: Its most telling words, best first; none if its documents have none.
        scores: Their c-TF-IDF weights.
        documents: The most typical documents seen, at most three different ones, best first.
        parts: Numbers of the topics, as they were found, that :meth:`TopicModel.reduce` merged
            into it.
    """

    id: int
    size: int
    words: tuple[str, ...]
    scores: tuple[float, ...]
    documents: tuple[str, ...]
    parts: tuple[int, ...]

    @property
    def name(self) -> str:
        """The first three words, for a legend; the number if there are none."""
        return ", ".join(self.words[:3]) or f"topic {self.id}"


@dataclass(frozen=True)
class TopicMerge:
    """One step of :meth:`TopicModel.reduce`.

    Attributes:
        first: Parts of the larger topic, as :attr:`Topic.parts`.
        second: Parts of the other.
        similarity: Cosine of their centers.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    similarity: float


@dataclass(frozen=True)
class DocumentTopics:
    """Topics of some documents, in their order.

    Attributes:
        labels: Topic of each document, int64 ``(documents,)``; -1 for none (HDBSCAN: too far from
            every topic; NMF: no known word; or there are no topics).
        scores: How well each document fits its topic ``(documents,)``; 0 for none.
        affinities: The same for every topic ``(documents, topics)``: the cosine to its center
            (the nearest, if topics were merged), or NMF's shares, which sum to 1.
        truncated: Whether each document was too long for the encoder and its end was not read,
            bool ``(documents,)``; False where vectors were given.
    """

    labels: Tensor
    scores: Tensor
    affinities: Tensor
    truncated: Tensor


@dataclass(frozen=True)
class TopicPeriod:
    """One topic at one time.

    Attributes:
        topic: The topic's number.
        time: The time, as it was given.
        size: Documents of the topic then.
        share: Their share of all documents then.
        words: Words that mark the topic at this time, best first.
    """

    topic: int
    time: Hashable
    size: int
    share: float
    words: tuple[str, ...]
