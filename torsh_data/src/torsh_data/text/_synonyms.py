"""Replacement of single words by synonyms."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from torsh_data.text._draws import Draw
from torsh_data.text._lexicon import Source
from torsh_data.text._operations import replace_words
from torsh_data.text._transform import Keep, Sentence, TextTransform

PosTagger: TypeAlias = Callable[[list[str]], Sequence[str]]


class SynonymReplacer(TextTransform):
    """Replace each word that has synonyms by one of them with probability `p`.

    The synonym has the form of the word (plural, tense, comparative) and its case. Stop words,
    names, numbers, addresses and what `keep` says stay, as does everything between the words. Texts
    in which nothing is replaced come back as they are.

    Args:
        p: Probability of each word that has synonyms, in [0, 1].
        lexicon: As for `EDA`.
        keep: As for `EDA`.
        stop_words: As for `EDA`.
        min_share: As for `EDA`; higher is more careful.
        pos_tagger: Gives the part of speech of each word of a list: "n" noun, "v" verb, "a"
            adjective, "r" adverb; or "" where it cannot tell. Only synonyms of that part of speech
            are used then. Shares still are of all uses of a word: a lower `min_share` is safe.
        seed: Seed of calls without keys.
        column: The column of texts where samples or batches are mappings.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> replace = SynonymReplacer(p=1.0, lexicon={"movie": ["film"]})
        >>> replace("What a MOVIE! Movie of the year, a movie.", keep=[(35, 40)])
        'What a FILM! Film of the year, a movie.'
    """

    def __init__(
        self,
        p: float = 0.1,
        lexicon: Source = "wordnet",
        keep: Keep = None,
        *,
        stop_words: Iterable[str] | None = None,
        min_share: float = 0.4,
        pos_tagger: PosTagger | None = None,
        seed: int = 0,
        column: str = "text",
    ) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p={p} must be in [0, 1]")
        super().__init__(
            lexicon=lexicon,
            keep=keep,
            stop_words=stop_words,
            min_share=min_share,
            seed=seed,
            column=column,
        )
        self.p = p
        self.pos_tagger = pos_tagger
        self._by_pos = {"": self._words, **{pos: self._words.of(pos) for pos in "nvar"}}

    def _outcome(self, results: list[str]) -> str:
        return results[0]

    def _edit(self, sentence: Sentence, draw: Draw) -> list[list[str]]:
        if self.pos_tagger is not None:
            self._read_tags(sentence, self.pos_tagger)
        chosen = [i for i in sentence.replaceable if draw() < self.p]
        pieces = sentence.pieces.copy()
        replace_words(pieces, sentence, chosen, self._words, draw)
        return [pieces]

    def _read_tags(self, sentence: Sentence, tagger: PosTagger) -> None:
        words = sentence.pieces[1::2]
        tags = list(tagger(words))
        wrong = [tag for tag in tags if tag not in self._by_pos]
        if wrong or len(tags) != len(words):
            raise ValueError(
                f"pos_tagger gave {len(tags)} tags {tags[:5]} for {len(words)} words; it must give "
                "one of 'n', 'v', 'a', 'r' or '' for each word"
            )
        for i in sentence.replaceable:
            sentence.entries[i] = self._by_pos[tags[i]][words[i]]
        sentence.replaceable = [i for i in sentence.replaceable if sentence.entries[i]]
