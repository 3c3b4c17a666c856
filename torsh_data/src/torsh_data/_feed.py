"""What a writer takes blocks from: samples in any of the shapes that people have them in."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset

from torsh_data._columns import encode, infer_schema
from torsh_data._order import CHUNK, Order

_LOOKED_AT = 1000  # samples, for the first list that is not empty
Sample: TypeAlias = Mapping[str, Any]
Samples: TypeAlias = (
    "Iterable[Sample] | Sequence[Sample] | Dataset[Any] | Callable[[int], Iterable[Sample]]"
)


class Feed(Protocol):
    """Rows in blocks. Blocks from row `begin` on depend on the rows from there on alone."""

    schema: pa.Schema
    rows: int | None
    """None if it is not known before the end."""

    def blocks(self, begin: int, end: int | None, limit: int) -> Iterator[pa.RecordBatch]:
        """The rows from `begin` to `end`, or to the last, in blocks of about `limit` bytes."""
        ...


class SampleFeed:
    """Samples from a sequence or a function, which are asked for, or from a stream."""

    def __init__(
        self, samples: Samples, schema: pa.Schema | None, shuffle_seed: int | None
    ) -> None:
        self._items = _as_sequence(samples)
        self._open: Callable[[int], Iterable[Sample]] | None = None
        self._stream: Iterator[Sample] | None = None
        self._streamed = 0
        self.rows = None if self._items is None else len(self._items)
        if shuffle_seed is not None and self._items is None:
            raise TypeError(
                f"shuffle_seed={shuffle_seed} needs samples with a length and an index, got "
                f"{type(samples).__name__}; pass a list or a map-style data set"
            )
        self._order = (
            None if not self.rows or shuffle_seed is None else _order(self.rows, shuffle_seed)
        )
        if self._items is None and callable(samples):
            self._open = cast("Callable[[int], Iterable[Sample]]", samples)
        elif self._items is None:
            self._stream = iter(cast("Iterable[Sample]", samples))
        first = self._first(1 if schema is not None else _LOOKED_AT)
        _check_columns(first, None if schema is None else list(schema.names), 0)
        self.schema = infer_schema(first) if schema is None else schema

    def _first(self, looked_at: int) -> Sample:
        """The first sample; for its empty lists, the next ones that are not and have a type."""
        seen: list[Sample] = []
        first: Sample = {}
        for sample in self._samples(0, looked_at):
            seen.append(sample)
            if len(seen) == 1:
                first = sample
            if not isinstance(sample, Mapping) or not isinstance(first, Mapping):
                break
            first = {
                name: value if _has_type(value) else sample.get(name, value)
                for name, value in first.items()
            }
            if all(map(_has_type, first.values())):
                break
        if not seen:
            raise ValueError("samples is empty; a data set has at least one sample")
        if self._stream is not None:
            self._stream, self._streamed = chain(seen, self._stream), 0
        return first

    def blocks(self, begin: int, end: int | None, limit: int) -> Iterator[pa.RecordBatch]:
        names = list(self.schema.names)
        values: dict[str, list[Any]] = {name: [] for name in names}
        written, rows, size = begin, 0, 0
        for sample in self._samples(begin, end):
            _check_columns(sample, names, written + rows)
            for name in names:
                values[name].append(sample[name])
                size += _value_bytes(sample[name])
            rows += 1
            if size >= limit:
                yield self._encode(values, written)
                values = {name: [] for name in names}
                written, rows, size = written + rows, 0, 0
        if rows:
            yield self._encode(values, written)

    def _encode(self, values: dict[str, list[Any]], first: int) -> pa.RecordBatch:
        columns = [encode(field, values[field.name], first) for field in self.schema]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def _samples(self, begin: int, end: int | None) -> Iterator[Sample]:
        if self._items is not None:
            last = len(self._items) if end is None else min(end, len(self._items))
            if begin > len(self._items):
                raise _too_short(begin, len(self._items))
            for number in self._numbers(begin, last):
                yield self._items[number]
        elif self._open is not None:
            yield from islice(self._open(begin), None if end is None else end - begin)
        else:
            yield from self._take(begin, end)

    def _numbers(self, begin: int, end: int) -> Iterator[int]:
        if self._order is None:
            yield from range(begin, end)
            return
        for first in range(begin, end, CHUNK):
            yield from self._order(0, np.arange(first, min(first + CHUNK, end))).tolist()

    def _take(self, begin: int, end: int | None) -> Iterator[Sample]:
        stream = cast("Iterator[Sample]", self._stream)
        while end is None or self._streamed < end:
            sample = next(stream, None)
            if sample is None:
                break
            self._streamed += 1
            if self._streamed > begin:
                yield sample
        if self._streamed < begin:
            raise _too_short(begin, self._streamed)


def _has_type(value: Any) -> bool:
    return not (isinstance(value, (list, tuple)) and len(value) == 0)


def _as_sequence(samples: Samples) -> Sequence[Sample] | None:
    has_index = hasattr(samples, "__len__") and hasattr(samples, "__getitem__")
    if not has_index or isinstance(samples, Mapping):
        return None
    return cast("Sequence[Sample]", samples)


def _order(rows: int, seed: int) -> Order:
    return Order(rows, seed, window=rows)


def _too_short(written: int, found: int) -> ValueError:
    return ValueError(
        f"samples has {found} samples, but {written} were written before the writer was stopped; "
        "give the same samples, or resume=False to start over"
    )


def _check_columns(sample: Sample, names: list[str] | None, number: int) -> None:
    if not isinstance(sample, Mapping):
        raise TypeError(f"sample {number} is a {type(sample).__name__}; a sample is a mapping")
    if names is not None and list(sample) != names and set(sample) != set(names):
        raise ValueError(
            f"sample {number} has the columns {sorted(map(str, sample))}, expected {sorted(names)}"
        )


def _value_bytes(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, (bytes, bytearray)):
        return len(value)
    if isinstance(value, (list, tuple)) and value:
        is_of_texts = isinstance(value[0], (str, bytes, list, tuple))
        return sum(map(_value_bytes, value)) if is_of_texts else 8 * len(value)
    return int(getattr(value, "nbytes", 8))
