import copy
import hashlib
import pickle
import struct
import tempfile
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from torsh_text import EmbeddingCache
from torsh_text._cache import open_cache

DIM = 6


def vectors_of(numbers, dim=DIM):
    return (np.array(numbers)[:, None] * 10 + np.arange(dim)).astype(np.float32)


def store(cache, numbers, model="m", **options):
    keys = cache.keys(model, [f"text {n}" for n in numbers])
    return cache.store(model, keys, vectors_of(numbers), **options)


def known(cache, numbers, model="m"):
    hits = cache.lookup(model, DIM, cache.keys(model, [f"text {n}" for n in numbers]))
    found = np.array(numbers)[hits.found]
    assert np.array_equal(hits.vectors, vectors_of(found))
    return set(found.tolist())


def contents(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


class CacheAgainstDict(RuleBasedStateMachine):
    """Two writers and a reader of one folder do together what one dict does."""

    models = st.sampled_from(["a", "b"])
    numbers = st.lists(st.integers(0, 60), max_size=25)

    @initialize()
    def open(self):
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "cache"
        self.writers = [EmbeddingCache(self.path), EmbeddingCache(self.path)]
        self.reader = EmbeddingCache(self.path, readonly=True)
        self.rows = {}

    def keys(self, model, numbers):
        return self.reader.keys(model, [str(n) for n in numbers])

    @rule(model=models, numbers=numbers, add=st.integers(0, 9), writer=st.integers(0, 1))
    def store(self, model, numbers, add, writer):
        vectors = vectors_of(numbers) + add if numbers else np.empty((0, DIM), np.float32)
        truncated = np.array([n % 3 == 0 for n in numbers], bool)
        new = {(model, n) for n in numbers} - set(self.rows)
        cache = self.writers[writer]
        keys = self.keys(model, numbers)
        assert cache.store(model, keys, vectors, truncated=truncated) == len(new)
        for n, vector in zip(numbers, vectors, strict=True):
            self.rows.setdefault((model, n), vector)

    @rule(model=models, numbers=numbers, who=st.integers(0, 2))
    def lookup(self, model, numbers, who):
        cache = [*self.writers, self.reader][who]
        hits = cache.lookup(model, DIM, self.keys(model, numbers))
        expected = [n for n in numbers if (model, n) in self.rows]
        assert hits.found.tolist() == [(model, n) in self.rows for n in numbers]
        assert hits.truncated.tolist() == [n % 3 == 0 for n in expected]
        for n, vector in zip(expected, hits.vectors, strict=True):
            assert np.array_equal(vector, self.rows[model, n])

    @rule(writer=st.integers(0, 1))
    def compact(self, writer):
        assert self.writers[writer].compact() >= 0

    @rule(writer=st.integers(0, 1))
    def reopen(self, writer):
        self.writers[writer] = EmbeddingCache(self.path)

    @rule()
    def reopen_reader(self):
        self.reader = EmbeddingCache(self.path, readonly=True)

    @invariant()
    def counts(self):
        if hasattr(self, "reader"):
            assert self.reader.stats().rows == len(self.rows)
            assert self.reader.verify() == []

    def teardown(self):
        self.folder.cleanup()


CacheAgainstDict.TestCase.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None
)


test_cache_against_dict = CacheAgainstDict.TestCase


def test_keys_know_everything_that_changes_a_vector(tmp_path):
    cache = EmbeddingCache(tmp_path / "a")
    half = EmbeddingCache(tmp_path / "b", dtype="float16")
    found = [
        cache.keys("m", ["text"]),
        cache.keys("n", ["text"]),
        cache.keys("m", ["text "]),
        cache.keys("m", ["text"], settings="mean"),
        half.keys("m", ["text"]),
        cache.keys("m", ["text", "naïve 日本語"])[1:],
    ]
    assert len({key.tobytes() for key in found}) == len(found)
    assert np.array_equal(cache.keys("m", ["x", "text"])[1:], found[0])
    assert cache.keys("m", []).shape == (0, 2)
    person = {"digest_size": 16, "person": b"torsh-text-cache"}
    salt = hashlib.blake2b(b"('m', '', 'float32')", **person).digest()
    assert found[0].tobytes() == hashlib.blake2b(b"text", salt=salt, **person).digest()


