"""Back-translation: paraphrases by way of another language."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast, overload

import torch
import xxhash

from torsh_data._progress import progress_bar
from torsh_data._rng import fold
from torsh_data.text._transform import text_column, with_results
from torsh_data.text._translation_cache import Found, TranslationCache
from torsh_data.text._translator import Direction, Search, Translator

_WINDOW = 256  # texts between two writes to the cache, at most
_TEMPERATURE = 0.9
_LOW_YIELD = 0.1


@dataclass(frozen=True)
class Yield:
    """What became of the results of one call.

    Attributes:
        texts: Texts given.
        asked: Results asked for: `n` for each text.
        kept: Results returned.
        cached: Results, of different texts, that were read from the cache.
        dropped: Why the others were not returned: "empty"; "truncated" (an answer that did not
            end); "too_long" (a text beyond the model's length); "identical" to the text; "length"
            (much longer or shorter); "different" (too little in common); "repeated" (like another
            result of the same text).
    """

    texts: int
    asked: int
    kept: int
    cached: int
    dropped: dict[str, int] = field(default_factory=dict)


class BackTranslator:
    """Paraphrase texts by translating them to another language and back.

    Texts of similar length run together, equal texts once, and a batch that does not fit the memory
    is halved. With sampling, a result is a function of (seed, text) and of which of the `n` it is,
    not of the texts beside it (up to rounding, which differs with the padding). What cannot serve
    as a paraphrase is dropped and counted: `report` says how many and why, so a text may have fewer
    than `n` results. A call that keeps less than a tenth warns.

    Args:
        forward: A hub id or folder of a translation model, or a `Translator`, which also takes
            model objects, language codes (NLLB, mBART) and prompts (T5, causal and chat models).
            Nothing of a model's own code is run.
        backward: The same for the way back.
        device: None for CUDA if there is one; for model objects, None leaves them where they are.
        dtype: `"auto"` is bfloat16 on CUDA and float32 elsewhere; model objects stay as they are.
        batch_tokens: Most tokens of a batch, new ones and beams included.
        num_beams: 1 samples, or takes the likeliest tokens if `temperature` is 0. More is beam
            search: deterministic, `n` the best of them, likelier and more alike.
        temperature: Of the sampling; None is 0.9 for one beam.
        cache_dir: A folder where results are kept, by content of models, settings and text. A call
            that was killed, at any time, goes on where it was.
        max_ratio: Drop results this many times longer or shorter than the text, in letters.
        min_similarity: Drop results with less in common with the text: the Dice coefficient of
            their sets of three neighbouring letters, in [0, 1].
        column: The column of texts where samples or batches are mappings.
        progress: Whether a call of more than two seconds shows a bar on a terminal; None if rich is
            installed.

    Attributes:
        report: The `Yield` of the last call, None before.

    Raises:
        ValueError: If an argument is out of range, or a model cannot translate.
        ImportError: If a model has to be loaded and transformers is missing.

    Reference:
        Sennrich, Haddow, Birch, Improving Neural Machine Translation Models with Monolingual Data,
        2016, arXiv 1511.06709. Edunov, Ott, Auli, Grangier, Understanding Back-Translation at
        Scale, 2018, arXiv 1808.09381 (why to sample).
    """

    def __init__(
        self,
        forward: "str | os.PathLike[str] | Translator",
        backward: "str | os.PathLike[str] | Translator",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = "auto",
        batch_tokens: int = 8192,
        num_beams: int = 1,
        temperature: float | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        max_ratio: float = 2.0,
        min_similarity: float = 0.2,
        column: str = "text",
        progress: bool | None = None,
    ) -> None:
        if batch_tokens < 1 or num_beams < 1:
            raise ValueError(
                f"batch_tokens={batch_tokens} and num_beams={num_beams} must be positive"
            )
        if temperature is not None and temperature < 0:
            raise ValueError(f"temperature={temperature} is negative; 0 does not sample")
        if temperature and num_beams > 1:
            raise ValueError(
                f"temperature={temperature} samples and num_beams={num_beams} does not; use one"
            )
        if max_ratio < 1:
            raise ValueError(f"max_ratio={max_ratio} must be at least 1")
        if not 0 <= min_similarity <= 1:
            raise ValueError(f"min_similarity={min_similarity} must be in [0, 1]")
        default = _TEMPERATURE if num_beams == 1 else 0.0
        self.temperature = default if temperature is None else temperature
        self.num_beams = num_beams
        self.max_ratio = max_ratio
        self.min_similarity = min_similarity
        self.column = column
        self.progress = find_spec("rich") is not None if progress is None else progress
        self.report: Yield | None = None
        loaded: dict[str, tuple[Any, Any]] = {}  # one id is often named twice
        self._forward, self._backward = (
            Direction(
                one if isinstance(one, Translator) else Translator(one),
                name=name,
                device=device,
                dtype=dtype,
                batch_tokens=batch_tokens,
                loaded=loaded,
            )
            for name, one in (("forward", forward), ("backward", backward))
        )
        self._cache_dir = None if cache_dir is None else Path(cache_dir)
        self._cache: TranslationCache | None = None

    @overload
    def __call__(self, texts: str, n: int = ..., seed: int = ...) -> list[str]: ...
    @overload
    def __call__(
        self, texts: Mapping[str, Any], n: int = ..., seed: int = ...
    ) -> dict[str, Any]: ...
    @overload
    def __call__(self, texts: Iterable[str], n: int = ..., seed: int = ...) -> list[list[str]]: ...
    def __call__(
        self, texts: str | Iterable[str] | Mapping[str, Any], n: int = 2, seed: int = 0
    ) -> list[str] | list[list[str]] | dict[str, Any]:
        """Paraphrase texts.

        Args:
            texts: Texts, or one text; or a batch of `datasets.Dataset.map(batched=True)`: a mapping
                whose column `column` holds texts.
            n: Results wanted for each.
            seed: Of the sampling.

        Returns:
            Up to `n` different results for each text; one list for one text; for a batch the same
            columns, with a row for each result: texts without one have no row.

        Raises:
            TypeError: If an item is no string.
            ValueError: If this search cannot give `n` results, or there is no such column.
        """
        if isinstance(texts, str):
            return self._answers([texts], n, seed)[0]
        if isinstance(texts, Mapping):
            columns = cast("Mapping[str, Any]", texts)
            column = text_column(columns, self.column)
            if isinstance(column, str):
                raise TypeError(
                    "a text may have no paraphrase, so a single sample cannot be replaced; use "
                    "batched=True in datasets.map"
                )
            return with_results(columns, self.column, self._answers(list(column), n, seed))
        return self._answers(list(texts), n, seed)

    def __getstate__(self) -> dict[str, Any]:
        # what calls leave behind is no part of what it does: a data set's cache goes by the rest
        return {**self.__dict__, "report": None, "_cache": None}

    def _answers(self, given: list[str], n: int, seed: int) -> list[list[str]]:
        for text in given:
            if not isinstance(text, str):
                raise TypeError(f"texts holds a {type(text).__name__}, expected strings")
        if n < 1:
            raise ValueError(f"n={n} must be at least 1")
        if not self.temperature and n > self.num_beams:
            raise ValueError(
                f"n={n} needs as many beams, but num_beams={self.num_beams}; raise it, or sample "
                "with a temperature above 0"
            )
        found, cached = self._results(list(dict.fromkeys(given)), n, seed)
        dropped: Counter[str] = Counter()
        kept = {
            text: self._keep(text, results, dropped=Counter()) for text, results in found.items()
        }
        for text in given:
            self._keep(text, found[text], dropped)
        answers = [list(kept[text]) for text in given]
        self.report = Yield(
            texts=len(given),
            asked=n * len(given),
            kept=sum(map(len, answers)),
            cached=cached,
            dropped=dict(dropped),
        )
        # of one text a lack is chance, and seen
        if len(given) > 1 and self.report.kept < _LOW_YIELD * self.report.asked:
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
            warnings.warn(
                f"{self.report.kept} of {self.report.asked} results were kept; dropped: {reasons}. "
                "Look at what each Translator answers, and at max_ratio and min_similarity",
                stacklevel=3,
            )
        return answers

    def _results(
        self, texts: list[str], n: int, seed: int
    ) -> tuple[dict[str, list[tuple[str, str]]], int]:
        """For each text its results as (text, reason to drop it or "")."""
        sampled = self.temperature > 0
        # without sampling a text is one piece of work with n results, else n pieces
        work = [(text, copy) for text in texts for copy in range(n if sampled else 1)]
        name = "{seed}/{copy}" if sampled else "beams/{n}"
        keys = [
            f"{name.format(seed=seed, copy=copy, n=n)}/{xxhash.xxh3_128_hexdigest(_bytes(text))}"
            for text, copy in work
        ]
        known: dict[str, Found] = {}
        if (cache := self._opened_cache()) is not None:
            cache.refresh()
            hits = ((key, cache.get(key)) for key in keys)
            known = {key: found for key, found in hits if found is not None}
        cached = sum(map(len, known.values()))
        lengths = [len(row) for row in self._forward.rows(texts)]
        by_text = dict(zip(texts, lengths, strict=True))
        todo = [i for i in range(len(work)) if keys[i] not in known]
        long = {i for i in todo if by_text[work[i][0]] > self._forward.limit}
        todo = sorted((i for i in todo if i not in long), key=lambda i: -by_text[work[i][0]])
        training = [one.model.training for one in (self._forward, self._backward)]
        self._forward.model.eval()
        self._backward.model.eval()
        shown = self.progress and len(todo) > 1
        bar = progress_bar(shown, 2 * len(todo), doing="Translating", unit="translations")
        try:
            with bar as advance:
                for start in range(0, len(todo), _WINDOW):
                    chosen = todo[start : start + _WINDOW]
                    streams = [
                        fold(seed, work[i][1], xxhash.xxh3_64_intdigest(_bytes(work[i][0])))
                        for i in chosen
                    ]
                    self._window([work[i][0] for i in chosen], [keys[i] for i in chosen], streams,
                                 n=1 if sampled else n, known=known, advance=advance)  # fmt: skip
        finally:
            self._forward.model.train(training[0])
            self._backward.model.train(training[1])
        results: dict[str, list[tuple[str, str]]] = {text: [] for text in texts}
        for i, (text, _) in enumerate(work):
            if i in long:
                results[text] += [("", "too_long")] * (1 if sampled else n)
            else:
                results[text] += [(one, "" if end else "truncated") for one, end in known[keys[i]]]
        return results, cached

    def _window(
        self,
        texts: list[str],
        keys: list[str],
        streams: list[int],
        *,
        n: int,
        known: dict[str, Found],
        advance: Callable[[int], None],
    ) -> None:
        """There and back, with the results in `known` and in the cache."""
        there: list[tuple[str, bool]] = [("", False)] * len(texts)

        def middle(where: list[int], answers: Sequence[Found]) -> None:
            for i, (answer, *_) in zip(where, answers, strict=True):
                there[i] = answer
            advance(len(where))

        out = Search(self.num_beams, 1, self.temperature)
        self._forward.write(self._forward.rows(texts), [_key(s, 0) for s in streams], out, middle)
        rows = self._backward.rows([text for text, _ in there])
        # what went wrong on the way there is not translated back
        lost = [
            i
            for i, (text, finished) in enumerate(there)
            if not (finished and text and len(rows[i]) <= self._backward.limit)
        ]
        self._remember({keys[i]: [("", there[i][1] and not there[i][0])] * n for i in lost}, known)
        advance(len(lost))
        gone = set(lost)
        rest = [i for i in range(len(texts)) if i not in gone]

        def end(where: list[int], answers: Sequence[Found]) -> None:
            self._remember(
                {keys[rest[k]]: list(found) for k, found in zip(where, answers, strict=True)}, known
            )
            advance(len(where))

        back = Search(max(self.num_beams, n), n, self.temperature)
        self._backward.write(
            [rows[i] for i in rest], [_key(streams[i], 1) for i in rest], back, end
        )

    def _remember(self, results: dict[str, Found], known: dict[str, Found]) -> None:
        known.update(results)
        if self._cache is not None and results:
            self._cache.add(results)

    def _opened_cache(self) -> TranslationCache | None:
        if self._cache_dir is not None:
            digest = xxhash.xxh3_128()
            for part in (self._forward.fingerprint(), self._backward.fingerprint()):
                digest.update(part.encode())
            digest.update(f"{self.num_beams} {self.temperature}".encode())
            path_key = digest.hexdigest()
            if self._cache is None or path_key not in self._cache.path.name:
                self._cache = TranslationCache(self._cache_dir, path_key)
        return self._cache

    def _keep(self, text: str, results: list[tuple[str, str]], dropped: Counter[str]) -> list[str]:
        kept: list[str] = []
        seen: set[str] = set()
        for result, trouble in results:
            reason = trouble or self._trouble(text, result)
            if not reason and _plain(result) in seen:
                reason = "repeated"
            if reason:
                dropped[reason] += 1
                continue
            seen.add(_plain(result))
            kept.append(result)
        return kept

    def _trouble(self, text: str, result: str) -> str:
        """Why a result is no paraphrase of a text; "" if it may be one."""
        if not result:
            return "empty"
        if _plain(result) == _plain(text):
            return "identical"
        if not len(text) / self.max_ratio <= len(result) <= len(text) * self.max_ratio:
            return "length"
        return "different" if similarity(text, result) < self.min_similarity else ""


def similarity(a: str, b: str) -> float:
    """Dice coefficient of two texts' sets of three neighbouring letters, case and spaces apart.

    Example:
        >>> similarity("abcd", "abce")  # 3 of 5 and 5: "  a", " ab" and "abc"
        0.6
    """
    sets = [
        {padded[i : i + 3] for i in range(len(padded) - 2)}
        for padded in (f"  {_plain(text)} " for text in (a, b))
    ]
    return 2 * len(sets[0] & sets[1]) / (len(sets[0]) + len(sets[1]))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _key(stream: int, way: int) -> int:
    found = fold(stream, way)
    return found - 2**64 if found >= 2**63 else found
