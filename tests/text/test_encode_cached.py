import errno
import resource
import warnings

import pytest
import torch

from tests.text.architectures import random_texts
from torsh_text import EmbeddingCache


class Rows:
    """Counts the rows that an encoder computes for texts."""

    def __init__(self, encoder):
        self.count = 0
        pooled = encoder._pooled

        def counted(batch):
            self.count += len(batch.lengths)
            return pooled(batch)

        encoder._pooled = counted

    def taken(self):
        count, self.count = self.count, 0
        return count


def test_cache_returns_the_same_bits_and_computes_only_what_is_new(tiny, tmp_path):
    rows = Rows(tiny)
    texts = random_texts([5, 30, 1, 17, 0, 8]) + random_texts([5])
    plain = tiny.encode(texts)
    assert rows.taken() == 6
    cold = tiny.encode(texts, cache=tmp_path / "cache")
    assert rows.taken() == 6
    warm = tiny.encode(texts, cache=str(tmp_path / "cache"))
    assert rows.taken() == 0
    assert torch.equal(cold, plain)
    assert torch.equal(warm, cold)
    mixed = [texts[3], "w9 w8", texts[0], "w9 w8", *texts, "w7"]
    found = tiny.encode(mixed, cache=EmbeddingCache(tmp_path / "cache"))
    assert rows.taken() == 2
    assert (found - tiny.encode(mixed)).abs().max() <= 2e-6  # other batches round differently
    assert torch.equal(found[4:-1], plain)
    assert EmbeddingCache(tmp_path / "cache").stats().rows == 8
    rows.taken()
    assert torch.equal(tiny.encode(texts[2], cache=tmp_path / "cache"), plain[2])
    assert tiny.encode(texts, cache=tmp_path / "cache", out="numpy").shape == (7, 64)
    assert tiny.encode([], cache=tmp_path / "cache").shape == (0, 64)
    assert rows.taken() == 0


def test_cache_serves_every_dim_and_allows_training_on_its_vectors(minilm, tmp_path):
    texts = ["a cat", "a dog"]
    minilm.encode(texts, cache=tmp_path)
    short = minilm.encode(texts, cache=tmp_path, dim=32)
    assert EmbeddingCache(tmp_path).stats().rows == 2
    assert torch.equal(short, minilm.encode(texts, dim=32))
    layer = torch.nn.Linear(32, 2)
    layer(short).sum().backward()
    assert layer.weight.grad is not None