def test_float16_halves_the_file_and_rounds(tmp_path):
    numbers = np.random.default_rng(0).standard_normal((500, DIM)).astype(np.float32)
    sizes = {}
    for dtype in ("float32", "float16"):
        cache = EmbeddingCache(tmp_path / dtype, dtype=dtype)
        keys = cache.keys("m", [str(i) for i in range(500)])
        cache.store("m", keys, numbers)
        found = cache.lookup("m", DIM, keys).vectors
        assert found.dtype == np.float32
        assert np.array_equal(found, numbers.astype(dtype).astype(np.float32))
        sizes[dtype] = cache.stats().bytes
    assert sizes["float32"] - sizes["float16"] == 500 * DIM * 2


def test_one_folder_serves_several_models_sizes_and_dtypes(tmp_path):
    cache = EmbeddingCache(tmp_path)
    assert store(cache, range(5)) == 5
    assert store(cache, range(3, 9), model="other") == 6
    wide = np.ones((2, DIM + 1), np.float32)
    keys = cache.keys("m", ["text 0", "text 1"])
    cache.store("m", keys, wide)
    half = EmbeddingCache(tmp_path, dtype="float16")
    half.store("m", half.keys("m", ["text 0"]), np.full((1, DIM), 0.5))
    for handle in (cache, EmbeddingCache(tmp_path)):
        assert known(handle, range(10)) == set(range(5))
        assert known(handle, range(10), model="other") == set(range(3, 9))
        assert np.array_equal(handle.lookup("m", DIM + 1, keys).vectors, wide)
        assert not handle.lookup("m", DIM + 2, keys).found.any()
    assert half.lookup("m", DIM, half.keys("m", ["text 0"])).vectors.tolist() == [[0.5] * DIM]
    stats = cache.stats()
    assert (stats.rows, stats.models, stats.segments) == (14, 2, 4)


def test_stats_count(tmp_path):
    cache = EmbeddingCache(tmp_path)
    store(cache, [1, 2, 2, 3])
    store(cache, [3, 4])
    known(cache, [1, 2, 8])
    stats = cache.stats()
    assert (stats.rows, stats.stored, stats.hits, stats.misses) == (4, 4, 2, 1)
    assert (stats.evicted, stats.damaged, stats.segments) == (0, 0, 1)
    # two headers of 128 bytes; a row is its vector and 32 bytes
    assert (
        stats.bytes
        == 2 * 128 + 4 * (DIM * 4 + 32)
        == sum(path.stat().st_size for path in tmp_path.iterdir())
    )


def test_oldest_rows_leave_when_the_limit_is_reached(tmp_path):
    row = DIM * 4 + 32
    limit = 16 * (2 * 128 + 10 * row)
    cache = EmbeddingCache(tmp_path, max_bytes=limit)
    for first in range(0, 400, 7):
        store(cache, range(first, first + 7))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit
        seen = known(cache, range(410))
        newest = set(range(max(0, first + 7 - 150), first + 7))
        assert newest <= seen  # at most one of sixteen segments is missing
        assert seen == set(range(min(seen), first + 7))
    stats = cache.stats()
    assert stats.evicted == stats.stored - stats.rows > 200
    assert len(list(tmp_path.iterdir())) == 2 * stats.segments + 1
    assert known(EmbeddingCache(tmp_path), range(410)) == known(cache, range(410))


