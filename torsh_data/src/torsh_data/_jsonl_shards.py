"""JSON Lines: one object a line, found by the places of the line ends."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from torsh_data._files import DataFile, RemoteFile
from torsh_data._index import hash_bytes
from torsh_data._numbers import Array
from torsh_data._plan import Plan, sample_bytes
from torsh_data._shards import Block, Sample, Shard
from torsh_data._store import Store

_BLOCK_BYTES = 4 << 20
_CHUNK = 16 << 20
_LOOKED_AT = 1000  # rows of each file, for names and types of the columns
_LINES = 1 << 16
_BOM = b"\xef\xbb\xbf"


@dataclass
class JsonlShard(Shard):
    """A file of JSON lines, read line by line where they lie."""

    file: DataFile
    store: Store | None = None
    refuse_unknown: bool = True
    """Whether a key that the columns do not have is an error."""

    def __post_init__(self) -> None:
        self.path = self.file.name
        self.is_remote = isinstance(self.file, RemoteFile)
        plan = Plan.of(self.file, self.store, "jsonl", self._look)
        self._schema = plan.schema
        self._starts = plan.arrays["starts"]  # one more than rows; blank lines end the row before
        self._block_samples = plan.arrays["block_samples"]
        self._block_lines = plan.arrays["block_lines"]
        self.block_rows = np.diff(self._block_samples).tolist()
        self.nbytes = self.file.size
        name = PurePosixPath(self.path).name
        places = hash_bytes(self._starts.tobytes())
        self.identity = f"{name}:{len(self._starts) - 1}:{self.nbytes}:{places}:{plan.digest}"

    def _look(self) -> Plan:
        content = self.file.whole().content if self.file.size else pa.py_buffer(b"")
        data = memoryview(content)
        begin = len(_BOM) if bytes(data[:3]) == _BOM else 0
        found = [np.array([begin], np.int64)]
        for start in range(begin, len(data), _CHUNK):
            chunk = np.frombuffer(data[start : start + _CHUNK], np.uint8)
            found.append(np.flatnonzero(chunk == ord("\n")) + (start + 1))
        starts = np.concatenate(found)
        if starts[-1] == len(data):
            starts = starts[:-1]
        firsts = np.frombuffer(data, np.uint8)[starts] if len(starts) else np.empty(0, np.uint8)
        ends = np.append(starts[1:], len(data))
        blank = np.zeros(len(starts), bool)
        for line in np.flatnonzero(np.isin(firsts, np.frombuffer(b" \t\r\n", np.uint8))):
            blank[line] = not bytes(data[starts[line] : ends[line]]).strip()
        lines = np.flatnonzero(~blank)
        rows = np.append(starts[lines], len(data))
        blocks = [0]
        while blocks[-1] < len(lines):
            limit = rows[blocks[-1]] + _BLOCK_BYTES
            blocks.append(max(blocks[-1] + 1, int(np.searchsorted(rows, limit, "right")) - 1))
        head = [
            self._parse(bytes(data[rows[k] : rows[k + 1]]), int(lines[k]) + 1)
            for k in range(min(_LOOKED_AT, len(lines)))
        ]
        schema = _infer(head)
        whole = {field.name for field in schema if field.type == pa.int64()}
        if len(lines) > _LOOKED_AT and whole:
            found = self._fractions(content, rows, lines, whole)
            schema = pa.schema(
                [pa.field(f.name, pa.float64()) if f.name in found else f for f in schema]
            )
        return Plan.make(
            schema,
            sample_bytes(content),
            starts=rows,
            block_samples=blocks,
            block_lines=lines[blocks[:-1]] + 1,
        )

    def _fractions(
        self, content: pa.Buffer, rows: Array, lines: Array, names: set[str]
    ) -> set[str]:
        """Which of these columns have a number that is not whole in any line.

        A search for what looks like one, at gigabytes a second; lines with a hit are parsed.
        """
        import pyarrow.compute as pc

        keys = {form for name in names for form in (name, json.dumps(name)[1:-1])}
        either = "|".join(map(re.escape, sorted(keys)))
        looks = rf'"(?:{either})"[ \t]*:[ \t]*-?(?:[0-9]+[.eE]|NaN|Infinity)'
        texts = pa.Array.from_buffers(
            pa.large_binary(), len(lines), [None, pa.py_buffer(rows), content]
        )
        options = pc.MatchSubstringOptions(looks)
        found: set[str] = set()
        for start in range(_LOOKED_AT, len(lines), _LINES):
            part = texts.slice(start, _LINES)
            matches = pc.call_function("match_substring_regex", [part], options)
            hits = pc.call_function("indices_nonzero", [matches])
            for k in hits.to_pylist():
                try:
                    row = self._parse(part[k].as_py(), int(lines[start + k]) + 1)
                except ValueError:
                    continue  # whoever reads the line is told
                found |= {name for name in names if isinstance(row.get(name), float)}
                if found == names:
                    return found
        return found

    def _parse(self, line: bytes, number: int) -> Sample:
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.path}, line {number}: {error}") from error
        except RecursionError as error:
            raise ValueError(f"{self.path}, line {number} is nested too deeply") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{self.path}, line {number} is a {type(row).__name__}; a line is an object"
            )
        return row

    def schema(self) -> pa.Schema:
        return self._schema

    def _range(self, block: int) -> tuple[int, int]:
        first, end = self._block_samples[block : block + 2]
        return int(self._starts[first]), int(self._starts[end])

    def open(self, block: int, fields: Sequence[pa.Field]) -> Block:
        start, end = self._range(block)
        view = self.file.part(start, end)
        first, last = self._block_samples[block : block + 2]
        opened = _JsonlBlock(
            self,
            view.content,
            self._starts[first : last + 1] - start,
            int(self._block_lines[block]),
            [field.name for field in fields],
        )
        opened.in_memory = view.content.size if view.in_memory else 0
        opened.leased = view.content.size
        return opened

    def prepare(self, block: int) -> None:
        self.file.prepare(*self._range(block))


class _JsonlBlock(Block):
    def __init__(
        self, shard: JsonlShard, content: pa.Buffer, starts: Any, line: int, names: list[str]
    ) -> None:
        self._shard, self._content, self._starts = shard, content, starts
        self._line, self._names, self._known = line, names, set(names)

    def _number(self, start: int) -> int:
        return self._line + self._content[:start].to_pybytes().count(b"\n")

    def sample(self, row: int) -> Sample:
        start, end = self._starts[row : row + 2].tolist()
        line = self._content[start:end].to_pybytes()
        shard = self._shard
        try:
            found = shard._parse(line, 0)
        except ValueError:  # which line it is takes a look at all lines before
            found = shard._parse(line, self._number(start))
        if shard.refuse_unknown and not found.keys() <= self._known:
            unknown = sorted(found.keys() - self._known)[0]
            raise ValueError(
                f"{shard.path}, line {self._number(start)} has a key {unknown!r} that none of the "
                f"first {_LOOKED_AT} lines has; choose the columns with columns="
            )
        return {name: found.get(name) for name in self._names}


def _infer(rows: Sequence[Sample]) -> pa.Schema:
    kinds: dict[str, set[type]] = {}
    items: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            kinds.setdefault(name, set()).add(type(value))
            if type(value) is list:
                items.setdefault(name, set()).update(map(type, value))
    return pa.schema(
        [
            (name, _kind(found - {type(None)}, items.get(name, set())))
            for name, found in kinds.items()
        ]
    )


def _kind(found: set[type], items: set[type]) -> pa.DataType:
    if found == {bool}:
        return pa.bool_()
    if found == {int}:
        return pa.int64()
    if found and found <= {int, float}:
        return pa.float64()
    if found == {str}:
        return pa.string()
    inner = _kind(items, set()) if found == {list} else pa.json_()
    return pa.json_() if inner == pa.json_() else pa.list_(inner)
