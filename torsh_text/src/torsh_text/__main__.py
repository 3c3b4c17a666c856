"""The torsh-text command."""

import json
import platform
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal


def _show(rows: Iterable[tuple[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", title, title_justify="left", box=None)
    for key, value in rows:
        table.add_row(key, str(value))
    Console(markup=False, emoji=False).print(table)  # texts are shown as they are


def doctor(*, json: bool = False) -> None:
    """Say what this machine has and which attention will run.

    Args:
        json: Print JSON instead of a table.
    """
    import importlib.metadata
    import importlib.util
    import os

    import torch

    from . import __version__
    from ._attention import packed_path, varlen_options

    found: dict[str, Any] = {"torsh-text": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "safetensors"):
        found[package] = importlib.metadata.version(package)
    extras = {"scikit-learn": "sklearn", "matplotlib": "matplotlib", "rich": "rich"}
    for package, module in extras.items():
        there = importlib.util.find_spec(module) is not None
        found[package] = importlib.metadata.version(package) if there else "missing (an extra)"
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        name = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        path = packed_path(device, dtype)
        found[str(device)] = f"{name}: {path.name} attention ({path.why})"
    options = varlen_options()
    found["varlen options"] = ", ".join(
        name for name in ("window_size", "enable_gqa", "num_splits") if name in options
    )
    found["threads"] = torch.get_num_threads()
    parallel = os.environ.get("TOKENIZERS_PARALLELISM", "").lower()
    slow = parallel in ("0", "false", "off", "no")
    found["tokenizing"] = (
        "one thread; unset TOKENIZERS_PARALLELISM to use all" if slow else "all cores"
    )
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "on", "yes")
    found["model hub"] = "offline (HF_HUB_OFFLINE): only cached models" if offline else "online"
    if json:
        _print_json(found)
    else:
        _show(found.items(), "")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _read_texts(file: Path, field: str) -> tuple[list[str], list[int]]:
    """Lines of a text file, or one field of each object of a ``.jsonl`` file.

    Only a line feed ends a line: JSON may hold U+2028 and its like, which ``str.splitlines`` cuts.

    Returns:
        The texts and their line numbers, from 1; blank lines are left out, but counted.
    """
    texts: list[str] = []
    numbers: list[int] = []
    with file.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            text = line.rstrip("\r\n")
            if file.suffix == ".jsonl":
                try:
                    text = json.loads(line)[field]
                except (json.JSONDecodeError, KeyError, TypeError):
                    text = None
                if not isinstance(text, str):
                    raise SystemExit(
                        f"{file}:{number} is no JSON object with a field {field!r} that is a string"
                    )
            texts.append(text)
            numbers.append(number)
    if not texts:
        raise SystemExit(f"{file} holds no text")
    return texts, numbers


def _encoded(texts: list[str], model: str) -> tuple[Any, Any]:
    from ._encoder import Encoder

    encoder = Encoder.from_pretrained(model)
    return encoder, encoder.encode(texts, progress=sys.stderr.isatty())


_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def embed(
    file: Path, /, *, out: Path | None = None, model: str = _MODEL, field: str = "text"
) -> None:
    """Write the vectors of a file's texts as safetensors, with their origin in its metadata.

    Args:
        file: One text a line, or a .jsonl file.
        out: The safetensors file; FILE with the suffix .safetensors if not given. Only an
            earlier file of vectors is replaced.
        model: Hub id or folder of the model.
        field: Field of the .jsonl objects that holds the text.
    """
    from ._vectors import check_target, save_vectors

    target = out or file.with_suffix(".safetensors")
    texts, _ = _read_texts(file, field)
    check_target(target, file)
    encoder, vectors = _encoded(texts, model)
    save_vectors(target, vectors, model=model, fingerprint=encoder.fingerprint)
    print(f"{len(texts):,} vectors of {encoder.dim} entries in {target}")


def search(
    file: Path,
    queries: tuple[str, ...],
    /,
    *,
    k: int = 5,
    model: str = _MODEL,
    field: str = "text",
    json: bool = False,
) -> None:
    """Find the texts of a file that are closest to each query.

    Args:
        file: One text a line, or a .jsonl file.
        queries: What to look for.
        k: How many texts for each query.
        model: Hub id or folder of the model.
        field: Field of the .jsonl objects that holds the text.
        json: Print JSON instead of tables.
    """
    from ._similarity import search as find

    texts, lines = _read_texts(file, field)
    encoder, vectors = _encoded(texts, model)
    scores, ids = find(encoder.encode(list(queries)), vectors, min(k, len(texts)))
    found = [
        {
            "query": query,
            "matches": [
                {"score": round(score, 4), "line": lines[index], "text": texts[index]}
                for score, index in zip(row_scores, row_ids, strict=True)
            ],
        }
        for query, row_scores, row_ids in zip(queries, scores.tolist(), ids.tolist(), strict=True)
    ]
    if json:
        _print_json(found)
        return
    for entry in found:
        _show([(f"{m['score']:.3f}", m["text"]) for m in entry["matches"]], entry["query"])


def cluster(
    file: Path,
    /,
    *,
    k: int | Literal["auto"] = "auto",
    method: Literal["kmeans", "spherical", "agglomerative", "hdbscan"] = "kmeans",
    seed: int = 0,
    model: str = _MODEL,
    field: str = "text",
    json: bool = False,
) -> None:
    """Group the texts of a file and name the groups.

    Args:
        file: One text a line, or a .jsonl file.
        k: Number of groups, or auto.
        method: How to group.
        seed: Seed of the grouping.
        model: Hub id or folder of the model.
        field: Field of the .jsonl objects that holds the text.
        json: Print JSON, with the group of each text, instead of a table.
    """
    from ._cluster import cluster as group
    from ._terms import topic_terms

    texts, _ = _read_texts(file, field)
    _, vectors = _encoded(texts, model)
    found = group(vectors, k=k, method=method, seed=seed)
    topics = topic_terms(texts, found.labels)
    if json:
        groups = [{"label": t.label, "size": t.size, "words": list(t.words)} for t in topics]
        _print_json({"groups": groups, "labels": found.labels.tolist()})
    else:
        rows = [(f"{t.label}", f"{t.size:,} texts: {', '.join(t.words)}") for t in topics]
        _show(rows, "words")


def main() -> None:
    """Run the command line."""
    try:
        from tyro.extras import subcommand_cli_from_dict
    except ImportError:
        raise SystemExit(
            "torsh-text needs its command-line extra: pip install 'torsh-text[cli]'"
        ) from None
    warnings.formatwarning = lambda message, *_, **__: f"torsh-text: {message}\n"
    commands = {"doctor": doctor, "embed": embed, "search": search, "cluster": cluster}
    try:
        subcommand_cli_from_dict(commands, prog="torsh-text")
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise SystemExit(f"torsh-text: {error}") from error


if __name__ == "__main__":
    main()