def test_a_store_beyond_the_limit_keeps_its_end(tmp_path):
    cache = EmbeddingCache(tmp_path, max_bytes=4000)
    store(cache, range(1000))
    seen = known(cache, range(1000))
    assert seen == set(range(1000 - len(seen), 1000))
    assert 2000 < cache.stats().bytes <= 4000
    EmbeddingCache(tmp_path, max_bytes=1500).store("n", *one_row("n"))
    assert cache.stats().bytes <= 1500


def one_row(model):
    cache_keys = np.array([[len(model), 7]], np.uint64)
    return cache_keys, np.ones((1, DIM), np.float32)


def test_limits_of_any_size(tmp_path):
    least = 2 * 128 + DIM * 4 + 32
    cache = EmbeddingCache(tmp_path / "least", max_bytes=least)
    for n in range(5):
        store(cache, [n])
        assert known(cache, range(5)) == {n}
    small = EmbeddingCache(tmp_path / "small", max_bytes=least - 1)
    with pytest.raises(ValueError, match=f"max_bytes=311 does not hold one.*at least {least}"):
        store(small, [1])


def test_every_flipped_byte_is_noticed(tmp_path):
    cache = EmbeddingCache(tmp_path)
    store(cache, range(4), truncated=np.array([True, False, True, False]))
    files = [path for path in sorted(tmp_path.iterdir()) if path.stat().st_size]
    whole = contents(tmp_path)
    assert len(files) == 2
    refused = 0
    for path in files:
        good = path.read_bytes()
        for position in range(len(good)):
            bad = bytearray(good)
            bad[position] ^= 1 << position % 8
            path.write_bytes(bad)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*damaged")
                try:
                    broken = EmbeddingCache(tmp_path)
                except ValueError as error:
                    refused += str(path) in str(error)
                else:
                    assert broken.verify(), f"{path.name}: byte {position} was not noticed"
                    assert known(broken, range(4)) < set(range(4))
                    store(broken, range(4))
                    assert known(broken, range(4)) == set(range(4))
                    broken.compact()
                    assert broken.verify() == []
                    assert known(broken, range(4)) == set(range(4))
            for extra in set(tmp_path.iterdir()) - {tmp_path / name for name in whole}:
                extra.unlink()
            for name, (content, _) in whole.items():
                (tmp_path / name).write_bytes(content)
    assert refused == 16  # the magic bytes of both files
    assert known(cache, range(4)) == set(range(4))


