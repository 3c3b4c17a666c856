import csv

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from torsh_text import (
    QuantizedVectors,
    TopicModel,
    cluster,
    mine_pairs,
    quantize,
    search,
    similarity,
)

_finite = st.floats(-(2.0**127), 2.0**127, width=32)


@settings(max_examples=100, deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 20)), elements=_finite))
def test_int8_moves_no_entry_by_more_than_half_a_step(x):
    small = quantize(x, "int8")
    largest = np.abs(x.astype(np.float64)).max(1, keepdims=True)
    moved = np.abs(small.dequantize().double().numpy() - x)
    # 127 float32 steps of the scale's rounding; below 2^-126 float32 itself has steps of 1.4e-45
    assert (moved <= largest / 254 + largest * 2e-7 + 127 * 1.5e-45).all()
    assert small.codes.abs().max() <= 127 if x.size else len(small) == 0


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(1, 40)), elements=_finite))
def test_binary_is_numpys_packing_of_signs(x):
    small = quantize(x, "binary")
    assert np.array_equal(small.codes.numpy(), np.packbits(x > 0, axis=1))
    assert np.array_equal(small.dequantize().numpy(), np.where(x > 0, 1, -1))


def test_sentence_transformers_reads_and_writes_the_same_bits():
    peer = pytest.importorskip("sentence_transformers.util.quantization")
    for dim in (384, 13):
        x = torch.randn(50, dim)
        theirs = peer.quantize_embeddings(x, "ubinary")
        assert np.array_equal(quantize(x, "binary").codes.numpy(), theirs)
        read = QuantizedVectors(torch.from_numpy(theirs), dim)
        assert torch.equal(read.dequantize(), quantize(x, "binary").dequantize())


def test_sizes():
    x = torch.randn(100, 384)
    assert quantize(x, "binary").nbytes * 32 == x.nbytes
    assert quantize(x, "int8").nbytes == 100 * (384 + 4)
    assert repr(quantize(x, "int8")) == "QuantizedVectors(int8, (100, 384), 38,800 bytes)"


