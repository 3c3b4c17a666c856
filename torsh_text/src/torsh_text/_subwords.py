"""Texts to the rows of a fastText model, all bytes of a window at once."""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from ._fasttext_file import FastTextModel

_OFFSET, _PRIME = -2_128_831_035, 16_777_619  # FNV-1a in 32 bits; the offset is 2166136261
_WORD_FACTOR = 116_049_371  # fastText's multiplier for hashes of word n-grams
_KEY_BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64
_PIECE_BYTES = {"cpu": 1 << 18, "cuda": 1 << 24}
_EOS = "</s>"
_EOS_HASH = -677604519  # FNV-1a of it
_PREFIX = "__label__"
_SEPARATORS = " \n\r\t\v\f\0"
_TOKEN = re.compile(f"[^{_SEPARATORS}]+")


def _signed(value: int) -> int:
    """Take the last 64 bits of an integer as two's complement."""
    return (value + 2**63) % 2**64 - 2**63


def _powers(base: int, count: int) -> Tensor:
    """``base ** (0 .. count - 1)`` modulo 2**64 as int64."""
    steps = np.full(count, base % 2**64, dtype=np.uint64)
    steps[:1] = 1
    return torch.from_numpy(np.cumprod(steps, dtype=np.uint64).view(np.int64))


def _word_keys(words: Sequence[bytes]) -> Tensor:
    """Polynomial hash of each word, as :meth:`Subwords.forward` computes it from prefix sums."""
    keys = []
    for word in words:
        key = 0
        for byte in reversed(word):
            key = key * _KEY_BASE + byte
        keys.append(_signed(key))
    return torch.tensor(keys, dtype=torch.int64)


