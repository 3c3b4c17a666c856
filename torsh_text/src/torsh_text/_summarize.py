"""Summaries: sentences chosen from the text, or written by a model."""

import math
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ._cache import EmbeddingCache
from ._encoder import Encoder
from ._extract import check_diversity, facility_location, lexrank, mmr
from ._generate import Generator
from ._runtime import check_device
from ._sentences import Sentence, split_sentences
from ._similarity import similarity
from ._splitting import split_to_fit
from ._tokenizing import checked_texts

ExtractMethod = Literal["lexrank", "mmr", "facility"]
_METHODS = ("lexrank", "mmr", "facility")
_LONG = ("map-reduce", "truncate", "error")
_INSTRUCTION = "Summarize the following text in a few short sentences:\n\n"
_LONG_SENTENCE = 400  # characters, about seventy words
_WRAPPED = 0.75  # of the longest line: hard-wrapped lines are at least so long
_ROUNDS = 12  # each at least halves the text


@dataclass(frozen=True)
class KeySentence:
    """A sentence of the text: ``text == source[start:end]``; ``score`` says why it was chosen."""

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Summary:
    """A summary of one text.

    Attributes:
        text: The summary.
        sentences: Where it is made of the text's own sentences, these in the text's order.
        pieces: Parts in which a model read the text; 1 if it was read whole.
        truncated: Whether the end of the text was not read.
        finished: Whether the model ended the summary by itself, and those of all pieces that it
            was made from; False if ``max_new_tokens`` cut one off.
    """

    text: str
    sentences: tuple[KeySentence, ...] = ()
    pieces: int = 1
    truncated: bool = False
    finished: bool = True


