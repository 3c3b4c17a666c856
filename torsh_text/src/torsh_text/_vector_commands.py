"""Commands that look at all texts of a file together: embed, search, cluster, topics."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ._jsonl import read_texts
from ._printing import print_json, print_line, print_table

if TYPE_CHECKING:
    from torch import Tensor

    from ._encoder import Encoder

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


def _encoded(texts: list[str], model: str, cache: Path | None) -> "tuple[Encoder, Tensor]":
    from ._encoder import Encoder

    encoder = Encoder.from_pretrained(model)
    return encoder, encoder.encode(texts, cache=cache, progress=sys.stderr.isatty())


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
        file: One text a line, or a .jsonl file.
        out: The safetensors file; FILE with the suffix .safetensors if not given. Only an
            earlier file of vectors is replaced.
        model: Hub id or folder of the model.
        field: Field of the .jsonl objects that holds the text.
        cache: Folder that keeps the vectors: an interrupted run goes on, and later runs compute
            only new texts.
    """
    from ._vectors import check_target, save_vectors

    target = out or file.with_suffix(".safetensors")
    texts = read_texts(file, field).texts
    check_target(target, file)
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
    json: bool = False,
) -> None:
    """Find the texts of a file that are closest to each query.

    Args:
        file: One text a line, or a .jsonl file.
        queries: What to look for.
        k: How many texts for each query.
        model: Hub id or folder of the model.
        field: Field of the .jsonl objects that holds the text.
        cache: Folder that keeps the vectors for later runs.
        json: Print JSON instead of tables.
    """
    from ._similarity import search as find

    source = read_texts(file, field)
    encoder, vectors = _encoded(source.texts, model, cache)
    scores, ids = find(encoder.encode(list(queries)), vectors, min(k, len(source.texts)))
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
        cache: Folder that keeps the vectors for later runs.
        plot: Picture of the texts as points, such as map.svg.
        json: Print JSON, with the group of each text, instead of a table.
    """
    from ._cluster import cluster as group
    from ._terms import topic_terms

    texts = read_texts(file, field).texts
    _, vectors = _encoded(texts, model, cache)
    found = group(vectors, k=k, method=method, seed=seed)
    terms = topic_terms(texts, found.labels)
    names = [", ".join(t.words[:3]) for t in terms]
    if plot is not None:
        from ._plot import plot_map

        _save(plot_map(vectors, found.labels, names=names), plot)
    if json:
        groups = [{"label": t.label, "size": t.size, "words": list(t.words)} for t in terms]
        print_json({"groups": groups, "labels": found.labels.tolist()})
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
    json: bool = False,
) -> None:
    """Find the topics of a file's texts.

    Args:
        file: One text a line, or a .jsonl file.
        k: Number of topics, or auto; nmf needs a number.
        method: How to find them.
        seed: Seed of all that is random.
        model: Hub id or folder of the encoder.
        field: Field of the .jsonl objects that holds the text.
        cache: Folder that keeps the vectors for later runs.
        save: Where to keep the topic model, for TopicModel.load.
        plot: Picture of the texts as points, such as map.svg.
        json: Print JSON, with the topic of each text, instead of a table.
    """
    from ._topics import TopicModel

    texts = read_texts(file, field).texts
    encoder, vectors = _encoded(texts, model, cache)
    used = None if method == "nmf" else vectors  # which looks at words
    fitted = TopicModel(encoder, k=k, method=method, seed=seed).fit(texts, vectors=used)
    found = fitted.transform(texts, vectors=used)
    if save is not None:
        fitted.save(save)
    if plot is not None:
        from ._plot import plot_topic_map

        _save(plot_topic_map(vectors, found.labels, fitted.topics), plot)
    if json:
        print_json(
            {
                "topics": [
                    {
                        "id": t.id,
                        "size": t.size,
                        "words": list(t.words),
                        "documents": list(t.documents),
                    }
                    for t in fitted.topics
                ],
                "labels": found.labels.tolist(),
            }
        )
    else:
        print_table(
            [(str(t.id), f"{t.size:,} texts: {', '.join(t.words)}") for t in fitted.topics],
            "words",
        )


def _save(axes: Any, path: Path) -> None:
    figure = axes.figure
    figure.savefig(path, bbox_inches="tight")
