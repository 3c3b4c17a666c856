"""Writes small fastText models, field by field, so that each field can be damaged."""

import struct
from dataclasses import dataclass, field

import numpy as np

WORDS = ["</s>", "the", "der", "é", "中文", "a", "straße", "x" * 40]
LABELS = [f"__label__{c}" for c in ("en", "de", "zh", "fr", "it", "xx", "yy")]
LOSSES = {"hs": 1, "ns": 2, "softmax": 3, "ova": 4}


@dataclass
class Written:
    """The bytes of a file and where each field lies."""

    data: bytearray = field(default_factory=bytearray)
    places: dict[str, tuple[int, str]] = field(default_factory=dict)

    def put(self, name: str, code: str, value) -> None:
        self.places[name] = (len(self.data), code)
        self.data += struct.pack("<" + code, value)

    def raw(self, name: str, data: bytes) -> None:
        self.places[name] = (len(self.data), "")
        self.data += data

    def changed(self, name: str, value) -> bytes:
        """The file with another number in one field."""
        place, code = self.places[name]
        copy = bytearray(self.data)
        struct.pack_into("<" + code, copy, place, value)
        return bytes(copy)


def _quantiser(out: Written, name: str, rng, dim: int, width: int) -> None:
    parts = -(-dim // width)
    for key, value in (
        ("dim", dim),
        ("parts", parts),
        ("width", width),
        ("last_width", dim - width * (parts - 1)),
    ):
        out.put(f"{name}.{key}", "i", value)
    out.raw(f"{name}.centroids", rng.normal(size=dim * 256).astype("<f4").tobytes())


def _matrix(out, name, rng, rows: int, dim: int, *, quantised: bool, norms: bool) -> None:
    if not quantised:
        out.put(f"{name}.rows", "q", rows)
        out.put(f"{name}.columns", "q", dim)
        out.raw(f"{name}.values", rng.normal(size=rows * dim).astype("<f4").tobytes())
        return
    width = 2
    parts = -(-dim // width)
    out.put(f"{name}.with_norms", "B", norms)
    out.put(f"{name}.rows", "q", rows)
    out.put(f"{name}.columns", "q", dim)
    out.put(f"{name}.codes", "i", rows * parts)
    out.raw(f"{name}.code_bytes", rng.integers(0, 256, rows * parts, dtype=np.uint8).tobytes())
    _quantiser(out, f"{name}.quantiser", rng, dim, width)
    if norms:
        out.raw(f"{name}.norm_codes", rng.integers(0, 256, rows, dtype=np.uint8).tobytes())
        _quantiser(out, f"{name}.norm_quantiser", rng, 1, 1)


def write_model(
    *,
    loss: str = "hs",
    dim: int = 5,
    buckets: int = 50,
    min_n: int = 2,
    max_n: int = 4,
    word_ngrams: int = 1,
    kept: int | None = None,
    quantised: bool = False,
    norms: bool = False,
    quantised_output: bool = False,
    version: int = 12,
    words: list[str] = WORDS,
    labels: list[str] = LABELS,
    counts: list[int] | None = None,
    model: int = 3,
    seed: int = 0,
) -> Written:
    rng = np.random.default_rng(seed)
    out = Written()
    out.put("magic number", "i", 793712314)
    out.put("version", "i", version)
    for name, value in (
        ("dim", dim),
        ("ws", 5),
        ("epoch", 5),
        ("minCount", 1),
        ("neg", 5),
        ("wordNgrams", word_ngrams),
        ("loss", LOSSES[loss]),
        ("model", model),
        ("bucket", buckets),
        ("minn", min_n),
        ("maxn", max_n),
        ("lrUpdateRate", 100),
    ):
        out.put(name, "i", value)
    out.put("t", "d", 1e-4)
    out.put("dictionary.size", "i", len(words) + len(labels))
    out.put("dictionary.words", "i", len(words))
    out.put("dictionary.labels", "i", len(labels))
    out.put("dictionary.tokens", "q", 1000)
    out.put("dictionary.pruned", "q", -1 if kept is None else kept)
    counts = counts or [90, 40, 40, 30, 10, 10, 10]
    for index, entry in enumerate([*words, *labels]):
        out.raw(f"entry {index}", entry.encode() + b"\0")
        count = counts[index - len(words)] if index >= len(words) else 7
        out.put(f"entry {index} count", "q", count)
        out.put(f"entry {index} kind", "b", int(index >= len(words)))
    if kept is not None:
        pairs = np.stack([rng.permutation(buckets)[:kept], rng.permutation(kept)], 1)
        out.raw("dictionary.pairs", pairs.astype("<i4").tobytes())
    rows = len(words) + (buckets if kept is None else kept)
    out.put("input.quantised", "B", quantised)
    _matrix(out, "input", rng, rows, dim, quantised=quantised, norms=norms)
    out.put("output.quantised", "B", quantised_output)
    _matrix(out, "output", rng, len(labels), dim, quantised=quantised_output, norms=norms)
    return out
