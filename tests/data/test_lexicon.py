import hashlib
import importlib.util
import os
import pickle
import struct
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torsh_data.text import Lexicon, Synonym
from torsh_data.text._lexicon_file import read_table, write_table

WORDNET = Path(sys.modules["torsh_data.text._lexicon_file"].__file__).with_name("wordnet.bin")
TOOLS = Path(__file__).parents[2] / "torsh_data" / "lexicon"


def words(name):
    return [one.word for one in Lexicon.wordnet().synonyms(name)]


@pytest.fixture(scope="module")
def inflection():
    spec = importlib.util.spec_from_file_location("inflection", TOOLS / "inflection.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("word", "synonym"),
    [
        ("big", "large"),
        ("bigger", "larger"),
        ("biggest", "largest"),
        ("car", "automobile"),
        ("cars", "automobiles"),
        ("stories", "tales"),
        ("bought", "purchased"),
        ("stopped", "halted"),
        ("buying", "purchasing"),
        ("quickly", "rapidly"),
        ("movies", "films"),
    ],
)
def test_synonyms_have_the_form_of_their_word(word, synonym):
    assert synonym in words(word)


def test_rare_senses_and_functional_words_have_no_synonyms():
    # "dog" mostly is the animal, which has no other single word; "hound" is another sense
    for word in ("dog", "good", "run", "not", "the", "two", "is", "paris"):
        assert words(word) == []
    assert "machine" not in words("car")  # which mostly is another machine


def test_nothing_offensive_or_capitalised_is_proposed():
    table = read_table(WORDNET)
    assert len(table) > 60_000
    proposed = {w for line in table.values() for g in line.split(";") for w in g[4:].split(",")}
    assert not [w for w in proposed if w != w.lower() or " " in w or "_" in w]
    for word, line in table.items():
        for group in line.split(";"):
            sense, others = group.split(":")
            assert sense[0] in "nvar"
            assert 20 <= int(sense[1:]) <= 99
            assert word not in others.split(",")
    assert not proposed & {"nigger", "kike", "fag", "faggot", "wetback", "chink", "darky", "spic"}


def test_part_of_speech_and_share():
    lexicon = Lexicon.wordnet()
    found = lexicon.synonyms("stopped")
    assert found[0] == Synonym("halted", "v", 0.35)
    assert lexicon.synonyms("stopped", pos="n") == []
    assert lexicon.synonyms("stopped", min_share=0.36) == []
    assert lexicon.synonyms("car", pos="n", min_share=0.96)[0].word == "automobile"
    with pytest.raises(ValueError, match="pos='x'; use one of n, v, a, r"):
        lexicon.synonyms("car", pos="x")


def test_the_lexicon_is_small_and_travels_as_its_name():
    assert WORDNET.stat().st_size < 1_500_000
    pickled = pickle.dumps(Lexicon.wordnet())
    assert len(pickled) < 1000
    assert pickle.loads(pickled).synonyms("cars") == Lexicon.wordnet().synonyms("cars")
    own = Lexicon({"ja": ["jawohl"]})
    assert pickle.loads(pickle.dumps(own)).synonyms("ja") == own.synonyms("ja")


def test_the_licence_is_beside_it():
    text = WORDNET.with_name("NOTICE").read_text()
    for part in ("WordNet 3.0 Copyright 2006 by Princeton University", "Permission to use, copy"):
        assert part in text


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_changed_byte_is_noticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("lexicon") / "small.bin"
    write_table(path, {"cat": "n90:feline", "dog": "n90:hound"})
    assert read_table(path) == {"cat": "n90:feline", "dog": "n90:hound"}
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"small\.bin"):
        read_table(path)


def test_a_shortened_file_is_noticed(tmp_path):
    path = tmp_path / "x.bin"
    write_table(path, {"cat": "n90:feline"})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(RuntimeError, match=r"x\.bin"):
            read_table(path)