@pytest.mark.parametrize("kind", ["int8", "binary"])
@pytest.mark.parametrize("dim", [1, 8, 13, 384])
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_search_equals_that_of_dequantized_vectors(kind, dim, metric):
    q, x = torch.randn(7, dim, dtype=torch.float64), torch.randn(3000, dim)
    small = quantize(x, kind)
    wide = small.dequantize().double()
    expected = similarity(q, wide, metric).topk(20)
    scores, ids = search(q, small, 20, metric=metric, block=700)
    # dequantize() rounds 384 entries to float32, search the scales alone
    torch.testing.assert_close(scores, expected.values, atol=1e-5, rtol=1e-6)
    picked = similarity(q, wide, metric).gather(1, ids)  # one- and eight-bit rows have ties
    torch.testing.assert_close(picked, expected.values, atol=1e-5, rtol=1e-6)
    if dim == 384:
        assert torch.equal(ids, expected.indices)
        assert torch.equal(ids, search(q.float(), small.dequantize(), 20, metric=metric).ids)
    torch.testing.assert_close(
        similarity(q, small, metric), similarity(q, wide, metric), atol=1e-5, rtol=1e-6
    )
    one = search(q[0], small, 20, metric=metric, block=700)
    torch.testing.assert_close(one.scores, scores[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dim", [5, 8, 61, 64, 384])
@pytest.mark.parametrize("queries", [3, 40])  # counts bits, multiplies signs
def test_binary_queries_rank_by_hamming_distance(dim, queries):
    q, x = quantize(torch.randn(queries, dim), "binary"), quantize(torch.randn(500, dim), "binary")
    # bits beyond dim must not count
    x.codes[:, -1] |= 2 ** (-dim % 8) - 1
    a = np.unpackbits(q.codes.numpy(), axis=1, count=dim)
    b = np.unpackbits(x.codes.numpy(), axis=1, count=dim)
    distance = (a[:, None] != b).sum(2)
    expected = np.lexsort((np.broadcast_to(np.arange(500), distance.shape), distance))[:, :500]
    scores, ids = search(q, x, 500, metric="dot", block=64)
    assert np.array_equal(ids.numpy(), expected)
    assert np.array_equal(scores.numpy(), dim - 2 * np.take_along_axis(distance, expected, 1))
    cosines = search(q, x, 500, block=64)
    assert torch.equal(cosines.ids, ids)
    torch.testing.assert_close(cosines.scores, scores / dim)


def test_rescoring_ranks_candidates_by_finer_vectors(tmp_path):
    q, x = torch.randn(9, 64), torch.randn(400, 64)
    coarse = quantize(x, "binary")
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for finer in (x, mapped, x.double(), quantize(x, "int8")):
        wide = finer.dequantize() if isinstance(finer, QuantizedVectors) else x
        scores, ids = search(q, coarse, 5, rescore=finer, candidates=30)
        table = similarity(q, wide)
        pool = search(q, coarse, 30).ids
        best = table.gather(1, pool).topk(5)
        torch.testing.assert_close(scores, best.values)
        assert torch.equal(ids, pool.gather(1, best.indices))
        everything = search(q, coarse, 5, rescore=finer, candidates=1000)
        assert torch.equal(everything.ids, table.topk(5).indices)
    assert torch.equal(
        search(q, coarse, 5, rescore=x).ids, search(q, coarse, 5, rescore=x, candidates=20).ids
    )
    assert search(q[0], coarse, 5, rescore=x).ids.shape == (5,)
    assert search(q[:0], coarse, 5, rescore=x).ids.shape == (0, 5)
    assert torch.equal(
        search(quantize(q, "int8"), coarse, 3, rescore=x, candidates=400).ids,
        search(quantize(q, "int8"), x, 3).ids,
    )


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_pairs_of_quantized_vectors(kind):
    small = quantize(torch.randn(150, 24), kind)
    wide = small.dequantize().double()
    found, expected = mine_pairs(small, k=40, block=64), mine_pairs(wide, k=40)
    torch.testing.assert_close(found.scores.double(), expected.scores, atol=1e-6, rtol=0)
    rows = similarity(wide, wide)[found.pairs[:, 0], found.pairs[:, 1]]
    torch.testing.assert_close(rows, expected.scores, atol=1e-6, rtol=0)


def test_zero_and_tiny_vectors():
    x = torch.tensor([[0.0, 0.0], [1e-45, 0.0], [0.0, -2.0]])
    small = quantize(x, "int8")
    assert small.codes.tolist() == [[0, 0], [0, 0], [0, -127]]
    assert similarity(torch.tensor([0.0, -1.0]), small).tolist() == [0.0, 0.0, 1.0]
    assert quantize(x, "binary").codes.flatten().tolist() == [0, 128, 0]


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_inputs_of_every_precision(kind):
    x = torch.randn(6, 20).to(torch.bfloat16)
    expected = quantize(x.float(), kind)
    for same in (x, x.double(), x.double().numpy(), np.asfortranarray(x.float().numpy())):
        assert torch.equal(quantize(same, kind).codes, expected.codes)
    assert quantize(x.float().requires_grad_(), kind).dequantize().requires_grad is False
    one = quantize(x[2], kind)
    assert one.shape == (20,)
    assert torch.equal(one.codes, expected.codes[2])
    assert torch.equal(one.dequantize(), expected.dequantize()[2])
    assert search(one, expected, 1).ids.tolist() == [2]
    assert len(quantize(x[:0], kind)) == 0
    big = torch.randn(5000, 300)  # several blocks
    expected = torch.cat([quantize(part, kind).codes for part in big.split(999)])
    assert torch.equal(quantize(big, kind).codes, expected)


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_rows_are_taken_and_joined(kind):
    small = quantize(torch.randn(7, 12), kind)
    wide = small.dequantize()
    mask = torch.tensor([True, False, True, False, False, False, True])
    for rows in (3, -1, slice(1, 6, 2), [5, 0, 5], torch.tensor([2, 4]), np.array([6]), mask):
        assert torch.equal(small[rows].dequantize(), wide[rows])
    assert small[[]].shape == (0, 12)
    assert [tuple(row.shape) for row in small] == [(12,)] * 7
    joined = QuantizedVectors.cat([small[:2], small[2:2], small[2:]])
    assert torch.equal(joined.dequantize(), wide)
    with pytest.raises(TypeError, match="only the rows of several"):
        small[0, 1]
    with pytest.raises(TypeError, match="only the rows of several"):
        small[0][1]
    with pytest.raises(TypeError, match="one vector"):
        len(small[0])
    with pytest.raises(ValueError, match="parts are none"):
        QuantizedVectors.cat([])
    with pytest.raises(ValueError, match="one vector without rows"):
        QuantizedVectors.cat([small[0]])
    with pytest.raises(ValueError, match="parts are binary of 9 and int8 of 9"):
        QuantizedVectors.cat([quantize(torch.ones(1, 9), to) for to in ("int8", "binary")])


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_files(tmp_path, kind):
    small = quantize(torch.randn(7, 12), kind)
    for part in (small, small[2], small[:0], small[::2]):
        part.save(tmp_path / "x.safetensors")
        read = QuantizedVectors.load(tmp_path / "x.safetensors")
        assert (read.kind, read.shape) == (kind, part.shape)
        assert torch.equal(read.dequantize(), part.dequantize())
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_refuses_other_and_damaged_files(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError):
        QuantizedVectors.load(path)
    quantize(torch.randn(7, 12), "int8").save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="blake2b does not match"):
        QuantizedVectors.load(path)
    path.write_bytes(content[:20])
    with pytest.raises(ValueError, match="damaged or no safetensors"):
        QuantizedVectors.load(path)
    save_file({"codes": torch.ones(2, 2)}, path)
    with pytest.raises(ValueError, match="holds no quantized vectors"):
        QuantizedVectors.load(path)
    about = {"format": "torsh-text-quantized", "version": "2"}
    save_file({"codes": torch.ones(2, 2)}, path, metadata=about)
    with pytest.raises(ValueError, match="has version 2; this torsh_text reads 1"):
        QuantizedVectors.load(path)


def test_refuses_what_does_not_fit():
    x = torch.randn(5, 12)
    with pytest.raises(ValueError, match="to='int4' is neither"):
        quantize(x, "int4")
    with pytest.raises(ValueError, match="shape"):
        quantize(x.unsqueeze(0), "int8")
    with pytest.raises(ValueError, match="shape"):
        quantize(x[:, :0], "int8")
    with pytest.raises(TypeError, match="vectors is a list"):
        quantize([1.0], "int8")
    with pytest.raises(TypeError, match=r"vectors holds torch.bool"):
        quantize(x > 0, "binary")
    for bad in (float("nan"), float("inf"), 1e300):
        wrong = x.double()
        wrong[3, 1] = bad
        for kind in ("int8", "binary"):
            with pytest.raises(ValueError, match=r"vectors\[3\] is not finite"):
                quantize(wrong, kind)
    with pytest.raises(ValueError, match=r"codes have shape \(5, 12\); binary codes of dim=12"):
        QuantizedVectors(torch.zeros(5, 12, dtype=torch.uint8), 12)
    with pytest.raises(ValueError, match=r"codes are torch.int16"):
        QuantizedVectors(torch.zeros(5, 12, dtype=torch.int16), 12)
    with pytest.raises(ValueError, match=r"scales are missing; expected float32 \(5,\)"):
        QuantizedVectors(torch.zeros(5, 12, dtype=torch.int8), 12)
    with pytest.raises(ValueError, match="binary vectors have none"):
        QuantizedVectors(torch.zeros(5, 2, dtype=torch.uint8), 12, torch.ones(5))


def test_search_refuses_what_does_not_fit():
    x = torch.randn(5, 12)
    small = quantize(x, "binary")
    assert search(x, small, 6).ids.shape == (5, 5)
    assert search(x, small[:0], 1).ids.shape == (5, 0)
    with pytest.raises(ValueError, match="queries have 11 entries a vector, the corpus has 12"):
        search(x[:, :11], small, 1)
    with pytest.raises(ValueError, match="metric='l2'"):
        search(small, small, 1, metric="l2")
    with pytest.raises(ValueError, match="candidates=3 is given without rescore"):
        search(x, small, 1, candidates=3)
    with pytest.raises(ValueError, match="candidates=1 is less than k=2"):
        search(x, small, 2, rescore=x, candidates=1)
    with pytest.raises(ValueError, match=r"rescore has shape \(4, 12\), the corpus has \(5, 12\)"):
        search(x, small, 1, rescore=x[:4])
    x[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"rescore\[2:\].* is not finite"):
        search(x[0], small, 1, rescore=x, candidates=5)
    broken = QuantizedVectors(torch.ones(2, 12, dtype=torch.int8), 12, torch.tensor([1.0, np.nan]))
    for metric in ("cosine", "dot"):
        with pytest.raises(ValueError, match=r"corpus\[1\] is not finite"):
            search(x[0], broken, 1, metric=metric)


def test_encoder_quantizes_at_the_end(minilm, tmp_path):
    texts = ["a cat on a mat", "stocks fell", "a cat on a mat"]
    whole = minilm.encode(texts)
    for kind in ("int8", "binary"):
        cold = minilm.encode(texts, quantize=kind, cache=tmp_path)
        warm = minilm.encode(texts, quantize=kind, cache=tmp_path)
        for found in (cold, warm, minilm.encode(texts, quantize=kind)):
            assert torch.equal(found.dequantize(), quantize(whole, kind).dequantize())
        assert minilm.encode(texts[0], quantize=kind).shape == (384,)
        assert minilm.encode([], quantize=kind).shape == (0, 384)
        assert minilm.encode(texts, quantize=kind, dim=30).shape == (3, 30)
    assert torch.equal(minilm.encode(texts, cache=tmp_path), whole)
    with pytest.raises(ValueError, match="quantize='int4' is neither"):
        minilm.encode(texts, quantize="int4")
    with pytest.raises(ValueError, match="out='numpy' is given with quantize='int8'"):
        minilm.encode(texts, quantize="int8", out="numpy")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["int8", "binary"])
