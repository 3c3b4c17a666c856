"""Text to rows of token ids, once, through a private copy of the tokenizer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from ._packing import PackedBatch

if TYPE_CHECKING:
    from tokenizers import Encoding

Long = Literal["truncate", "error", "mean"]
_PLACES = ("_file", "name_or_path", "cache_dir")


def checked_texts(texts: Iterable[str], *, unicode: bool = False) -> list[str]:
    """Return texts as a list, refusing what is no list of strings (or, if asked, no Unicode)."""
    if isinstance(texts, (str, bytes)):
        raise TypeError("texts is a single string; pass a list of strings")
    if isinstance(texts, (Mapping, Set)):
        raise TypeError(
            f"texts is a {type(texts).__name__}, which is no sequence of texts; pass a list, such"
            " as list(texts.values())"
            if isinstance(texts, Mapping)
            else f"texts is a {type(texts).__name__}, which has no order; pass a list"
        )
    if not isinstance(texts, Iterable):
        raise TypeError(f"texts is {texts!r}; pass a string or a list of strings")
    items = list(texts)
    for index, text in enumerate(items):
        if not isinstance(text, str):
            raise TypeError(
                f"texts[{index}] is {text!r} of type {type(text).__name__}, not a string"
            )
        if unicode and not text.isascii():  # the latter is known without looking
            check_unicode(text, index)
    return items


def check_unicode(text: str, index: int, name: str = "texts") -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}[{index}] holds a lone surrogate at character {error.start}, which"
            " is no Unicode text; decode the source with errors='replace'"
        ) from error


@dataclass(frozen=True)
class TokenRows:
    """Rows of token ids lying end to end.

    Attributes:
        ids: Token ids of all rows, int32 ``(tokens,)``.
        lengths: Tokens in each row, int64 ``(rows,)``.
        pieces: Rows made from each text, int64 ``(texts,)``; 1 unless a long text was split.
        too_long: Indices of texts that did not fit ``max_length``.
        types: Which text of a pair each token belongs to, int32 ``(tokens,)``; None without pairs.
    """

    ids: np.ndarray
    lengths: np.ndarray
    pieces: np.ndarray
    too_long: list[int]
    types: np.ndarray | None = None

    def finished(self, rows: np.ndarray) -> np.ndarray:
        """Which texts have all their rows among these, bool ``(texts,)``."""
        done = np.zeros(len(self.lengths), bool)
        done[rows] = True
        return np.logical_and.reduceat(done, np.cumsum(self.pieces) - self.pieces)

    def batch(self, rows: np.ndarray, *, first_position: int = 0) -> PackedBatch:
        """Pack some of the rows."""
        lengths = self.lengths[rows]
        starts = np.cumsum(self.lengths)[rows] - lengths
        ends = np.cumsum(lengths)
        where = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
        return PackedBatch.from_arrays(
            self.ids[where],
            lengths,
            types=None if self.types is None else self.types[where],
            first_position=first_position,
        )


@dataclass(frozen=True)
class Window:
    """Tokens of a part of a text, and where they come from.

    Attributes:
        text: Index of the text.
        ids: Token ids, special tokens included.
        offsets: First character and the one behind the last of each token, in the text; equal
            where a token stands for no character.
        words: Word of each token, counted as the tokenizer splits; -1 for special tokens.
    """

    text: int
    ids: list[int]
    offsets: list[tuple[int, int]]
    words: list[int]


class RowTokenizer:
    """Tokenizes without padding and cuts at a length of our choosing.

    A ``tokenizer.json`` may carry padding and truncation of its own (MiniLM's pads to 128 and
    cuts at 128 while its model is used with 256), so the rules are set on a private copy.

    Args:
        tokenizer: A tokenizer of transformers.
        max_length: Tokens after which a text is cut, special tokens included.
        lower_case: Whether texts are lower-cased first.

    Attributes:
        room: Tokens of a text that fit beside the special ones.
        from_end: Whether it is the beginning of a long text that is cut off.
    """

    def __init__(self, tokenizer: Any, *, max_length: int, lower_case: bool = False) -> None:
        special = tokenizer.num_special_tokens_to_add(pair=False)
        if max_length <= special:
            raise ValueError(
                f"max_length={max_length} leaves no room for text beside {special} special tokens;"
                f" use at least {special + 1}"
            )
        self.max_length = max_length
        self.room: int = max_length - special
        self.from_end: bool = tokenizer.truncation_side == "left"
        self._slow = tokenizer
        self._lower_case = lower_case
        self._fast: Any = None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            self._fast = type(backend).from_str(backend.to_str())
            self._fast.no_padding()
            self._fast.no_truncation()
        candidates = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.cls_token_id, 0)
        self._for_empty = next(i for i in candidates if i is not None)

    def rows(
        self, texts: Sequence[str] | Sequence[tuple[str, str]], *, long: Long = "truncate"
    ) -> TokenRows:
        """Tokenize texts or pairs; a text without tokens becomes one end-of-text token.

        Args:
            texts: What to tokenize. Of pairs only the first text is ever cut.
            long: ``"mean"`` keeps what does not fit as further rows; any other value drops it.
        """
        if texts and not isinstance(texts[0], str):
            return self._pair_rows(cast("Sequence[tuple[str, str]]", texts))
        texts = cast("Sequence[str]", texts)
        if self._lower_case:
            texts = [text.lower() for text in texts]
        parts = self._parts(texts)
        too_long = [i for i, rows in enumerate(parts) if len(rows) > 1]
        if long != "mean":
            parts = [rows[:1] for rows in parts]
        rows = [row or [self._for_empty] for text in parts for row in text]
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        ids = np.fromiter((i for row in rows for i in row), np.int32, count=int(lengths.sum()))
        pieces = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
        return TokenRows(ids, lengths, pieces, too_long)

    def windows(self, texts: Sequence[str], *, stride: int) -> list[Window]:
        """Cut texts into overlapping windows of ``max_length`` tokens, with their offsets.

        Args:
            texts: The texts; not lower-cased, as that may move characters.
            stride: Tokens that a window shares with the one before.

        Raises:
            TypeError: If the tokenizer is written in Python and knows no offsets.
            ValueError: If ``stride`` leaves no new token in a window.
        """
        if self._fast is None:
            raise TypeError(
                f"{type(self._slow).__name__} does not say where its tokens come from; use a model"
                " with a fast tokenizer (tokenizer.json)"
            )
        if not 0 <= stride < self.room:
            raise ValueError(
                f"stride={stride} is not between 0 and {self.room - 1}:"
                f" max_length={self.max_length} leaves {self.room} tokens beside the special ones"
            )
        with named_surrogates(texts):
            found = self._fast.encode_batch(list(texts))
        windows = []
        for index, whole in enumerate(found):
            ids, offsets = whole.ids, whole.offsets
            words = [-1 if word is None else word for word in whole.word_ids]
            for part in self._cuts(whole, stride):
                windows.append(
                    Window(
                        index,
                        [ids[i] for i in part],
                        [offsets[i] for i in part],
                        [words[i] for i in part],
                    )
                )
        return windows

    def _cuts(self, whole: "Encoding", stride: int) -> list[list[int]]:
        """Places of the tokens of each piece of a text, special tokens around each.

        The pieces are cut here: ``overflowing`` of tokenizers 0.23.2 lacks a part of the text.
        """
        count, special = len(whole.ids), self.max_length - self.room
        if count <= self.max_length:
            return [list(range(count))]
        mask = whole.special_tokens_mask
        before = next((i for i in range(special) if not mask[i]), special)
        first, last = before, count - (special - before)
        frame = (list(range(first)), list(range(last, count)))
        step = self.room - stride
        if self.from_end:
            ends = range(last, min(first + stride, last - 1), -step)
            pieces = [range(max(first, end - self.room), end) for end in ends]
        else:
            starts = range(first, max(last - stride, first + 1), step)
            pieces = [range(start, min(last, start + self.room)) for start in starts]
        return [[*frame[0], *piece, *frame[1]] for piece in pieces]

    def _pair_rows(self, pairs: Sequence[tuple[str, str]]) -> TokenRows:
        if self._lower_case:
            pairs = [(first.lower(), second.lower()) for first, second in pairs]
        with named_surrogates([text for pair in pairs for text in pair]):
            if self._fast is None:
                found = [self._slow_pair(*pair) for pair in pairs]
            else:
                found = [(row.ids, row.type_ids) for row in self._fast.encode_batch_fast(pairs)]
        too_long = [i for i, (ids, _) in enumerate(found) if len(ids) > self.max_length]
        for i in too_long:
            found[i] = self._cut_pair(*pairs[i])
        lengths = np.fromiter((len(ids) for ids, _ in found), np.int64, count=len(found))
        ids, types = (
            np.fromiter((i for row in found for i in row[which]), np.int32, int(lengths.sum()))
            for which in (0, 1)
        )
        return TokenRows(ids, lengths, np.ones(len(pairs), np.int64), too_long, types)

    def described(self) -> str:
        """All that decides which tokens a text becomes, as text."""
        if self._fast is not None:
            return f"{self._for_empty} {self.from_end} {self._fast.to_str()}"
        slow, given = self._slow, self._slow.init_kwargs
        files = [Path(str(given.get(name))) for name in sorted(slow.vocab_files_names)]
        facts = {
            "class": type(slow).__qualname__,
            "words": sorted(slow.get_vocab().items()),
            "special": slow.special_tokens_map,
            # without places of files, which differ where the tokenizer does not
            "given": sorted((k, repr(v)) for k, v in given.items() if not k.endswith(_PLACES)),
            "files": [path.read_bytes() if path.is_file() else None for path in files],
            "from end": self.from_end,
            "empty": self._for_empty,
        }
        return repr(facts)

    def _slow_pair(self, first: str, second: str, **options: Any) -> tuple[list[int], list[int]]:
        row = self._slow(first, second, return_token_type_ids=True, verbose=False, **options)
        return row["input_ids"], row["token_type_ids"]

    def _cut_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        room = self.max_length - self._slow.num_special_tokens_to_add(pair=True)
        if len(self._slow.encode(second, add_special_tokens=False, verbose=False)) >= room:
            raise ValueError(
                f"the second text of a pair, {second[:60]!r}, leaves no room for the first in"
                f" max_length={self.max_length} tokens; shorten it"
            )
        if self._fast is None:
            return self._slow_pair(
                first, second, truncation="only_first", max_length=self.max_length
            )
        row = self._fast.encode(first, second)
        places = [i for i, which in enumerate(row.sequence_ids) if which == 0]
        beyond = len(row.ids) - self.max_length
        cut = set(places[:beyond] if self.from_end else places[-beyond:])
        kept = [i for i in range(len(row.ids)) if i not in cut]
        return [row.ids[i] for i in kept], [row.type_ids[i] for i in kept]

    def _parts(self, texts: Sequence[str]) -> list[list[list[int]]]:
        with named_surrogates(texts):
            if self._fast is None:
                return [self._slow_parts(text) for text in texts]
            wholes = self._fast.encode_batch_fast(texts)
        parts = []
        for whole in wholes:
            ids = whole.ids
            fits = len(ids) <= self.max_length
            parts.append([ids] if fits else [[ids[i] for i in cut] for cut in self._cuts(whole, 0)])
        return parts

    def _slow_parts(self, text: str) -> list[list[int]]:
        """Cut into pieces with special tokens around each, for tokenizers written in Python."""
        ids = self._slow.encode(text, add_special_tokens=False, verbose=False)
        room = self.room
        if self.from_end:
            pieces = [ids[max(0, i - room) : i] for i in range(len(ids), 0, -room)] or [[]]
        else:
            pieces = [ids[i : i + room] for i in range(0, len(ids), room)] or [[]]
        return [self._slow.build_inputs_with_special_tokens(piece) for piece in pieces]


@contextmanager
def named_surrogates(texts: Sequence[str]) -> Iterator[None]:
    """Turn a tokenizer's complaint about a lone surrogate into one that names the text."""
    try:
        yield
    except (TypeError, UnicodeEncodeError):
        for index, text in enumerate(texts):
            check_unicode(text, index)
        raise