@pytest.mark.parametrize("suffix", [".keys", ".vectors"])
def test_a_file_cut_anywhere_loses_only_what_was_cut(tmp_path, suffix):
    first = EmbeddingCache(tmp_path)
    store(first, range(3))
    (path,) = tmp_path.glob(f"*{suffix}")
    del first  # a map of a file that shrinks must not be read
    whole = path.read_bytes()
    per_row = 32 if suffix == ".keys" else DIM * 4
    other = path.with_suffix(".vectors" if suffix == ".keys" else ".keys")
    others = other.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        if length < 128:
            with pytest.warns(UserWarning, match="ends within its header"):
                cache = EmbeddingCache(tmp_path)
            assert known(cache, range(3)) == set()
        else:
            cache = EmbeddingCache(tmp_path)
            assert known(cache, range(3)) == set(range((length - 128) // per_row))
            beyond = 3 - (length - 128) // per_row if suffix == ".vectors" else 0
            assert [d.reason for d in cache.verify()] == ["beyond the end of its vectors"] * beyond
        store(cache, range(3))
        assert known(EmbeddingCache(tmp_path) if length >= 128 else cache, range(3)) == {0, 1, 2}
        del cache
        for extra in tmp_path.iterdir():
            if extra.suffix != ".lock":
                extra.unlink()
        other.write_bytes(others)


def test_damage_is_named_and_compacted_away(tmp_path):
    cache = EmbeddingCache(tmp_path)
    store(cache, range(20))
    (path,) = tmp_path.glob("*.vectors")
    with path.open("r+b") as file:
        file.seek(128 + 7 * DIM * 4 + 5)
        file.write(b"\xff")
    (damage,) = cache.verify()
    assert (damage.segment, damage.row, damage.reason) == (path.stem, 7, "checksum differs")
    with pytest.warns(UserWarning, match="1 vectors in .* are damaged and count as missing"):
        assert known(cache, range(20)) == set(range(20)) - {7}
    assert known(cache, range(20)) == set(range(20)) - {7}
    assert store(cache, range(20)) == 1
    assert known(cache, range(20)) == set(range(20))
    assert (cache.stats().rows, cache.stats().damaged) == (21, 1)
    reader = EmbeddingCache(tmp_path, readonly=True)
    assert cache.compact() == DIM * 4 + 32
    for handle in (cache, reader, EmbeddingCache(tmp_path)):
        assert handle.verify() == []
        assert handle.stats().rows == 20
        assert known(handle, range(30)) == set(range(20))


def test_a_segment_without_its_vectors_is_set_aside(tmp_path):
    store(EmbeddingCache(tmp_path), range(3))
    next(tmp_path.glob("*.vectors")).unlink()
    with pytest.warns(UserWarning, match="not used: its vectors are not there"):
        cache = EmbeddingCache(tmp_path)
    assert [damage.row for damage in cache.verify()] == [None]
    store(cache, range(2))
    cache.compact()
    assert cache.verify() == []
    assert known(cache, range(3)) == {0, 1}


def test_compact_merges_what_small_limits_split(tmp_path):
    small = EmbeddingCache(tmp_path, max_bytes=16 * 600)
    for n in range(30):
        store(small, [n], model="ab"[n % 2])
    cache = EmbeddingCache(tmp_path)
    assert cache.stats().segments > 4
    before = [known(cache, range(30), model) for model in "ab"]
    assert cache.compact() > 0
    assert [known(cache, range(30), model) for model in "ab"] == before
    assert (cache.stats().segments, cache.stats().rows) == (2, sum(map(len, before)))
    assert cache.compact() == 0


def test_a_reader_sees_what_others_finish(tmp_path):
    writer = EmbeddingCache(tmp_path)
    reader = EmbeddingCache(tmp_path, readonly=True)
    for first in range(0, 50, 10):
        store(writer, range(first, first + 10))
        assert known(reader, range(100)) == set(range(first + 10))


def test_readonly_never_writes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no cache at .*readonly=True does not make one"):
        EmbeddingCache(tmp_path / "none", readonly=True)
    assert not (tmp_path / "none").exists()
    store(EmbeddingCache(tmp_path / "cache"), range(5))
    (torn,) = (tmp_path / "cache").glob("*.keys")
    with torn.open("ab") as file:
        file.write(b"half a record")
    (tmp_path / "cache" / f"{1:019d}.vectors").write_bytes(b"left over")
    before = contents(tmp_path / "cache")
    reader = EmbeddingCache(tmp_path / "cache", readonly=True)
    assert known(reader, range(9)) == set(range(5))
    assert reader.verify() == []
    reader.stats()
    with pytest.raises(RuntimeError, match=r"store\(\) writes, but .* with readonly=True"):
        store(reader, [1])
    with pytest.raises(RuntimeError, match=r"compact\(\) writes, but"):
        reader.compact()
    assert contents(tmp_path / "cache") == before


def test_foreign_and_newer_files_are_refused_by_name(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files, such as 'notes.txt'; name a new"):
        EmbeddingCache(tmp_path)
    with pytest.raises(ValueError, match=r"notes.txt is a file; a cache is a folder"):
        EmbeddingCache(tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    folder = tmp_path / "cache"
    store(EmbeddingCache(folder), range(3))
    (path,) = folder.glob("*.keys")
    good = path.read_bytes()
    path.write_bytes(b"something else entirely" * 10)
    with pytest.raises(ValueError, match=rf"{path.name} is no file of an embedding cache"):
        EmbeddingCache(folder)
    newer = bytearray(good)
    newer[8:12] = struct.pack("<I", 2)
    newer[124:128] = struct.pack("<I", zlib.crc32(newer[:124]))
    path.write_bytes(newer)
    with pytest.raises(ValueError, match=rf"{path.name} has version 2 .* reads version 1"):
        EmbeddingCache(folder)
    path.write_bytes(good)
    path.rename(path.with_name(f"{5:019d}.keys"))
    next(folder.glob("*.vectors")).rename(folder / f"{5:019d}.vectors")
    with pytest.warns(UserWarning, match=rf"its header names segment {int(path.stem)}"):
        assert known(EmbeddingCache(folder), range(3)) == set()


def test_arguments_are_checked(tmp_path):
    for value in ("1 GB", True, 1.5):
        with pytest.raises(TypeError, match=r"max_bytes=.* is neither None nor an integer"):
            EmbeddingCache(tmp_path, max_bytes=value)
    with pytest.raises(ValueError, match="max_bytes=0 is not positive"):
        EmbeddingCache(tmp_path, max_bytes=0)
    with pytest.raises(ValueError, match="dtype='int8' is neither 'float32' nor 'float16'"):
        EmbeddingCache(tmp_path, dtype="int8")
    cache = EmbeddingCache(tmp_path)
    keys = cache.keys("m", ["a", "b"])
    with pytest.raises(ValueError, match=r"vectors\[1\] is not finite as float32"):
        cache.store("m", keys, np.array([[1.0], [np.nan]], np.float32))
    half = EmbeddingCache(tmp_path, dtype="float16")
    with pytest.raises(ValueError, match=r"vectors\[0\] is not finite as float16"):
        half.store("m", keys, np.array([[1e6], [1.0]], np.float32))
    with pytest.raises(ValueError, match=r"vectors has shape \(1, 3\), not \(2, dim\)"):
        cache.store("m", keys, np.ones((1, 3), np.float32))
    with pytest.raises(ValueError, match=r"truncated has shape \(1,\), not \(2,\)"):
        cache.store("m", keys, np.ones((2, 3), np.float32), truncated=np.ones(1, bool))
    with pytest.raises(ValueError, match=r"keys is float64 \(2, 2\), not uint64"):
        cache.lookup("m", 3, keys.astype(float))
    with pytest.raises(ValueError, match="is not 1 to 92 bytes of text"):
        cache.lookup("m" * 93, 3, keys)
    with pytest.raises(ValueError, match="dim=0 is not positive"):
        cache.lookup("m", 0, keys)
    with pytest.raises(TypeError, match="cache=5 is neither an EmbeddingCache nor a path"):
        open_cache(5)
    assert cache.stats().rows == 0


def test_copies_open_the_same_folder(tmp_path):
    cache = EmbeddingCache(tmp_path, max_bytes=10_000, dtype="float16")
    store(cache, range(4))
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert (other.path, other.max_bytes, other.dtype) == (tmp_path, 10_000, "float16")
        assert known(other, range(9)) == set(range(4))
    assert open_cache(str(tmp_path)) is open_cache(tmp_path)
    assert open_cache(cache) is cache


def test_a_deleted_folder_is_an_empty_cache(tmp_path):
    cache = EmbeddingCache(tmp_path / "cache")
    store(cache, range(4))
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    (tmp_path / "cache").rmdir()
    assert known(cache, range(4)) == set()
    store(cache, range(2))
    assert known(cache, range(4)) == {0, 1}


def test_threads_share_a_cache(tmp_path):
    cache = EmbeddingCache(tmp_path)
    errors = []

    def work(offset):
        try:
            for first in range(0, 100, 5):
                store(cache, range(first + offset, first + offset + 8))
                assert known(cache, range(200)) >= set(range(offset, first + offset + 8))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in (0, 3, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert cache.stats().rows == len(known(cache, range(200))) == 153
    assert cache.verify() == []
