import copy
import gc
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Subset

from tests.data.samples_to_cache import Counted, equal
from torsh_data import ShardedDataset, StreamLoader, write_shards
from torsh_data import _sample_cache as module
from torsh_data._sample_cache import SampleCache
from torsh_data._sample_layout import Layout, UnfitError, describe


@pytest.mark.parametrize("where", ["ram", "shm", "disk"])
def test_samples_come_back_as_they_were_and_are_read_once(make_cache, where):
    data = Counted()
    cache = make_cache(data, where)
    data.reads.clear()
    for _ in range(3):
        for n in range(20):
            assert equal(cache[n], Counted()[n])
    assert sorted(data.reads) == list(range(3, 20))  # the first three were read to look at them
    assert cache.stats().samples == 20
    assert (cache.stats().hits, cache.stats().misses) == (43, 17)
    assert equal(cache[-1], Counted()[19])
    assert len(cache) == 20
    assert "20 of 20 samples in" in str(cache.stats())
    assert repr(cache).startswith(f"SampleCache({where!r}: 20 of 20 samples in ")
    with pytest.raises(IndexError, match="sample 20 of a data set of 20"):
        cache[20]


def test_a_sample_that_is_changed_by_the_caller_is_not_changed_in_the_cache(make_cache):
    cache = make_cache(Counted())
    cache[7]["image"].zero_()
    cache[7]["image"].zero_()
    assert equal(cache[7], Counted()[7])


leaf = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.booleans(),
    st.text(st.characters(codec="utf-8"), max_size=9),
    st.binary(max_size=9),
    st.none(),
    st.tuples(st.integers(0, 3), st.integers(0, 3)).map(lambda s: torch.rand(s)),
    st.integers(0, 4).map(lambda n: np.arange(n, dtype=np.int16)),
)


