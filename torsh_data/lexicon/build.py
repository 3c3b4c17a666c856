"""Compile the data files of WordNet 3.0 into the table of synonyms that torsh_data.text uses.

    python torsh_data/lexicon/build.py FOLDER_OF_WORDNET OUT

A synonym is proposed where it most likely fits, without knowing the context:

- only of senses that make up at least 20 % of the uses of the word, all its parts of speech
  together, by the counts of WordNet's sense-tagged texts (and of senses without counts by rank);
- only words that have this sense in at least 20 % of their own uses;
- only single words in lower case: no names, no abbreviations, nothing marked as slang, slur,
  obscenity or archaism, nothing for or by a word that is offensive in any of its senses, and for a
  word that was seen in the tagged texts more than once none that never was;
- in the same form: a plural for a plural, a past for a past. Where the form of the synonym is not
  sure, there is none.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "torsh_data" / "src")]

from inflection import (  # noqa: E402
    Exceptions,
    adjective_forms,
    noun_forms,
    read_exceptions,
    recognised,
    verb_forms,
)

from torsh_data.text._lexicon_file import write_table  # noqa: E402
from torsh_data.text._stop_words import ENGLISH  # noqa: E402

FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
POS_OF_TYPE = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}
MIN_SHARE = 0.2
MOST_SYNONYMS = 5
OFTEN_SEEN = 2
INFLECTED = 0.4  # a base form that reads as another word's form is that word's less often
UNWANTED_LABELS = """
slang archaism disparagement ethnic_slur obscenity street_name colloquialism trade_name trademark
combining_form dialect plural
"""
NUMBER_WORDS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred
thousand million billion trillion dozen first second third fourth fifth sixth seventh eighth ninth
tenth once twice thrice half quarter
"""
INSULTING_WORDS = """
whore slut bitch tart homo midget gay gays queer queers lesbian lesbians tribade gypsy gypsies negro
negroes black blacks blacknesses white whites idiot imbecile moron cretin savage savages cripple
"""
UNWANTED, NUMBERS = frozenset(UNWANTED_LABELS.split()), frozenset(NUMBER_WORDS.split())
SLURS = frozenset({"disparagement", "ethnic_slur", "obscenity"})
OFFENSIVE = re.compile(
    r"offensive|ethnic slur|derogat|disparag|obscen|vulgar|insulting (term|name|word)|contemptuous"
)
WORD = re.compile(r"[a-z]{3,}(-[a-z]+)*")
SHORTEST = 3

Senses = dict[tuple[str, str], list[str]]  # (lemma, pos) -> synsets, most frequent first
Synsets = dict[tuple[str, str], list[str]]  # (pos, offset) -> words with their case


def read_senses(folder: Path) -> Senses:
    """The `index` files."""
    senses: Senses = {}
    for pos, name in FILES.items():
        for line in (folder / f"index.{name}").read_text().splitlines():
            if not line.startswith(" "):
                fields = line.split()
                senses[fields[0], pos] = fields[-int(fields[2]) :]
    return senses


def read_synsets(folder: Path) -> tuple[Synsets, set[tuple[str, str, str]], set[str]]:
    """The `data` files, the (pos, offset, word) with an unwanted label, and offensive words."""
    synsets: Synsets = {}
    labels: list[tuple[str, str, str | None, tuple[str, str]]] = []
    offensive = set(INSULTING_WORDS.split())
    for pos, name in FILES.items():
        for line in (folder / f"data.{name}").read_text().splitlines():
            if line.startswith(" "):
                continue
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            offset, count = fields[0], int(fields[3], 16)
            words = [re.sub(r"\(\w+\)$", "", word) for word in fields[4 : 4 + 2 * count : 2]]
            synsets[pos, offset] = words
            if OFFENSIVE.search(gloss.partition('"')[0]):
                offensive.update(words)
            start = 5 + 2 * count
            for k in range(start, start + 4 * int(fields[start - 1]), 4):
                symbol, target, target_pos, ends = fields[k : k + 4]
                if symbol == ";u":
                    source = int(ends[:2], 16)  # 0: the whole synset
                    word = words[source - 1] if source else None
                    labels.append((pos, offset, word, (target_pos, target)))
    unwanted = {
        (pos, offset, word)
        for pos, offset, one, label in labels
        if UNWANTED & set(synsets[label])
        for word in ([one] if one else synsets[pos, offset])
    }
    for pos, offset, one, label in labels:
        if SLURS & set(synsets[label]):
            offensive.update([one] if one else synsets[pos, offset])
    return synsets, unwanted, offensive


