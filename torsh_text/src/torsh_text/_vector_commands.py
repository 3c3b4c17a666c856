"""Commands that look at all texts of a file together: embed, search, cluster, topics."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ._jsonl import GOES_ON, Texts, check_out, read_texts, why_no_text
from ._printing import json_text, print_json, print_line, print_table
from ._writing import write_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from ._encoder import Encoder

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


def _read(file: Path, field: str, out: Path | None, *, overwrite: bool) -> Texts:
    """Read texts that a model takes, if what comes of them may be written."""
    if out is not None:
        check_out(out, overwrite=overwrite, source=file)
    source = read_texts(file, field)
    for line, text in zip(source.lines, source.texts, strict=True):
        if (why := why_no_text(text)) is not None:
            raise ValueError(f"{file}:{line}: {why}; mend or remove it")
    return source


def _encoded(
    texts: list[str], model: str, cache: Path | None, *, roles: tuple[str, ...] = ()
) -> "tuple[Encoder, Tensor]":
    """Load an encoder and encode texts with the first of its prompts named in ``roles``."""
    from ._encoder import Encoder

    encoder = Encoder.from_pretrained(model)
    prompt = _prompt(encoder, *roles)
    try:
        found = encoder.encode(texts, prompt=prompt, cache=cache, progress=sys.stderr.isatty())
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*[GOES_ON] if cache is not None else []) from None
    return encoder, found


def _prompt(encoder: "Encoder", *roles: str) -> str | None:
    return next((encoder.prompts[role] for role in roles if role in encoder.prompts), None)


def _write(found: Any, out: Path, count: int) -> None:
    write_bytes(out, (json_text(found) + "\n").encode())
    print_line(f"{count:,} texts in {out}")


def embed(
    file: Path,
    /,
    *,
    out: Path | None = None,
    model: str = ENCODER,
    field: str = "text",
    cache: Path | None = None,
) -> None:
    """Write the vectors of a file's texts as safetensors, with their origin in its metadata.

    Args:
        file: One text a line, or a .jsonl file; - for the standard input.
        out: The safetensors file; FILE with the suffix .safetensors if not given, so it has to be
            given with -. Only an earlier file of vectors is replaced.
        model: Hub id or folder of the model.
        field: Field of the .jsonl objects that holds the text.
        cache: Folder that keeps the vectors: an interrupted run goes on, and later runs compute
            only new texts.
    """
    from ._vectors import check_target, save_vectors

    if out is None and file == Path("-"):
        raise ValueError("the vectors of the standard input have no file; name it with --out")
    target = out or file.with_suffix(".safetensors")
    check_target(target, file)
    texts = _read(file, field, None, overwrite=False).texts
    encoder, vectors = _encoded(texts, model, cache)
    save_vectors(target, vectors, model=model, fingerprint=encoder.fingerprint)
    print_line(f"{len(texts):,} vectors of {encoder.dim} entries in {target}")


def search(
    file: Path,
    queries: tuple[str, ...],
    /,
    *,
    k: int = 5,
    model: str = ENCODER,
    field: str = "text",
    cache: Path | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Find the texts of a file that are closest to each query.

    If the model knows prompts for queries and documents, they are used.

    Args:
        file: One text a line, or a .jsonl file; - for the standard input.
        queries: What to look for.
        k: How many texts for each query.
        model: Hub id or folder of the model.
        field: Field of the .jsonl objects that holds the text.
        cache: Folder that keeps the vectors for later runs.
        out: A .json file for what --json prints.
        overwrite: Replace OUT.
        json: Print JSON instead of tables.
    """
    from ._similarity import search as find

    if not queries:
        raise ValueError("queries is empty; write what to look for behind the file")
    source = _read(file, field, out, overwrite=overwrite)
    encoder, vectors = _encoded(source.texts, model, cache, roles=("document", "passage", "corpus"))
    asked = encoder.encode(list(queries), prompt=_prompt(encoder, "query"))
    scores, ids = find(asked, vectors, min(k, len(source.texts)))
    found = [
        {
            "query": query,
            "matches": [
                {
                    "score": round(score, 4),
                    "line": source.lines[index],
                    "text": source.texts[index],
                }
                for score, index in zip(row_scores, row_ids, strict=True)
            ],
        }
        for query, row_scores, row_ids in zip(queries, scores.tolist(), ids.tolist(), strict=True)
    ]
    if out is not None:
        _write(found, out, len(source.texts))
        return
    if json:
        print_json(found)
        return
    for entry in found:
        print_table([(f"{m['score']:.3f}", m["text"]) for m in entry["matches"]], entry["query"])


