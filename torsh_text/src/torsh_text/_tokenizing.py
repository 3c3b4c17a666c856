"""Text to rows of token ids, once, through a private copy of the tokenizer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Encoding

Long = Literal["truncate", "error", "mean"]


def checked_texts(texts: Iterable[str]) -> list[str]:
    """Return texts as a list, refusing what is no list of strings."""
    if isinstance(texts, (str, bytes)):
        raise TypeError("texts is a single string; pass a list of strings")
    items = list(texts)
    for index, text in enumerate(items):
        if not isinstance(text, str):
            raise TypeError(
                f"texts[{index}] is {text!r} of type {type(text).__name__}, not a string"
            )
    return items


def vocabulary(tokenizer: Any) -> str:
    """All that a tokenizer knows, as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend else repr(sorted(tokenizer.get_vocab().items()))


@dataclass(frozen=True)
class TokenRows:
    """Rows of token ids lying end to end.

    Attributes:
        ids: Token ids of all rows, int32 ``(tokens,)``.
        lengths: Tokens in each row, int64 ``(rows,)``.
        pieces: Rows made from each text, int64 ``(texts,)``; 1 unless a long text was split.
        too_long: Indices of texts that did not fit ``max_length``.
    """

    ids: np.ndarray
    lengths: np.ndarray
    pieces: np.ndarray
    too_long: list[int]

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of some rows, end to end, and their lengths."""
        lengths = self.lengths[rows]
        starts = np.cumsum(self.lengths)[rows] - lengths
        ends = np.cumsum(lengths)
        return self.ids[
            np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
        ], lengths


class RowTokenizer:
    """Tokenizes without padding and cuts at a length of our choosing.

    A ``tokenizer.json`` may carry padding and truncation of its own (MiniLM's pads to 128 and
    cuts at 128 while its model is used with 256), so the rules are set on a private copy.

    Args:
        tokenizer: A tokenizer of transformers.
        max_length: Tokens after which a text is cut, special tokens included.
        lower_case: Whether texts are lower-cased first.
    """

    def __init__(self, tokenizer: Any, *, max_length: int, lower_case: bool = False) -> None:
        special = tokenizer.num_special_tokens_to_add(pair=False)
        if max_length <= special:
            raise ValueError(
                f"max_length={max_length} leaves no room for text beside {special} special tokens;"
                f" use at least {special + 1}"
            )
        self.max_length = max_length
        self._slow = tokenizer
        self._lower_case = lower_case
        self._fast: Any = None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            self._fast = type(backend).from_str(backend.to_str())
            self._fast.no_padding()
            self._fast.enable_truncation(max_length, direction=tokenizer.truncation_side)
        candidates = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.cls_token_id, 0)
        self._for_empty = next(i for i in candidates if i is not None)

    def rows(self, texts: Sequence[str], *, long: Long = "truncate") -> TokenRows:
        """Tokenize texts; a text without tokens becomes one end-of-text token.

        Args:
            texts: What to tokenize.
            long: ``"mean"`` keeps what does not fit as further rows; any other value drops it.
        """
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

    def _parts(self, texts: Sequence[str]) -> list[list[list[int]]]:
        try:
            if self._fast is None:
                return [self._slow_parts(text) for text in texts]
            return [_fast_parts(found) for found in self._fast.encode_batch_fast(texts)]
        except (TypeError, UnicodeEncodeError):
            for index, text in enumerate(texts):
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(
                        f"texts[{index}] holds a lone surrogate at character {error.start}, which"
                        " is no Unicode text; decode the source with errors='replace'"
                    ) from error
            raise

    def _slow_parts(self, text: str) -> list[list[int]]:
        """Cut into pieces with special tokens around each, for tokenizers written in Python."""
        ids = self._slow.encode(text, add_special_tokens=False, verbose=False)
        room = self.max_length - self._slow.num_special_tokens_to_add(pair=False)
        pieces = [ids[i : i + room] for i in range(0, len(ids), room)] or [[]]
        return [self._slow.build_inputs_with_special_tokens(piece) for piece in pieces]


def _fast_parts(found: "Encoding") -> list[list[int]]:
    rest = found.overflowing
    return [found.ids, *(part.ids for part in rest)] if rest else [found.ids]
