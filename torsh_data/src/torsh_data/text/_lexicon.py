"""Synonyms of words: the WordNet table of the package, or a table of the user's own."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

from torsh_data.text._lexicon_file import read_table

_WORDNET = Path(__file__).with_name("wordnet.bin")
_POS = ("n", "v", "a", "r")


@dataclass(frozen=True)
class Synonym:
    """One word that may stand for another.

    Attributes:
        word: The synonym, in the same form (plural for plural, past for past).
        pos: Part of speech: "n" noun, "v" verb, "a" adjective, "r" adverb; "" if not known.
        share: How often the replaced word has the sense in which this is a synonym, in [0, 1].
    """

    word: str
    pos: str
    share: float


class Lexicon:
    """Which words may stand for a word.

    `Lexicon.wordnet()` is English, compiled from WordNet 3.0 and part of the package: nothing is
    downloaded. It proposes only synonyms of frequent senses, in the form of the word they replace:
    "cars" has "autos", "stopped" has "halted". It knows no context: `share` says how often, in
    texts that people tagged with senses, a word has the sense of a synonym. (Shares of words that
    were not seen there are guessed from the order of their senses.)

    Args:
        table: Each word's synonyms. A key in lower case also serves words with capitals.

    Raises:
        ValueError: If a word or a synonym is empty, or the table is.

    Example:
        >>> [s.word for s in Lexicon.wordnet().synonyms("cars")]
        ['automobiles', 'autos', 'motorcars']
        >>> Lexicon({"Haus": ["Gebäude"]}).synonyms("Haus")
        [Synonym(word='Gebäude', pos='', share=1.0)]

    Reference:
        Fellbaum (ed.), WordNet: An Electronic Lexical Database, 1998; data of WordNet 3.0,
        Princeton University, 2006.
    """

    def __init__(self, table: Mapping[str, Iterable[str]]) -> None:
        self._groups: dict[str, str] = {}
        self._words: dict[str, tuple[str, ...]] = {}
        self.english = False
        for word, synonyms in table.items():
            if isinstance(synonyms, str):
                raise TypeError(f"lexicon[{word!r}] is one string; give a list of synonyms")
            found = tuple(dict.fromkeys(synonyms))
            if not word or not all(isinstance(one, str) and one.strip() for one in found):
                raise ValueError(f"lexicon: {word!r} has the synonyms {found}, and one is empty")
            self._words[word] = found
        if not self._words:
            raise ValueError("lexicon: the table is empty")
        self._origin: str | None = None

    @classmethod
    def wordnet(cls) -> "Lexicon":
        """The English lexicon of the package; read once in a process (about 0.03 s).

        Raises:
            RuntimeError: If its file is damaged.
        """
        return _compiled(str(_WORDNET))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Lexicon":
        """Read a lexicon of one's own.

        Args:
            path: A UTF-8 text: on each line a word, a tab, and its synonyms with commas between
                them; lines that begin with `#` are skipped. Or a file compiled by this project.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If a line is none of these.
            RuntimeError: If a compiled file is damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"lexicon={str(path)!r} is no file; 'wordnet' is built in")
        with path.open("rb") as file:
            compiled = file.read(8) == b"TORSHLEX"
        if compiled:
            return _compiled(str(path.resolve()))
        table: dict[str, list[str]] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
            if not line.strip() or line.startswith("#"):
                continue
            word, tab, rest = line.partition("\t")
            synonyms = [one.strip() for one in rest.replace("\t", ",").split(",") if one.strip()]
            if not tab or not word.strip() or not synonyms:
                raise ValueError(
                    f"{path}, line {number}: {line[:60]!r} is no word, tab and synonyms"
                )
            table.setdefault(word.strip(), []).extend(synonyms)
        return cls(table)

    def synonyms(
        self, word: str, *, pos: str | None = None, min_share: float = 0.0
    ) -> list[Synonym]:
        """The synonyms of a word as it is written, those of its most frequent sense first.

        Args:
            word: One word; case counts.
            pos: Only as this part of speech: "n", "v", "a" or "r".
            min_share: Only senses with at least this share, in [0, 1].

        Raises:
            ValueError: If `pos` is none of these.
        """
        if pos is not None and pos not in _POS:
            raise ValueError(f"pos={pos!r}; use one of {', '.join(_POS)}")
        found = [Synonym(one, "", 1.0) for one in self._words.get(word, ())]
        for group in filter(None, self._groups.get(word, "").split(";")):
            sense, words = group.split(":")
            share = int(sense[1:]) / 100
            found += [Synonym(one, sense[0], share) for one in words.split(",")]
        return [
            one for one in found if (pos is None or one.pos in (pos, "")) and one.share >= min_share
        ]

    def __contains__(self, word: str) -> bool:
        return word in self._words or word in self._groups

    def __len__(self) -> int:
        return len(self._words) + len(self._groups)

    def __getstate__(self) -> dict[str, object]:
        if self._origin is not None:  # a table that is in a file travels as its name
            return {"_origin": self._origin}
        return self.__dict__

    def __setstate__(self, state: dict[str, object]) -> None:
        origin = state.get("_origin")
        self.__dict__.update(_compiled(str(origin)).__dict__ if origin else state)


Source: TypeAlias = "Lexicon | Mapping[str, Iterable[str]] | str | os.PathLike[str]"


def open_lexicon(source: Source) -> Lexicon:
    """A lexicon from what users may give for one."""
    if isinstance(source, Lexicon):
        return source
    if isinstance(source, Mapping):
        return Lexicon(source)
    return Lexicon.wordnet() if source == "wordnet" else Lexicon.load(source)


@lru_cache(maxsize=4)
def _compiled(path: str) -> Lexicon:
    lexicon = Lexicon.__new__(Lexicon)
    lexicon._words = {}
    lexicon._groups = read_table(Path(path))
    lexicon._origin = path
    lexicon.english = path == str(_WORDNET)
    return lexicon