def cluster(
    file: Path,
    /,
    *,
    k: int | Literal["auto"] = "auto",
    method: Literal["kmeans", "spherical", "agglomerative", "hdbscan"] = "kmeans",
    seed: int = 0,
    model: str = ENCODER,
    field: str = "text",
    cache: Path | None = None,
    plot: Path | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Group the texts of a file and name the groups.

    Args:
        file: One text a line, or a .jsonl file; - for the standard input.
        k: Number of groups, or auto.
        method: How to group.
        seed: Seed of the grouping.
        model: Hub id or folder of the model.
        field: Field of the .jsonl objects that holds the text.
        cache: Folder that keeps the vectors for later runs.
        plot: Picture of the texts as points, such as map.svg.
        out: A .json file for what --json prints.
        overwrite: Replace OUT.
        json: Print JSON, with the group of each text, instead of a table.
    """
    from ._cluster import cluster as group
    from ._terms import topic_terms

    _check_picture(plot)
    texts = _read(file, field, out, overwrite=overwrite).texts
    _, vectors = _encoded(texts, model, cache)
    found = group(vectors, k=k, method=method, seed=seed)
    terms = topic_terms(texts, found.labels)
    names = [", ".join(t.words[:3]) for t in terms]
    if plot is not None:
        from ._plot import plot_map

        _save(plot_map(vectors, found.labels, names=names), plot)
    groups = [{"label": t.label, "size": t.size, "words": list(t.words)} for t in terms]
    result = {"groups": groups, "labels": found.labels.tolist()}
    if out is not None:
        _write(result, out, len(texts))
    elif json:
        print_json(result)
    else:
        rows = [(f"{t.label}", f"{t.size:,} texts: {', '.join(t.words)}") for t in terms]
        print_table(rows, "words")


def topics(
    file: Path,
    /,
    *,
    k: int | Literal["auto"] = "auto",
    method: Literal["kmeans", "spherical", "hdbscan", "nmf"] = "kmeans",
    seed: int = 0,
    model: str = ENCODER,
    field: str = "text",
    cache: Path | None = None,
    save: Path | None = None,
    plot: Path | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Find the topics of a file's texts.

    Args:
        file: One text a line, or a .jsonl file; - for the standard input.
        k: Number of topics, or auto; nmf needs a number.
        method: How to find them.
        seed: Seed of all that is random.
        model: Hub id or folder of the encoder.
        field: Field of the .jsonl objects that holds the text.
        cache: Folder that keeps the vectors for later runs.
        save: Where to keep the topic model, for TopicModel.load.
        plot: Picture of the texts as points, such as map.svg.
        out: A .json file for what --json prints.
        overwrite: Replace OUT.
        json: Print JSON, with the topic of each text, instead of a table.
    """
    from ._topics import TopicModel

    _check_picture(plot)
    texts = _read(file, field, out, overwrite=overwrite).texts
    encoder, vectors = _encoded(texts, model, cache)
    used = None if method == "nmf" else vectors  # which looks at words
    fitted = TopicModel(encoder, k=k, method=method, seed=seed).fit(texts, vectors=used)
    found = fitted.transform(texts, vectors=used)
    if save is not None:
        fitted.save(save)
    if plot is not None:
        from ._plot import plot_topic_map

        _save(plot_topic_map(vectors, found.labels, fitted.topics), plot)
    kept = ("id", "size", "words", "documents")
    described = [{name: getattr(t, name) for name in kept} for t in fitted.topics]
    result = {"topics": described, "labels": found.labels.tolist()}
    if out is not None:
        _write(result, out, len(texts))
    elif json:
        print_json(result)
    else:
        print_table(
            [(str(t.id), f"{t.size:,} texts: {', '.join(t.words)}") for t in fitted.topics],
            "words",
        )


def _check_picture(path: Path | None) -> None:
    """Refuse a picture that could not be written, before anything is computed."""
    if path is None:
        return
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install 'torsh-text[plot]'") from None
    known = sorted(FigureCanvasBase.filetypes)
    if path.suffix.removeprefix(".") not in known:
        raise ValueError(
            f"plot={str(path)!r} is no kind of picture; end it in .{', .'.join(known)}"
        )


def _save(axes: Any, path: Path) -> None:
    figure = axes.figure
    figure.savefig(path, bbox_inches="tight")
