import io
import itertools
import json
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from torsh_data import ShardedDataset, StreamLoader, write_shards
from torsh_data._rng import sample_keys

ROWS = 203


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(
        ({"x": torch.full((3,), n), "label": n} for n in range(ROWS)),
        folder,
        shard_bytes="2kB",
        block_bytes="200B",
    )
    return ShardedDataset(folder)


def loader(data, batch_size=8, **options):
    window = 64 if batch_size <= 64 else "2GB"
    options = {"seed": 1, "window": window, "rank": 0, "world_size": 1, **options}
    return StreamLoader(data, batch_size, **options)


def ids(batches):
    return [n for batch in batches for n in batch["index"].tolist()]


def ranks(data, world, batch_size, state=None, **options):
    made = [loader(data, batch_size, rank=r, world_size=world, **options) for r in range(world)]
    for each in made:
        if state is not None:
            each.load_state_dict(json.loads(json.dumps(state)))
    return made


def global_batches(loaders):
    """What the ranks receive, step by step, until none has a batch left."""
    for parts in itertools.zip_longest(*loaders):
        yield [n for part in parts if part is not None for n in part["index"].tolist()]


def take(loaders, steps):
    iterators = [iter(each) for each in loaders]
    taken = [[next(each)["index"].tolist() for each in iterators] for _ in range(steps)]
    return [n for step in taken for rank in step for n in rank]


def test_an_epoch_has_each_sample_once_and_the_right_contents(data):
    batches = list(loader(data, drop_last=False))
    assert sorted(ids(batches)) == list(range(ROWS))
    for batch in batches:
        assert torch.equal(batch["label"], batch["index"])
        assert torch.equal(batch["x"], batch["index"][:, None].expand(-1, 3))
        expected = sample_keys(1, 0, batch["index"].numpy())
        assert batch["key"].numpy().tolist() == expected.tolist()
        assert set(batch) == {"x", "label", "index", "key"}


@pytest.mark.parametrize("drop_last", [True, False, "pad"])
@pytest.mark.parametrize("batch_size", [1, 7, 8, 203])
def test_len_is_what_comes(data, drop_last, batch_size):
    stream = loader(data, batch_size, drop_last=drop_last)
    length = len(stream)
    assert len(list(stream)) == length == len(stream)


def test_without_shuffle_samples_come_in_storage_order(data):
    stream = loader(data, shuffle=False, drop_last=False)
    assert ids(stream) == ids(stream) == list(range(ROWS))
    assert stream.state_dict()["window"] == 0


def test_its_repr_says_where_it_stands(data):
    each = loader(data, num_workers=2)
    each.skip(3)
    shown = "203 samples in batches of 8, 2 process workers; next is epoch 0, position 24"
    assert repr(each) == f"StreamLoader({shown})"
    assert "of 8, no workers; next" in repr(loader(data))


def test_epochs_differ_and_come_back(data):
    stream = loader(data)
    first, second = ids(stream), ids(stream)
    assert first != second
    stream.set_epoch(0)
    assert ids(stream) == first
    assert ids(loader(data, epoch=1)) == second


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(data, workers):
    here, there = list(loader(data)), list(loader(data, num_workers=workers))
    for a, b in zip(here, there, strict=True):
        assert list(a) == list(b)
        assert all(torch.equal(a[name], b[name]) for name in a)


def random_transform(sample, rng):
    return {"label": sample["label"], "draw": rng.random()}


def test_draws_in_transforms_depend_on_seed_epoch_and_sample_alone(data):
    noisy = ShardedDataset(list(data.files), columns=["label"], transform=random_transform)

    def draws(**options):
        batches = loader(noisy, **options)
        return {
            n: d
            for b in batches
            for n, d in zip(*(b[k].tolist() for k in ("label", "draw")), strict=True)
        }

    base = draws(batch_size=7, drop_last=False)
    assert len(set(base.values())) == ROWS
    assert draws(batch_size=16, drop_last=False, num_workers=2, window=100) == base
    assert draws(drop_last=False, epoch=1) != base
    assert draws(drop_last=False, seed=2) != base
    some = loader(Subset(noisy, range(50, 150)), window="2GB", drop_last=False)
    for batch in some:  # the wrapper numbers samples anew, the draws stay the samples' own
        for n, draw in zip(batch["label"].tolist(), batch["draw"].tolist(), strict=True):
            assert draw == base[n]


