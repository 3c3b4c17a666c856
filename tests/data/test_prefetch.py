import gc
import itertools
import json
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass, field

import lightning
import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

from torsh_data import StreamLoader
from torsh_data._prefetch import DevicePrefetcher
from torsh_data._transfer import lend, move, tensors_in

ROWS, BATCH = 40, 4
Pair = namedtuple("Pair", ["left", "right"])


def samples(rows=ROWS):
    return [{"x": torch.tensor([float(n)])} for n in range(rows)]


def stream(batch_size=BATCH, **options):
    return StreamLoader(samples(), batch_size, seed=3, **options)


def ids(batches):
    return [batch["index"].tolist() for batch in batches]


def threads():
    return [t for t in threading.enumerate() if t.name == "DevicePrefetcher"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    if threads():
        gc.collect()
    assert threads() == []


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 50])
def test_batches_are_those_of_the_loader(depth):
    expected = list(stream())
    got = list(DevicePrefetcher(stream(), "cpu", depth=depth))
    assert ids(got) == ids(expected)
    for a, b in zip(got, expected, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("rows", [0, 1])
def test_short_loaders(rows):
    batches = [torch.tensor([n]) for n in range(rows)]
    assert [b.item() for b in DevicePrefetcher(batches, "cpu", depth=3)] == list(range(rows))


def test_no_more_than_depth_batches_are_drawn_ahead():
    drawn = []

    def source():
        for n in range(20):
            drawn.append(n)
            yield torch.tensor(n)

    class Loader:
        def __iter__(self):
            return source()

    for n, _ in enumerate(DevicePrefetcher(Loader(), "cpu", depth=3)):
        threading.Event().wait(0.01)
        assert len(drawn) == min(20, n + 4)


@dataclass(frozen=True)
class Inner:
    a: torch.Tensor
    name: str
    later: torch.Tensor = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "later", self.a * 2)


class Moves:
    """Like a packed batch: moves itself and keeps lengths on the host."""

    def __init__(self, values, calls=()):
        self.values, self.calls = values, list(calls)

    def pin_memory(self):
        return Moves(self.values, [*self.calls, "pin"])

    def to(self, device, non_blocking=False):
        return Moves(self.values.to(device), [*self.calls, (torch.device(device), non_blocking)])


def nested():
    return {
        "t": torch.arange(6).view(2, 3),
        "list": [torch.ones(2), (torch.zeros(1), "text", 3)],
        "named": Pair(torch.ones(1), {"deep": torch.ones(3)}),
        "ordered": OrderedDict(b=torch.ones(1), a=torch.ones(2)),
        "data": Inner(torch.ones(2), "n"),
        "array": np.arange(3),
        "none": None,
        "moves": Moves(torch.ones(5)),
        "packed": pack_sequence([torch.ones(3), torch.ones(2)]),
        "sparse": torch.eye(2).to_sparse(),
    }


