"""Sentences with their tags as one batch, for the training of taggers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._labels import number_of
from ._packing import PackedBatch
from ._spans import TagScheme, Transitions
from ._tokenizing import RowTokenizer, TokenRows, Window
from ._words import by_text


@dataclass(frozen=True)
class TaggedBatch:
    """Tokenized sentences with their tags, on which :meth:`Tagger.loss` computes.

    Attributes:
        tokens: The tokens, packed.
        places: Index among the tokens of the one that speaks for each word, in order of the
            sentences and their words, int64 ``(words,)``.
        tags: Index of each word's tag, int64 ``(words,)``.
        lengths: Words of each sentence.
    """

    tokens: PackedBatch
    places: Tensor
    tags: Tensor
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of sentences."""
        return len(self.lengths)

    def _moved(self, move: Callable[[Any], Any]) -> "TaggedBatch":
        return TaggedBatch(move(self.tokens), move(self.places), move(self.tags), self.lengths)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "TaggedBatch":
        """Move to a device."""
        return self._moved(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TaggedBatch":
        """Copy into page-locked host memory (a ``DataLoader`` with ``pin_memory`` calls this)."""
        return self._moved(lambda x: x.pin_memory())


def collate_tagged(
    examples: Iterable[tuple[Sequence[str], Sequence[str | int]]],
    *,
    tokenizer: RowTokenizer,
    scheme: TagScheme,
    legal: Transitions | None,
    first_position: int,
) -> TaggedBatch:
    """Tokenize sentences given as words and their tags, as :meth:`Tagger.collate` says.

    Args:
        examples: ``(words, tags)`` pairs; tags are names or their places in the scheme.
        tokenizer: Cuts sentences that are too long into several rows.
        scheme: The tags and what they mean.
        legal: Which tags may be neighbours, if breaking this is refused.
        first_position: See :class:`PackedBatch`.
    """
    texts, spans, tags = _joined(examples, scheme.labels)
    windows = by_text(tokenizer.windows(texts, stride=0), from_end=tokenizer.from_end)
    flat = [window for parts in windows for window in parts]
    lengths = np.array([len(window.ids) for window in flat], np.int64)
    order = np.argsort(-lengths, kind="stable")
    starts = np.empty_like(lengths)
    starts[order] = np.cumsum(lengths[order]) - lengths[order]
    places: list[int] = []
    kept: list[int] = []
    counts: list[int] = []
    row = 0
    for sentence, parts in enumerate(windows):
        first = _first_tokens(texts[sentence], spans[sentence], parts)
        for word, found in enumerate(first):
            if found is not None:
                places.append(int(starts[row + found[0]]) + found[1])
                kept.append(tags[sentence][word])
            elif scheme.parts[tags[sentence][word]] != "O":
                start, end = spans[sentence][word]
                raise ValueError(
                    f"the word {texts[sentence][start:end]!r} of example {sentence} has a tag"
                    " and no token; remove it"
                )
        counts.append(sum(found is not None for found in first))
        if legal is not None and not legal.allow(kept[len(kept) - counts[-1] :]):
            names = [scheme.labels[i] for i in tags[sentence]]
            raise ValueError(
                f"the tags of example {sentence} break the rules of {scheme.name}, which"
                f" the CRF knows: {' '.join(names)}"
            )
        row += len(parts)
    if not places:
        raise ValueError("examples holds no words")
    ids = np.fromiter((i for window in flat for i in window.ids), np.int32, int(lengths.sum()))
    rows = TokenRows(ids, lengths, np.ones(len(flat), np.int64), [])
    return TaggedBatch(
        rows.batch(order, first_position=first_position),
        torch.tensor(places),
        torch.tensor(kept),
        tuple(counts),
    )


def _joined(
    examples: Iterable[tuple[Sequence[str], Sequence[str | int]]], labels: Sequence[str]
) -> tuple[list[str], list[list[tuple[int, int]]], list[list[int]]]:
    """Join words by spaces; return texts, the characters of each word, and tag indices."""
    numbers = {label: number for number, label in enumerate(labels)}
    texts: list[str] = []
    spans: list[list[tuple[int, int]]] = []
    tags: list[list[int]] = []
    for index, example in enumerate(examples):
        if not isinstance(example, (tuple, list)) or len(example) != 2:
            raise TypeError(
                f"example {index} is {example!r:.80}; pass (words, tags), two lists of equal length"
            )
        words, names = example
        if isinstance(words, str) or isinstance(names, str):
            whole = words if isinstance(words, str) else names
            raise TypeError(
                f"example {index} has {whole!r}, a single string, for its words or tags; pass lists"
                " of strings, such as text.split()"
            )
        if len(words) != len(names):
            raise ValueError(
                f"example {index} has {len(words)} words and {len(names)} tags; pass one tag for"
                " each word"
            )
        start = 0
        places: list[tuple[int, int]] = []
        for word in words:
            if not isinstance(word, str):
                raise TypeError(f"example {index} has the word {word!r}, which is no string")
            places.append((start, start + len(word)))
            start += len(word) + 1
        texts.append(" ".join(words))
        spans.append(places)
        tags.append([_tag(name, numbers, index) for name in names])
    return texts, spans, tags


def _tag(tag: object, numbers: Mapping[str, int], example: int) -> int:
    """Number of a tag, which is given by its name or its number."""
    if isinstance(tag, str):
        return number_of(tag, numbers, f"example {example} has")
    if not isinstance(tag, int | np.integer) or isinstance(tag, bool):
        raise TypeError(f"example {example} has the tag {tag!r}; pass names or their numbers")
    if not 0 <= tag < len(numbers):
        raise ValueError(
            f"example {example} has the tag {tag}; the {len(numbers)} tags have the numbers 0 to"
            f" {len(numbers) - 1}"
        )
    return int(tag)


def _first_tokens(
    text: str, spans: Sequence[tuple[int, int]], windows: Sequence[Window]
) -> list[tuple[int, int] | None]:
    """For each word the window and place of the first token that starts in it.

    Args:
        text: The text.
        spans: First character of each word and the one behind its last.
        windows: The text's windows, without overlap.
    """
    found: list[tuple[int, int] | None] = [None] * len(spans)
    word = 0
    for index, window in enumerate(windows):
        for place, (start, end) in enumerate(window.offsets):
            piece = text[start:end]
            if window.words[place] < 0 or not piece.strip():
                continue
            start += len(piece) - len(piece.lstrip())
            while word < len(spans) and spans[word][1] <= start:
                word += 1
            if word < len(spans) and found[word] is None:
                found[word] = (index, place)
    return found
