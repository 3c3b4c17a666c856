"""Commands that look at all texts of a file: embed, search, cluster, topics, duplicates."""

import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ._default_models import ENCODER
from ._jsonl import GOES_ON, Texts, check_out, read_texts
from ._printing import json_text, print_json, print_line, print_table, rounded
from ._writing import replacing, write_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from ._encoder import Encoder
    from ._near_duplicates import Duplicates

Long = Literal["truncate", "error", "mean"]
_NOT_KEPT = "--cache FOLDER would keep what it computes for the next run"


def _read(file: Path, field: str, *, overwrite: bool, **targets: Path | None) -> Texts:
    """Read texts that a model takes, if what comes of them may be written to ``targets``."""
    named: dict[Path, str] = {}
    for option, path in targets.items():
        if path is None:
            continue
        suffix = ".json" if option == "out" else None
        check_out(path, overwrite=overwrite, source=file, option=option, suffix=suffix)
        if (other := named.setdefault(path.resolve(), option)) != option:
            raise ValueError(f"{other} and {option} are both {str(path)!r}; name two files")
    source = read_texts(file, field)
    for line, why in source.faults.items():
        raise ValueError(f"{file}:{line}: {why}; mend or remove it")
    return source


def _refuse(options: Mapping[str, object], method: str) -> None:
    """Refuse options that a method does not use."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}={str(value)!r} is not for --method {method}; leave it out")


def _encoded(
    file: Path,
    source: Texts,
    model: str,
    cache: Path | None,
    *,
    long: Long,
    device: str | None,
    roles: tuple[str, ...] = (),
) -> "tuple[Encoder, Tensor]":
    """Load an encoder and encode texts with the first of its prompts named in ``roles``."""
    from ._encoder import Encoder

    encoder = Encoder.from_pretrained(model, device=device)
    prompt = _prompt(encoder, *roles)
    try:
        found = encoder.encode(
            source.texts, prompt=prompt, long=long, cache=cache, progress=sys.stderr.isatty()
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_NOT_KEPT if cache is None else GOES_ON) from None
    except (ValueError, RuntimeError) as error:
        raise type(error)(_with_lines(str(error), file, source)) from error
    return encoder, found


def _prompt(encoder: "Encoder", *roles: str) -> str | None:
    return next((encoder.prompts[role] for role in roles if role in encoder.prompts), None)


def _with_lines(message: str, file: Path, source: Texts) -> str:
    """Name a text by its line, not by its place among those that are not blank."""
    return re.sub(r"texts\[(\d+)\]", lambda m: f"{file}:{source.lines[int(m[1])]}", message)


def _write(found: Any, out: Path, count: int) -> None:
    write_bytes(out, (json_text(found) + "\n").encode())
    print_line(f"{count:,} texts in {out}")


def embed(
    file: Path,
    /,
    *,
    out: Path | None = None,
    model: str = ENCODER,
    long: Long = "truncate",
    device: str | None = None,
    field: str = "text",
    cache: Path | None = None,
) -> None:
    """Write the vectors of a file's texts as safetensors, with their origin in its metadata.

    Args:
        file: One text a line, or a .jsonl file; - for the standard input.
        out: The safetensors file; FILE with the suffix .safetensors if not given, so it has to be
            given with -. Only an earlier file of vectors is replaced.
        model: Hub id or folder of the model.
        long: What happens to a text that is too long: truncate cuts it, error refuses it, mean
            averages the vectors of its pieces.
        device: Where it runs: cpu, cuda, cuda:1; CUDA if there is one, else the CPU.
        field: Field of the .jsonl objects that holds the text.
        cache: Folder that keeps the vectors: an interrupted run goes on, and later runs compute
            only new texts.
    """
    from ._vectors import check_target, save_vectors

    if out is None and file == Path("-"):
        raise ValueError("the vectors of the standard input have no file; name it with --out")
    source = _read(file, field, overwrite=False)
    target = out or file.with_suffix(".safetensors")
    check_target(target, file)
    encoder, vectors = _encoded(file, source, model, cache, long=long, device=device)
    save_vectors(target, vectors, model=model, fingerprint=encoder.fingerprint)
    print_line(f"{len(source.texts):,} vectors of {encoder.dim} entries in {target}")


def search(
    file: Path,
    queries: tuple[str, ...],
    /,
    *,
    k: int | None = None,
    model: str = ENCODER,
    long: Long = "truncate",
    device: str | None = None,
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
        k: How many texts for each query; 5 if not given.
        model: Hub id or folder of the model.
        long: What happens to a text that is too long: truncate cuts it, error refuses it, mean
            averages the vectors of its pieces.
        device: Where it runs: cpu, cuda, cuda:1; CUDA if there is one, else the CPU.
        field: Field of the .jsonl objects that holds the text.
        cache: Folder that keeps the vectors for later runs.
        out: A .json file for what --json prints.
        overwrite: Replace OUT.
        json: Print JSON instead of tables.
    """
    from ._similarity import search as find

    if not queries:
        raise ValueError("there is nothing to look for; write it behind the file")
    if k is not None and k < 1:
        raise ValueError(f"k={k} is not positive")
    source = _read(file, field, overwrite=overwrite, out=out)
    roles = ("document", "passage", "corpus")
    encoder, vectors = _encoded(file, source, model, cache, long=long, device=device, roles=roles)
    asked = encoder.encode(list(queries), prompt=_prompt(encoder, "query"))
    scores, ids = find(asked, vectors, min(k or 5, len(source.texts)))
    found = [
        {
            "query": query,
            "matches": [
                {
                    "score": rounded(score),
                    "line": source.lines[index],
                    "text": source.texts[index],
                }
                for score, index in zip(row_scores, row_ids, strict=True)
            ],
        }
        for query, row_scores, row_ids in zip(queries, scores.tolist(), ids.tolist(), strict=True)
    ]
    if k is not None and k > len(source.texts):
        warnings.warn(
            f"k={k} is more than the {len(source.texts)} texts of {file}; all are ranked",
            stacklevel=2,
        )
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
    long: Long = "truncate",
    device: str | None = None,
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
        long: What happens to a text that is too long: truncate cuts it, error refuses it, mean
            averages the vectors of its pieces.
        device: Where it runs: cpu, cuda, cuda:1; CUDA if there is one, else the CPU.
        field: Field of the .jsonl objects that holds the text.
        cache: Folder that keeps the vectors for later runs.
        plot: Picture of the texts as points, such as map.svg.
        out: A .json file for what --json prints.
        overwrite: Replace OUT and PLOT.
        json: Print JSON, with the group of each text, instead of a table.
    """
    from ._cluster import cluster as group
    from ._terms import topic_terms

    group(torch.empty(0, 1), k=k, method=method)  # which looks at the options only
    _check_picture(plot)
    source = _read(file, field, overwrite=overwrite, plot=plot, out=out)
    texts = source.texts
    _, vectors = _encoded(file, source, model, cache, long=long, device=device)
    found = group(vectors, k=k, method=method, seed=seed)
    terms = topic_terms(texts, found.labels)
    names = [", ".join(t.words[:3]) for t in terms]
    if plot is not None:
        from ._plot import plot_map

        _save(plot_map(vectors, found.labels, names=names), plot, told=not json)
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
    model: str | None = None,
    long: Long | None = None,
    device: str | None = None,
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
        method: How to find them. nmf looks at words and needs no encoder, so that MODEL, LONG,
            DEVICE and CACHE are for --plot there.
        seed: Seed of all that is random.
        model: Hub id or folder of the encoder; sentence-transformers/all-MiniLM-L6-v2 if not
            given.
        long: What happens to a text that is too long: truncate (if not given) cuts it, error
            refuses it, mean averages the vectors of its pieces.
        device: Where it runs: cpu, cuda, cuda:1; CUDA if there is one, else the CPU.
        field: Field of the .jsonl objects that holds the text.
        cache: Folder that keeps the vectors for later runs.
        save: Where to keep the topic model, for TopicModel.load.
        plot: Picture of the texts as points, such as map.svg.
        out: A .json file for what --json prints.
        overwrite: Replace OUT, SAVE and PLOT.
        json: Print JSON, with the topic of each text, instead of a table.
    """
    from ._topics import TopicModel

    if method == "nmf" and k == "auto":
        raise ValueError("--method nmf needs a number of topics; give it with --k")
    fitted = TopicModel(k=k, method=method, seed=seed)
    by_words = method == "nmf"
    if by_words and plot is None:
        _refuse({"model": model, "long": long, "device": device, "cache": cache}, method)
    _check_picture(plot)
    source = _read(file, field, overwrite=overwrite, save=save, plot=plot, out=out)
    texts, vectors = source.texts, None
    if plot is not None or not by_words:
        _, vectors = _encoded(
            file, source, model or ENCODER, cache, long=long or "truncate", device=device
        )
    used = None if by_words else vectors
    found = fitted.fit(texts, vectors=used).transform(texts, vectors=used)
    if save is not None:
        fitted.save(save)
        if not json:
            print_line(f"topic model in {save}")
    if plot is not None and vectors is not None:
        from ._plot import plot_topic_map

        _save(plot_topic_map(vectors, found.labels, fitted.topics), plot, told=not json)
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


