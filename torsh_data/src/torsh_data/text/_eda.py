"""Easy data augmentation: four cheap edits of a text."""

from collections.abc import Iterable
from itertools import permutations

from torsh_data.text._draws import Draw
from torsh_data.text._lexicon import Source
from torsh_data.text._operations import (
    delete_words,
    expected_edits,
    insert_words,
    pick,
    replace_words,
    restore_capitals,
    swap_words,
)
from torsh_data.text._transform import Keep, Sentence, TextTransform


class EDA(TextTransform):
    """Synonym replacement, random insertion, random swap and random deletion of words.

    Each result comes from one of the four, and the first four from four different ones, in random
    order; where one can do nothing to a text, the next is tried. Only words move: punctuation,
    spacing and line ends stay, but for marks that a deletion would leave doubled or at an end;
    sentences keep their capital, synonyms take the case of their word. Numbers, addresses,
    @mentions, #tags, markup, common English abbreviations ("e.g.", "etc.", "Fig. 3"), titles with
    their name ("Mr. Baker") and what `keep` says are never touched. Other capitalised words inside
    a sentence count as names and get no synonyms. A text in which nothing can be done comes back as
    it is.

    A result is a function of the text and its key: not of the batch, the order or the worker.

    Args:
        alpha_sr: Share of the words that synonym replacement replaces, at least one word; 0
            switches the operation off, here and below.
        alpha_ri: Share of the words for each of which a synonym is inserted somewhere.
        alpha_rs: Share of the words for each of which two words are swapped.
        p_rd: Probability of each word to be deleted, in [0, 1).
        num_aug: Results for each text.
        lexicon: `"wordnet"` (English), a mapping from words to lists of synonyms, a path that
            `Lexicon.load` reads, or a `Lexicon`.
        keep: What stays: a regular expression, or a list of words and phrases (in any case). Spans
            of single texts are given with the call. Deleting a negation can turn a label round:
            `keep=["not", "no", "never", "n't"]`.
        stop_words: Words that are not replaced; None for the function words of English.
        min_share: A WordNet sense is used from this share of the word's uses on, in [0, 1].
        seed: Seed of calls without keys.
        column: The column of texts where samples or batches are mappings.

    Raises:
        ValueError: If an argument is out of range, or all operations are off.

    Example:
        >>> eda = EDA(num_aug=4, seed=3)
        >>> for text in eda("The quick car stopped at 10:30, near the big house."):
        ...     print(text)
        The quick car stopped at 10:30, near the big house automobile.
        Quick car stopped at 10:30, near the big house.
        The quick car stopped at 10:30, near the large house.
        The quick car big at 10:30, near the stopped house.
        >>> eda("12:30") == ["12:30"] * 4  # nothing to do
        True

    Reference:
        Wei, Zou, EDA: Easy Data Augmentation Techniques for Boosting Performance on Text
        Classification Tasks, 2019, arXiv 1901.11196. There texts are lower-cased and lose their
        punctuation, synonyms come from all senses, and all occurrences of a word are replaced.
    """

    def __init__(
        self,
        alpha_sr: float = 0.1,
        alpha_ri: float = 0.1,
        alpha_rs: float = 0.1,
        p_rd: float = 0.1,
        num_aug: int = 4,
        lexicon: Source = "wordnet",
        keep: Keep = None,
        *,
        stop_words: Iterable[str] | None = None,
        min_share: float = 0.4,
        seed: int = 0,
        column: str = "text",
    ) -> None:
        for name, value in (("alpha_sr", alpha_sr), ("alpha_ri", alpha_ri), ("alpha_rs", alpha_rs)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must be in [0, 1]")
        if not 0 <= p_rd < 1:
            raise ValueError(f"p_rd={p_rd} must be in [0, 1)")
        if num_aug < 1:
            raise ValueError(f"num_aug={num_aug} must be at least 1")
        super().__init__(
            lexicon=lexicon,
            keep=keep,
            stop_words=stop_words,
            min_share=min_share,
            seed=seed,
            column=column,
        )
        strengths = (alpha_sr, alpha_ri, alpha_rs, p_rd)
        self.alpha_sr, self.alpha_ri, self.alpha_rs, self.p_rd = strengths
        self.num_aug = num_aug
        operations = [k for k, strength in enumerate(strengths) if strength > 0]
        if not operations:
            raise ValueError("alpha_sr, alpha_ri, alpha_rs and p_rd are all 0: nothing is left")
        self._orders = list(permutations(operations))
        self._ahead = min(24, 3 + 3 * num_aug)

    def _outcome(self, results: list[str]) -> list[str]:
        return results

    def _edit(self, sentence: Sentence, draw: Draw) -> list[list[str]]:
        original = sentence.pieces
        if not sentence.movable:
            return [original] * self.num_aug
        order = self._orders[int(draw() * len(self._orders))]
        found: list[list[str]] = []
        for n in range(self.num_aug):
            for k in range(len(order)):
                pieces = self._apply(order[(n + k) % len(order)], sentence, draw)
                if pieces != original:
                    break
            found.append(pieces)
        return found

    def _apply(self, operation: int, sentence: Sentence, draw: Draw) -> list[str]:
        pieces = sentence.pieces.copy()
        count = len(sentence.entries)
        if operation == 0:
            if sentence.replaceable:
                chosen = pick(draw, expected_edits(self.alpha_sr, count), sentence.replaceable)
                replace_words(pieces, sentence, chosen, self._words, draw)
            return pieces
        if operation == 1:
            insert_words(pieces, sentence, expected_edits(self.alpha_ri, count), self._words, draw)
        elif operation == 2:
            swap_words(pieces, sentence, expected_edits(self.alpha_rs, count), draw)
        else:
            delete_words(pieces, sentence, self.p_rd, draw)
        if sentence.starts:
            restore_capitals(pieces, sentence, self._words)
        return pieces