tree = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=60)
@given(tree)
def test_any_sample_survives_the_way_to_bytes(sample):
    layout = Layout(describe(sample))
    table, parts, size = layout.encode(sample)
    memory = bytearray(size)
    memory[: len(table)] = table
    end = len(table)
    for part in parts:
        begin = -(-end // 64) * 64
        end = begin + len(part)
        memory[begin:end] = bytes(part)
    assert end == size
    back = layout.decode(memoryview(memory))
    assert describe(back) == describe(sample)
    assert equal(back, sample)


def test_what_no_layout_can_hold_is_named():
    with pytest.raises(UnfitError, match=r"sample\['x'\]\[1\] is a builtins.set"):
        describe({"x": [1, {2}]})
    layout = Layout(describe({"x": torch.zeros(2)}))
    for other, match in (
        ({"y": 1}, r"has the keys \['y'\], the first sample \['x'\]"),
        ({"x": torch.zeros(2, 2)}, "is a 2-dimensional tensor of float32"),
        ({"x": torch.zeros(2).double()}, "a 1-dimensional tensor of float64, but the first"),
        ([1], "sample is a list, the first sample has a dict"),
    ):
        with pytest.raises(UnfitError, match=match):
            layout.encode(other)
    with pytest.raises(UnfitError, match="beyond int64"):
        Layout(describe(1)).encode(2**63)
    with pytest.raises(UnfitError, match="has 1 items, the first sample 2"):
        Layout(describe([1, 2])).encode([1])


def test_a_sample_of_another_structure_goes_by_with_one_warning(make_cache):
    cache = make_cache([{"x": n} if n != 5 and n != 6 else {"x": str(n)} for n in range(8)])
    with pytest.warns(UserWarning, match=r"sample 5 is not cached.*'x'\] is a str") as caught:
        assert [s["x"] for s in cache.__getitems__(range(8))] == [0, 1, 2, 3, 4, "5", "6", 7]
    assert len(caught) == 1
    assert cache[5]["x"] == "5"
    assert cache.stats().samples == 6


def test_when_it_is_full_the_rest_goes_by(make_cache):
    data = [torch.full((100_000,), n, dtype=torch.uint8) for n in range(10)]
    with pytest.warns(UserWarning, match=r"bytes=450,000, .* about 1 MB .* first 3: about 44\.9%"):
        cache = make_cache(data, size=450_000)
    for _ in range(2):
        assert [int(sample[0]) for sample in cache.__getitems__(range(10))] == list(range(10))
    stats = cache.stats()
    assert stats.samples == 4
    assert stats.used <= stats.limit == 450_000


class Uneven:
    """The first samples are no measure for the others."""

    def __len__(self):
        return 100

    def __getitem__(self, n):
        return torch.zeros(10 if n < 3 else 1_000_000, dtype=torch.uint8)


def test_the_first_samples_do_not_set_the_limit(make_cache):
    cache = make_cache(Uneven(), size="2GB")
    cache.__getitems__(range(100))
    assert cache.limit == 2_000_000_000
    assert cache.stats().samples == 100


def test_room_that_ends_is_told_once_with_what_is_stored(make_cache):
    cache = make_cache(Uneven(), size="3.5MB")  # the first three would fit a thousand times
    with pytest.warns(
        UserWarning, match="no room for sample 6: 6 of 100 samples take 3 MB of 3"
    ) as w:
        cache.__getitems__(range(50))
    cache.__getitems__(range(50, 100))
    assert len(w) == 1
    assert cache.stats().samples == 6


def constant():
    return torch.full((100_000,), 7, dtype=torch.uint8)


class Constant:
    fingerprint = "constant"

    def __len__(self):
        return 10

    def __getitem__(self, n):
        return constant()


def test_another_limit_counts_when_the_file_is_opened_again(make_cache):
    with pytest.warns(UserWarning, match="will be cached"):
        small = make_cache(Constant(), "disk", 450_000)
    small.__getitems__(range(10))
    assert small.stats().samples == 4
    small.close()
    large = make_cache(Constant(), "disk", 2_000_000)
    assert large.limit == 2_000_000
    large.__getitems__(range(10))
    assert large.stats().samples == 10
    used = large.stats().used
    large.close()
    with pytest.warns(UserWarning, match=r"bytes=200,000, but .* they stay.* Remove the file") as w:
        kept = make_cache(Constant(), "disk", 200_000)
    assert len(w) == 1  # all are there, so none will be missing
    assert kept.limit == used
    assert kept.stats().samples == 10
    assert torch.equal(kept[9], constant())


def test_another_limit_while_the_file_is_used_is_told(make_cache):
    first = make_cache(Constant(), "disk", 2_000_000)
    with pytest.warns(
        UserWarning, match=r"bytes=3,000,000, but another process .* bytes=2,000,000"
    ):
        second = make_cache(Constant(), "disk", 3_000_000)
    assert second.limit == first.limit == 2_000_000
    make_cache(Constant(), "disk", 2_000_000)  # the same is no matter for a warning


def test_nine_tenths_of_what_is_free_may_be_taken(make_cache, monkeypatch):
    monkeypatch.setattr(module, "usable_memory", lambda: 10_000_000)
    assert make_cache(Constant(), size="1GB").limit == 9_000_000


def test_a_small_shm_is_looked_at_first(make_cache, monkeypatch):
    data = [torch.zeros(100_000, dtype=torch.uint8)] * 10
    usage = module.shutil.disk_usage(make_cache.shm)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=500_000))
    with pytest.warns(UserWarning, match=r"has 500 kB free, .* 44\.9% .* --shm-size=32g"):
        cache = make_cache(data, "shm", key="zeros")
    assert cache.limit == 450_000
    cache.close()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(ValueError, match="10 kB free, and one sample takes 100 kB; in a container"):
        make_cache(data, "shm", key="zeros")


def test_workers_fill_one_cache_and_a_loader_reads_it(make_cache):
    data = Counted(64)
    cache = make_cache(data)

    def batches(dataset, workers, kind="process"):
        loader = StreamLoader(
            dataset,
            8,
            num_workers=workers,
            workers=kind,
            seed=1,
            collate_fn=lambda samples: samples,
        )
        return [[s["text"] for s in batch] for batch in loader]

    expected = batches(data, 0)
    assert batches(cache, 2) == expected
    assert cache.stats().samples == 64
    hits = cache.stats().hits
    assert batches(cache, 2) == expected
    assert batches(cache, 2, "thread") == expected
    assert cache.stats().hits == hits + 128


def random_crop(sample, rng):
    return {"x": sample["x"] + rng.random()}


def test_random_transforms_come_after_and_draw_as_without_a_cache(make_cache, tmp_path):
    write_shards(({"x": float(n)} for n in range(32)), tmp_path / "shards")
    whole = ShardedDataset(tmp_path / "shards", transform=random_crop)
    with pytest.raises(ValueError, match=r"takes a generator; .*SampleCache\(dataset, transform="):
        make_cache(whole)
    with pytest.raises(ValueError, match="takes a generator"):
        make_cache(ConcatDataset([Subset(whole, [1])]))
    cache = make_cache(ShardedDataset(tmp_path / "shards"), "disk", transform=random_crop)
    assert cache.fingerprint == whole.fingerprint
    for epoch in range(2):
        draws = [
            [b["x"].tolist() for b in StreamLoader(data, 8, seed=5, epoch=epoch)]
            for data in (whole, cache)
        ]
        assert draws[0] == draws[1]
    plain = make_cache(ShardedDataset(tmp_path / "shards"), transform=lambda s: -s["x"])
    assert plain[4] == -4.0


