"""Reading supervised fastText models (.bin and .ftz) that may be damaged."""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_MAGIC = 793_712_314
_LOSSES = {1: "hs", 2: "ns", 3: "softmax", 4: "ova"}
_SUPERVISED = 3
_MAX_BUCKETS = 1 << 26  # the table of pruned buckets has an int32 for each
_MAX_NGRAM = 32
_MAX_DECODED_BYTES = 4 << 30
_MAX_COUNT = 10**15  # what fastText's Huffman tree takes for "not yet made"
_CODES = 256  # centroids of a product quantiser


@dataclass(frozen=True)
class FastTextModel:
    """What a supervised fastText model consists of, product quantisation undone.

    Attributes:
        words: Vocabulary as UTF-8; rows ``0 .. len(words) - 1`` of ``weight``.
        labels: Class names with fastText's prefix, in the order of ``output``'s rows.
        counts: How often each label was seen in training (they shape the Huffman tree).
        weight: Input vectors, float32 ``(words + buckets, dim)``.
        output: Output vectors, float32 ``(labels, dim)``.
        pruned: ``(bucket, row - words)`` of each bucket that was kept, int32 ``(kept, 2)``; None
            if all are there.
        num_buckets: N-gram hashes are taken modulo this.
        min_n: Shortest character n-gram.
        max_n: Longest character n-gram; 0 for none.
        word_ngrams: Longest word n-gram; 1 for none.
        loss: ``"hs"``, ``"ns"``, ``"softmax"`` or ``"ova"``.
    """

    words: tuple[bytes, ...]
    labels: tuple[str, ...]
    counts: tuple[int, ...]
    weight: np.ndarray
    output: np.ndarray
    pruned: np.ndarray | None
    num_buckets: int
    min_n: int
    max_n: int
    word_ngrams: int
    loss: str

    def __post_init__(self) -> None:
        """Check that every index points into what it is for."""
        kept = self.num_buckets if self.pruned is None else len(self.pruned)
        rows, dim = len(self.words) + kept, self.weight.shape[1]
        shapes = (self.weight.shape, self.output.shape, len(self.counts))
        expected = ((rows, dim), (len(self.labels), dim), len(self.labels))
        if shapes != expected:
            raise ValueError(f"weight, output and counts have shapes {shapes}, not {expected}")
        if self.pruned is not None:
            inside = (self.pruned >= 0) & (self.pruned < (self.num_buckets, kept))
            if not inside.all():
                raise ValueError("dictionary.pruned points outside the buckets")
        if self.loss not in _LOSSES.values():
            raise ValueError(f"loss={self.loss!r} is none of {', '.join(_LOSSES.values())}")


