"""Texts in, one JSON record a text out: files of the command line, written so that they resume."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ._runtime import progress_bar
from ._writing import replacing

_FORMAT = "torsh-text-partial"


@dataclass(frozen=True)
class Texts:
    """Texts of a file.

    Attributes:
        texts: The texts; blank lines are left out.
        lines: Their line numbers, from 1, with blank lines counted.
    """

    texts: list[str]
    lines: list[int]

    @property
    def digest(self) -> str:
        """Hash of all texts."""
        total = hashlib.blake2b(digest_size=16)
        for text in self.texts:
            total.update(hashlib.blake2b(text.encode("utf-8", "surrogatepass")).digest())
        return total.hexdigest()


def read_texts(file: Path, field: str) -> Texts:
    """Read the lines of a text file, or one field of each object of a ``.jsonl`` file.

    Only a line feed ends a line: JSON may hold U+2028 and its like, which ``str.splitlines`` cuts.

    Args:
        file: The file; ``-`` for the standard input, one text a line.
        field: Field of the objects that holds the text.

    Raises:
        ValueError: If there is no text, or a line is no object with that field.
    """
    if str(file) == "-":
        return _parsed(sys.stdin, file, field)
    with file.open(encoding="utf-8", newline="\n") as source:
        return _parsed(source, file, field)


def _parsed(source: TextIO, file: Path, field: str) -> Texts:
    texts: list[str] = []
    lines: list[int] = []
    for number, line in enumerate(source, 1):
        if not line.strip():
            continue
        text: Any = line.rstrip("\r\n")
        if file.suffix == ".jsonl":
            try:
                text = json.loads(line)[field]
            except (json.JSONDecodeError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise ValueError(
                    f"{file}:{number} is no JSON object with a field {field!r} that is a string"
                )
        texts.append(text)
        lines.append(number)
    if not texts:
        raise ValueError(f"{file} holds no text")
    return Texts(texts, lines)


def _json_line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _whole_lines(path: Path) -> list[bytes]:
    """Lines that were written whole, without the torn one behind them."""
    lines = path.read_bytes().split(b"\n")
    return [line + b"\n" for line in lines[:-1]]


def partial_of(out: Path) -> Path:
    """Where unfinished records of ``out`` are kept."""
    return out.with_name(out.name + ".partial")


def write_records(
    source: Texts,
    work: Callable[[Sequence[str]], Sequence[Mapping[str, Any]]],
    out: Path,
    *,
    settings: Mapping[str, Any],
    window: int,
    overwrite: bool,
    progress: bool,
) -> int:
    """Write one JSON object for each text to ``out``; go on where an earlier run stopped.

    Finished windows are kept in ``OUT.partial``, whose first line says what was asked of which
    texts. The same command again goes on behind them, another one refuses. ``out`` appears when
    all is there.

    Args:
        source: The texts.
        work: Gives the records of some texts; ``line`` is put before their fields.
        out: The file.
        settings: What decides about the records, in JSON's types.
        window: Texts worked on between two writes.
        overwrite: Replace ``out``, and start anew.
        progress: Show a progress bar.

    Returns:
        How many records were there already.

    Raises:
        FileExistsError: If ``out`` is there already.
        ValueError: If the unfinished file belongs to another command.
    """
    partial = partial_of(out)
    if overwrite:
        partial.unlink(missing_ok=True)
    elif out.exists():
        raise FileExistsError(f"out={str(out)!r} exists; name another or add --overwrite")
    header = {"format": _FORMAT, "version": 1, "texts": source.digest, **settings}
    done = 0
    if partial.exists():
        kept = _whole_lines(partial)
        if not kept or json.loads(kept[0]) != json.loads(_json_line(header)):
            raise ValueError(
                f"{partial} was left by another command or other texts; finish that one, or add"
                " --overwrite to start anew"
            )
        done = len(kept) - 1
        with partial.open("r+b") as file:
            file.truncate(sum(map(len, kept)))
    with partial.open("ab") as file, progress_bar(len(source.texts), shown=progress) as bar:
        if not done and not file.tell():
            file.write(_json_line(header))
        bar.update(done)
        for records, lines in _windows(source, work, done, window):
            for record, line in zip(records, lines, strict=True):
                file.write(_json_line({"line": line, **record}))
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(lines))
    _without_header(partial, out)
    return done


def _windows(
    source: Texts,
    work: Callable[[Sequence[str]], Sequence[Mapping[str, Any]]],
    done: int,
    window: int,
) -> Iterator[tuple[Sequence[Mapping[str, Any]], list[int]]]:
    for start in range(done, len(source.texts), window):
        part = source.texts[start : start + window]
        yield work(part), source.lines[start : start + window]


def _without_header(partial: Path, out: Path) -> None:
    with replacing(out) as file, partial.open("rb") as rows:
        rows.readline()
        shutil.copyfileobj(rows, file)
    partial.unlink()