@pytest.mark.parametrize("stop", [0, 1, 11, 24])
def test_a_resumed_loader_goes_on_sample_by_sample(data, stop):
    unbroken = loader(data)
    expected = ids(unbroken) + ids(unbroken)
    stream = loader(data)
    begun = list(itertools.islice(iter(stream), stop))
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = loader(data)
    resumed.load_state_dict(state)
    assert ids(begun) + ids(resumed) + ids(resumed) == expected  # the epoch after it, too


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker:UserWarning")
@pytest.mark.parametrize(("before", "after"), [(0, 1), (0, 3), (2, 1), (2, 3), (2, 0)])
def test_resuming_with_other_workers_is_exact(data, before, after):
    expected = ids(loader(data))
    stream = loader(data, num_workers=before)
    iterator = iter(stream)
    begun = [next(iterator) for _ in range(5)]  # workers have prepared more than these
    assert stream.state_dict()["position"] == 40
    del iterator
    resumed = loader(data, num_workers=after)
    resumed.load_state_dict(stream.state_dict())
    assert ids(begun) + ids(resumed) == expected


def test_resuming_on_other_numbers_of_ranks_sees_each_sample_once(data):
    seen, state = [], None
    for world, batch_size, steps in ((2, 8, 4), (1, 5, 3), (3, 7, 2), (2, 3, 5)):
        loaders = ranks(data, world, batch_size, state, drop_last=False)
        seen += take(loaders, steps)
        states = [each.state_dict() for each in loaders]
        assert all(each == states[0] for each in states)
        state = states[0]
    assert state["position"] == len(seen) == 64 + 15 + 42 + 30
    rest = [n for step in global_batches(ranks(data, 1, 8, state, drop_last=False)) for n in step]
    assert sorted(seen + rest) == list(range(ROWS))


@pytest.mark.parametrize(("world", "batch_size"), [(1, 12), (2, 6), (3, 4), (12, 1)])
def test_the_global_batch_does_not_depend_on_its_split(data, world, batch_size):
    split = list(global_batches(ranks(data, world, batch_size, drop_last=False)))
    whole = list(global_batches(ranks(data, 1, 12, drop_last=False)))
    assert split == whole


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [4, 10, 60, 300])
def test_padding_gives_ranks_equal_numbers_of_full_batches(data, world, batch_size):
    received = [list(each) for each in ranks(data, world, batch_size, drop_last="pad")]
    assert len({len(batches) for batches in received}) == 1
    batches = [batch for part in received for batch in part]
    assert all(len(batch["index"]) == batch_size for batch in batches)
    valid = [n for b in batches for n in b["index"][b["valid"]].tolist()]
    assert sorted(valid) == list(range(ROWS))


@pytest.mark.parametrize(("world", "batch_size"), [(2, 100), (3, 50), (5, 40), (4, 67)])
def test_the_rest_is_dealt_out_evenly(data, world, batch_size):
    loaders = ranks(data, world, batch_size, drop_last=False)
    received = [list(each) for each in loaders]
    assert sorted(n for part in received for n in ids(part)) == list(range(ROWS))
    assert [len(part) for part in received] == [len(each) for each in loaders]
    sizes = [len(part[-1]["index"]) for part in received if len(part) == len(received[-1])]
    assert max(sizes) - min(sizes) <= 1


def test_a_rest_smaller_than_the_new_batch_is_left_out(data):
    loaded = loader(data, 50)
    loaded.load_state_dict({**loaded.state_dict(), "position": 190})
    batches = list(loaded)
    assert len(batches) == 4  # all of the next epoch, not none
    assert loaded.epoch == 2
    assert ids(batches) == ids(loader(data, 50, epoch=1))