class _Reader:
    """A position in a file; nothing is allocated before it is known to be there."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def damaged(self, field: str, problem: str) -> ValueError:
        return ValueError(
            f"{self.path}: {field} {problem}; the file is damaged or no fastText model, fetch it"
            " again"
        )

    def need(self, field: str, count: int, size: int) -> None:
        """Refuse ``count`` items of at least ``size`` bytes that the file cannot hold."""
        if count < 0 or count * size > self.left:
            raise self.damaged(
                field, f"claims {count:,} x {size} bytes where {self.left:,} are left"
            )

    def number(self, field: str, code: str) -> int:
        size = struct.calcsize("<" + code)
        self.need(field, 1, size)
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += size
        return int(value)

    def flag(self, field: str) -> bool:
        value = self.number(field, "B")
        self.require(value < 2, field, f"is {value}, neither 0 nor 1")
        return bool(value)

    def array(self, field: str, dtype: str, count: int) -> np.ndarray:
        kind = np.dtype(dtype)
        self.need(field, count, kind.itemsize)
        found = np.frombuffer(self.data, kind, count, self.position).copy()
        self.position += count * kind.itemsize
        if kind.kind == "f":
            self.require(bool(np.isfinite(found).all()), field, "holds values that are not finite")
        return found

    def require(self, valid: bool, field: str, problem: str) -> None:
        if not valid:
            raise self.damaged(field, problem)


def _entries(file: _Reader, size: int, num_words: int) -> tuple[list[bytes], list[int]]:
    """Read the dictionary: words first, then labels, with their counts."""
    file.need("dictionary.size", size, 10)
    texts: list[bytes] = []
    counts: list[int] = []
    data, position = file.data, file.position
    for index in range(size):
        field = f"dictionary entry {index}"
        end = data.find(b"\0", position)
        file.require(end >= 0 and end + 10 <= len(data), field, "has no end")
        texts.append(data[position:end])
        count, kind = struct.unpack_from("<qb", data, end + 1)
        file.require(kind == int(index >= num_words), field, f"is of kind {kind}")
        file.require(0 <= count < _MAX_COUNT, field, f"has count {count:,}")
        counts.append(count)
        position = end + 10
    file.position = position
    return texts, counts


def _plain(file: _Reader, name: str, shape: tuple[int, int]) -> np.ndarray:
    found = (file.number(f"{name}.rows", "q"), file.number(f"{name}.columns", "q"))
    file.require(found == shape, f"{name}.shape", f"is {found} instead of {shape}")
    return file.array(f"{name}.values", "<f4", shape[0] * shape[1]).reshape(shape)


def _centroids(file: _Reader, name: str, dim: int) -> list[np.ndarray]:
    """Return one ``(256, width)`` table for each part of a vector."""
    found, parts, width, last = (
        file.number(f"{name}.{field}", "i") for field in ("dim", "parts", "width", "last_width")
    )
    file.require(found == dim, f"{name}.dim", f"is {found} instead of {dim}")
    file.require(1 <= width <= dim, f"{name}.width", f"is {width}, not in 1 to {dim}")
    file.require(parts == -(-dim // width), f"{name}.parts", f"is {parts}")
    file.require(last == dim - width * (parts - 1), f"{name}.last_width", f"is {last}")
    values = file.array(f"{name}.centroids", "<f4", dim * _CODES)
    cuts = np.arange(1, parts) * (_CODES * width)
    return [table.reshape(_CODES, -1) for table in np.split(values, cuts)]


def _quantised(file: _Reader, name: str, shape: tuple[int, int]) -> np.ndarray:
    """Read a product-quantised matrix and decode it."""
    with_norms = file.flag(f"{name}.with_norms")
    found = (file.number(f"{name}.rows", "q"), file.number(f"{name}.columns", "q"))
    file.require(found == shape, f"{name}.shape", f"is {found} instead of {shape}")
    rows, dim = shape
    length = file.number(f"{name}.codes", "i")
    file.require(
        length > 0 and length % rows == 0, f"{name}.codes", f"is {length:,} for {rows:,} rows"
    )
    codes = file.array(f"{name}.codes", "u1", length).reshape(rows, -1)
    tables = _centroids(file, f"{name}.quantiser", dim)
    file.require(
        len(tables) == codes.shape[1], f"{name}.codes", f"is {length:,} for {len(tables)} parts"
    )
    decoded_bytes = 4 * rows * dim
    file.require(
        decoded_bytes <= _MAX_DECODED_BYTES,
        f"{name}.shape",
        f"means {decoded_bytes:,} bytes, more than the limit of {_MAX_DECODED_BYTES:,}",
    )
    decoded = np.concatenate([table[codes[:, i]] for i, table in enumerate(tables)], axis=1)
    if with_norms:
        norm_codes = file.array(f"{name}.norm_codes", "u1", rows)
        (norms,) = _centroids(file, f"{name}.norm_quantiser", 1)
        decoded *= norms[norm_codes]
    return decoded


def read_fasttext(path: Path) -> FastTextModel:
    """Read a supervised fastText model.

    Every count is checked against the bytes that are left before anything of its size is
    allocated, every index against what it points into.

    Args:
        path: A ``.bin`` or ``.ftz`` file of format 11 or 12.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the file is damaged, of another kind or holds word vectors; the message
            names the file and the field.

    Reference:
        Joulin et al., "Bag of Tricks for Efficient Text Classification", 2016, arXiv:1607.01759;
        "FastText.zip: Compressing text classification models", 2016, arXiv:1612.03651.
    """
    with path.open("rb") as handle:
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: magic number is missing; the file is empty")
        with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Reader(path, data))


def _parse(file: _Reader) -> FastTextModel:
    magic = file.number("magic number", "i")
    file.require(magic == _MAGIC, "magic number", f"is {magic} instead of {_MAGIC}")
    version = file.number("version", "i")
    file.require(version in (11, 12), "version", f"is {version}, neither 11 nor 12")
    names = ("dim", "ws", "epoch", "minCount", "neg", "wordNgrams", "loss", "model", "bucket")
    args = {name: file.number(name, "i") for name in (*names, "minn", "maxn", "lrUpdateRate")}
    file.number("t", "q")  # the sampling threshold of training, a double that nothing here reads
    dim, buckets = args["dim"], args["bucket"]
    file.require(args["model"] in (1, 2, 3), "model", f"is {args['model']}, not in 1 to 3")
    if args["model"] != _SUPERVISED:
        raise ValueError(f"{file.path}: holds word vectors; a supervised model is needed")
    file.require(args["loss"] in _LOSSES, "loss", f"is {args['loss']}, not in 1 to 4")
    file.require(dim > 0, "dim", f"is {dim}")
    max_n = 0 if version == 11 else max(0, args["maxn"])  # format 11 had no character n-grams
    min_n = max(1, args["minn"])
    file.require(max_n <= _MAX_NGRAM, "maxn", f"is {max_n}, beyond {_MAX_NGRAM}")
    file.require(max_n == 0 or min_n <= max_n, "minn", f"is {min_n}, above maxn={max_n}")
    word_ngrams = max(1, args["wordNgrams"])
    file.require(word_ngrams <= _MAX_NGRAM, "wordNgrams", f"is {word_ngrams}, beyond {_MAX_NGRAM}")
    file.require(
        buckets > 0 or (buckets == 0 and max_n == 0 and word_ngrams == 1),
        "bucket",
        f"is {buckets:,}",
    )
    size, num_words, num_labels = (
        file.number(f"dictionary.{name}", "i") for name in ("size", "words", "labels")
    )
    file.number("dictionary.tokens", "q")
    kept = file.number("dictionary.pruned", "q")
    file.require(num_labels > 0, "dictionary.labels", f"is {num_labels:,}")
    file.require(
        num_words >= 0 and num_words + num_labels == size,
        "dictionary.words",
        f"is {num_words:,} beside {num_labels:,} labels among {size:,} entries",
    )
    file.require(kept >= -1, "dictionary.pruned", f"is {kept:,}")
    texts, counts = _entries(file, size, num_words)
    try:
        labels = tuple(text.decode() for text in texts[num_words:])
    except UnicodeDecodeError:
        raise file.damaged("dictionary", "has a label that is not UTF-8") from None
    pruned = None
    if kept >= 0:
        file.need("dictionary.pruned", kept, 8)
        file.require(buckets <= _MAX_BUCKETS, "bucket", f"is {buckets:,}, beyond {_MAX_BUCKETS:,}")
        pruned = file.array("dictionary.pruned", "<i4", 2 * kept).reshape(-1, 2)
        inside = (pruned >= 0) & (pruned < (buckets, kept))
        file.require(bool(inside.all()), "dictionary.pruned", "points outside the buckets")
    quantised = file.flag("input.quantised")
    file.require(
        quantised or pruned is None, "input.quantised", "is 0 though the dictionary is pruned"
    )
    rows = num_words + (buckets if pruned is None else kept)
    file.require(rows > 0, "input.rows", "is 0")
    weight = (_quantised if quantised else _plain)(file, "input", (rows, dim))
    quantised_output = file.flag("output.quantised") and quantised
    output = (_quantised if quantised_output else _plain)(file, "output", (num_labels, dim))
    file.require(file.left == 0, "end", f"is followed by {file.left:,} bytes")
    return FastTextModel(
        words=tuple(texts[:num_words]),
        labels=labels,
        counts=tuple(counts[num_words:]),
        weight=weight,
        output=output,
        pruned=pruned,
        num_buckets=buckets,
        min_n=min_n,
        max_n=max_n,
        word_ngrams=word_ngrams,
        loss=_LOSSES[args["loss"]],
    )