def test_move_rebuilds_every_structure():
    value = nested()
    moved = move(value, lambda t: t + 1, torch.device("cpu"))
    assert moved["t"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert moved["list"][0].tolist() == [2, 2]
    assert moved["list"][1][1:] == ("text", 3)
    assert type(moved["named"]) is Pair
    assert moved["named"].right["deep"].tolist() == [2, 2, 2]
    assert list(moved["ordered"]) == ["b", "a"]
    assert type(moved["ordered"]) is OrderedDict
    assert moved["data"].name == "n"
    assert moved["data"].later.tolist() == [3, 3]
    assert moved["array"] is value["array"]
    assert moved["none"] is None
    assert moved["moves"].calls == [(torch.device("cpu"), True)]
    assert moved["packed"].batch_sizes.tolist() == [2, 2, 1]
    assert torch.equal(moved["sparse"].to_dense(), torch.eye(2))
    assert value["ordered"]["b"].tolist() == [1]  # the original is left as it was


def test_all_tensors_of_a_batch_are_found():
    sizes = sorted(t.numel() for t in tensors_in(nested()))
    # the packed sequence has data and batch_sizes; the sparse matrix indices and values
    assert sizes == sorted([6, 2, 1, 1, 3, 1, 2, 2, 2, 5, 5, 3, 4, 2])


def test_an_object_that_hides_its_tensors_is_refused():
    class Hidden:
        __slots__ = ()

        def to(self, device):
            return self

    with pytest.raises(TypeError, match=r"a Hidden, which moves itself .* record_stream\(stream\)"):
        lend({"x": [Hidden()]}, None)


def test_the_transform_runs_in_the_thread_without_gradients():
    weight = torch.ones(1, requires_grad=True)
    seen = []

    def transform(batch):
        seen.append((threading.current_thread().name, torch.is_grad_enabled()))
        return batch["x"] * weight

    for x in DevicePrefetcher(stream(), "cpu", transform=transform):
        assert not x.requires_grad
    assert set(seen) == {("DevicePrefetcher", False)}


def failing(at):
    class Failing(list):
        def __getitem__(self, n):
            if n == at:
                raise KeyError(f"sample {n}")
            return super().__getitem__(n)

    return StreamLoader(Failing(samples()), BATCH, shuffle=False)


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("at", [0, 13, 39])
def test_an_error_of_the_loader_comes_with_its_batch(depth, at):
    prefetcher = DevicePrefetcher(failing(at), "cpu", depth=depth)
    got = []
    with pytest.raises(KeyError, match=f"sample {at}"):
        got.extend(prefetcher)
    assert ids(got) == [list(range(n, n + BATCH)) for n in range(0, at // BATCH * BATCH, BATCH)]
    assert prefetcher.state_dict()["position"] == at // BATCH * BATCH


@pytest.mark.parametrize("at", [0, 3])
def test_an_error_of_the_transform_comes_with_its_batch(at):
    def transform(batch):
        if batch["index"][0] == at * BATCH:
            raise RuntimeError("no such colour")
        return batch

    prefetcher = DevicePrefetcher(stream(shuffle=False), "cpu", transform=transform, depth=3)
    got = []
    with pytest.raises(RuntimeError, match="no such colour"):
        got.extend(prefetcher)
    assert len(got) == at
    assert prefetcher.state_dict()["position"] == at * BATCH


def unbroken(epochs=3):
    loader = stream()
    return [batch for _ in range(epochs) for batch in ids(loader)]


@pytest.mark.parametrize("stop", range(1, 30))
@pytest.mark.parametrize("through", ["prefetcher", "loader"])
def test_a_run_resumes_after_any_batch(stop, through):
    """The state of the loader itself counts what the prefetcher delivered, too."""
    loader = stream()
    prefetcher = DevicePrefetcher(loader, "cpu", depth=3)
    begun, state = [], None
    for _ in range(3):
        for batch in prefetcher:
            begun.append(batch["index"].tolist())
            if len(begun) == stop:
                state = (prefetcher if through == "prefetcher" else loader).state_dict()
                break
        if state:
            break
    resumed = DevicePrefetcher(stream(num_workers=0), "cpu")
    resumed.load_state_dict(json.loads(json.dumps(state)))
    rest = []
    while len(begun) + len(rest) < 30:
        rest += ids(resumed)
    assert begun + rest == unbroken()


def test_leaving_early_ends_the_epoch_as_without_a_prefetcher():
    plain, ahead = stream(), DevicePrefetcher(stream(), "cpu", depth=3)
    for taken in (1, 9, 10, 0, 3):
        expected = ids(itertools.islice(plain, taken))
        assert ids(itertools.islice(ahead, taken)) == expected
        assert ahead.state_dict() == plain.state_dict()
        assert ahead.epoch == plain.epoch
    plain.set_epoch(7)
    ahead.set_epoch(7)
    assert ids(ahead) == ids(plain)
    assert len(ahead) == len(plain) == 10


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_and_an_early_end(workers):
    prefetcher = DevicePrefetcher(stream(num_workers=workers), "cpu")
    first = ids(itertools.islice(prefetcher, 3))
    assert first == unbroken()[:3]
    assert ids(prefetcher) == unbroken()[10:20]


def test_several_iterators_at_once():
    prefetcher = DevicePrefetcher(stream(), "cpu")
    one, two = iter(prefetcher), iter(prefetcher)
    first = next(one)["index"].tolist()
    other = next(two)["index"].tolist()
    assert first == unbroken()[0]
    assert other == unbroken()[10]  # the first iterator was left midway
    assert prefetcher.state_dict()["epoch"] == 1  # the newest iterator moves the state
    assert [first, *ids(one)] == unbroken()[:10]
    assert [other, *ids(two)] == unbroken()[10:20]


def test_an_iterator_that_is_dropped_or_closed_ends_its_thread():
    prefetcher = DevicePrefetcher(stream(), "cpu")
    iterator = iter(prefetcher)
    assert threads() == []  # nothing begins before the first batch is wanted
    next(iterator)
    assert len(threads()) == 1
    del iterator
    assert threads() == []
    other = iter(prefetcher)
    next(other)
    other.close()
    assert threads() == []
    assert list(other) == []


class Tenfold(StreamLoader):
    """Its batches are not those that a StreamLoader draws."""

    def __iter__(self):
        for batch in super().__iter__():
            yield {**batch, "x": batch["x"] * 10}


class Around:
    """A wrapper that passes all on but the batches."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __iter__(self):
        for batch in self.loader:
            yield {**batch, "x": batch["x"] * 10}


class Artist:
    """A loader with a `_draw` that has nothing to do with ours."""

    def _draw(self, canvas):
        raise NotImplementedError

    def __iter__(self):
        return iter([{"x": torch.tensor([[10.0]])}])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Tenfold(samples(), BATCH, seed=3),
        lambda: Around(stream()),
        Artist,
        lambda: DevicePrefetcher(stream(), "cpu", transform=lambda b: {**b, "x": b["x"] * 10}),
    ],
    ids=["subclass", "wrapper", "another's _draw", "a prefetcher"],
)
def test_batches_are_those_that_iterating_the_loader_gives(make):
    expected = [batch["x"] for batch in make()]
    assert all(x[0, 0] == 0 or x.max() >= 10 for x in expected)
    got = [batch["x"] for batch in DevicePrefetcher(make(), "cpu", depth=2)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("stop", [3, 10, 13])
@pytest.mark.parametrize(
    "make",
    [lambda: Tenfold(samples(), BATCH, seed=3), lambda: DevicePrefetcher(stream(), "cpu", depth=3)],
    ids=["subclass", "a prefetcher"],
)
def test_a_loader_with_its_own_iteration_resumes_exactly(make, stop):
    ahead, begun = DevicePrefetcher(make(), "cpu", depth=3), []
    while len(begun) < stop:
        begun += ids(itertools.islice(ahead, stop - len(begun)))
    resumed = DevicePrefetcher(make(), "cpu")
    resumed.load_state_dict(ahead.state_dict())
    while len(begun) < 20:
        begun += ids(resumed)
    assert begun == unbroken(2)


def test_leaving_early_leaves_the_permits_unused():
    """It waits for the batch that the loader is at, not for `depth` of them."""
    drawn, go_on = [], threading.Event()

    def source():
        for n in range(20):
            drawn.append(n)
            yield torch.tensor(n)
            go_on.wait(10)

    iterator = iter(DevicePrefetcher(Once(source), "cpu", depth=8))
    next(iterator)
    threading.Timer(0.05, go_on.set).start()
    iterator.close()
    assert len(drawn) <= 2


def test_leaving_early_while_the_transform_works_draws_no_more():
    drawn, at_work, go_on = [], threading.Event(), threading.Event()

    def source():
        for n in range(20):
            drawn.append(n)
            yield torch.tensor(n)

    def transform(batch):
        if batch == 1:
            at_work.set()
            go_on.wait(10)
        return batch

    iterator = iter(DevicePrefetcher(Once(source), "cpu", depth=8, transform=transform))
    next(iterator)
    assert at_work.wait(10)
    threading.Timer(0.05, go_on.set).start()
    iterator.close()
    assert drawn == [0, 1]


_HANGS = """
import itertools, time, torch
from torsh_data import DevicePrefetcher, _prefetch
_prefetch._PATIENCE = 0.2
class Hangs:
    def __iter__(self):
        yield torch.zeros(1)
        time.sleep(600)
iterator = iter(DevicePrefetcher(Hangs(), "cpu"))
next(iterator)
print("the loop has failed")
"""


def test_a_loader_that_hangs_does_not_keep_the_program():
    done = subprocess.run(
        [sys.executable, "-c", _HANGS], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout == "the loop has failed\n"
    assert done.stderr == ""


class Counting:
    """A loader with a state, but none of ours."""

    def __init__(self, n=10):
        self.n, self.at = n, 0

    def __iter__(self):
        while self.at < self.n:
            self.at += 1
            yield torch.tensor(self.at)
        self.at = 0

    def __len__(self):
        return self.n

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("stop", [1, 5, 10])
def test_other_stateful_loaders_resume_exactly_too(stop):
    loader = Counting()
    prefetcher = DevicePrefetcher(loader, "cpu", depth=3)
    begun = [b.item() for b in itertools.islice(prefetcher, stop)]
    state = prefetcher.state_dict()
    assert state == {"at": stop}
    resumed = DevicePrefetcher(Counting(), "cpu")
    resumed.load_state_dict(state)
    assert begun + [b.item() for b in resumed] == list(range(1, 11))


def test_only_stateful_loaders_make_stateful_prefetchers():
    plain = DevicePrefetcher(DataLoader(list(range(8)), 2), "cpu")
    assert not hasattr(plain, "state_dict")
    assert not hasattr(plain, "load_state_dict")
    assert len(plain) == 4
    assert [b.tolist() for b in plain] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert hasattr(DevicePrefetcher(stream(), "cpu"), "state_dict")


def test_set_epoch_reaches_a_distributed_sampler():
    sampler = torch.utils.data.DistributedSampler(range(16), num_replicas=2, rank=0)
    prefetcher = DevicePrefetcher(DataLoader(range(16), 4, sampler=sampler), "cpu")
    prefetcher.set_epoch(3)
    assert sampler.epoch == 3
    with pytest.raises(TypeError, match="a list has no set_epoch"):
        DevicePrefetcher([1], "cpu").set_epoch(1)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"loader": 3}, TypeError, "loader is a int, no iterable of batches; give a StreamLoader"),
        ({"loader": "shards"}, TypeError, "loader is a str, no iterable of batches"),
        ({"depth": 0}, ValueError, "depth=0 must be a whole number, at least 1"),
        ({"depth": 1.5}, ValueError, "depth=1.5"),
        ({"device": "meta"}, ValueError, "device='meta'; use 'cpu' or a CUDA device"),
    ],
)
def test_arguments_are_checked(options, error, match):
    arguments = {"loader": [1], "device": "cpu", **options}
    with pytest.raises(error, match=match):
        DevicePrefetcher(arguments.pop("loader"), arguments.pop("device"), **arguments)


def test_it_passes_on_the_stats_of_its_loader():
    loader = StreamLoader([{"x": n} for n in range(64)], 8)
    batches = DevicePrefetcher(loader, "cpu", depth=3)
    for _ in batches:
        time.sleep(0.01)
    assert batches.stats().batches == 8
    assert batches.stats().bottleneck == "step"
    assert repr(batches) == "DevicePrefetcher(StreamLoader, 'cpu', depth=3)"
    with pytest.raises(TypeError, match="a list has no stats"):
        DevicePrefetcher([1], "cpu").stats()


class Recorder(lightning.LightningModule):
    def __init__(self, stop_after=None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []
        self.stop_after = stop_after

    def training_step(self, batch, _):
        self.seen.append(batch["index"].tolist())
        return self.layer(batch["x"]).square().mean()

    def on_train_batch_end(self, *_):
        if self.stop_after is not None and len(self.seen) == self.stop_after:
            self.trainer.save_checkpoint(self.trainer.default_root_dir + "/stop.ckpt")
            self.trainer.should_stop = True

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder, module, ckpt_path=None):
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        default_root_dir=str(folder),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DevicePrefetcher(stream(), "cpu", depth=3), ckpt_path=ckpt_path)
    return module.seen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning.*")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("stop", [3, 10, 14])
def test_a_trainer_resumes_on_the_exact_batch(tmp_path, stop):
    expected = unbroken()
    begun = fit(tmp_path, Recorder(stop_after=stop))
    assert begun == expected[:stop]
    resumed = fit(tmp_path, Recorder(), tmp_path / "stop.ckpt")
    assert begun + resumed == expected


def device_batches(count, rows=64):
    generator = torch.Generator().manual_seed(0)
    for n in range(count):
        images = torch.randint(0, 256, (rows + n % 7, 3, 32, 32), generator=generator)
        yield {
            "image": images.to(torch.uint8).to(memory_format=torch.channels_last),
            "label": torch.full((rows,), n),
            "odd": torch.arange(n % 5, dtype=torch.float64),
            "pair": Pair(torch.tensor(float(n)), [torch.ones(3, n + 1).t()]),
        }


class Once:
    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return self.make()


def same(a, b):
    flat = zip(tensors_in(a), tensors_in(b), strict=True)
    return all(torch.equal(x.cpu(), y) and x.stride() == y.stride() for x, y in flat)


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_on_a_gpu_contents_and_strides_are_equal(depth):
    prefetcher = DevicePrefetcher(Once(lambda: device_batches(30)), "cuda", depth=depth)
    for _ in range(2):  # the second time through slots that were used before
        for got, expected in zip(prefetcher, device_batches(30), strict=True):
            assert all(t.is_cuda for t in tensors_in(got))
            assert same(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("transform", [None, lambda batch: {**batch, "image": batch["image"] + 1}])
def test_on_a_gpu_no_memory_is_used_again_too_early(depth, transform):
    """The device is kept busy, so that reads lag far behind the host, and batches are collected."""
    size, count = (256, 3, 64, 64), 60

    def make():
        for n in range(count):
            yield {"image": torch.full(size, n, dtype=torch.uint8)}

    prefetcher = DevicePrefetcher(Once(make), "cuda", depth=depth, transform=transform)
    busy = torch.randn(2048, 2048, device="cuda")
    held, early, late = deque(), [], []
    for batch in prefetcher:
        for _ in range(10):
            busy = (busy @ busy).clamp(-1, 1)
        early.append(batch["image"].sum(dtype=torch.int64))
        held.append(batch["image"])
        if len(held) > 5:
            late.append(held.popleft().sum(dtype=torch.int64))
        del batch
    late += [image.sum(dtype=torch.int64) for image in held]
    elements, shift = torch.Size(size).numel(), 0 if transform is None else 1
    expected = [elements * (n + shift) for n in range(count)]
    assert torch.stack(early).tolist() == expected
    assert torch.stack(late).tolist() == expected


@pytest.mark.gpu
def test_on_a_gpu_the_loop_does_not_wait_and_nothing_is_pinned_anew(forbid_synchronisation):
    prefetcher = DevicePrefetcher(Once(lambda: device_batches(12)), "cuda", depth=2)
    for _ in prefetcher:
        pass
    buffers = [slot._buffer.data_ptr() for slot in prefetcher._slots]
    stream_before = prefetcher._stream
    total = torch.zeros((), device="cuda", dtype=torch.int64)
    with forbid_synchronisation():
        for batch in prefetcher:
            total += batch["image"].sum()
    assert sorted(slot._buffer.data_ptr() for slot in prefetcher._slots) == sorted(buffers)
    assert prefetcher._stream is stream_before


@pytest.mark.gpu
@pytest.mark.parametrize("transform", [None, lambda batch: {**batch, "x": batch["x"] + 0}])
def test_on_a_gpu_the_keys_of_a_stream_stay_on_the_host(forbid_synchronisation, transform):
    expected = list(stream())
    prefetcher = DevicePrefetcher(stream(), "cuda", transform=transform)
    table = torch.arange(ROWS, device="cuda") * 10
    looked_up, keys = [], []
    list(prefetcher)
    prefetcher.set_epoch(0)
    with forbid_synchronisation():
        for batch in prefetcher:
            assert list(batch) == ["x", "key", "index"]
            assert batch["key"].device.type == "cpu"
            keys += batch["key"].tolist()
            looked_up.append(table[batch["index"]])  # on the device, where the table is
    assert keys == [k for batch in expected for k in batch["key"].tolist()]
    assert torch.cat(looked_up).tolist() == [10 * n for row in ids(expected) for n in row]


@pytest.mark.gpu
def test_on_a_gpu_columns_called_key_of_other_loaders_move_like_all():
    batches = DevicePrefetcher([{"key": torch.arange(3)}], "cuda")
    assert all(batch["key"].is_cuda for batch in batches)


@pytest.mark.gpu
def test_on_a_gpu_memory_is_bounded_though_the_host_runs_ahead():
    size = 32 << 20

    def make():
        for n in range(40):
            yield torch.full((size,), n % 100, dtype=torch.uint8)

    busy = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for batch in DevicePrefetcher(Once(make), "cuda", depth=2):
        torch.mm(busy, busy, out=torch.empty_like(busy))
        batch.sum()
        del batch
    torch.cuda.synchronize()
    # depth + 1 batches, one that is let go of while its work runs, and the products
    assert torch.cuda.max_memory_allocated() - before < 5 * size + 4 * busy.nbytes


@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_without_a_part_of_the_rest_ends_its_epoch_when_the_loop_does(world):
    samples = [{"x": n} for n in range(4 * world * 3 + world - 1)]
    for rank in range(world):
        loader = StreamLoader(samples, 4, rank=rank, world_size=world, drop_last=False)
        prefetcher = DevicePrefetcher(loader, "cpu", depth=3)
        for count, _ in enumerate(prefetcher, 1):
            assert prefetcher.state_dict()["epoch"] == (count == 4)
        assert count == len(prefetcher) == 4 - (rank == world - 1)
        assert (loader.epoch, prefetcher.state_dict()["position"]) == (1, 0)
