"""Why there is nothing to read at a path, and what to do about it."""

import os
from collections import Counter
from pathlib import Path

from torch.utils.data import Dataset

from torsh_data._images import is_image_tree
from torsh_data._index import INDEX_NAME

REMEDIES = {
    ".csv": "; write it as shards first: convert(source, out)",
    ".tsv": "; write it as shards first: convert(source, out)",
    ".json": "; one object a line is JSON Lines: name such a file .jsonl",
    ".tgz": ": unpack it first",
    ".gz": ": unpack it first",
    ".zst": ": unpack it first",
}


def explain(source: object, formats: str) -> FileNotFoundError:
    """What to raise for a source without files of these formats."""
    start = f"source={source!r}"
    path = Path(source) if isinstance(source, (str, os.PathLike)) else None
    if path is None or "://" in str(source):
        return FileNotFoundError(f"{start}: no {formats} files there")
    if not path.is_dir():
        if any(sign in str(path) for sign in "*?["):
            return FileNotFoundError(f"{start}: no file has such a name")
        return FileNotFoundError(f"{start} does not exist")
    if is_image_tree(path):
        return FileNotFoundError(
            f"{start} holds folders of pictures; write them as shards first: convert(source, out)"
        )
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    kinds = Counter(entry.suffix.lower() for entry in entries if entry.is_file())
    if not kinds:
        held = f"holds the folders {sorted(p.name for p in entries)[:5]}" if entries else "is empty"
        return FileNotFoundError(
            f"{start} {held} and no {formats} files; a folder without an {INDEX_NAME} may also be "
            "one whose writer did not finish"
        )
    suffix, count = kinds.most_common(1)[0]
    remedy = REMEDIES.get(suffix, "")
    if suffix in (".jpg", ".jpeg", ".png"):
        remedy = (
            "; convert() reads pictures from one folder for each class, and write_shards() takes "
            'any samples, such as {"image": path.read_bytes(), "label": ...}'
        )
    return FileNotFoundError(
        f"{start} holds {count} {suffix or 'nameless'} files and no {formats} files{remedy}"
    )


_AS_SAMPLES = {"pandas": "source.to_dict('records')", "polars": "source.to_dicts()"}


def refuse_samples(source: object) -> None:
    """Raise if a source is no list of paths but the samples themselves."""
    kind = type(source)
    start = f"source is a {kind.__module__.partition('.')[0]}.{kind.__name__}, and not files"
    samples = _AS_SAMPLES.get(kind.__module__.partition(".")[0])
    if kind.__module__ == "pyarrow.lib":
        samples = "source.to_pylist()"
    if samples is not None:
        raise TypeError(f"{start}; make shards of it: write_shards({samples}, out)")
    if isinstance(source, Dataset) or not hasattr(kind, "__iter__"):
        raise TypeError(
            f"{start}; make shards of its samples, as mappings: "
            'write_shards([{"x": x, "y": y} for x, y in source], out)'
        )