class Summarizer(nn.Module):
    """Summarizes texts: :meth:`extract` with an encoder, :meth:`generate` with a model that writes.

    Args:
        model: A :class:`Generator`, or what :meth:`Generator.from_pretrained` takes, such as
            ``"facebook/bart-large-cnn"``. Not needed to extract.
        encoder: An :class:`Encoder`, or what :meth:`Encoder.from_pretrained` takes, such as
            ``"sentence-transformers/all-MiniLM-L6-v2"``. Not needed to generate.
        device: Where paths and hub ids are loaded; None for CUDA if there is one, else
            the CPU.

    Raises:
        ValueError: If both are None.
    """

    def __init__(
        self,
        model: Generator | str | os.PathLike[str] | None = None,
        encoder: Encoder | str | os.PathLike[str] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_device(device, model, encoder)
        if model is None and encoder is None:
            raise ValueError(
                "pass an encoder, such as 'sentence-transformers/all-MiniLM-L6-v2', to extract, or"
                " a model, such as 'facebook/bart-large-cnn', to generate"
            )
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
    def extract(
        self,
        texts: str,
        *,
        sentences: int | None = ...,
        ratio: float | None = ...,
        diversity: float | None = ...,
        method: ExtractMethod = ...,
        cache: EmbeddingCache | str | os.PathLike[str] | None = ...,
        progress: bool = ...,
    ) -> Summary: ...

    @overload
    def extract(
        self,
        texts: Iterable[str],
        *,
        sentences: int | None = ...,
        ratio: float | None = ...,
        diversity: float | None = ...,
        method: ExtractMethod = ...,
        cache: EmbeddingCache | str | os.PathLike[str] | None = ...,
        progress: bool = ...,
    ) -> list[Summary]: ...

    def extract(
        self,
        texts: str | Iterable[str],
        *,
        sentences: int | None = None,
        ratio: float | None = None,
        diversity: float | None = None,
        method: ExtractMethod = "lexrank",
        cache: EmbeddingCache | str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> Summary | list[Summary]:
        """Choose the sentences that say most, word for word, in the order of the text.

        Every sentence becomes a vector, so nothing is truncated; memory is quadratic in the
        sentences of one text. What :func:`split_sentences` takes for one sentence of more than
        400 characters is divided at the ends of lines, unless these are of about one length, as
        in hard-wrapped text. A warning tells how many texts still hold one so long, which comes
        out whole if it is chosen.

        Args:
            texts: The texts, or one text.
            sentences: How many; fewer where the text has fewer. None is 3.
            ratio: Instead, which part of a text's sentences, rounded up; above 0, at most 1.
            diversity: Between 0 and 1, how much a sentence loses for being like one already
                chosen; None is 0.3. ``"facility"`` has no such setting.
            method: ``"lexrank"`` prefers sentences that many others resemble, ``"mmr"`` those
                like the text as a whole, ``"facility"`` chooses a set to which every sentence has
                something alike.
            cache: Keeps the vectors of the sentences, as for :meth:`Encoder.encode`.
            progress: Show a progress bar.

        Returns:
            A :class:`Summary` for each text; one for one text. A sentence's ``score`` is its
            LexRank relative to the highest, its cosine to the mean of all sentences, or what it
            added to the coverage of the text (all of it is 1).

        Raises:
            RuntimeError: If there is no encoder.
            ValueError: If an option does not fit.
        """
        if self.encoder is None:
            raise RuntimeError("there is no encoder; make Summarizer(encoder=...) to extract")
        _check_extract(sentences, ratio, diversity, method)
        items = [texts] if isinstance(texts, str) else checked_texts(texts)
        split = [_sentences(text) for text in items]
        undivided = sum(any(len(one.text) > _LONG_SENTENCE for one in found) for found in split)
        if undivided:
            warnings.warn(
                f"{undivided} of {len(items)} texts hold a sentence of more than {_LONG_SENTENCE}"
                " characters, which no mark and no line end divides; if it is several, put each on"
                " a line",
                stacklevel=2,
            )
        vectors = self.encoder.encode(
            [sentence.text for found in split for sentence in found],
            long="mean",
            cache=cache,
            progress=progress,
        )
        summaries = []
        for text, found, x in zip(items, split, vectors.split(list(map(len, split))), strict=True):
            asked = (
                math.ceil(ratio * len(found)) if ratio else 3 if sentences is None else sentences
            )
            k = min(asked, len(found))
            ids, scores = _choose(x, k, 0.3 if diversity is None else diversity, method)
            chosen = [(found[i], scores[i]) for i in ids]
            summaries.append(_joined(text, chosen))
        return summaries[0] if isinstance(texts, str) else summaries

    @overload
    def generate(
        self,
        texts: str,
        *,
        max_new_tokens: int = ...,
        long: Literal["map-reduce", "truncate", "error"] = ...,
        instruction: str | None = ...,
        num_beams: int | None = ...,
        max_tokens: int | Literal["auto"] = ...,
        progress: bool = ...,
    ) -> Summary: ...

    @overload
    def generate(
        self,
        texts: Iterable[str],
        *,
        max_new_tokens: int = ...,
        long: Literal["map-reduce", "truncate", "error"] = ...,
        instruction: str | None = ...,
        num_beams: int | None = ...,
        max_tokens: int | Literal["auto"] = ...,
        progress: bool = ...,
    ) -> list[Summary]: ...

    def generate(
        self,
        texts: str | Iterable[str],
        *,
        max_new_tokens: int = 128,
        long: Literal["map-reduce", "truncate", "error"] = "map-reduce",
        instruction: str | None = None,
        num_beams: int | None = None,
        max_tokens: int | Literal["auto"] = "auto",
        progress: bool = False,
    ) -> Summary | list[Summary]:
        """Let the model write a summary of each text.

        A text beyond the model's context is split between sentences into as few pieces as fit, of
        about equal length; the pieces are summarized, and so are their summaries, joined, until
        one piece is left. All pieces of all texts of a round share batches.

        Args:
            texts: The texts, or one text.
            max_new_tokens: Most tokens of a summary and of a piece's summary.
            long: ``"map-reduce"`` as above, ``"truncate"`` cuts the end and warns, ``"error"``
                raises.
            instruction: What is put before the text. None is, for chat models, a short request in
                English; for others what the model's configuration names for summarization, such
                as T5's ``"summarize: "``, or nothing.
            num_beams: As for :meth:`Generator.generate`.
            max_tokens: As for :meth:`Generator.generate`.
            progress: Show a progress bar for each round.

        Returns:
            A :class:`Summary` for each text; one for one text. An empty text has an empty one.

        Raises:
            RuntimeError: If there is no model.
            ValueError: If an option does not fit, or ``max_new_tokens`` leaves so little room
                that pieces would not get shorter.
        """
        if self.model is None:
            raise RuntimeError("there is no model; make Summarizer(model=...) to generate")
        if long not in _LONG:
            raise ValueError(f"long={long!r} is none of {', '.join(map(repr, _LONG))}")
        items = [texts] if isinstance(texts, str) else checked_texts(texts)
        if instruction is None:
            instruction = _own_instruction(self.model)
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "instruction": instruction,
            "num_beams": num_beams,
            "max_tokens": max_tokens,
            "progress": progress,
        }
        if long == "map-reduce":
            room = self.model.room(max_new_tokens, instruction=instruction)
            summaries = _map_reduce(self.model, items, room, options)
        else:
            written = [text for text in items if text.strip()]
            answers = iter(self.model.generate(written, long=long, **options))
            summaries = [
                _written(next(answers), 1) if text.strip() else Summary("") for text in items
            ]
        return summaries[0] if isinstance(texts, str) else summaries


def _check_extract(
    sentences: int | None, ratio: float | None, diversity: float | None, method: str
) -> None:
    if method not in _METHODS:
        raise ValueError(f"method={method!r} is none of {', '.join(map(repr, _METHODS))}")
    if sentences is not None and ratio is not None:
        raise ValueError(f"sentences={sentences} and ratio={ratio} say the same; pass one of them")
    if sentences is not None and (not isinstance(sentences, int) or isinstance(sentences, bool)):
        raise TypeError(f"sentences={sentences!r} is no integer")
    if sentences is not None and sentences < 1:
        raise ValueError(f"sentences={sentences} is not positive")
    if ratio is not None and not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio} is not in (0, 1]")
    if diversity is not None:
        check_diversity(diversity)
        if method == "facility":
            raise ValueError(
                f"diversity={diversity} has no part in method='facility', which is diverse by"
                " itself; leave it out"
            )


