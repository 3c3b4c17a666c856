"""Tables of text: CSV and TSV, whose cells say nothing of types but what they look like."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from torsh_data._schemas import chosen_columns

_BLOCK_BYTES = 16 << 20  # a row must lie in one
_NUMBER = r"-?(0|[1-9][0-9]{0,14})(\.[0-9]+)?([eE][+-]?[0-9]+)?|NaN|nan|-?inf"
# What a column is if all of its cells look like it. 00501 and 31.12.1999 look like none of these.
_LOOKS = (
    (pa.int64(), "0|-?[1-9][0-9]{0,18}"),
    (pa.float64(), _NUMBER),
    (pa.bool_(), "true|True|TRUE|false|False|FALSE"),
)


@dataclass
class TextTable:
    """The rows of a file; `given` are types that are known, the others take a pass to find."""

    path: Path
    delimiter: str
    columns: Sequence[str] | None
    given: pa.Schema
    schema: pa.Schema = field(init=False)

    def __post_init__(self) -> None:
        with self._opened(None) as reader:
            names = reader.schema.names
        twice = [name for k, name in enumerate(names) if name in names[:k]]
        if twice:
            raise ValueError(f"{self.path}: two columns have the name {twice[0]!r}")
        kept = chosen_columns(self.columns, names)
        known = {column.name: column.type for column in self.given if column.name in kept}
        known |= self._looked([name for name in kept if name not in known])
        self.schema = pa.schema([(name, known[name]) for name in kept])

    def __call__(self, start: int) -> Iterator[dict[str, Any]]:
        """The rows from one on."""
        types = {column.name: column.type for column in self.schema}
        for batch in self._batches(types):
            if start < batch.num_rows:
                yield from batch.slice(start).to_pylist()
            start = max(0, start - batch.num_rows)

    def _looked(self, names: list[str]) -> dict[str, pa.DataType]:
        left = {name: list(_LOOKS) for name in names}
        empty = set(names)
        for batch in self._batches(dict.fromkeys(names, pa.string())) if names else ():
            for name in names:
                cells = batch.column(name).drop_null() if left[name] else []
                if len(cells):
                    empty.discard(name)
                    left[name] = [looks for looks in left[name] if _all_look(cells, *looks)]
            if not any(left.values()):
                break
        is_known = {name: bool(left[name]) and name not in empty for name in names}
        return {name: left[name][0][0] if is_known[name] else pa.string() for name in names}

    def _opened(self, types: Mapping[str, pa.DataType] | None) -> csv.CSVStreamingReader:
        parse = csv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True)
        convert = csv.ConvertOptions(
            column_types=types,
            include_columns=None if types is None else list(types),
            null_values=[""],
            strings_can_be_null=True,
        )
        try:
            return csv.open_csv(self.path, csv.ReadOptions(block_size=_BLOCK_BYTES), parse, convert)
        except pa.ArrowInvalid as error:
            raise self._explained(error) from error

    def _batches(self, types: Mapping[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
        try:
            with self._opened(types) as reader:
                yield from reader
        except pa.ArrowInvalid as error:
            raise self._explained(error) from error

    def _explained(self, error: pa.ArrowInvalid) -> ValueError:
        remedy = "; is the type that schema= gives right?" if len(self.given) else ""
        return ValueError(f"{self.path}: {error}{remedy}")


def _all_look(cells: pa.Array, kind: pa.DataType, looks: str) -> bool:
    options = pc.MatchSubstringOptions(f"^ *({looks}) *$")
    matches = pc.call_function("match_substring_regex", [cells], options)
    if not pc.call_function("all", [matches]).as_py():
        return False
    try:
        pc.cast(pc.call_function("utf8_trim", [cells], pc.TrimOptions(" ")), kind)
    except pa.ArrowInvalid:  # beyond int64
        return False
    return True
