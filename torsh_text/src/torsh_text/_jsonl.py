"""Texts in, one JSON record a text out: files of the command line, written so that they resume."""

import fcntl
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO, NamedTuple

from ._runtime import progress_bar
from ._writing import replacing

GOES_ON = "the same command goes on from here"
_JSON_LINES = (".jsonl", ".ndjson")
_DELIMITERS = {".csv": "", ".tsv": r", delimiter='\t'"}
_FORMAT = "torsh-text-partial"
_MARK = f'{{"format": "{_FORMAT}"'.encode()


@dataclass(frozen=True)
class Texts:
    """Texts of a file.

    Attributes:
        texts: The texts; blank lines are left out. The whole line where no text is found in it.
        lines: Their line numbers, from 1, with blank lines counted.
        faults: Lines that hold no text, and why.
    """

    texts: list[str]
    lines: list[int]
    faults: dict[int, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Hash of all texts and their lines."""
        total = hashlib.blake2b(repr(self.lines).encode(), digest_size=16)
        for text in self.texts:
            total.update(hashlib.blake2b(text.encode("utf-8", "surrogatepass")).digest())
        return total.hexdigest()


def read_texts(file: Path, field: str) -> Texts:
    """Read the lines of a text file, or one field of each object of a ``.jsonl`` file.

    A byte order mark at the beginning is no part of the text. Only a line feed ends a line: JSON
    may hold U+2028 and its like, which ``str.splitlines`` cuts. Bytes that are no UTF-8 become lone
    surrogates. A bad line is one of the ``faults`` and does not hide the others.

    Args:
        file: The file; ``-`` for the standard input, one text a line.
        field: Field of the objects that holds the text.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it is a folder or cannot be read.
        ValueError: If there is no text, or no line is an object with that field, or a field is
            named for a file that has none, or it is a table or one JSON value.
    """
    if (delimiter := _DELIMITERS.get(file.suffix.lower())) is not None:
        raise ValueError(
            f"{str(file)!r} is a table, not one text a line; make JSON lines of it, and name the"
            ' column with --field: python -c "import csv, json, sys; [print(json.dumps(row)) for'
            f' row in csv.DictReader(sys.stdin{delimiter})]" < {quote(str(file))} >'
            f" {quote(str(file.with_suffix('.jsonl')))}"
        )
    if field != "text" and file.suffix.lower() not in _JSON_LINES:
        raise ValueError(
            f"field={field!r} is for .jsonl files, {str(file)!r} is read line by line; leave it out"
        )
    if str(file) == "-":
        return _parsed(sys.stdin, file, field)
    try:
        with file.open(encoding="utf-8", errors="surrogateescape", newline="\n") as source:
            return _parsed(source, file, field)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {str(file)!r}") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{str(file)!r} is a folder; name a file of texts") from None
    except OSError as error:
        raise OSError(f"cannot read {str(file)!r}: {error.strerror}") from error


def _parsed(source: Iterable[str], file: Path, field: str) -> Texts:
    found = Texts([], [])
    lacking, first_lack = 0, ""
    for number, line in enumerate(source, 1):
        if number == 1:
            line = line.removeprefix("\ufeff")
            if file.suffix.lower() == ".json" and line.lstrip().startswith(("[", "{")):
                raise ValueError(
                    f"{str(file)!r} is JSON, not one text a line; write an object a line to a file"
                    ' that ends in .jsonl; from a list: python -c "import json, sys;'
                    f' [print(json.dumps(row)) for row in json.load(sys.stdin)]" <'
                    f" {quote(str(file))} > {quote(str(file.with_suffix('.jsonl')))}"
                )
        if not line.strip():
            continue
        text, lack = line.rstrip("\r\n"), None
        if file.suffix.lower() in _JSON_LINES:
            text, lack = _text_of(text, field)
        if lack is not None:
            lacking += 1
            first_lack = first_lack or f"{file}:{number}: {lack}{_remedy(lack)}"
        if (why := lack or why_no_text(text)) is not None:
            found.faults[number] = why
        found.texts.append(text)
        found.lines.append(number)
    if not found.texts:
        raise ValueError(f"{file} holds no text")
    if lacking == len(found.texts):
        raise ValueError(first_lack)
    return found


def _text_of(line: str, field: str) -> tuple[str, str | None]:
    """Text in one line of JSON lines; or the line and why there is none."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        return line, f"the line is no JSON: {error.msg} at column {error.colno}"
    except ValueError as error:  # a number of too many digits
        return line, f"the line is no JSON: {error}"
    if not isinstance(found, dict):
        return line, f"the line is no JSON object with a field {field!r}"
    if field not in found:
        names = ", ".join(map(repr, found)) or "none at all"
        return line, f"the line has no field {field!r} but {names}"
    if not isinstance(found[field], str):
        return line, f"the field {field!r} holds {json.dumps(found[field])[:40]}, no string"
    return found[field], None


def _remedy(lack: str) -> str:
    return "; name the one that holds the text with --field" if "field" in lack else ""


def why_no_text(text: str) -> str | None:
    """Say why a string is no Unicode text, which no model takes; None if it is one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"character {error.start} is a lone surrogate or no UTF-8"
    return None


def check_out(
    out: Path,
    *,
    overwrite: bool,
    source: Path | None = None,
    option: str = "out",
    suffix: str | None = None,
) -> None:
    """Refuse to write where something would be lost, or a name that says something else.

    Args:
        out: The file to write.
        overwrite: Whether it may replace what is there.
        source: The file of the texts, which is never replaced.
        option: What names ``out``, for messages.
        suffix: How its name has to end; None for any way.

    Raises:
        FileExistsError: If ``out`` is there already and may not be replaced.
        FileNotFoundError: If its folder is not there.
        IsADirectoryError: If it is a folder.
        ValueError: If it is the file of the texts, or its name ends in another way.
    """
    if not out.parent.is_dir():
        raise FileNotFoundError(
            f"{option}={str(out)!r}: there is no folder {str(out.parent)!r}; make it first"
        )
    if out.is_dir():
        raise IsADirectoryError(f"{option}={str(out)!r} is a folder; name a file in it")
    if out.exists():
        if source is not None and source.exists() and out.samefile(source):
            raise ValueError(f"{option}={str(out)!r} is the file of the texts; name another")
        if not overwrite:
            raise FileExistsError(f"{option}={str(out)!r} exists; name another or add --overwrite")
    if suffix is not None and out.suffix != suffix:
        what = "a record a line" if suffix == ".jsonl" else "one JSON value"
        raise ValueError(f"{option}={str(out)!r} gets {what}; end its name in {suffix}")


def _json_line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def partial_of(out: Path) -> Path:
    """Where unfinished records of ``out`` are kept."""
    return out.with_name(out.name + ".partial")


Work = Callable[[Sequence[str]], Sequence[Mapping[str, Any]]]


class Written(NamedTuple):
    """What is in a file of records: how many were there before, how many hold an error."""

    before: int
    refused: int


def write_records(
    source: Texts,
    work: Work,
    out: Path,
    *,
    settings: Mapping[str, Any],
    window: int,
    overwrite: bool,
    progress: bool,
) -> Written:
    """Write one JSON object for each text to ``out``; go on where an earlier run stopped.

    Finished windows are kept in ``OUT.partial``, whose first line says what was asked of which
    texts. The same command again goes on behind them, another one refuses. ``out`` appears when
    all is there. One process at a time may write.

    Args:
        source: The texts.
        work: Gives the records of some texts; ``line`` is put before their fields.
        out: The file.
        settings: What decides about the records, in JSON's types.
        window: Texts worked on between two writes.
        overwrite: Replace ``out``, and what another command left unfinished.
        progress: Show a progress bar.

    Raises:
        FileExistsError: If ``out`` is there already.
        ValueError: If the unfinished file belongs to another command.
        RuntimeError: If another process is writing, or the unfinished file is damaged.
    """
    partial = partial_of(out)
    header = _json_line({"format": _FORMAT, "version": 1, "texts": source.digest, **settings})
    with _held(partial) as file:
        try:
            check_out(out, overwrite=overwrite)
            before = _resumed(file, header, partial, overwrite=overwrite)
            with living_bar(len(source.texts), shown=progress) as bar:
                bar.update(before)
                for records, lines in in_windows(source, work, window, start=before):
                    for record, line in zip(records, lines, strict=True):
                        file.write(_json_line({"line": line, **record}))
                    _to_disk(file)
                    bar.update(len(lines))
            refused = _publish(partial, out, source.lines)
        except KeyboardInterrupt as stop:
            raise (stop if _is_bare(file) else KeyboardInterrupt(GOES_ON)) from None
        finally:
            if _is_bare(file):
                partial.unlink(missing_ok=True)
        partial.unlink()
    return Written(before, refused)


@contextmanager
def living_bar(total: int, *, shown: bool) -> Generator[Any]:
    """A progress bar whose clock goes on while a model loads or a window is computed."""
    done = threading.Event()

    def tick() -> None:
        while not done.wait(1.0):
            bar.refresh()

    clock = threading.Thread(target=tick, daemon=True)
    with progress_bar(total, shown=shown) as bar:
        if shown:
            clock.start()
        try:
            yield bar
        finally:
            done.set()
            if shown:
                clock.join()


def in_windows(
    source: Texts, work: Work, window: int, *, start: int = 0
) -> Iterator[tuple[Sequence[Mapping[str, Any]], list[int]]]:
    """Work on some texts after the other: their records and lines; faults become records too."""
    for first in range(start, len(source.texts), window):
        part = slice(first, first + window)
        lines = source.lines[part]
        pairs = zip(source.texts[part], lines, strict=True)
        records = iter(work([text for text, line in pairs if line not in source.faults]))
        yield (
            [
                {"error": source.faults[line]} if line in source.faults else next(records)
                for line in lines
            ],
            lines,
        )


@contextmanager
def _held(path: Path) -> Generator[BinaryIO]:
    """Open a file to read and append, for this process alone; made if it is not there."""
    while True:
        with path.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(
                    f"another process is writing {path}; wait until it is done, or name another"
                    " --out"
                ) from None
            # who held it until now may have removed it, and another may have made a new one
            if _is_at(path, file):
                yield file
                return


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _is_bare(file: BinaryIO) -> bool:
    """Whether an unfinished file holds no record: nothing, or its first line, perhaps torn."""
    file.seek(0)
    header = file.readline()
    return header.startswith(_MARK[: len(header)]) and not file.readline().endswith(b"\n")


def _resumed(file: BinaryIO, header: bytes, partial: Path, *, overwrite: bool) -> int:
    """Count the records of an earlier run, cut off the torn one behind them, or start anew."""
    if not _is_bare(file):
        file.seek(0)
        if file.readline() == header:
            whole = [len(line) for line in file if line.endswith(b"\n")]
            file.truncate(len(header) + sum(whole))
            return len(whole)
        if not overwrite:
            raise ValueError(
                f"{partial} was left by another command or other texts{_changed(file, header)};"
                " finish that one, or add --overwrite to start anew"
            )
    file.truncate(0)
    file.write(header)
    _to_disk(file)
    return 0


def _changed(file: BinaryIO, header: bytes) -> str:
    """Say which settings of an unfinished file are not those of this run."""
    file.seek(0)
    try:
        then, now = json.loads(file.readline()), json.loads(header)
        names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    except (ValueError, TypeError, AttributeError):  # not a file of ours
        return ""
    return f" (changed: {', '.join(names)})"


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _publish(partial: Path, out: Path, lines: list[int]) -> int:
    """Move the records to ``out`` if there is one for each line; return how many hold an error."""
    refused = 0
    with replacing(out) as file, partial.open("rb") as rows:
        rows.readline()
        try:
            for line, row in zip(lines, rows, strict=True):
                record = json.loads(row)
                if record["line"] != line:
                    raise ValueError(line)
                refused += "error" in record
                file.write(row)
        except (ValueError, KeyError, TypeError) as error:
            raise RuntimeError(
                f"{partial} does not hold one record for each text; remove it and run the command"
                " again"
            ) from error
    return refused