@pytest.mark.parametrize("dim", [13, 384])
def test_a_gpu_gives_the_same(kind, dim):
    q, x = torch.randn(30, dim), torch.randn(5000, dim)
    small = quantize(x, kind)
    there = quantize(x.cuda(), kind)
    assert torch.equal(there.to("cpu").dequantize(), small.dequantize())
    assert torch.equal(there.dequantize().cpu(), small.dequantize())
    exact = search(q, x, 5).scores
    for corpus in (small, there):  # the corpus may stay on the host
        for finer in (x, x.cuda()):
            found = search(q.cuda(), corpus, 5, rescore=finer, candidates=len(x))
            assert found.ids.is_cuda
            torch.testing.assert_close(found.scores.cpu(), exact, atol=1e-5, rtol=0)
    near = search(q.cuda(), there, 5).scores.cpu()
    torch.testing.assert_close(near, search(q, small, 5).scores, atol=1e-5, rtol=0)


def test_recall_on_real_sentences(minilm, text_data):
    with (text_data / "stsb" / "dev.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    x = minilm.encode(list(dict.fromkeys(row[0] for row in rows)))
    q = minilm.encode([row[1] for row in rows[::5]])
    best = search(q, x, 10).ids

    def recall(ids):
        return (ids.unsqueeze(2) == best.unsqueeze(1)).any(2).float().mean().item()

    fine, coarse = quantize(x, "int8"), quantize(x, "binary")
    # measured: 0.998, 0.776, 0.665, 0.985
    assert recall(search(q, fine, 10).ids) >= 0.99
    assert recall(search(q, coarse, 10).ids) >= 0.74
    assert recall(search(quantize(q, "binary"), coarse, 10).ids) >= 0.62
    assert recall(search(q, coarse, 10, rescore=fine).ids) >= 0.97


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_one_row_by_any_integer(kind):
    small = quantize(torch.randn(5, 12), kind)
    for row in (3, np.int64(3), np.array(3), torch.tensor(3), -2):
        assert small[row].shape == (12,)
        assert torch.equal(small[row].codes, small.codes[3])
    assert small[np.array([3])].shape == small[torch.tensor([3])].shape == (1, 12)
    with pytest.raises(TypeError, match="integer"):
        small[1.0]


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_what_takes_no_codes_says_what_to_do(kind):
    small = quantize(torch.randn(5, 12), kind)
    with pytest.raises(TypeError, match=r"\.dequantize\(\)\.numpy\(\)"):
        np.asarray(small)
    with pytest.raises(TypeError, match=r"x is a QuantizedVectors; pass x\.dequantize\(\)"):
        cluster(small)
    with pytest.raises(TypeError, match=r"pass vectors\.dequantize\(\)"):
        TopicModel(k=2).fit(["a b"] * 5, vectors=small)


def test_a_damaged_dim_is_noticed(tmp_path):
    path = tmp_path / "small"
    quantize(torch.randn(5, 12), "binary").save(path)
    content = path.read_bytes()
    assert content.count(b'"dim":"12"') == 1
    path.write_bytes(content.replace(b'"dim":"12"', b'"dim":"13"'))
    with pytest.raises(ValueError, match="blake2b does not match"):
        QuantizedVectors.load(path)