def duplicates(
    file: Path,
    /,
    *,
    method: Literal["words", "vectors"] = "words",
    threshold: float | None = None,
    ngram: int | None = None,
    model: str | None = None,
    long: Long | None = None,
    device: str | None = None,
    field: str = "text",
    cache: Path | None = None,
    keep: Path | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Find groups of texts that are almost the same.

    Args:
        file: One text a line, or a .jsonl file; - for the standard input.
        method: words finds copies with small changes, without a model; vectors finds texts that
            say the same.
        threshold: Least similarity, above 0 and at most 1; 0.8 for words and 0.95 for vectors if
            not given.
        ngram: Characters that words are compared by; 5 if not given.
        model: For vectors, hub id or folder of the model; sentence-transformers/all-MiniLM-L6-v2
            if not given.
        long: For vectors, what happens to a text that is too long: truncate (if not given) cuts
            it, error refuses it, mean averages the vectors of its pieces.
        device: For vectors, where they are made: cpu, cuda, cuda:1; CUDA if there is one, else
            the CPU.
        field: Field of the .jsonl objects that holds the text.
        cache: For vectors, folder that keeps them for later runs.
        keep: A copy of FILE, of each group only with the first.
        out: A .json file for what --json prints.
        overwrite: Replace OUT and KEEP.
        json: Print JSON instead of tables.
    """
    from ._near_duplicates import near_duplicates

    of_vectors = {"model": model, "long": long, "device": device, "cache": cache}
    _refuse(of_vectors if method == "words" else {"ngram": ngram}, method)
    nothing = [] if method == "words" else torch.empty(0, 1)
    near_duplicates(nothing, threshold, ngram=ngram)  # which looks at the options only
    source = _read(file, field, overwrite=overwrite, keep=keep, out=out)
    if method == "words":
        found = near_duplicates(source.texts, threshold, ngram=ngram)
    else:
        _, vectors = _encoded(
            file, source, model or ENCODER, cache, long=long or "truncate", device=device
        )
        found = near_duplicates(vectors, threshold)
    groups = _described(found, source)
    if keep is not None:
        _keep(file, source, found, keep)
        if not json:
            print_line(f"{len(found.kept):,} of {len(source.texts):,} texts in {keep}")
    if out is not None:
        _write(groups, out, len(source.texts))
    elif json:
        print_json(groups)
    elif keep is None:
        for group in groups:
            rows = [(f"{m['score']:.3f}", f"{m['line']}: {m['text']}") for m in group]
            print_table(rows, f"{len(group)} texts")
        print_line(f"{len(groups):,} groups among {len(source.texts):,} texts")


def _described(found: "Duplicates", source: Texts) -> list[list[dict[str, Any]]]:
    """Groups of texts, each with its line and its highest similarity to another one."""
    best: dict[int, float] = {}
    for pair, score in zip(found.pairs.tolist(), found.scores.tolist(), strict=True):
        for row in pair:
            best[row] = max(score, best.get(row, score))
    return [
        [
            {"score": rounded(best[i]), "line": source.lines[i], "text": source.texts[i]}
            for i in group
        ]
        for group in found.groups
    ]


def _keep(file: Path, source: Texts, found: "Duplicates", keep: Path) -> None:
    """Copy a file without the lines that repeat others; blank lines stay."""
    dropped = {source.lines[row] for group in found.groups for row in group[1:]}
    with replacing(keep) as target:
        if file == Path("-"):  # which cannot be read twice
            texts = zip(source.lines, source.texts, strict=True)
            target.writelines(f"{text}\n".encode() for line, text in texts if line not in dropped)
            return
        with file.open("rb") as lines:
            target.writelines(row for line, row in enumerate(lines, 1) if line not in dropped)


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


def _save(axes: Any, path: Path, *, told: bool) -> None:
    with replacing(path) as file:
        axes.figure.savefig(file, format=path.suffix.removeprefix("."), bbox_inches="tight")
    if told:
        print_line(f"map in {path}")