def test_a_data_set_that_draws_by_itself_is_found_out(make_cache):
    own = np.random.default_rng(0)

    class Noisy(Counted):
        def __getitem__(self, n):
            return own.random(4)

    with pytest.raises(ValueError, match="sample 0 differs when it is read twice"):
        make_cache(Noisy())


@pytest.mark.parametrize(
    "draw",
    [random.random, np.random.random, lambda: torch.rand(1).item()],
    ids=["py", "np", "torch"],
)
def test_a_draw_is_found_out_though_it_seldom_matters(make_cache, draw):
    class Erases(Counted):
        def __getitem__(self, n):
            return torch.zeros(4) if draw() < 0.001 else torch.ones(4)

    for seed in range(5):
        random.seed(seed)
        with pytest.raises(ValueError, match=r"sample 0 draws from a global .* say so with key="):
            make_cache(Erases())
    random.seed(0)
    assert make_cache(Erases(), key="it is always the same").stats().samples == 3


class Scale:
    def __init__(self, by):
        self.by = by

    def __call__(self, sample):
        return {"x": sample["x"] * self.by}


def test_other_contents_never_read_old_samples(make_cache, tmp_path):
    write_shards(({"x": float(n), "y": n} for n in range(8)), tmp_path / "a")
    write_shards(({"x": float(n) + 100, "y": n} for n in range(8)), tmp_path / "b")
    add, local = 1, {}
    for line in ("lambda s: {'x': s['x'] + 1}", "lambda s: {'x': s['x'] + 2}"):
        local[line] = eval(line)
    cases = [(tmp_path / "b", None), *((tmp_path / "a", f) for f in (None, *local.values()))]
    cases += [(tmp_path / "a", f) for f in (Scale(2), Scale(3), lambda s: {"x": s["x"] + add})]
    results = {}
    for k, (folder, transform) in enumerate(cases):
        data = ShardedDataset(folder, transform=transform)
        results[k] = make_cache(data, "disk")[5]["x"]
    assert results == {0: 105.0, 1: 5.0, 2: 6.0, 3: 7.0, 4: 10.0, 5: 15.0, 6: 6.0}
    again = make_cache(ShardedDataset(tmp_path / "a", transform=Scale(3)), "disk")
    assert again.stats().samples == 4  # three from the first look, and the one that was read
    assert make_cache(ShardedDataset(tmp_path / "a", columns=["y"]), "disk")[5] == {"y": 5}
    one = make_cache(ShardedDataset(tmp_path / "a", transform=Scale(2)), "disk", key="one")
    assert one.stats().samples == 3


def read_with(make_cache, folder, source):
    """A sample whose transform is `decode` of a module with this text, and how many were stored."""
    scope = {"__name__": "own", "torch": torch}
    exec(source, scope)
    cache = make_cache(ShardedDataset(folder, transform=scope["decode"]), "disk")
    result = cache[5]["x"], cache.stats().hits
    cache.close()
    return result


@pytest.mark.parametrize(
    "source",
    [
        "BY = {}\ndef decode(s): return dict(x=s['x'] * BY)",
        "BY = [1, {}]\ndef decode(s): return dict(x=[v * BY[1] for v in [s['x']]][0])",
        "BY = torch.tensor([{}])\ndef decode(s): return dict(x=s['x'] * BY.item())",
        "def f(v): return v * {}\ndef g(v): return f(v)\ndef decode(s): return dict(x=g(s['x']))",
        "class D:\n BY = {}\n def __call__(self, s): return dict(x=s['x'] * self.BY)\ndecode = D()",
        "class D:\n @staticmethod\n def f(v): return v * {}\n"
        " def __call__(self, s): return dict(x=self.f(s['x']))\ndecode = D()",
        "class D:\n @classmethod\n def f(cls, v): return v * {}\n"
        " def __call__(self, s): return dict(x=self.f(s['x']))\ndecode = D()",
        "class D:\n @property\n def by(self): return {}\n"
        " def __call__(self, s): return dict(x=s['x'] * self.by)\ndecode = D()",
        "class D:\n @staticmethod\n def f(v): return v * {}\n"
        "def decode(s): return dict(x=D.f(s['x']))",
        "class B:\n def f(self, v): return v * {}\nclass D(B): pass\n"
        "def decode(s): return dict(x=D().f(s['x']))",
        "import types\nconfig = types.ModuleType('config')\nconfig.BY = {}\n"
        "def decode(s): return dict(x=s['x'] * config.BY)",
        "import functools\n@functools.lru_cache\ndef f(v): return v * {}\n"
        "def decode(s): return dict(x=f(s['x']))",
    ],
)
def test_what_a_transform_names_is_part_of_it(make_cache, tmp_path, source):
    write_shards(({"x": float(n)} for n in range(8)), tmp_path / "a")
    assert read_with(make_cache, tmp_path / "a", source.replace("{}", "2")) == (10.0, 0)
    assert read_with(make_cache, tmp_path / "a", source.replace("{}", "100")) == (500.0, 0)
    assert read_with(make_cache, tmp_path / "a", source.replace("{}", "2")) == (10.0, 1)