def test_cache_knows_what_changes_a_vector(tiny, tmp_path):
    rows = Rows(tiny)
    text = ["w5 w6 " * 25]

    def computed(**options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = tiny.encode(text, cache=tmp_path, **options)
            count = rows.taken()
            assert (found - tiny.encode(text, **options)).abs().max() <= 2e-6
            rows.taken()
        return count

    assert computed() == 1
    assert computed() == 0
    assert computed(prompt="w7 ") == 1
    assert computed(prompt="") == 0
    assert computed(long="mean") == 2
    assert computed(long="mean") == 0
    tiny.max_length = 30
    assert computed() == 1
    tiny.max_length = 40
    assert computed() == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert computed() == 1
        assert computed() == 0
    tiny._normalize = True
    assert computed() == 1
    tiny._modes = ("cls",)
    assert computed() == 1
    with torch.no_grad():
        tiny.backbone.embeddings.word_embeddings.weight[5, 0] += 1
    assert computed() == 1


def test_cached_truncation_is_reported_and_refused(tiny, tmp_path):
    texts = random_texts([50, 3, 60])
    for _ in range(2):
        with pytest.warns(UserWarning, match="2 of 3 different texts have more than max_length=40"):
            tiny.encode(texts, cache=tmp_path)
    with pytest.raises(ValueError, match=r"texts\[1\] has more than max_length=40"):
        tiny.encode([texts[1], texts[2]], cache=tmp_path, long="error")
    tiny.encode([texts[1]], cache=tmp_path, long="error")
    fresh = random_texts([4, 44], seed=1)
    with pytest.raises(ValueError, match=r"texts\[2\] has more than max_length=40"):
        tiny.encode([texts[1], *fresh], cache=tmp_path, long="error")


def test_what_was_computed_stays_in_the_cache(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("torsh_text._encoder.KEPT_WINDOW", 8)
    rows = Rows(tiny)
    texts = [f"w{n} {'w5 ' * 17}" for n in range(10, 40)] + random_texts([90], seed=3)
    tiny.encode(texts[:3], cache=tmp_path, long="mean")

    def stop(*_):
        if rows.count > 22:
            raise KeyboardInterrupt

    hook = tiny.backbone.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        tiny.encode(texts, cache=tmp_path, max_tokens=40, long="mean")
    hook.remove()
    kept = EmbeddingCache(tmp_path).stats().rows
    assert kept == 3 + 16 + 2  # two windows, and the first two texts of the third
    rows.taken()
    found = tiny.encode(texts, cache=tmp_path, long="mean")
    assert rows.taken() == 31 + 2 - kept  # the last text has three pieces
    assert (found - tiny.encode(texts, long="mean")).abs().max() <= 2e-6


def test_a_text_of_which_a_piece_is_missing_is_not_kept(tiny, tmp_path):
    texts = [*random_texts([90]), "w5", "w6 w7"]  # three pieces, the longest of which come first
    rows = Rows(tiny)

    def stop(*_):
        if rows.count == 2:
            raise RuntimeError("no more")

    hook = tiny.backbone.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="no more"):
        tiny.encode(texts, cache=tmp_path, max_tokens=40, long="mean")
    assert EmbeddingCache(tmp_path).stats().rows == 0
    hook.remove()


def test_vectors_that_are_not_finite_are_never_kept(tiny, tmp_path):
    with torch.no_grad():
        tiny.backbone.embeddings.word_embeddings.weight[9] = torch.nan
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"texts\[1\] is not finite"):
            tiny.encode(["w5", "w9"], cache=tmp_path)
    assert EmbeddingCache(tmp_path).stats().rows == 1


def test_float16_cache_gives_cold_and_warm_the_same_bits(minilm, tmp_path):
    cache = EmbeddingCache(tmp_path, dtype="float16")
    texts = ["a cat", "a dog", ""]
    cold = minilm.encode(texts, cache=cache)
    assert torch.equal(cold, minilm.encode(texts, cache=cache))
    assert cache.stats().hits == 3
    exact = minilm.encode(texts)
    assert 0 < (cold - exact).abs().max() <= 2.5e-4  # half a step of float16 below 0.5
    assert (cold.norm(dim=1) - 1).abs().max() <= 1e-6


def test_a_readonly_or_full_cache_still_encodes(tiny, tmp_path):
    cache = EmbeddingCache(tmp_path)
    tiny.encode(["w5"], cache=cache)
    reader = EmbeddingCache(tmp_path, readonly=True)
    found = tiny.encode(["w5", "w6"], cache=reader)
    assert (found - tiny.encode(["w5", "w6"])).abs().max() <= 2e-6
    assert reader.stats().rows == 1

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    try:
        with pytest.warns(UserWarning, match="not kept any more: .* is full") as said:
            full = tiny.encode(["w5", "w6", "w7"], cache=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"[Errno {errno.EFBIG}]" in str(said[0].message)
    assert (full - tiny.encode(["w5", "w6", "w7"])).abs().max() <= 2e-6
    assert cache.verify() == []


def test_cache_refuses_training_mode_and_other_things(tiny, tmp_path):
    with pytest.raises(TypeError, match="cache=7 is neither an EmbeddingCache nor a path"):
        tiny.encode(["w5"], cache=7)
    with pytest.raises(RuntimeError, match="in training mode"):
        tiny.train().encode(["w5"], cache=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match=r"texts\[1\] holds a lone surrogate"):
        tiny.eval().encode(["w5", "\ud800"], cache=tmp_path)