@pytest.mark.parametrize("world", [2, 3, 5])
def test_a_rank_without_a_part_of_the_rest_moves_on_like_the_others(data, world):
    state = {**loader(data, 4).state_dict(), "position": ROWS - 1}
    loaders = ranks(data, world, 4, state, drop_last=False)
    assert sorted(len(list(each)) for each in loaders) == [0] * (world - 1) + [1]
    assert all(each.state_dict() == loaders[0].state_dict() for each in loaders)
    assert (loaders[0].epoch, loaders[0].state_dict()["position"]) == (1, 0)
    assert sorted(n for each in loaders for n in ids(each)) == list(range(ROWS))


@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_without_a_part_of_the_rest_does_not_save_it_away(data, world):
    part = Subset(data, range(44 * 4 + world - 1))
    loaders = ranks(part, world, 11, drop_last=False, window="2GB")
    steps = len(part) // (world * 11)
    seen = take(loaders, steps)
    states = [each.state_dict() for each in loaders]
    assert all(state == states[0] for state in states)
    resumed = ranks(part, 3, 7, states[-1], drop_last=False, window="2GB")
    rest = [n for each in resumed for n in ids(each)]
    assert sorted(seen + rest) == list(range(len(part)))
    assert [each.epoch for each in resumed] == [1, 1, 1]
    # a Trainer does not ask for more than len(): the next loop is the next epoch all the same
    assert [len(each) for each in loaders] == [steps + 1] * (world - 1) + [steps]
    assert loaders[-1].epoch == 0
    next(iter(loaders[-1]))
    assert loaders[-1].epoch == 1


def test_a_state_counts_the_batches_of_its_epoch(data):
    begun = loader(data, 8)
    for count, _ in enumerate(itertools.islice(begun, 10), 1):
        assert begun.state_dict()["batches"] == count
    resumed = loader(data, 4)
    resumed.load_state_dict(begun.state_dict())
    next(iter(resumed))
    assert resumed.state_dict()["batches"] == 11
    assert len(resumed) == len(loader(data, 4))
    resumed.load_state_dict({**resumed.state_dict(), "batches": 7})
    resumed.skip(2)
    assert resumed.state_dict()["batches"] == 9
    resumed.set_epoch(9)
    assert resumed.state_dict()["batches"] == 0


def test_the_epoch_ends_before_its_last_batch_is_handed_over(data):
    stream = loader(data)
    iterator = iter(stream)
    for _ in range(len(stream)):
        next(iterator)  # as a trainer does, which never asks for one more
    assert (stream.state_dict()["epoch"], stream.state_dict()["position"]) == (1, 0)
    assert ids(stream) == ids(loader(data, epoch=1))


def test_leaving_a_loop_ends_the_epoch(data):
    stream = loader(data)
    for _ in stream:
        break
    assert stream.state_dict()["position"] == 8
    assert ids(stream) == ids(loader(data, epoch=1))
    assert stream.epoch == 2


def test_an_iterator_that_was_not_used_changes_nothing(data):
    stream = loader(data)
    iter(stream)
    assert ids(stream) == ids(loader(data))


def test_the_newest_of_two_iterators_moves_the_state(data):
    stream = loader(data)
    old = iter(stream)
    first = next(old)
    new = iter(stream)
    next(new)
    next(old)
    next(old)
    assert (stream.epoch, stream.state_dict()["position"]) == (1, 8)
    assert torch.equal(first["index"], next(iter(loader(data)))["index"])


def test_loading_a_state_cuts_off_the_running_iterator(data):
    stream = loader(data)
    running = iter(stream)
    next(running)
    stream.load_state_dict({**stream.state_dict(), "position": 80})
    next(running)
    assert stream.state_dict()["position"] == 80


@pytest.mark.parametrize("value", [1.5, -1, True, "2"])
def test_epochs_and_batches_are_counts(data, value):
    for move in (loader(data).set_epoch, loader(data).skip):
        with pytest.raises(ValueError, match="must be a whole number, at least 0"):
            move(value)


@pytest.mark.parametrize("skipped", [0, 3, 24, 25, 26, 60])
def test_skipping_leaves_out_batches_across_epochs(data, skipped):
    stream = loader(data)
    everything = ids(stream) + ids(stream) + ids(stream)
    stream = loader(data)
    stream.skip(skipped)
    left = []
    while stream.epoch < 3:
        left += ids(stream)
    assert left == everything[skipped * 8 :]