def read_counts(folder: Path) -> dict[tuple[str, str, int], int]:
    """Uses of (lemma, pos, rank of the sense) in the tagged texts."""
    counts: dict[tuple[str, str, int], int] = defaultdict(int)
    for line in (folder / "cntlist.rev").read_text().splitlines():
        key, rank, count = line.split()
        lemma, rest = key.rsplit("%", 1)
        counts[lemma, POS_OF_TYPE[rest[0]], int(rank) - 1] += int(count)
    return counts


class Compiler:
    """Holds the tables while the lexicon is made."""

    def __init__(self, folder: Path) -> None:
        self.senses = read_senses(folder)
        self.synsets, self.unwanted, self.offensive = read_synsets(folder)
        self.counts = read_counts(folder)
        self.irregular: dict[str, Exceptions] = {
            pos: read_exceptions(folder / f"{name}.exc") for pos, name in FILES.items()
        }
        self.uses: dict[str, float] = defaultdict(float)
        for (lemma, pos), offsets in self.senses.items():
            self.uses[lemma] += sum(self.weight(lemma, pos, k) for k in range(len(offsets)))

    def weight(self, lemma: str, pos: str, rank: int) -> float:
        """Uses of a sense; where none was seen, earlier senses are taken for likelier."""
        return self.counts.get((lemma, pos, rank), 0) + 0.5 / (rank + 1)

    def readings(self) -> dict[str, list[tuple[str, str, str, float]]]:
        """For each surface form its readings (lemma, pos, name of the form, weight)."""
        found: dict[str, list[tuple[str, str, str, float]]] = defaultdict(list)
        for (lemma, pos), offsets in self.senses.items():
            if not WORD.fullmatch(lemma) and len(lemma) >= SHORTEST:
                continue
            weight = sum(self.weight(lemma, pos, k) for k in range(len(offsets)))
            found[lemma].append((lemma, pos, "base", weight))
            for name, forms in recognised(lemma, pos, self.irregular[pos]).items():
                for form in forms - {lemma}:
                    found[form].append((lemma, pos, name, weight * INFLECTED))
        return found

    def synonyms(self, lemma: str, pos: str, rank: int) -> list[str]:
        """Base forms of the synonyms of one sense, best first."""
        offset = self.senses[lemma, pos][rank]
        words = self.synsets[pos, offset]
        if lemma not in words:  # only as a name
            return []
        often = self.weight(lemma, pos, rank) >= OFTEN_SEEN
        ranked: list[tuple[float, str]] = []
        for word in words:
            if word == lemma or not WORD.fullmatch(word) or word in ENGLISH or word in NUMBERS:
                continue
            if (pos, offset, word) in self.unwanted or word in self.offensive:
                continue
            other = self.weight(word, pos, self.senses[word, pos].index(offset))
            share = other / self.uses[word]
            if share >= MIN_SHARE and (other >= 1 or not often):
                ranked.append((-other, word))
        return [word for _, word in sorted(ranked)[:MOST_SYNONYMS]]

    def inflected(self, word: str, pos: str, name: str) -> str | None:
        """One form of a synonym, None if it is not sure."""
        if name == "base":
            return word
        make = {"n": noun_forms, "v": verb_forms}.get(pos, adjective_forms)
        return make(word, self.irregular[pos])[name]

    def groups(self, surface: str, readings: list[tuple[str, str, str, float]]) -> str:
        """The line of one surface form."""
        total = sum(weight for *_, weight in readings)
        senses: list[tuple[float, str, list[str]]] = []
        for lemma, pos, name, weight in readings:
            offsets = self.senses[lemma, pos]
            own = sum(self.weight(lemma, pos, k) for k in range(len(offsets)))
            for rank in range(len(offsets)):
                share = self.weight(lemma, pos, rank) / own * weight / total
                if share < MIN_SHARE:
                    continue
                made = [self.inflected(word, pos, name) for word in self.synonyms(lemma, pos, rank)]
                good = [w for w in made if w and w != surface and w not in self.offensive]
                if good:
                    senses.append((share, pos, list(dict.fromkeys(good))))
        senses.sort(key=lambda sense: -sense[0])
        return ";".join(
            f"{pos}{min(99, round(100 * share))}:{','.join(words)}" for share, pos, words in senses
        )

    def table(self) -> dict[str, str]:
        """The groups of each word that has synonyms."""
        found: dict[str, str] = {}
        for surface, readings in self.readings().items():
            if not WORD.fullmatch(surface) or surface in ENGLISH | NUMBERS | self.offensive:
                continue
            if groups := self.groups(surface, readings):
                found[surface] = groups
        return found


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    made = Compiler(Path(sys.argv[1])).table()
    write_table(Path(sys.argv[2]), made)
    size = Path(sys.argv[2]).stat().st_size
    sys.stdout.write(f"{len(made)} words, {size} bytes\n")