def test_what_a_transform_names_may_be_of_any_usual_kind(make_cache, tmp_path):
    write_shards(({"x": float(n)} for n in range(8)), tmp_path / "a")
    source = (
        "import enum, functools, logging, re, numpy as np\n"
        "log, word = logging.getLogger('own'), re.compile('[a-z]')\n"
        "model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU())\n"
        "class Kind(enum.Enum):\n one = 1\n"
        "def again(n): return again(n - 1) if n else decode\n"
        "def decode(s):\n"
        " log.debug(word.match('a'), model, Kind.one, again, np.sum, str.upper, functools)\n"
        " return dict(x=s['x'])"
    )
    torch.manual_seed(0)
    assert read_with(make_cache, tmp_path / "a", source) == (5.0, 0)
    torch.manual_seed(0)
    assert read_with(make_cache, tmp_path / "a", source) == (5.0, 1)
    torch.manual_seed(1)  # another model
    assert read_with(make_cache, tmp_path / "a", source) == (5.0, 0)
    locked = "import threading\nlock = threading.Lock()\ndef decode(s):\n lock\n return s"
    with pytest.raises(ValueError, match=r"transform holds a _thread.lock.*give key="):
        read_with(make_cache, tmp_path / "a", locked)


def test_with_a_key_the_user_vouches(make_cache, tmp_path):
    write_shards(({"x": float(n)} for n in range(8)), tmp_path / "a")
    for by in (2, 3):
        data = ShardedDataset(tmp_path / "a", transform=Scale(by))
        cache = make_cache(data, "disk", key="v1")
        assert cache[5] == {"x": 10.0}
        cache.close()


def test_contents_that_cannot_be_known_need_a_key(make_cache):
    data = [{"x": n} for n in range(4)]
    with pytest.raises(ValueError, match=r"a list has no fingerprint.*give key="):
        make_cache(data, "disk")
    assert make_cache(data, "disk", key="four")[3] == {"x": 3}
    opaque = Counted()
    opaque.transform = iter([1])
    with pytest.raises(ValueError, match=r"transform holds a builtins.list_iterator.*give key="):
        make_cache(opaque, "shm")
    assert make_cache(opaque, "shm", key="v1").stats().samples == 3


def test_a_shallow_copy_shares_the_file(make_cache):
    cache = make_cache(Counted())
    twin = copy.copy(cache)
    twin.transform = lambda s: s["text"]
    assert twin[3] == "ééé"
    del twin
    gc.collect()
    assert equal(cache[3], Counted()[3])


def test_ranks_with_a_copy_each_are_told(make_cache, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.warns(UserWarning, match="one copy in each of 4 ranks; 'shm' keeps one for all"):
        make_cache(Counted())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"where": "gpu"}, ValueError, "where='gpu'; use 'ram', 'shm' or 'disk'"),
        ({"folder": "x"}, ValueError, "folder='x' and where='ram': a folder goes with 'disk'"),
        ({"where": "disk"}, ValueError, "folder=None and where='disk'"),
        ({"bytes": "lots"}, ValueError, "bytes='lots' is not a size"),
        ({"dataset": iter([1])}, TypeError, "without a length and an index"),
        ({"dataset": "x"}, TypeError, "dataset='x' is a path; give SampleCache a ShardedDataset"),
        ({"dataset": []}, ValueError, "dataset is empty"),
        ({"dataset": [{1, 2}]}, ValueError, "sample 0: sample is a builtins.set"),
    ],
)
def test_arguments_are_checked(options, error, match):
    with pytest.raises(error, match=match):
        SampleCache(**{"dataset": [1, 2], **options})