def test_set_epoch_begins_an_epoch_that_was_left_anew(data):
    stream = loader(data)
    for _ in range(2):
        stream.set_epoch(0)
        first = next(iter(stream))
        assert torch.equal(first["index"], next(iter(loader(data)))["index"])
    stream.skip(3)
    stream.set_epoch(0)
    assert stream.state_dict()["position"] == 32


def test_set_epoch_keeps_the_place_in_the_current_epoch(data):
    stream = loader(data, epoch=3)
    next(iter(stream))
    stream.load_state_dict(stream.state_dict())
    stream.set_epoch(3)
    assert stream.state_dict()["position"] == 8
    stream.set_epoch(5)
    assert (stream.epoch, stream.state_dict()["position"]) == (5, 0)


def test_the_state_is_small_plain_and_quick(data):
    stream = loader(data, epoch=10**9)
    state = stream.state_dict()
    places = ["version", "epoch", "position", "batches", "seed", "window", "fingerprint"]
    assert list(state) == [*places, "errors"]
    assert state["errors"] == ""
    assert len(json.dumps(state)) < 500
    assert torch.load(_saved(state), weights_only=True) == state


def _saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_states_of_version_1_stay_loadable(data):
    stream = loader([{"x": n} for n in range(10)], 2, window="2GB")
    stream.load_state_dict(
        {
            "version": 1,
            "epoch": 2,
            "position": 4,
            "seed": 1,
            "window": 10,
            "fingerprint": "c414523067d2ba2961c8325b7fd2230a",
        }
    )
    assert ids(stream) == [2, 7, 6, 1, 3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version=2, this loader has 1"),
        ({"fingerprint": "f"}, "fingerprint='f', this loader has"),
        ({"seed": 9}, "seed=9, this loader has 1; make the loader with that seed"),
        ({"window": 9}, "window=9, this loader has 64; make the loader with window="),
        ({"seed": 9, "window": 9}, "seed=9"),
        ({"position": -1}, "position=-1, not a place in a stream"),
        ({"position": ROWS + 1}, "position=204, beyond 203 samples"),
        ({"epoch": "1"}, "epoch='1', not a place in a stream"),
    ],
)
def test_a_state_of_another_stream_is_refused(data, change, message):
    stream = loader(data)
    with pytest.raises(ValueError, match=message):
        stream.load_state_dict({**stream.state_dict(), **change})
    with pytest.raises(ValueError, match="state_dict has no 'version'"):
        stream.load_state_dict({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be a whole number, at least 1"),
        ({"batch_size": True}, "batch_size=True must be"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"prefetch_factor": 0}, "prefetch_factor=0"),
        ({"epoch": -1}, "epoch=-1"),
        ({"drop_last": "no"}, "drop_last='no'; use True, False or 'pad'"),
        ({"rank": 0, "world_size": None}, "must be given together"),
        ({"rank": 2, "world_size": 2}, r"rank=2 must be in \[0, world_size=2\)"),
        ({"window": 7}, "window=7 holds 7 rows, less than one batch of 8"),
        ({"window": "100B"}, "window='100B' holds 0 rows"),
        ({"window": "wide"}, "window='wide' is not a size"),
        ({"batch_size": 150, "world_size": 2, "window": "2GB"}, "takes 300 samples a step"),
    ],
)
def test_arguments_out_of_range_are_refused(data, options, message):
    options = {"batch_size": 8, **options}
    with pytest.raises(ValueError, match=message):
        loader(data, **options)
    with pytest.raises(ValueError, match="epoch=-1"):
        loader(data).set_epoch(-1)
    with pytest.raises(ValueError, match="n_batches=-1"):
        loader(data).skip(-1)


def test_data_sets_that_cannot_be_indexed_or_are_empty_are_refused():
    with pytest.raises(TypeError, match="dataset is a generator without a length and an index"):
        StreamLoader((n for n in range(3)), 1)
    with pytest.raises(ValueError, match="dataset is empty"):
        StreamLoader([], 1)


