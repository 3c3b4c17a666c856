"""Topics of documents: found, named, kept up to date, merged."""

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ._arrays import as_tensor
from ._cache import EmbeddingCache
from ._coherence import diversity, npmi
from ._document_vectors import TextEncoder, document_vectors, loaded_encoder
from ._terms import StopWords, stopped_words, weighted_terms, words_of
from ._token_model import warn_cut
from ._tokenizing import Long, checked_texts
from ._topic import DocumentTopics, Topic, TopicMerge, TopicPeriod
from ._topic_file import read_topics, write_topics
from ._topic_merging import merge_topics
from ._topic_parts import Group, TopicMethod, TopicParts, best_examples, taken, unit_rows


class TopicModel:
    """Topics of documents: what they are about, in words, and which document is about what.

    Documents are grouped by their vectors (k-means, or density with HDBSCAN) or by their words
    (NMF); each topic is named by the words that are frequent in its documents and rare elsewhere
    (c-TF-IDF). The same documents and seed give the same topics, bit for bit on one machine. With
    k-means every document has a topic: there is no class of outliers.

    A fitted model is small: sums of vectors, counts of words, and three documents for each topic.
    The documents themselves are not kept.

    Args:
        encoder: Anything with ``encode(texts)``, such as :class:`torsh_text.Encoder`, or what
            :meth:`Encoder.from_pretrained` takes. None if vectors are always passed, or for NMF.
        k: Number of topics; ``"auto"`` as in :func:`torsh_text.cluster`. NMF needs a number,
            HDBSCAN finds its own. There are fewer, with a warning, where documents are too few or
            too alike.
        method: ``"kmeans"``, ``"spherical"`` (centers of length one), ``"hdbscan"`` (by density
            in the five widest directions of the vectors, since density means little in hundreds)
            or ``"nmf"`` (on counts of words, weighted by rarity). The last two need scikit-learn.
        seed: Seed of all that is random.
        words: Words that describe a topic, at most.
        stop_words: As for :func:`torsh_text.topic_terms`.
        tokenize: Splits a text into words.
        device: Where a path or hub id is loaded; None for CUDA if there is one, else the CPU.

    Example:
        >>> texts = ["red apple", "green apple pie", "fast car", "red car race", "a car"]
        >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 1.0], [0.0, 0.9]])
        >>> model = TopicModel(k=2).fit(texts, vectors=x)
        >>> [(topic.size, topic.words[0]) for topic in model.topics]
        [(3, 'car'), (2, 'apple')]
        >>> model.labels.tolist()
        [1, 1, 0, 0, 0]
        >>> model.transform(["apples"], vectors=torch.tensor([[2.0, 0.5]])).labels.tolist()
        [1]

    Reference:
        Grootendorst, "BERTopic: Neural topic modeling with a class-based TF-IDF procedure", 2022,
        arXiv:2203.05794; here vectors keep all their dimensions and are grouped by k-means.
    """

    def __init__(
        self,
        encoder: TextEncoder | str | os.PathLike[str] | None = None,
        *,
        k: int | Literal["auto"] = "auto",
        method: TopicMethod = "kmeans",
        seed: int = 0,
        words: int = 10,
        stop_words: StopWords = "english",
        tokenize: Callable[[str], Iterable[str]] = words_of,
        device: torch.device | str | None = None,
    ) -> None:
        if method not in get_args(TopicMethod):
            valid = ", ".join(map(repr, get_args(TopicMethod)))
            raise ValueError(f"method={method!r} is none of {valid}")
        if k != "auto" and (not isinstance(k, int) or isinstance(k, bool)):
            raise TypeError(f"k={k!r} is of type {type(k).__name__}; expected an integer or 'auto'")
        if k != "auto" and (k < 1 or method == "hdbscan"):
            valid = "'auto' with method='hdbscan'" if method == "hdbscan" else "at least 1"
            raise ValueError(f"k={k}; it has to be {valid}")
        if k == "auto" and method == "nmf":
            raise ValueError("k='auto' does not go with method='nmf'; give a number of topics")
        if words < 1:
            raise ValueError(f"words={words} is not positive")
        self.encoder = loaded_encoder(encoder, device)
        self.k: int | Literal["auto"] = k
        self.method: TopicMethod = method
        self.seed = seed
        self.words = words
        self.tokenize = tokenize
        self.stop_words = stopped_words(stop_words)
        self._parts: TopicParts | None = None
        self._groups: list[Group] = []
        self._merges: list[TopicMerge] = []
        self._topics: list[Topic] | None = None
        self._fitted: Tensor | None = None

    def fit(
        self,
        texts: Iterable[str],
        *,
        vectors: Tensor | np.ndarray | None = None,
        cache: EmbeddingCache | str | os.PathLike[str] | None = None,
        long: Long = "truncate",
    ) -> "TopicModel":
        """Find the topics of documents, the largest first; what was known before is forgotten.

        Documents without words (or of stop words only) count like others with vectors; a topic
        of such documents has no words. Equal documents are always in one topic.

        Args:
            texts: The documents, at least one.
            vectors: Their vectors ``(documents, dim)``, if there are any already; they are scaled
                to length one.
            cache: Where an :class:`Encoder` keeps the vectors, as for :meth:`Encoder.encode`.
            long: What an :class:`Encoder` does with documents beyond its ``max_length``, as for
                :meth:`Encoder.encode`.

        Returns:
            This model.

        Raises:
            TypeError: If a document is no string, or ``cache`` or ``long`` is given with another
                encoder.
            ValueError: If there are no documents, vectors do not fit them, or there is nothing to
                encode for the cache.
            ImportError: If scikit-learn is missing for HDBSCAN or NMF.
        """
        items = checked_texts(texts)
        if not items:
            raise ValueError("texts is empty; topics need at least one document")
        x, _ = self._vectors(items, vectors, None, cache, long)
        parts, self._fitted = TopicParts.find(
            self.method,
            items,
            self._words(items),
            x,
            k=self.k,
            seed=self.seed,
        )
        self._hold(parts, [(part,) for part in range(len(parts.sizes))], [])
        if self.k != "auto" and len(parts.sizes) < self.k:
            warnings.warn(
                f"k={self.k} topics asked, {len(parts.sizes)} found: there are too few different"
                " documents",
                stacklevel=2,
            )
        return self

    def transform(
        self,
        texts: str | Iterable[str],
        *,
        vectors: Tensor | np.ndarray | None = None,
        cache: EmbeddingCache | str | os.PathLike[str] | None = None,
        long: Long = "truncate",
    ) -> DocumentTopics:
        """Tell the topics of documents; the model does not change.

        A document's topic is that of the nearest center. With HDBSCAN it has none if it is
        farther from that center than any document of the topic was when the model was fitted;
        with NMF its topic is that of the largest share.

        Args:
            texts: The documents, or one document.
            vectors: Their vectors ``(documents, dim)``, if there are any already.
            cache: As for :meth:`fit`.
            long: As for :meth:`fit`.

        Returns:
            Topics in input order, on the device of the vectors; without the axis of documents
            where one document was given.

        Raises:
            RuntimeError: If the model has not been fitted.
            ValueError: If vectors do not fit the documents or the model.
        """
        parts = self._known()
        single = isinstance(texts, str)
        if single and vectors is not None:
            vectors = as_tensor(vectors, "vectors").reshape(1, -1)
        items = checked_texts([texts] if isinstance(texts, str) else texts)
        x, cut = self._vectors(items, vectors, parts, cache, long)
        found = self._placed(parts, items, x, cut)
        if not single:
            return found
        return DocumentTopics(
            found.labels[0], found.scores[0], found.affinities[0], found.truncated[0]
        )

    def update(
        self,
        texts: Iterable[str],
        *,
        vectors: Tensor | np.ndarray | None = None,
        cache: EmbeddingCache | str | os.PathLike[str] | None = None,
        long: Long = "truncate",
        new_below: float | None = None,
        new_size: int = 5,
    ) -> DocumentTopics:
        """Learn from further documents; numbers of topics stay what they are.

        Each document counts in the topic that :meth:`transform` gives it. Centers become the means
        of all documents ever counted (with NMF the factors stay), and sizes, words and typical
        documents are brought up to date; :attr:`labels` goes on to speak of the documents of
        :meth:`fit` alone, so keep what this returns.

        A new topic is opened only if ``new_below`` is given: among the documents whose cosine to
        every center is below it, the one with the most others at least that similar to it makes a
        topic with these, if together they are ``new_size`` or more; then the next. New topics get
        the next numbers. The other documents are counted where they are nearest.

        Args:
            texts: New documents.
            vectors: Their vectors, if there are any already.
            cache: As for :meth:`fit`.
            long: As for :meth:`fit`.
            new_below: Cosine below which a document may belong to a new topic, such as 0.3.
            new_size: Fewest documents of a new topic.

        Returns:
            Topics of these documents, as they were when they came.

        Raises:
            RuntimeError: If the model has not been fitted.
            ValueError: If ``new_below`` is given with NMF, or does not fit.
        """
        parts = self._known()
        if new_below is not None and self.method not in ("kmeans", "spherical"):
            raise ValueError(f"new_below={new_below} does not go with method={self.method!r}")
        if new_below is not None and not 0 < new_below < 1:
            raise ValueError(f"new_below={new_below} is not between 0 and 1")
        if new_size < 1:
            raise ValueError(f"new_size={new_size} is not positive")
        items = checked_texts(texts)
        counts = self._words(items)
        x, cut = self._vectors(items, vectors, parts, cache, long)
        labels, affinities = parts.place(counts, x, self._groups)
        if new_below is not None:
            old = len(parts.sizes)
            labels, affinities = parts.open(x, labels, affinities, below=new_below, size=new_size)
            self._groups += [(part,) for part in range(old, len(parts.sizes))]
        parts.add(items, counts, x, labels, taken(affinities, labels))
        self._topics = None
        return self._described(labels, affinities, cut)

    def reduce(self, k: int) -> "TopicModel":
        """Merge the two most similar topics until ``k`` are left, then number them by size.

        The two are those whose merger adds least to the squared distances of documents from their
        centers (Ward's criterion). A document still goes to the center that was nearest before,
        now under its topic's new number. :attr:`merges` tells what happened, :attr:`Topic.parts`
        what each topic holds.

        Args:
            k: Topics that shall be left, 1 to as many as there are.

        Returns:
            This model.
        """
        parts = self._known()
        if not 1 <= k <= len(self._groups):
            raise ValueError(f"k={k} is not between 1 and the {len(self._groups)} topics")
        groups, merges = merge_topics(self._groups, parts.totals(), parts.sizes, k)
        self._hold(parts, groups, self._merges + merges)
        return self

    @property
    def topics(self) -> list[Topic]:
        """All topics; each is at the place of its number."""
        parts = self._known()
        if self._topics is None:
            counts = {
                group: sum((parts.counts[part] for part in group), Counter[str]())
                for group in self._groups
            }
            self._topics = []
            for group, terms in weighted_terms(counts, self.words).items():
                examples = [example for part in group for example in parts.examples[part]]
                topic = Topic(
                    id=len(self._topics),
                    size=sum(parts.sizes[part] for part in group),
                    words=tuple(word for word, _ in terms),
                    scores=tuple(score for _, score in terms),
                    documents=tuple(text for _, text in best_examples(examples)),
                    parts=group,
                )
                self._topics.append(topic)
        return list(self._topics)

    @property
    def labels(self) -> Tensor:
        """Topic of each document of the last :meth:`fit`, int64 ``(documents,)``; -1 for none.

        :meth:`reduce` renumbers them, :meth:`update` leaves them. :meth:`save` does not keep them:
        ask a loaded model's :meth:`transform`. On the device of the vectors.

        Raises:
            RuntimeError: If the model has not been fitted, or was loaded.
        """
        self._known()
        if self._fitted is None:
            raise RuntimeError(
                "a loaded TopicModel does not know the documents that it was fitted with; ask"
                " transform(texts).labels"
            )
        return self._numbers().to(self._fitted.device)[self._fitted]

    @property
    def merges(self) -> list[TopicMerge]:
        """What :meth:`reduce` merged, in order."""
        return list(self._merges)

    def coherence(
        self, texts: Iterable[str], measure: Literal["npmi", "diversity"] = "npmi"
    ) -> float:
        """Judge the topics' words by the documents that hold them.

        Args:
            texts: Documents to judge by: those of :meth:`fit`, or better others.
            measure: ``"npmi"``: mean over topics of the mean normalized pointwise mutual
                information of their pairs of words within documents, -1 to 1 (Lau et al., 2014);
                ``"diversity"``: share of different words among all topics' words, 0 to 1 (Dieng
                et al., 2020; looks at no document).

        Returns:
            The measure; nan if no topic has two words (or, for diversity, one).
        """
        words = [topic.words for topic in self.topics]
        if measure == "diversity":
            return diversity(words)
        if measure != "npmi":
            raise ValueError(f"measure={measure!r} is neither 'npmi' nor 'diversity'")
        items = checked_texts(texts)
        if not items:
            raise ValueError("texts is empty; npmi needs documents")
        each = [score for score in npmi(words, map(self.tokenize, items)) if not math.isnan(score)]
        return math.fsum(each) / len(each) if each else math.nan

    def over_time(
        self,
        texts: Iterable[str],
        times: Sequence[Hashable],
        *,
        vectors: Tensor | np.ndarray | None = None,
        cache: EmbeddingCache | str | os.PathLike[str] | None = None,
        long: Long = "truncate",
        words: int = 5,
    ) -> list[TopicPeriod]:
        """Tell how much and in which words each topic was present at each time.

        Words are weighed by c-TF-IDF with each topic at each time as one group.

        Args:
            texts: The documents.
            times: Time of each: anything that can be sorted, such as years or ``"2026-11"``.
                Documents of one time are those whose times are equal, so round them first.
            vectors: Their vectors, if there are any already.
            cache: As for :meth:`fit`.
            long: As for :meth:`fit`.
            words: Words of each topic at each time, at most.

        Returns:
            One entry for each topic at each time at which it has documents: by time, then topic.
        """
        items = checked_texts(texts)
        if len(times) != len(items):
            raise ValueError(f"{len(items)} texts came with {len(times)} times")
        parts = self._known()
        x, cut = self._vectors(items, vectors, parts, cache, long)
        labels = self._placed(parts, items, x, cut).labels.tolist()
        sizes: Counter[tuple[Hashable, int]] = Counter()
        counts: dict[tuple[Hashable, int], Counter[str]] = {}
        for count, time, label in zip(self._words(items), times, labels, strict=True):
            if label >= 0:
                sizes[time, label] += 1
                counts.setdefault((time, label), Counter()).update(count)
        terms = weighted_terms(counts, words)
        totals = Counter(times)
        return [
            TopicPeriod(
                key[1],
                key[0],
                sizes[key],
                sizes[key] / totals[key[0]],
                tuple(word for word, _ in terms[key]),
            )
            for key in sorted(sizes)
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted model, without its encoder, to one safetensors file.

        The three typical documents of each topic and the counts of its words are in it.
        """
        tensors, note = self._known().state()
        note |= {
            "k": self.k,
            "method": self.method,
            "seed": self.seed,
            "words": self.words,
            "stop_words": sorted(self.stop_words),
            "own_tokenize": self.tokenize is not words_of,
            "encoder": getattr(self.encoder, "fingerprint", None),
            "groups": self._groups,
            "merges": [(m.first, m.second, m.similarity) for m in self._merges],
        }
        write_topics(Path(path), tensors, note)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        encoder: TextEncoder | str | os.PathLike[str] | None = None,
        *,
        tokenize: Callable[[str], Iterable[str]] | None = None,
        device: torch.device | str | None = None,
    ) -> "TopicModel":
        """Read a model that :meth:`save` wrote; nothing is unpickled.

        Args:
            path: The file.
            encoder: The encoder it was fitted with, as for :class:`TopicModel`; a warning tells if
                it is another one.
            tokenize: The function it was made with, if it was one of your own.
            device: As for :class:`TopicModel`.

        Raises:
            ValueError: If the file is damaged or no topic model, or ``tokenize`` does not fit it.
        """
        tensors, note = read_topics(Path(path))
        if note["own_tokenize"] and tokenize is None:
            raise ValueError(f"{str(path)!r} was made with a tokenize of its own; pass it")
        if not note["own_tokenize"] and tokenize not in (None, words_of):
            raise ValueError(f"{str(path)!r} was made with the built-in tokenize; leave it out")
        encoder = loaded_encoder(encoder, device)
        expected, found = note["encoder"], getattr(encoder, "fingerprint", None)
        if expected and found and expected != found:
            warnings.warn(
                "encoder is not the one that the topics were found with (or has another dtype or"
                " settings); its vectors may not fit them",
                stacklevel=2,
            )
        model = cls(
            encoder,
            k=note["k"],
            method=note["method"],
            seed=note["seed"],
            words=note["words"],
            stop_words=note["stop_words"],
            tokenize=tokenize or words_of,
        )
        merges = [
            TopicMerge(tuple(first), tuple(second), similarity)
            for first, second, similarity in note["merges"]
        ]
        parts = TopicParts.from_state(model.method, tensors, note)
        model._hold(parts, [tuple(group) for group in note["groups"]], merges)
        return model

    def _hold(self, parts: TopicParts, groups: list[Group], merges: list[TopicMerge]) -> None:
        self._parts, self._groups, self._merges, self._topics = parts, groups, merges, None

    def _known(self) -> TopicParts:
        if self._parts is None:
            raise RuntimeError("this TopicModel has no topics yet; call fit first")
        return self._parts

    def _words(self, texts: list[str]) -> list[Counter[str]]:
        return [
            Counter(word for word in self.tokenize(text) if word not in self.stop_words)
            for text in texts
        ]

    def _vectors(
        self,
        texts: list[str],
        vectors: Tensor | np.ndarray | None,
        parts: TopicParts | None,
        cache: EmbeddingCache | str | os.PathLike[str] | None,
        long: Long,
    ) -> tuple[Tensor, list[bool]]:
        """Check vectors, or make them; rows of length one, or of no entries for NMF."""
        if self.method == "nmf":
            if vectors is not None:
                raise ValueError("vectors were given, but method='nmf' looks at words alone")
            if cache is not None:
                raise ValueError("cache was given, but method='nmf' looks at words alone")
            if long != "truncate":
                raise ValueError("long was given, but method='nmf' looks at words alone")
            return torch.empty(len(texts), 0), [False] * len(texts)
        x, cut, why = document_vectors(
            texts,
            vectors,
            encoder=self.encoder,
            cache=cache,
            dim=parts.dim if parts else None,
            long=long,
        )
        if why is not None:
            warn_cut(*why)
        return unit_rows(x), cut

    def _placed(
        self, parts: TopicParts, texts: list[str], x: Tensor, cut: list[bool]
    ) -> DocumentTopics:
        counts = self._words(texts) if self.method == "nmf" else []
        return self._described(*parts.place(counts, x, self._groups), cut)

    def _described(self, labels: Tensor, affinities: Tensor, cut: list[bool]) -> DocumentTopics:
        """Turn parts into the topics that hold them."""
        merged = affinities.new_empty(len(labels), len(self._groups))
        for number, group in enumerate(self._groups):
            own = affinities[:, list(group)]
            merged[:, number] = own.sum(1) if self.method == "nmf" else own.amax(1)
        numbers = self._numbers().to(labels.device)[labels]
        truncated = torch.tensor(cut, dtype=torch.bool, device=numbers.device)
        return DocumentTopics(numbers, taken(merged, numbers), merged, truncated)

    def _numbers(self) -> Tensor:
        """Topic of each part, and -1 behind the last, which is what label -1 reads."""
        topic = torch.full((len(self._known().sizes) + 1,), -1)
        for number, group in enumerate(self._groups):
            topic[list(group)] = number
        return topic
