"""The command that gives texts labels: classify."""

import sys
from collections.abc import Iterable, Sequence
from json import loads
from pathlib import Path
from typing import Any, Literal

from ._default_models import ZERO_SHOT
from ._printing import rounded
from ._record_run import WINDOW, Record, Work, check_spaced, has_head, run

_LM_WINDOW = 16  # a language model shows no bar of its own
_FEW_SHOT = "few_shot.json"
_CLASSIFIER = "a classifier, or --labels to compare without training"


def classify(
    file: Path,
    /,
    *,
    labels: tuple[str, ...] = (),
    model: str | None = None,
    via: Literal["auto", "nli", "embed", "lm"] = "auto",
    template: str | None = None,
    multi_label: bool = False,
    top_k: int | None = None,
    min_score: float | None = None,
    long: Literal["truncate", "error", "mean"] = "truncate",
    device: str | None = None,
    field: str = "text",
    out: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Label the texts of a file: their sentiment, or whatever a model or your labels say.

    Without a model or labels this is sentiment. A model gives its own labels. With labels, texts
    are compared with them without training (zero-shot).

    Args:
        file: One text a line, or a .jsonl file; - for the standard input.
        labels: What a text may be about.
        model: Hub id or folder: a classifier, the folder of a FewShot, or with labels an encoder,
            an entailment classifier or a language model.
        via: How labels are compared; auto is told by the model. Without a model, embed (which is
            auto) uses sentence-transformers/all-MiniLM-L6-v2, nli
            MoritzLaurer/ModernBERT-base-zeroshot-v2.0, lm HuggingFaceTB/SmolLM2-360M-Instruct.
        template: Sentence that each of the labels becomes, with {} for the label; not for lm.
            "This text is about {}." if not given.
        multi_label: A text may have several labels or none; of labels compared, only nli can say.
        top_k: How many labels for each text; the best one, or with several labels those that
            reach MIN-SCORE, if not given.
        min_score: Leave out labels below this score, with TOP-K or several labels; 0.5 if neither
            of both is given.
        long: What happens to a text that is too long: truncate cuts it, error refuses it, mean
            averages its pieces (not for nli and lm).
        device: Where it runs: cpu, cuda, cuda:1; CUDA if there is one, else the CPU.
        field: Field of the .jsonl objects that holds the text.
        out: A .jsonl file for the records; an interrupted run goes on where it stopped.
        overwrite: Replace OUT, and what another command left unfinished.
        json: Print a JSON object a line instead of a table.
    """
    if via != "auto" and not labels:
        raise ValueError(f"via={via!r} compares labels; name them with --labels")
    if template is not None and not labels:
        raise ValueError(f"template={template!r} is for labels; name them with --labels")
    check_spaced("labels", labels)
    if labels and model is not None:
        _check_untrained(model, labels)
    if not labels and model is None:
        given = {"top_k": top_k, "min_score": min_score, "multi_label": multi_label or None}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}={value}: sentiment gives one label; leave it out")
    if labels and model is None:
        via = "embed" if via == "auto" else via
        model = ZERO_SHOT[via]
    options: Record = {"top_k": top_k, "min_score": min_score}
    if template is not None:
        options["template"] = template
    options["long"] = long
    from ._sentiment import DEFAULT

    def load() -> Work:
        if labels:
            return _by_labels(
                str(model), via, labels, {**options, "multi_label": multi_label}, device
            )
        if model is None:
            return _by_sentiment(long, device)
        if (Path(model) / _FEW_SHOT).is_file():
            return _by_few_shot(model, {**options, "multi_label": multi_label or None}, device)
        return _by_model(model, {**options, "multi_label": multi_label or None}, device)

    def show(record: Record) -> str:
        return ", ".join(f"{x['name']} {x['score']:.3f}" for x in record["labels"]) or "(none)"

    run(
        file,
        field,
        load,
        out=out,
        overwrite=overwrite,
        json=json,
        settings={
            "command": "classify",
            "labels": list(labels),
            "via": via,
            "multi_label": multi_label,
            **options,
        },
        models={"model": model or DEFAULT},
        show=show,
        window=_LM_WINDOW if via == "lm" else WINDOW,
    )


def _check_untrained(model: str, labels: tuple[str, ...]) -> None:
    """Refuse to compare labels by a model that was trained to give them."""
    folder = Path(model)
    trained: list[str] = []
    if (few_shot := folder / _FEW_SHOT).is_file():
        trained = loads(few_shot.read_text(encoding="utf-8"))["labels"]
    elif (config := folder / "config.json").is_file():
        known = loads(config.read_text(encoding="utf-8")).get("id2label") or {}
        trained = list(known.values()) if set(known.values()) == set(labels) else []
    if trained:
        raise ValueError(
            f"{model!r} is a classifier trained for {', '.join(trained)}; leave out --labels"
        )


def _as_records(found: Iterable[Any]) -> list[Record]:
    records = []
    for row in found:
        labels = row if isinstance(row, list) else [row]
        record = {"labels": [{"name": x.name, "score": rounded(x.score)} for x in labels]}
        cut = any(label.truncated for label in labels)
        records.append({**record, "truncated": True} if cut else record)
    return records


def _by_labels(
    model: str, via: Any, labels: tuple[str, ...], options: Record, device: str | None
) -> Work:
    from ._zero_shot import ZeroShot

    with has_head(model, "an entailment classifier, or --via embed"):
        judge = ZeroShot(model, via=via, device=device)
    progress = sys.stderr.isatty()
    return lambda texts: _as_records(
        judge.predict(list(texts), labels, progress=progress, **options)
    )


def _by_sentiment(long: Any, device: str | None) -> Work:
    from ._sentiment import Sentiment

    mood = Sentiment.from_pretrained(device=device)

    def work(texts: Sequence[str]) -> list[Record]:
        found = mood.predict(list(texts), long=long, progress=sys.stderr.isatty())
        return [
            {**record, "signed": rounded(label.signed)}
            for record, label in zip(_as_records(found), found, strict=True)
        ]

    return work


def _by_model(model: str, options: Record, device: str | None) -> Work:
    from ._classify import Classifier

    with has_head(model, _CLASSIFIER):
        classifier = Classifier.from_pretrained(model, device=device)
    return lambda texts: _as_records(
        classifier.predict(list(texts), progress=sys.stderr.isatty(), **options)
    )


def _by_few_shot(model: str, options: Record, device: str | None) -> Work:
    from ._few_shot import FewShot

    learnt = FewShot.load(model, device=device)
    if options.pop("multi_label"):
        raise ValueError("multi_label=True: a FewShot gives one label; leave it out")
    return lambda texts: _as_records(
        learnt.predict(list(texts), progress=sys.stderr.isatty(), **options)
    )