def _sentences(text: str) -> list[Sentence]:
    """The sentences; of those that are too long for one, the lines, unless they are wrapped."""
    found: list[Sentence] = []
    for sentence in split_sentences(text):
        lines = [match.span() for match in re.finditer(r"\S(?:.*\S)?", sentence.text)]
        widths = [end - start for start, end in lines]
        # of wrapped lines only the first and the last may be short
        wrapped = min(widths[1:-1] or widths[:-1], default=0) >= _WRAPPED * max(widths)
        if len(sentence.text) <= _LONG_SENTENCE or wrapped:
            found.append(sentence)
        else:
            at = sentence.start
            found += [Sentence(sentence.text[a:b], at + a, at + b) for a, b in lines]
    return found


def _choose(x: Tensor, k: int, diversity: float, method: str) -> tuple[list[int], list[float]]:
    """Rows chosen, in order of the text, and the score of every row."""
    if not len(x):
        return [], []
    with torch.inference_mode():
        cosines = similarity(x, x)
        if method == "facility":
            ids, gains = facility_location(cosines, k)
            scores = x.new_zeros(len(x)).scatter(0, ids, gains / cosines.clamp_min(0).amax(0).sum())
        else:
            if method == "lexrank":
                ranks = lexrank(cosines)
                scores = ranks / ranks.max()
            else:
                scores = similarity(x, torch.nn.functional.normalize(x, dim=1).mean(0))
            ids, _ = mmr(scores, cosines, k, diversity=diversity)
    return sorted(ids.tolist()), scores.tolist()


def _joined(text: str, chosen: Sequence[tuple[Sentence, float]]) -> Summary:
    """Sentences joined by a space, or by nothing in scripts that put none between them."""
    parts = []
    for sentence, _ in chosen:
        spaced = text[sentence.end : sentence.end + 1].isspace() or sentence.end == len(text)
        parts.append(sentence.text + " " * spaced)
    kept = tuple(KeySentence(s.text, s.start, s.end, score) for s, score in chosen)
    return Summary("".join(parts).strip(), kept)


def _own_instruction(model: Generator) -> str:
    if model.chat:
        return _INSTRUCTION
    tasks = getattr(model.model.config, "task_specific_params", None) or {}
    return tasks.get("summarization", {}).get("prefix") or ""


def _written(answer: Any, pieces: int) -> Summary:
    return Summary(answer.text, pieces=pieces, truncated=answer.truncated, finished=answer.finished)


def _map_reduce(
    model: Generator, texts: list[str], room: int, options: dict[str, Any]
) -> list[Summary]:
    limit = options["max_new_tokens"]
    summaries = [Summary("")] * len(texts)
    pieces_of = [0] * len(texts)
    whole = [True] * len(texts)  # so far
    left = {i: text for i, text in enumerate(texts) if text.strip()}
    for _ in range(_ROUNDS):
        pieces = {i: split_to_fit(text, model, room) for i, text in left.items()}
        if room < 2 * limit and any(len(p) > 1 for p in pieces.values()):
            raise ValueError(
                f"max_new_tokens={limit} is more than half of the {room} tokens that a piece of"
                " text may have, so summaries of pieces would not get shorter; use at most"
                f" {max(room, 0) // 2}, or a model with a longer context"
            )
        answers = iter(model.generate([p for found in pieces.values() for p in found], **options))
        for i, found in pieces.items():
            pieces_of[i] = pieces_of[i] or len(found)
            parts = [next(answers) for _ in found]
            whole[i] &= all(part.finished for part in parts)
            if len(parts) == 1:
                summaries[i] = replace(_written(parts[0], pieces_of[i]), finished=whole[i])
                del left[i]
            else:
                left[i] = "\n".join(part.text for part in parts if part.text)
        for i in [i for i, text in left.items() if not text]:
            summaries[i] = Summary("", pieces=pieces_of[i], finished=whole[i])
            del left[i]
        if not left:
            return summaries
    warnings.warn(
        f"the summaries of {len(left)} texts still did not fit after {_ROUNDS} rounds and were cut",
        stacklevel=3,
    )
    for i, answer in zip(left, model.generate(list(left.values()), **options), strict=True):
        finished = whole[i] and answer.finished
        summaries[i] = replace(_written(answer, pieces_of[i]), finished=finished)
    return summaries