def test_other_data_sets_deliver_their_own_kind_of_batch():
    pairs = TensorDataset(torch.arange(10), torch.arange(10) * 2)
    stream = StreamLoader(ConcatDataset([pairs, pairs]), 5)
    first = next(iter(stream))
    assert isinstance(first, list)
    assert torch.equal(first[1], first[0] * 2)
    seen = torch.cat([x for x, _ in StreamLoader(pairs, 5)])
    assert sorted(seen.tolist()) == list(range(10))
    with pytest.raises(TypeError, match="drop_last='pad' marks the padding"):
        next(iter(StreamLoader(pairs, 3, drop_last="pad")))


def test_a_state_knows_the_indices_of_subsets_and_the_parts_of_a_concatenation(data):
    samples = [{"x": n} for n in range(40)]
    sets = [
        samples[:20],
        Subset(samples, range(20)),
        Subset(samples, range(20, 40)),
        Subset(Subset(samples, range(1, 40)), range(20)),
        Subset(data, range(20)),
        Subset({f"k{n}": n for n in range(40)}, [f"k{n}" for n in range(20)]),
        Subset({f"k{n}": n for n in range(40)}, [f"k{n}" for n in range(20, 40)]),
        ConcatDataset([samples[:10], samples[:10]]),
        ConcatDataset([samples[:5], samples[:15]]),
        ConcatDataset([Subset(samples, range(10)), samples[:10]]),
    ]
    assert len({StreamLoader(each, 5).state_dict()["fingerprint"] for each in sets}) == len(sets)
    begun = StreamLoader(sets[1], 5)
    next(iter(begun))
    StreamLoader(Subset(samples, list(range(20))), 5).load_state_dict(begun.state_dict())
    with pytest.raises(ValueError, match="open the data set that it was saved with"):
        StreamLoader(sets[2], 5).load_state_dict(begun.state_dict())


def test_a_window_without_blocks_is_said_to_have_no_effect():
    with pytest.warns(UserWarning, match=r"window=4 has no effect: a list has no blocks"):
        StreamLoader([{"x": n} for n in range(9)], 3, window=4)


def test_a_column_that_the_loader_adds_itself_is_refused():
    with pytest.raises(ValueError, match="samples have a column 'index', which StreamLoader adds"):
        next(iter(StreamLoader([{"index": 1}], 1)))


def test_collate_fn_makes_the_batch(data):
    stream = loader(data, collate_fn=lambda samples: {"n": [s["label"] for s in samples]})
    batch = next(iter(stream))
    assert batch["n"] == batch["index"].tolist()


def test_ranks_come_from_the_environment(data, monkeypatch):
    stream = StreamLoader(data, 8, window=64)
    assert (stream.rank, stream.world_size) == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert (stream.rank, stream.world_size, len(stream)) == (2, 3, ROWS // 24)
    expected = loader(data, seed=0, rank=2, world_size=3)
    assert ids(stream) == ids(expected)


def test_ranks_come_from_the_process_group(data, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "7")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        stream = StreamLoader(data, 8, window=64)
        assert (stream.rank, stream.world_size) == (0, 1)
    finally:
        torch.distributed.destroy_process_group()


def test_batches_can_be_sent_elsewhere(data):
    batch = next(iter(loader(data)))
    assert torch.equal(pickle.loads(pickle.dumps(batch))["index"], batch["index"])


def test_a_broken_worker_is_an_error_and_not_a_short_epoch(data):
    broken = ShardedDataset(list(data.files), transform=_fail_on_100)
    with pytest.raises(ZeroDivisionError):
        list(loader(broken, num_workers=1))


def _fail_on_100(sample):
    return {"x": 1 // (sample["label"] - 100)}


def test_the_order_of_a_batch_is_that_of_the_order(data):
    stream = loader(data)
    order = stream._order
    assert ids(stream) == order(0, np.arange(200)).tolist()


def test_a_path_is_no_dataset(tmp_path):
    for path in (tmp_path, str(tmp_path)):
        with pytest.raises(TypeError, match=r"is a path; use StreamLoader\(ShardedDataset"):
            StreamLoader(path, 4)


def test_the_number_of_workers_can_be_measured():
    samples = [{"x": torch.tensor([n])} for n in range(64)]
    stream = StreamLoader(samples, 8, num_workers="auto", rank=0, world_size=1)
    assert isinstance(stream.num_workers, int)
    assert len(list(stream)) == 8
