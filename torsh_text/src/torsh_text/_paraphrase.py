"""Paraphrases: written by a model, kept only if they mean the same in other words."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, overload

import torch
from torch import Tensor, nn

from ._cache import EmbeddingCache
from ._encoder import Encoder
from ._generate import Generation, Generator
from ._runtime import check_device
from ._similarity import similarity
from ._tokenizing import checked_texts

# words; in scripts without spaces, characters
_WORD = re.compile(r"[぀-ヿ㐀-鿿豈-﫿]|[^\W぀-ヿ㐀-鿿豈-﫿]+(?:['\u2019][^\W]+)*")
_INSTRUCTION = "Rewrite the following text in other words. Answer with the rewritten text only.\n\n"
_PREAMBLE = re.compile(
    r"\W*(?:(?:sure|certainly|of course|absolutely|okay|ok|great|yes)\b[,!.:]"
    r"|here(?:'s|\u2019s| is| are)\b[^.\n]{0,80}(?:paraphras|rewrit|version|rephras|text|sentence)"
    r"|(?:a |the |one |possible )*(?:paraphras|rewrit|rephras|reword)\w*"
    r"(?: (?:text|version|sentence))?(?: is)?\s*:"
    r"|(?:i'm|i am) (?:sorry|an ai)|as an ai\b|i (?:cannot|can't)\b)",
    re.IGNORECASE,
)
_QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“", "「": "」", "'": "'"}


@dataclass(frozen=True)
class Paraphrase:
    """A text in other words.

    Attributes:
        text: The paraphrase.
        similarity: Cosine of its vector and the original's.
        overlap: See :func:`word_overlap`.
    """

    text: str
    similarity: float
    overlap: float


def word_overlap(a: str, b: str) -> float:
    """How much of the shorter text stands word for word in the other: 0 to 1.

    Pairs of neighbouring words that both texts have, counted as often as both have them, over the
    pairs of the text that has fewer. So a copy, a copy with something added and a part of the
    original are all 1, while the same words in another order are less. Capitals and punctuation
    do not count; a text of one word is compared by words; Chinese and Japanese by characters.

    Args:
        a: A text.
        b: The other one; the order does not matter.

    Example:
        Three of the four pairs of the shorter text are in the other one:

        >>> word_overlap("The cat sat on the mat.", "the cat sat on mats")
        0.75
    """
    left, right = _words(a), _words(b)
    pairs = min(len(left), len(right)) > 1
    first, second = _runs(left, pairs=pairs), _runs(right, pairs=pairs)
    fewer = min(first.total(), second.total())
    return (first & second).total() / fewer if fewer else float(left == right)


class Paraphraser(nn.Module):
    """Writes texts in other words, and checks that they are other words and mean the same.

    Args:
        model: A :class:`Generator`, or what :meth:`Generator.from_pretrained` takes: a model
            trained to paraphrase, or a chat model.
        encoder: An :class:`Encoder`, or what :meth:`Encoder.from_pretrained` takes, such as
            ``"sentence-transformers/all-MiniLM-L6-v2"``: it judges the meaning.
        device: Where paths and hub ids are loaded; None for CUDA if there is one, else
            the CPU.
    """

    def __init__(
        self,
        model: Generator | str | os.PathLike[str],
        encoder: Encoder | str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_device(device, model, encoder)
        self.model = (
            Generator.from_pretrained(model, device=device)
            if isinstance(model, (str, os.PathLike))
            else model
        )
        self.encoder = (
            Encoder.from_pretrained(encoder, device=device)
            if isinstance(encoder, (str, os.PathLike))
            else encoder
        )
        self.training = any(part.training for part in self.children())

    @overload
    def generate(
        self,
        texts: str,
        *,
        n: int = ...,
        min_similarity: float = ...,
        max_overlap: float = ...,
        seed: int = ...,
        candidates: int | None = ...,
        method: Literal["sample", "beam"] = ...,
        temperature: float = ...,
        top_p: float = ...,
        max_new_tokens: int | None = ...,
        instruction: str | None = ...,
        max_tokens: int | Literal["auto"] = ...,
        cache: EmbeddingCache | str | os.PathLike[str] | None = ...,
        progress: bool = ...,
    ) -> list[Paraphrase]: ...

    @overload
    def generate(
        self,
        texts: Iterable[str],
        *,
        n: int = ...,
        min_similarity: float = ...,
        max_overlap: float = ...,
        seed: int = ...,
        candidates: int | None = ...,
        method: Literal["sample", "beam"] = ...,
        temperature: float = ...,
        top_p: float = ...,
        max_new_tokens: int | None = ...,
        instruction: str | None = ...,
        max_tokens: int | Literal["auto"] = ...,
        cache: EmbeddingCache | str | os.PathLike[str] | None = ...,
        progress: bool = ...,
    ) -> list[list[Paraphrase]]: ...

    def generate(
        self,
        texts: str | Iterable[str],
        *,
        n: int = 5,
        min_similarity: float = 0.8,
        max_overlap: float = 0.7,
        seed: int = 0,
        candidates: int | None = None,
        method: Literal["sample", "beam"] = "sample",
        temperature: float = 1.0,
        top_p: float = 0.95,
        max_new_tokens: int | None = None,
        instruction: str | None = None,
        max_tokens: int | Literal["auto"] = "auto",
        cache: EmbeddingCache | str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> list[Paraphrase] | list[list[Paraphrase]]:
        """Write up to ``n`` paraphrases of each text.

        The model writes ``candidates`` answers; kept are those that are similar enough, overlap
        little enough, and are no copy, not empty, not cut off and no talk about the task
        ("Sure, here is ..."). There may be fewer than ``n``, or none: no candidate is let
        through to fill up.

        Args:
            texts: The texts, or one text; a text beyond the model's context is refused, because a
                paraphrase of its beginning is none.
            n: Most paraphrases of a text.
            min_similarity: Least cosine of the vectors of original and paraphrase. What is the
                same meaning depends on the encoder: 0.8 suits all-MiniLM-L6-v2.
            max_overlap: Most :func:`word_overlap` with the original.
            seed: Seed of the sampling.
            candidates: How many to write for each text; None is ``3 * n``.
            method: ``"sample"``, or ``"beam"`` for the likeliest, which are more alike.
            temperature: Of the sampling.
            top_p: Of the sampling.
            max_new_tokens: Most tokens of a paraphrase; None is for each text twice its own tokens
                and 16, rounded up to a multiple of 64, or what the model has room for if that is
                less.
            instruction: What is put before a text; None is a request in English for chat models,
                nothing for others.
            max_tokens: As for :meth:`Generator.generate`.
            cache: Keeps the vectors, as for :meth:`Encoder.encode`.
            progress: Show a progress bar, for each limit on new tokens one.

        Returns:
            For each text a list of :class:`Paraphrase`, the most similar first; one list for one
            text.

        Raises:
            ValueError: If an option does not fit, or a text is too long.
        """
        count = 3 * n if candidates is None else candidates
        _check_limits(n, count, min_similarity, max_overlap)
        items = [texts] if isinstance(texts, str) else checked_texts(texts)
        if not items:
            return []
        if instruction is None:
            instruction = _INSTRUCTION if self.model.chat else ""
        asked = list(dict.fromkeys(text for text in items if text.strip()))
        limits = self._limits(asked, items, instruction, max_new_tokens)
        written: dict[str, list[Generation]] = {}
        for limit in dict.fromkeys(limits):
            some = [text for text, own in zip(asked, limits, strict=True) if own == limit]
            answers = self.model.candidates(
                some,
                count,
                method=method,
                max_new_tokens=limit,
                instruction=instruction,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                max_tokens=max_tokens,
                long="error",
                progress=progress,
            )
            written.update(zip(some, answers, strict=True))
        usable = [_usable(text, written[text]) for text in asked]
        groups = [[text, *kept] for text, kept in zip(asked, usable, strict=True)]
        vectors = self.encoder.encode(
            [one for group in groups for one in group], long="mean", cache=cache
        )
        found = {
            group[0]: _judged(group, x, min_similarity, max_overlap)[:n]
            for group, x in zip(groups, vectors.split([len(g) for g in groups]), strict=True)
        }
        results = [list(found.get(text, [])) for text in items]
        return results[0] if isinstance(texts, str) else results

    def _limits(
        self, asked: list[str], items: list[str], instruction: str, most: int | None
    ) -> list[int]:
        """Most new tokens for each text, which depend on nothing but the text."""
        if most is not None:
            self.model.room(most, instruction=instruction)  # refuses what no text leaves room for
        limits = []
        rooms = self.model.rooms(asked, instruction=instruction)
        for text, room, tokens in zip(asked, rooms, self.model.count_tokens(asked), strict=True):
            # steps of 64, so that texts of about a length share their batches
            limit = min(-(-(16 + 2 * tokens) // 64) * 64, room) if most is None else most
            if room < max(limit, 1):
                raise ValueError(
                    f"texts[{items.index(text)}] does not fit the model beside its prompt"
                    " and max_new_tokens; use a shorter text or a model with a longer context"
                )
            limits.append(limit)
        return limits


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _runs(words: list[str], *, pairs: bool) -> Counter[tuple[str, ...]]:
    """How often each pair of neighbours, or each word, comes."""
    return Counter(pairwise(words) if pairs else ((word,) for word in words))


def _check_limits(n: int, count: int, min_similarity: float, max_overlap: float) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n={n!r} is no positive integer")
    if count < n:
        raise ValueError(f"candidates={count} is less than n={n}; write at least as many")
    if not -1 <= min_similarity <= 1:
        raise ValueError(f"min_similarity={min_similarity} is not in [-1, 1]")
    if not 0 <= max_overlap <= 1:
        raise ValueError(f"max_overlap={max_overlap} is not in [0, 1]")


def _usable(text: str, answers: list[Generation]) -> list[str]:
    """Different answers that are finished, no copies and not about the task."""
    seen = {tuple(_words(text))}
    kept = []
    for answer in answers:
        candidate = _unquoted(answer.text, text)
        words = tuple(_words(candidate))
        talk = _PREAMBLE.match(candidate) and not _PREAMBLE.match(text)
        lines = "\n" in candidate and "\n" not in text.strip()
        if answer.finished and words and words not in seen and not talk and not lines:
            seen.add(words)
            kept.append(candidate)
    return kept


def _unquoted(candidate: str, text: str) -> str:
    """Without the quotation marks in which models like to wrap an answer."""
    candidate = candidate.strip()
    opening = candidate[:1]
    wrapped = len(candidate) > 1 and candidate[-1] == _QUOTES.get(opening)
    if wrapped and not text.lstrip().startswith(opening):
        return candidate[1:-1].strip()
    return candidate


def _judged(
    group: list[str], vectors: Tensor, min_similarity: float, max_overlap: float
) -> list[Paraphrase]:
    """The candidates of a text that pass both limits, the most similar first."""
    cosines = similarity(vectors[0], vectors).tolist()
    kept = [
        Paraphrase(text, cosine, overlap)
        for text, cosine in zip(group[1:], cosines[1:], strict=True)
        if cosine >= min_similarity and (overlap := word_overlap(group[0], text)) <= max_overlap
    ]
    return sorted(kept, key=lambda one: (-one.similarity, one.overlap, one.text))
