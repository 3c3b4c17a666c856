"""Tags and spans: what tag names mean, which may follow which, and the spans they mark."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from ._paths import Paths, best_paths

Scheme = Literal["IO", "BIO", "IOB1", "BIOES", "BILOU"]
SCHEMES: tuple[Scheme, ...] = ("IO", "BIO", "IOB1", "BIOES", "BILOU")
_PREFIXES = {"IO": "I", "BIO": "BI", "IOB1": "BI", "BIOES": "BIES", "BILOU": "BILU"}
_PART = {"B": "B", "I": "I", "E": "E", "S": "S", "L": "E", "U": "S"}  # the name in BIOES
_PREFIXED = re.compile(r"([BIESLU])[-_](.+)", re.DOTALL)
_SUFFIXED = re.compile(r"(.+)[-_]([BIESLU])", re.DOTALL)


class Span(NamedTuple):
    """Words that belong together, and what they are: those from ``start`` up to ``end``."""

    label: str
    start: int
    end: int


class Transitions(NamedTuple):
    """Which tags may be neighbours.

    ``between`` says whether tag j may follow tag i, bool ``(tags, tags)``; ``first`` and ``last``
    whether a tag may come first and last, bool ``(tags,)``.
    """

    between: Tensor
    first: Tensor
    last: Tensor

    def allow(self, path: Sequence[int]) -> bool:
        """Say whether a path of tag indices is legal."""
        if not path:
            return True
        tags = torch.tensor(path)
        ends = self.first[tags[0]] & self.last[tags[-1]]
        return bool(ends & self.between[tags[:-1], tags[1:]].all())


@dataclass(frozen=True)
class TagScheme:
    """What a list of tag names means.

    Attributes:
        labels: The tag names, in the order of the model's outputs.
        name: ``"IO"``, ``"BIO"`` (also called IOB2), ``"IOB1"``, ``"BIOES"`` or ``"BILOU"``.
        parts: For each tag ``"O"`` (outside) or the place in its span: ``"B"``, ``"I"``, ``"E"``
            or ``"S"``.
        types: For each tag the label of its span; empty outside.

    Example:
        >>> scheme = TagScheme.from_labels(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"])
        >>> scheme.name
        'BIO'
        >>> scheme.spans(["B-PER", "I-PER", "O", "B-LOC", "B-LOC"])
        [Span(label='PER', start=0, end=2), Span(label='LOC', start=3, end=4),
        Span(label='LOC', start=4, end=5)]
        >>> scheme.transitions().allow([0, 2])  # I-PER does not follow O
        False
    """

    labels: tuple[str, ...]
    name: Scheme
    parts: tuple[str, ...]
    types: tuple[str, ...]

    @classmethod
    def from_labels(
        cls, labels: Iterable[str], scheme: Scheme | Literal["auto"] = "auto"
    ) -> "TagScheme":
        """Read a scheme from tag names such as ``B-PER``, ``I_PER``, ``PER`` and ``O``.

        ``"auto"`` looks at the prefixes. B and I alone are BIO, unless some label has an I and no
        B (as in CoNLL-2003, whose tags are IOB1). Names without prefixes are IO: neighbours of
        one name are one span.

        Args:
            labels: The tag names; ``O`` is outside.
            scheme: ``"auto"`` or a scheme's name.

        Raises:
            TypeError: If labels is a single string or no list.
            ValueError: If labels are missing, double or mixed, or do not fit the scheme.
        """
        if isinstance(labels, (str, bytes)) or not isinstance(labels, Iterable):
            raise TypeError(
                f"labels={labels!r} is no list; pass names of tags, such as ['O', 'B-x', 'I-x']"
            )
        names = tuple(labels)
        if not names or any(not isinstance(name, str) or not name for name in names):
            raise ValueError(f"labels={list(names)} must be one or more names of tags")
        if len(set(names)) < len(names):
            double = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"labels has {double!r} twice")
        inside = [name for name in names if name != "O"]
        if scheme == "auto":
            scheme = _detect(inside)
        elif scheme not in SCHEMES:
            raise ValueError(f"scheme={scheme!r} is none of 'auto', {str(list(SCHEMES))[1:-1]}")
        read = {name: _PREFIXED.fullmatch(name) for name in inside}
        allowed = _PREFIXES[scheme]
        found: dict[str, tuple[str, str]] = {"O": ("O", "")}
        for name, match in read.items():
            if match and match[1] in allowed:
                found[name] = (_PART[match[1]], match[2])
            elif scheme == "IO":
                found[name] = ("I", name)
            else:
                raise ValueError(
                    f"label {name!r} does not fit scheme {scheme!r}, whose tags are O and"
                    f" {', '.join(f'{prefix}-x' for prefix in allowed)}"
                )
        parts, types = zip(*(found[name] for name in names), strict=True)
        return cls(names, cast("Scheme", scheme), parts, types)

    def transitions(self) -> Transitions:
        """Say which tags may follow which, begin and end, by the rules of the scheme."""
        count = len(self.labels)
        between = torch.tensor(
            [[self._may_follow(i, j) for j in range(count)] for i in range(count)]
        )
        first = torch.tensor([self._may_begin(j) for j in range(count)])
        last = torch.tensor([not self._goes_on(i) for i in range(count)])
        return Transitions(between, first, last)

    def spans(self, tags: Iterable[int | str]) -> list[Span]:
        """Turn tags into spans, as conlleval does; illegal tags are read in its lenient way.

        A span begins at B and S, and wherever a word inside follows one outside, one of another
        label, or an E or S. It goes on until the next begins or a word is outside.

        Args:
            tags: Indices or names of the words' tags.

        Reference:
            Tjong Kim Sang and Buchholz (2000), Introduction to the CoNLL-2000 Shared Task, whose
            evaluation program this follows.
        """
        index = {name: i for i, name in enumerate(self.labels)}
        found: list[Span] = []
        start, before, kind = 0, "O", ""
        end = 0
        for end, tag in enumerate(tags, 1):
            number = index[tag] if isinstance(tag, str) else tag
            part, label = self.parts[number], self.types[number]
            begins = part != "O" and (
                part in "BS" or before == "O" or before in "ES" or label != kind
            )
            if before != "O" and (begins or part == "O"):
                found.append(Span(kind, start, end - 1))
            if begins:
                start = end - 1
            before, kind = part, label
        if before != "O":
            found.append(Span(kind, start, end))
        return found

    def tags(self, spans: Iterable[Span], length: int) -> list[str]:
        """Turn spans over ``length`` words into tag names: the way back of :meth:`spans`.

        Raises:
            ValueError: If spans overlap or leave the text, or there is no tag for one.
        """
        names = {
            (part, kind): name
            for part, kind, name in zip(self.parts, self.types, self.labels, strict=True)
        }
        found = [""] * length
        earlier = Span("", 0, 0)
        for span in sorted(spans, key=lambda span: span.start):
            label, start, end = span
            if not earlier.end <= start < end <= length:
                raise ValueError(f"{span} overlaps {earlier} or is not within {length} words")
            touches = earlier.label == label and earlier.end == start
            for word in range(start, end):
                part = self._part(word == start, word == end - 1, touches)
                if (part, label) not in names:
                    raise ValueError(f"{span} needs a tag {part}-{label}, which is no label")
                found[word] = names[part, label]
            earlier = span
        if "" in found and ("O", "") not in names:
            raise ValueError("some words are in no span, and labels has no 'O'")
        return [name or "O" for name in found]

    def _part(self, first: bool, last: bool, touches: bool) -> str:
        if self.name in ("BIOES", "BILOU"):
            return "S" if first and last else "B" if first else "E" if last else "I"
        if self.name == "BIO" or (self.name == "IOB1" and touches):
            return "B" if first else "I"
        return "I"

    def _goes_on(self, i: int) -> bool:
        """Whether the span of tag i cannot end with it."""
        return self.name in ("BIOES", "BILOU") and self.parts[i] in "BI"

    def _may_begin(self, j: int) -> bool:
        if self.name == "IOB1":
            return self.parts[j] != "B"
        return self.name == "IO" or self.parts[j] in "OBS"

    def _may_follow(self, i: int, j: int) -> bool:
        same = self.types[i] == self.types[j] and self.parts[i] != "O"
        if self.name == "IO":
            return True
        if self.name == "IOB1":
            return self.parts[j] != "B" or same
        if self.parts[j] in "IE":
            return same and self.parts[i] in "BI"
        return not self._goes_on(i)


def _detect(inside: Sequence[str]) -> Scheme:
    """Guess the scheme of tag names other than ``O``."""
    matches = [_PREFIXED.fullmatch(name) for name in inside]
    pairs = [(match[1], match[2]) for match in matches if match]
    if not pairs:
        if inside and all(_SUFFIXED.fullmatch(name) for name in inside):
            raise ValueError(
                f"labels such as {inside[0]!r} carry the scheme behind the name; rename them to"
                " B-x, I-x, or pass scheme='IO' to take them as they are"
            )
        return "IO"
    if len(pairs) < len(inside):
        plain = next(n for n, match in zip(inside, matches, strict=True) if not match)
        raise ValueError(
            f"labels mix names with a prefix and without, such as {plain!r}; pass scheme='IO' to"
            " take them as they are"
        )
    prefixes = {prefix for prefix, _ in pairs}
    if prefixes & set("ES"):
        return "BIOES"
    if prefixes & set("LU"):
        return "BILOU"
    if "B" not in prefixes:
        return "IO"
    begun = {kind for prefix, kind in pairs if prefix == "B"}
    return "BIO" if begun == {kind for _, kind in pairs} else "IOB1"


def legal_paths(emissions: Tensor, lengths: Sequence[int], legal: Transitions) -> Tensor:
    """Find the legal tags of highest total score of each sequence.

    Where the best tag of each word alone makes a legal sequence, that is the answer; only the
    other sequences are searched (Viterbi).

    Args:
        emissions: Score of each tag for each word, packed ``(words, tags)``.
        lengths: Words of each sequence.
        legal: What is legal, on the device of ``emissions``.

    Returns:
        Tag indices, int64 ``(words,)``.

    Raises:
        ValueError: If a sequence has no legal path.
    """
    if not len(emissions):
        return torch.empty(0, dtype=torch.int64, device=emissions.device)
    tags = emissions.argmax(1)
    counts = torch.tensor(lengths, device=emissions.device)
    filled = counts[counts > 0]
    ends = filled.cumsum(0)
    fine = torch.ones_like(tags, dtype=torch.bool)
    fine[1:] = legal.between[tags[:-1], tags[1:]]
    fine[ends - filled] = legal.first[tags[ends - filled]]
    fine[ends - 1] &= legal.last[tags[ends - 1]]
    rows = torch.arange(len(lengths), device=counts.device).repeat_interleave(counts)
    wrong = torch.zeros(len(lengths), dtype=torch.bool, device=counts.device)
    wrong[rows[~fine]] = True
    if bool(wrong.any()):
        redo = wrong[rows]
        some = [length for length, bad in zip(lengths, wrong.tolist(), strict=True) if bad]
        found = constrained_paths(emissions[redo], some, legal)
        if not bool(found.scores.isfinite().all()):
            raise ValueError("a sequence has no legal path; check labels and scheme")
        tags[redo] = found.tags
    return tags


def constrained_paths(emissions: Tensor, lengths: Sequence[int], legal: Transitions) -> Paths:
    """Search the legal tags of highest total score of each sequence (Viterbi)."""
    nothing = emissions.new_zeros(())
    between, first, last = (nothing.where(allowed, float("-inf")) for allowed in legal)
    return best_paths(emissions, lengths, between, first, last)