class Subwords(nn.Module):
    """Finds the words and n-grams of a fastText model in a stream of bytes.

    fastText walks each word and hashes each n-gram on its own. Here every character of the window
    starts an n-gram at the same time, and step ``n`` feeds the next character to all of them; the
    separators around a word stand for fastText's ``<`` and ``>``. Vocabulary words are found by a
    polynomial hash modulo 2**64 taken from prefix sums. The order of the rows is fastText's.

    Args:
        model: The words, buckets and n-gram lengths.
    """

    bucket_rows: Tensor
    word_keys: Tensor
    word_rows: Tensor

    def __init__(self, model: FastTextModel) -> None:
        super().__init__()
        self.min_n, self.max_n = model.min_n, model.max_n
        self.word_ngrams = model.word_ngrams
        self.num_buckets = model.num_buckets
        self.num_words = len(model.words)
        words = {word: row for row, word in enumerate(model.words)}  # fastText finds the last
        self.eos_row = words.get(_EOS.encode(), -1)
        keys = _word_keys(list(words))
        order = keys.argsort()
        rows = torch.tensor(list(words.values()), dtype=torch.int32)
        table = torch.empty(0, dtype=torch.int32)
        if model.pruned is not None and (self.max_n or self.word_ngrams > 1):
            kept = torch.from_numpy(model.pruned)
            table = torch.full((max(self.num_buckets, 1),), -1, dtype=torch.int32)
            table[kept[:, 0].long()] = kept[:, 1] + self.num_words
        self.pruned = model.pruned is not None
        # a key that no text has keeps the search below simple when there are no words
        end = torch.tensor([2**63 - 1])
        self.register_buffer("bucket_rows", table, persistent=False)
        self.register_buffer("word_keys", torch.cat([keys[order], end]), persistent=False)
        rows = torch.cat([rows[order], rows.new_full((1,), -1)])
        self.register_buffer("word_rows", rows, persistent=False)
        empty = torch.empty(0, dtype=torch.int64)
        self._tables = (empty, empty)
        self._labels = {x for x in model.labels if not x.startswith(_PREFIX)}

    def clean(self, text: str) -> str:
        """Drop what fastText's reader treats as no text.

        A token ``</s>`` ends the line there and tokens that look like labels are skipped. Line
        ends become spaces: fastText would stop at the first.
        """
        if "\n" in text:
            text = text.replace("\n", " ")
        if _EOS not in text and _PREFIX not in text and not self._labels:
            return text
        kept = []
        for found in _TOKEN.finditer(text):
            token = found.group()
            if token == _EOS:
                break
            if not token.startswith(_PREFIX) and token not in self._labels:
                kept.append(token)
        return " ".join(kept)

    def stream(self, texts: Sequence[str]) -> Tensor:
        """Return the bytes of texts, with what :meth:`forward` wants around each."""
        joined = "\n ".join(texts)
        suspect = joined.count("\n") >= len(texts) or _EOS in joined or _PREFIX in joined
        if suspect or self._labels:
            joined = "\n ".join([self.clean(text) for text in texts])
        data = f" {joined}\n".encode()
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def forward(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of each text and where they start.

        Args:
            stream: UTF-8, uint8 ``(bytes,)``; each text begins with a space and ends with a line
                feed, with no other line feed in it.

        Returns:
            Rows of the input matrix, int32 ``(features,)``, text after text; and the position of
            each text's first, int32 ``(texts,)``.
        """
        rows: list[Tensor] = []
        ends: list[Tensor] = []
        total = 0
        for piece in self._pieces(stream):
            found, found_ends = self._rows(piece)
            rows.append(found)
            ends.append(found_ends + total)
            total += len(found)
        end = torch.cat(ends)
        return torch.cat(rows), end - end.diff(prepend=end.new_zeros(1))

    def _pieces(self, stream: Tensor) -> Iterator[Tensor]:
        """Cut a long stream at spaces, which end one piece and begin the next.

        The arrays below take some 150 bytes for each byte of a piece; word n-grams look beyond it.
        """
        limit = _PIECE_BYTES["cuda" if stream.is_cuda else "cpu"]
        if len(stream) <= limit or self.word_ngrams > 1:
            yield stream
            return
        spaces = (stream[:-1] == 32).nonzero().squeeze(1)
        marks = torch.arange(limit, len(stream), limit, device=stream.device)
        places = (torch.searchsorted(spaces, marks) - 1).clamp_min_(0)
        cuts = [0, *spaces[places].unique().tolist(), len(stream) - 1]
        for start, end in pairwise(cuts):
            if end > start:
                yield stream[start : end + 1]

    def _rows(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows, and for each line feed how many there are up to it."""
        space = (stream == 32) | ((stream >= 9) & (stream <= 13)) | (stream == 0)
        signed = stream.view(torch.int8).int()  # fastText hashes bytes as signed characters
        borders = (space[:-1] ^ space[1:]).nonzero().squeeze(1) + 1
        starts, ends = borders[0::2], borders[1::2]  # a stream begins and ends with a separator
        largest = int(stream.max())
        first, edge = signed, space
        later: list[tuple[Tensor, Tensor]] = []  # further bytes of characters beyond ASCII
        if largest >= 0x80:
            places = ((stream & 0xC0) != 0x80).nonzero().squeeze(1)
            first, edge = signed[places], space[places]
            widths = places.diff(append=places.new_full((1,), len(stream)))
            for k in range(1, 2 + (largest >= 0xE0) + (largest >= 0xF0)):
                byte = signed.index_select(0, (places + k).clamp_max_(len(stream) - 1))
                later.append((widths > k, byte))
        inner = ~edge
        words = (edge[:-1] & inner[1:]).nonzero().squeeze(1)
        lines = (first == 10).nonzero().squeeze(1)
        lead = first.new_full((len(first),), -1)
        lead[words] = self._word_rows(stream, starts, ends)
        lead[lines] = self.eos_row
        found = torch.stack([lead, *self._ngrams(first, inner, later)], 1)
        kept = found >= 0
        totals = kept.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)[lines]
        rows = found.masked_select(kept)
        if self.word_ngrams > 1:
            return self._with_word_ngrams(rows, totals, signed, (starts, ends), words, lines)
        return rows, totals

    def _word_rows(self, stream: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
        """Return the vocabulary row of each word, -1 for none."""
        powers, inverses = self._key_tables(len(stream), stream.device)
        sums = (stream * powers[: len(stream)]).cumsum(0)
        keys = (sums[ends - 1] - sums[starts - 1]) * inverses[starts]
        places = torch.searchsorted(self.word_keys, keys)
        return self.word_rows[places].where(self.word_keys[places] == keys, -1)

    def _key_tables(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Powers of the key's base and of its inverse, ``count`` of each or more."""
        tables = self._tables
        if len(tables[0]) < count or tables[0].device != device:
            count = 1 << (count - 1).bit_length()
            bases = (_KEY_BASE, pow(_KEY_BASE, -1, 2**64))
            tables = (_powers(bases[0], count).to(device), _powers(bases[1], count).to(device))
            # one assignment: a thread that runs beside this one sees a whole pair, old or new
            self._tables = tables
        return tables

    def _ngrams(
        self, first: Tensor, inner: Tensor, later: Sequence[tuple[Tensor, Tensor]]
    ) -> list[Tensor]:
        """Return, for each length, the row of the n-gram that begins at each character, or -1."""
        if self.max_n == 0:
            return []
        count = len(first)
        begin = first.where(inner, ord("<"))
        follow = first.where(inner, ord(">"))
        hashes = (begin ^ _OFFSET) * _PRIME
        for more, byte in later:
            hashes = ((hashes ^ byte) * _PRIME).where(more, hashes)
        alive = inner
        found = []
        for n in range(1, self.max_n + 1):
            if n > 1:
                length = count - n + 1
                if length < 1:
                    break
                hashes = (hashes[:length] ^ follow[n - 1 :]) * _PRIME
                for more, byte in later:
                    fed = (hashes ^ byte[n - 1 :]) * _PRIME
                    hashes = fed.where(more[n - 1 :], hashes)
                further = alive[:length] & inner[n - 2 : -1]
                alive = further if n > 2 else inner[:-1] | inner[1:]
            if n >= self.min_n:
                rows = self._bucket_rows(hashes.long() & 0xFFFFFFFF)
                rows = rows.where(alive, -1)
                found.append(nn.functional.pad(rows, (0, count - len(rows)), value=-1))
        return found

    def _bucket_rows(self, hashes: Tensor) -> Tensor:
        """Row of each non-negative hash, -1 where its bucket was pruned."""
        buckets = hashes % self.num_buckets
        if self.pruned:
            return self.bucket_rows.index_select(0, buckets)
        return (buckets + self.num_words).int()

    def _with_word_ngrams(
        self,
        rows: Tensor,
        totals: Tensor,
        signed: Tensor,
        bounds: tuple[Tensor, Tensor],
        words: Tensor,
        lines: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Add the rows of runs of two and more words behind each text's other rows."""
        places, order = torch.cat([words, lines]).sort()
        hashes = _fnv(signed, *bounds)
        hashes = torch.cat([hashes, hashes.new_full((len(lines),), _EOS_HASH)])[order].long()
        line = torch.searchsorted(lines, places)
        count, num_lines = len(places), len(lines)
        found = hashes.new_full((count, self.word_ngrams - 1), -1, dtype=torch.int32)
        running = hashes
        for step in range(1, min(self.word_ngrams, count)):
            running = running[:-1] * _WORD_FACTOR + hashes[step:]
            # the hash is unsigned: its halves are reduced one after the other
            high = ((running >> 32) & 0xFFFFFFFF) % self.num_buckets
            high = high * (2**32 % self.num_buckets) + (running & 0xFFFFFFFF)
            same = line[:-step] == line[step:]
            found[: count - step, step - 1] = self._bucket_rows(high).where(same, -1)
        kept = found >= 0
        extra = found.masked_select(kept)
        extra_line = line.repeat_interleave(kept.sum(1))
        row_counts = totals.diff(prepend=totals.new_zeros(1)).long()
        row_line = torch.arange(num_lines, device=rows.device).repeat_interleave(row_counts)
        both, order = torch.cat([row_line, extra_line]).sort(stable=True)
        sizes = torch.bincount(both, minlength=num_lines)
        return torch.cat([rows, extra])[order], sizes.cumsum(0).int()


def _fnv(signed: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Return fastText's hash of each word: a step for each byte of the longest."""
    lengths, order = (ends - starts).sort()
    starts = starts[order]
    hashes = signed.new_full((len(starts),), _OFFSET)
    steps = torch.arange(int(lengths.max()) if len(lengths) else 0, device=signed.device)
    for step, begin in enumerate(torch.searchsorted(lengths, steps, right=True).tolist()):
        hashes[begin:] = (hashes[begin:] ^ signed[starts[begin:] + step]) * _PRIME
    return torch.empty_like(hashes).index_copy_(0, order, hashes)