def forged(version=1, entries=1, raw=None, packed=None, text=b"cat\tn90:feline\n"):
    body = zlib.compress(text) if packed is None else packed
    size = len(text) if raw is None else raw
    head = struct.pack("<8sIIQQ", b"TORSHLEX", version, entries, size, len(body))
    return head + hashlib.blake2b(head + body, digest_size=16).digest() + body


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (forged(version=2), "has version 2, this torsh-data reads version 1"),
        (forged(entries=2), "does not hold the 2 words"),
        (forged(raw=1 << 40), "a table of 1099511627776 bytes is more than"),
        (forged(raw=3), "does not hold the 1 words"),
        (forged(packed=b"nonsense"), "is damaged: Error"),
        (forged(text=b"\xff\xff\tn90:x\n"), "is damaged: 'utf-8'"),
        (forged(text=b"cat and dog\n"), "does not hold the 1 words"),
        (b"TORSHLEX", "ends inside its header"),
        (b"PK", "is not a compiled lexicon"),
    ],
)
def test_forged_files_are_refused(tmp_path, content, message):
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=message):
        read_table(path)


def test_own_files(tmp_path):
    path = tmp_path / "german.tsv"
    path.write_text("# Synonyme\nHaus\tGebäude, Bau\n\nschnell\trasch\tflink\nHaus\tHeim\n")
    lexicon = Lexicon.load(path)
    assert [one.word for one in lexicon.synonyms("Haus")] == ["Gebäude", "Bau", "Heim"]
    assert [one.word for one in lexicon.synonyms("schnell")] == ["rasch", "flink"]
    assert len(lexicon) == 2
    assert "Haus" in lexicon
    assert "haus" not in lexicon
    path.write_text("Haus\tBau\nhier fehlt etwas\n")
    with pytest.raises(ValueError, match=r"german\.tsv, line 2: 'hier fehlt etwas' is no word"):
        Lexicon.load(path)
    with pytest.raises(FileNotFoundError, match="'wordnet' is built in"):
        Lexicon.load(tmp_path / "wordnett")
    compiled = tmp_path / "own.bin"
    write_table(compiled, {"cat": "n90:feline"})
    assert Lexicon.load(compiled).synonyms("cat") == [Synonym("feline", "n", 0.9)]


def test_wrong_tables_are_refused():
    with pytest.raises(ValueError, match="the table is empty"):
        Lexicon({})
    with pytest.raises(ValueError, match="'a' has the synonyms"):
        Lexicon({"a": ["b", " "]})
    with pytest.raises(TypeError, match="is one string; give a list"):
        Lexicon({"a": "b"})


def test_regular_and_irregular_forms(inflection):
    def noun(word, **irregular):
        return inflection.noun_forms(word, irregular)["plural"]

    assert [noun(w) for w in ("cat", "box", "baby", "day", "church", "fireman")] == [
        "cats", "boxes", "babies", "days", "churches", "firemen",
    ]  # fmt: skip
    assert noun("wolf", wolf=["wolves"]) == "wolves"
    assert noun("corpus", corpus=["corpora", "corpuses"]) is None  # not sure
    assert noun("scissors") is None

    def verb(word, **irregular):
        return tuple(inflection.verb_forms(word, irregular).values())

    assert verb("walk") == ("walks", "walked", "walking")
    assert verb("try") == ("tries", "tried", "trying")
    assert verb("chat") == ("chats", "chatted", "chatting")
    assert verb("visit") == ("visits", "visited", "visiting")
    assert verb("lie") == ("lies", "lied", "lying")
    assert verb("agree") == ("agrees", "agreed", "agreeing")
    assert verb("stop", stop=["stopped", "stopping"]) == ("stops", "stopped", "stopping")
    assert verb("go", go=["went", "gone"]) == ("goes", None, "going")
    assert verb("show", show=["shown"])[1] is None  # a participle is no past
    adjective = inflection.adjective_forms
    assert adjective("large", {}) == {"comparative": "larger", "superlative": "largest"}
    assert adjective("fat", {})["comparative"] == "fatter"
    assert adjective("beautiful", {})["comparative"] is None


def test_the_file_is_what_the_script_makes(tmp_path):
    folder = os.environ.get("TORSH_WORDNET")
    if not folder:
        pytest.skip("TORSH_WORDNET names no folder with the data files of WordNet 3.0")
    import subprocess

    made = tmp_path / "wordnet.bin"
    subprocess.run([sys.executable, TOOLS / "build.py", folder, made], check=True)
    assert read_table(made) == read_table(WORDNET)
