"""What commands that look at each text share: refused texts, models seen before, records out."""

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import blake2b
from json import dumps
from pathlib import Path
from shlex import join
from typing import Any

from torch import OutOfMemoryError

from ._jsonl import (
    Texts,
    check_out,
    in_windows,
    living_bar,
    read_texts,
    write_records,
)
from ._printing import print_line, print_table

WINDOW = 1024  # texts between two writes where a text costs milliseconds
_MODEL_FILES = {".json", ".txt", ".model", ".jinja", ".safetensors", ".bin", ".gguf", ".ftz"}

Record = dict[str, Any]
Work = Callable[[Sequence[str]], list[Record]]


def origin(model: str | Path) -> Record | str:
    """Name a model and what changes when it does: the state of its files, or its commit.

    A model of the hub is looked up, and fetched if this machine has it not: only then its commit
    is known. Without a network the one in the local cache counts.

    Raises:
        FileNotFoundError: If a model of the hub is not to be had.
    """
    path = Path(model)
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    seen = [
        (str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
        if file.suffix in _MODEL_FILES and file.is_file()
    ]
    if not seen:
        return str(model) if isinstance(model, Path) else _of_hub(model)
    return {"name": str(model), "files": blake2b(repr(seen).encode(), digest_size=16).hexdigest()}


def _of_hub(model: str) -> Record:
    from ._backbone import find_model

    folder = find_model(model, revision=None, local_files_only=False, trust_remote_code=False)
    return {"name": model, "commit": folder.name}


def run(
    file: Path,
    field: str,
    load: Callable[[], Work],
    *,
    out: Path | None,
    overwrite: bool,
    json: bool,
    settings: Record,
    show: Callable[[Record], str],
    models: Mapping[str, str | Path] | None = None,
    window: int = WINDOW,
) -> None:
    """Read texts, let ``load()`` work on them, and write or print a record for each.

    A text that is refused gets a record with the field ``error``. An unfinished file goes on only
    with the same ``settings`` and the same ``models``, by their :func:`origin`.

    Raises:
        SystemExit: At the end, if a text was refused.
    """
    if out is not None:
        check_out(out, overwrite=overwrite, source=file, suffix=".jsonl")
    source = read_texts(file, field)
    if out is not None:
        origins = {name: origin(model) for name, model in (models or {}).items()}
        written = write_records(
            source,
            _patient(load),
            out,
            settings={**settings, **origins},
            window=window,
            overwrite=overwrite,
            progress=sys.stderr.isatty(),
        )
        before = f", {written.before:,} of them from an earlier run" if written.before else ""
        print_line(f"{len(source.texts):,} records in {out}{before}")
        _report_refused(written.refused, len(source.texts))
        return
    records = records_of(source, load, window)
    if json:
        for line, record in zip(source.lines, records, strict=True):
            print_line(dumps({"line": line, **record}, ensure_ascii=False))
    else:
        shown = [f"({r['error']})" if "error" in r else show(r) for r in records]
        texts = [text.encode(errors="replace").decode() for text in source.texts]
        print_table(list(zip(shown, texts, strict=True)), "text")
    _report_refused(sum("error" in record for record in records), len(records))


def records_of(source: Texts, load: Callable[[], Work], window: int = WINDOW) -> list[Record]:
    """Work on all texts, with a progress bar."""
    records: list[Record] = []
    with living_bar(len(source.texts), shown=sys.stderr.isatty()) as bar:
        for found, _ in in_windows(source, _patient(load), window):
            records += map(dict, found)
            bar.update(len(found))
    return records


def check_spaced(option: str, names: Sequence[str]) -> None:
    """Refuse names that were separated by commas, which would be one name.

    Raises:
        ValueError: If there is a single name that holds a comma.
    """
    if len(names) == 1 and "," in names[0]:
        parts = join(part.strip() for part in names[0].split(","))
        raise ValueError(
            f"{option}={names[0]!r} is a single name; put spaces between names: --{option} {parts}"
        )


@contextmanager
def has_head(model: str, instead: str) -> Generator[None]:
    """Say what a command takes, where the loader would have labels to train a new head."""
    from ._heads import MissingHeadError

    try:
        yield
    except MissingHeadError as error:
        raise ValueError(
            f"{model!r} has no trained head for this: {error.lack}; give {instead}"
        ) from error


def _report_refused(refused: int, total: int) -> None:
    """End with status 1 if texts were refused."""
    if refused:
        raise SystemExit(
            f"torsh-text: {refused:,} of {total:,} texts were refused; the field 'error' of their"
            " records says why"
        )


def _patient(load: Callable[[], Work]) -> Callable[[Sequence[str]], Sequence[Mapping[str, Any]]]:
    """Load when there is something to do, and give refused texts a record that says why."""
    loaded = cache(load)
    return lambda texts: _accepted(loaded(), list(texts)) if texts else []


def _accepted(work: Work, texts: list[str], *, tried: bool = False) -> list[Record]:
    """Halve what fails until the refused texts are alone."""
    try:
        return work(texts)
    except OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:
        if not tried:
            work(["a"])  # which any model takes: if this fails too, no text is to blame
        if len(texts) == 1:
            return [{"error": str(error).replace("texts[0]", "the text")}]
    middle = len(texts) // 2
    return [
        *_accepted(work, texts[:middle], tried=True),
        *_accepted(work, texts[middle:], tried=True),
    ]
