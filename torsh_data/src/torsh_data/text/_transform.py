"""What all augmentations of texts share: how they are called, and what they may change."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import Any, TypeAlias, cast

import numpy as np
import torch

from torsh_data._rng import Keys, sample_keys
from torsh_data.text._abbreviations import is_abbreviation, is_initial, is_title
from torsh_data.text._draws import Draw, content_keys, draws
from torsh_data.text._lexicon import Lexicon, Source, open_lexicon
from torsh_data.text._stop_words import ENGLISH
from torsh_data.text._words import (
    CLITICS,
    Span,
    has_full_stop,
    has_signs,
    join_spans,
    protected_spans,
    split_around,
    split_pieces,
)

Keep: TypeAlias = "str | re.Pattern[str] | Iterable[str] | None"
Spans: TypeAlias = Sequence[Span]

_KNOWN_WORDS = 1 << 17
_SHOUTED = 5  # capitals: a longer word is emphasised, a shorter one an acronym
_FIXED = re.compile(r"[\d_]").search
_SENTENCE_END = re.compile(r"[.!?\u3002\u061f\u0964\u2026]").search


class Words(dict[str, "tuple[str, ...] | None"]):
    """What may stand for each word: synonyms in its case; () if none; None if it must stay.

    A dictionary that fills itself, so that a word which was seen costs one look-up.
    """

    def __init__(
        self,
        lexicon: Lexicon,
        *,
        stop_words: frozenset[str],
        kept: frozenset[str],
        min_share: float,
        pos: str | None = None,
    ) -> None:
        self.lexicon = lexicon
        self.pos = pos
        self.stop_words = stop_words
        self.kept = kept
        self.min_share = min_share

    def __missing__(self, word: str) -> "tuple[str, ...] | None":
        if len(self) >= _KNOWN_WORDS:
            self.clear()
        self[word] = found = self._find(word)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        # without the words seen, and in order: a data set's cache goes by what is pickled
        settings = (sorted(self.stop_words), sorted(self.kept), self.min_share, self.pos)
        return _made_words, (self.lexicon, *settings)

    def of(self, pos: str) -> "Words":
        """The same with synonyms of one part of speech only."""
        return _made_words(self.lexicon, self.stop_words, self.kept, self.min_share, pos)

    def _find(self, word: str) -> "tuple[str, ...] | None":
        low = word.lower()
        if _FIXED(word) or low in CLITICS or low.casefold() in self.kept:
            return None
        if low in self.stop_words:
            return ()
        exact = self.raw(word)
        if exact or word == low:
            return exact
        if len(word) > 1 and word == word.upper():
            return tuple(dict.fromkeys(one.upper() for one in self.raw(low)))
        if word[1:] == low[1:]:
            return tuple(dict.fromkeys(one[:1].upper() + one[1:] for one in self.raw(low)))
        return ()

    def raw(self, word: str) -> tuple[str, ...]:
        """Synonyms as the lexicon has them."""
        found = self.lexicon.synonyms(word, pos=self.pos, min_share=self.min_share)
        return tuple(dict.fromkeys(one.word for one in found if one.word != word))


def _made_words(
    lexicon: Lexicon,
    stop_words: Iterable[str],
    kept: Iterable[str],
    min_share: float,
    pos: str | None,
) -> Words:
    stops = frozenset(stop_words)
    return Words(lexicon, stop_words=stops, kept=frozenset(kept), min_share=min_share, pos=pos)


class Sentence:
    """A text in pieces: `pieces[2 * i + 1]` is word `i`, the others are gaps."""

    __slots__ = ("entries", "movable", "pieces", "replaceable", "starts")

    def __init__(self, text: str, words: Words, spans: Spans) -> None:
        if spans:
            pieces, stays = split_around(text, spans)
            entries = [None if i in stays else words[w] for i, w in enumerate(pieces[1::2])]
        else:
            pieces = split_pieces(text)
            entries = list(map(words.__getitem__, pieces[1::2]))
        self.pieces = pieces
        self.entries = entries
        if has_full_stop(text):
            self._read_abbreviations()
        order = range(len(entries))
        self.movable: Sequence[int] = order
        if None in entries:
            self.movable = [i for i in order if entries[i] is not None]
        self.replaceable = list(compress(order, entries))
        self.starts: list[int] = []
        if text != text.lower():
            self._read_capitals(words.stop_words)

    def _read_abbreviations(self) -> None:
        """Make the full stop a part of its word, and both stay."""
        pieces, entries = self.pieces, self.entries
        for i, gap in enumerate(pieces[2::2]):
            if gap[:1] != "." or gap[1:2] == ".":
                continue
            word, before = pieces[2 * i + 1], pieces[2 * i - 1] if i else ""
            after = pieces[2 * i + 3] if i + 1 < len(entries) and gap[1:].isspace() else ""
            if not is_abbreviation(word, before, after):
                continue
            pieces[2 * i + 1], pieces[2 * i + 2] = word + ".", gap[1:]
            entries[i] = None
            if after[:1].isupper() and (is_title(word) or is_initial(word)):
                entries[i + 1] = None
            elif word.lower() == "al":
                entries[i - 1] = None

    def _read_capitals(self, stop_words: frozenset[str]) -> None:
        pieces = self.pieces
        count = len(self.entries)
        self.starts = [i for i in range(count) if i == 0 or _SENTENCE_END(pieces[2 * i])]
        if len(self.movable) < count:  # "at 5 p.m. The car", but not "Mr. Will"
            self.starts += [
                i
                for i in range(1, count)
                if pieces[2 * i - 1][-1] == "."
                and pieces[2 * i + 1][0].isupper()
                and pieces[2 * i + 1].lower() in stop_words
                and not is_title(pieces[2 * i - 1][:-1])
            ]
            self.starts.sort()
        inner = set(range(count)).difference(self.starts)
        capital = [i for i in inner if pieces[2 * i + 1][:1].isupper()]
        if 2 * len(capital) <= len(inner):  # more are a headline
            long = ((i, pieces[2 * i + 1]) for i in capital)
            names = {i for i, word in long if len(word) < _SHOUTED or not word.isupper()}
            self.replaceable = [i for i in self.replaceable if i not in names]


class TextTransform:
    """How the augmentations are called; `_edit` is what they do to one text.

    Args:
        lexicon: "wordnet", a mapping, a path or a `Lexicon`.
        keep: A regular expression, or words and phrases that stay as they are.
        stop_words: Words that are not replaced; None for those of English.
        min_share: For "wordnet", how common a sense has to be.
        seed: Of calls without keys.
        column: Of samples and batches with several columns.
    """

    def __init__(
        self,
        *,
        lexicon: Source,
        keep: Keep,
        stop_words: Iterable[str] | None,
        min_share: float,
        seed: int,
        column: str,
    ) -> None:
        if not 0 <= min_share <= 1:
            raise ValueError(f"min_share={min_share} must be in [0, 1]")
        if isinstance(stop_words, str):
            raise TypeError(f"stop_words={stop_words!r} is one string; give a list of words")
        self.seed = seed
        self.column = column
        phrases: list[str] = []
        self._patterns: list[re.Pattern[str]] = []
        if isinstance(keep, (str, re.Pattern)):
            try:
                self._patterns = [re.compile(keep)]
            except re.error as error:
                raise ValueError(f"keep={keep!r} is no regular expression: {error}") from None
        elif keep is not None:
            phrases = [*keep]
            if not all(isinstance(one, str) and one.strip() for one in phrases):
                raise TypeError(f"keep={phrases!r} must hold words; pass spans with each call")
        whole = [
            one for one in phrases if len(split_pieces(one)) != 3 or split_pieces(one)[1] != one
        ]
        if whole:
            longest = sorted(whole, key=len, reverse=True)
            either = "|".join(map(re.escape, longest))
            self._patterns.append(re.compile(rf"(?<!\w)(?:{either})(?!\w)", re.IGNORECASE))
        stops = ENGLISH if stop_words is None else frozenset(one.lower() for one in stop_words)
        self._words = Words(
            open_lexicon(lexicon),
            stop_words=stops,
            kept=frozenset(one.lower().casefold() for one in phrases if one not in whole),
            min_share=min_share,
        )

    _ahead = 8  # random numbers that most texts need

    def _edit(self, sentence: Sentence, draw: Draw) -> list[list[str]]:
        """New pieces, as many and in the same places, for each result."""
        raise NotImplementedError

    def _outcome(self, results: list[str]) -> Any:
        """What a call returns for one text."""
        raise NotImplementedError

    def __call__(
        self,
        texts: Any,
        rng: "np.random.Generator | int | Sequence[int] | None" = None,
        *,
        keys: "Sequence[int] | Keys | torch.Tensor | None" = None,
        keep: "Spans | Sequence[Spans] | None" = None,
    ) -> Any:
        """Augment one text, several, a sample or a batch of samples.

        Args:
            texts: A text, a list of texts, or a mapping whose column `column` is one of these: a
                sample of a data set, or a batch of `datasets.Dataset.map(batched=True)`, whose
                other columns are repeated as needed.
            rng: A generator that draws the keys, or numbers of samples (what `map` gives with
                `with_indices=True`).
            keys: One 64-bit number for each text, such as `batch["key"]` of a `StreamLoader`: the
                same key gives the same result. Without `rng` and `keys` a text's key is made of
                the text, of `seed`, and of the loader's seed and epoch where a loader reads.
            keep: Spans (start, end) of a text that stay; for several texts a list for each.

        Returns:
            Of the same kind as `texts`.

        Raises:
            TypeError: If `texts` is or holds something else.
            ValueError: If lengths differ, a span is outside its text, or there is no such column.
        """
        if isinstance(texts, Mapping):
            return self._of_columns(cast("Mapping[str, Any]", texts), rng, keys, keep)
        if isinstance(texts, str):
            spans = None if keep is None else [cast("Spans", keep)]
            return self._outcome(self._augment([texts], rng, keys, spans)[0])
        found = self._augment(list(texts), rng, keys, cast("Sequence[Spans] | None", keep))
        return [self._outcome(results) for results in found]

    def with_spans(
        self,
        text: str,
        spans: Spans,
        rng: "np.random.Generator | int | Sequence[int] | None" = None,
        *,
        keys: "Sequence[int] | Keys | torch.Tensor | None" = None,
    ) -> list[tuple[str, list[Span]]]:
        """Augment a text around labelled spans, and say where they are afterwards.

        Args:
            text: A text.
            spans: Its (start, end), such as entities; they may overlap. None of them changes.
            rng: As for a call.
            keys: As for a call.

        Returns:
            Each result with the spans in the order given.
        """
        draw = next(draws(self._keys([text], rng, keys), 0))
        joined = join_spans([*_checked(text, spans), *protected_spans(text, self._patterns)])
        sentence = Sentence(text, self._words, joined)
        before = _starts(sentence.pieces)
        found: list[tuple[str, list[Span]]] = []
        for pieces in self._edit(sentence, draw):
            after = _starts(pieces)
            moved: list[Span] = []
            for start, end in spans:
                k = max(i for i in range(1, len(before), 2) if before[i] <= start)
                shift = after[k] - before[k]
                moved.append((start + shift, end + shift))
            found.append(("".join(pieces), moved))
        return found

    def _keys(self, texts: list[str], rng: Any, keys: Any) -> Keys:
        if rng is not None and keys is not None:
            raise ValueError("give rng or keys, not both")
        if isinstance(rng, np.random.Generator):
            return rng.integers(-(2**63), 2**63, len(texts), dtype=np.int64)
        if rng is None and keys is None:
            return content_keys(self.seed, texts)
        given = keys if rng is None else rng
        if isinstance(given, torch.Tensor):
            given = given.cpu().numpy()
        found = np.asarray(given).reshape(-1)
        if len(found) != len(texts) or found.dtype.kind not in "iu":
            name = "keys" if rng is None else "rng"
            raise ValueError(
                f"{name} has {len(found)} values of {found.dtype} for {len(texts)} texts; it needs "
                "one integer for each"
            )
        found = found.astype(np.int64)
        return found if rng is None else sample_keys(self.seed, 0, found)

    def _augment(
        self, texts: list[str], rng: Any, keys: Any, keep: Sequence[Spans] | None
    ) -> list[list[str]]:
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"texts holds a {type(text).__name__}, expected strings")
        if keep is not None and len(keep) != len(texts):
            raise ValueError(f"keep has spans for {len(keep)} texts, but there are {len(texts)}")
        if not texts:
            return []
        words, patterns, edit = self._words, self._patterns, self._edit
        found: list[list[str]] = []
        for n, (text, draw) in enumerate(
            zip(texts, draws(self._keys(texts, rng, keys), self._ahead), strict=True)
        ):
            spans = protected_spans(text, patterns) if patterns or has_signs(text) else []
            if keep is not None:
                spans += _checked(text, keep[n])
            sentence = Sentence(text, words, join_spans(spans) if spans else ())
            found.append(["".join(pieces) for pieces in edit(sentence, draw)])
        return found

    def _of_columns(self, columns: Mapping[str, Any], rng: Any, keys: Any, keep: Any) -> Any:
        texts = text_column(columns, self.column)
        return with_results(columns, self.column, self(texts, rng, keys=keys, keep=keep))


def text_column(columns: Mapping[str, Any], name: str) -> Any:
    """The texts of a sample or a batch.

    Raises:
        ValueError: If there is no such column.
    """
    if name not in columns:
        raise ValueError(f"column={name!r}; there are {sorted(columns)}")
    return columns[name]


def with_results(columns: Mapping[str, Any], name: str, result: Any) -> dict[str, Any]:
    """A sample or batch with results in the place of its texts.

    Args:
        columns: The sample or batch.
        name: Of the column of texts.
        result: For a sample a text, or a list with one; for a batch a text for each row, or a list
            for each: rows are repeated, or left out where it is empty.

    Raises:
        ValueError: If there are several results for one sample.
    """
    if not isinstance(columns[name], str) and result and isinstance(result[0], list):
        batch = {
            column: [value for value, made in zip(values, result, strict=True) for _ in made]
            for column, values in columns.items()
        }
        return {**batch, name: [one for made in result for one in made]}
    if isinstance(result, list) and isinstance(columns[name], str):
        if len(result) != 1:
            raise ValueError(
                f"there are {len(result)} results for one sample; ask for one in a transform, or "
                "use batched=True in datasets.map"
            )
        result = result[0]
    return {**columns, name: result}


def _starts(pieces: Sequence[str]) -> list[int]:
    return np.cumsum([0, *map(len, pieces)]).tolist()


def _checked(text: str, spans: Spans) -> list[Span]:
    found: list[Span] = []
    for start, end in spans:
        if not 0 <= start < end <= len(text):
            raise ValueError(f"keep: ({start}, {end}) is no span of a text of {len(text)} letters")
        found.append((int(start), int(end)))
    return found
