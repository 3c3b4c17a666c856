"""The next batches on the device before they are asked for."""

import inspect
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeAlias, cast

import torch

from torsh_data._loader import END, StreamLoader
from torsh_data._stats import LoaderStats
from torsh_data._transfer import PinnedSlot, lend, move

Batch: TypeAlias = Any
_Arrival: TypeAlias = Callable[[], None]

_PATIENCE = 5.0  # seconds that the end of the program waits for a loader that does not answer


class DevicePrefetcher:
    """Batches of a loader, moved to a device and transformed while the last one is in use.

    A thread draws up to `depth` batches ahead. On a GPU it copies each through a ring of pinned
    buffers that are made once and used again, and runs `transform`, on a stream of its own; the
    stream of the loop waits for the batch's event, the host does not wait. The thread in turn stays
    no more than `depth` batches ahead of the work that the GPU has *finished*, so memory is bounded
    by `depth` + 1 batches even if the host runs far ahead. On a CPU the same thread reads ahead.

    A batch may be kept for as long as its tensors are wanted: their memory was made on the
    prefetcher's stream and is lent to the loop's (`record_stream`), so that it is used again only
    when what the loop started on it has ended. Keeping the last few batches alive would do for
    loops that let go of a batch before they take the next, but not for those that collect them.

    Make one prefetcher and iterate it each epoch: its stream and its pinned memory stay.

    The `key` of a `StreamLoader`'s batches stays on the CPU, where augmentation reads it without
    waiting for the device; `index` and everything else come on the device.

    `state_dict` and `load_state_dict`, which exist if the loader has them, count the batches that
    the loop has received, not those drawn ahead: a run that goes on from a state misses no sample
    and sees none twice. With a `StreamLoader` that holds for the loader's own state as well, unless
    a subclass has an `__iter__` of its own.

    Leaving a loop early waits for the one batch that the loader or the transform is at, and leaves
    the others. A program that ends waits no longer than five seconds for it.

    Args:
        loader: Any iterable of batches; `StreamLoader`, `DataLoader` and others. Batches may be
            mappings, lists, tuples, named tuples, dataclasses, and objects with a method `to`, one
            inside the other; what is no tensor is passed on.
        device: A CUDA device or the CPU.
        depth: Batches to keep ready, at least 1.
        transform: Called with each batch on the device, on the prefetcher's stream and thread,
            without gradients: `vision.BatchPipeline`, for instance. Let it draw from keys in the
            batch; the order of draws from torch's global generator is that of two threads.

    Raises:
        ValueError: If `depth` is out of range or the device is neither CUDA nor CPU.
        TypeError: If the loader cannot be iterated, or is a path.

    Example:
        >>> from torsh_data import StreamLoader
        >>> loader = StreamLoader([{"x": n} for n in range(6)], 2, shuffle=False)
        >>> batches = DevicePrefetcher(loader, "cpu", transform=lambda batch: batch["x"] * 10)
        >>> for x in batches:
        ...     print(x.tolist(), batches.state_dict()["position"])
        [0, 10] 2
        [20, 30] 4
        [40, 50] 0
    """

    def __new__(cls, loader: Iterable[Batch], *_: Any, **__: Any) -> "DevicePrefetcher":
        # A Trainer asks by the methods' names whether an iterable can be resumed.
        is_stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        return object.__new__(
            cast("type[DevicePrefetcher]", _StatefulPrefetcher) if is_stateful else cls
        )

    def __init__(
        self,
        loader: Iterable[Batch],
        device: torch.device | str | int,
        *,
        depth: int = 2,
        transform: Callable[[Batch], Batch] | None = None,
    ) -> None:
        if not hasattr(loader, "__iter__") or isinstance(loader, (str, bytes, os.PathLike)):
            raise TypeError(
                f"loader is a {type(loader).__name__}, no iterable of batches; give a StreamLoader "
                "or DataLoader of the data set"
            )
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth={depth!r} must be a whole number, at least 1")
        device = torch.device(device)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device='{device}'; use 'cpu' or a CUDA device")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.loader = loader
        self.device = device
        self.depth = depth
        self.transform = transform
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._slots: list[PinnedSlot] = []
        self._received: Any = None  # the loader's state as of the batch that was received last
        self._newest: _Ahead | None = None

    def __repr__(self) -> str:
        loader = type(self.loader).__name__
        return f"DevicePrefetcher({loader}, '{self.device}', depth={self.depth})"

    def stats(self) -> LoaderStats:
        """The loader's `stats`, whose step is the loop's, or the copy and transform if slower.

        Raises:
            TypeError: If the loader has none.
        """
        loader = cast("Any", self.loader)
        if not hasattr(loader, "stats"):
            raise TypeError(f"a {type(loader).__name__} has no stats")
        return loader.stats()

    def __len__(self) -> int:
        """Batches of an epoch, as the loader says."""
        return len(cast("Any", self.loader))

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to, if the loader knows."""
        return int(cast("Any", self.loader).epoch)

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch: passed on to the loader, or to the sampler that it has.

        Raises:
            TypeError: If neither has a `set_epoch`.
        """
        loader = cast("Any", self.loader)
        for owner in (loader, getattr(loader, "sampler", None)):
            if hasattr(owner, "set_epoch"):
                self._settle()
                owner.set_epoch(epoch)
                return
        raise TypeError(f"a {type(loader).__name__} has no set_epoch")

    def _settle(self) -> None:
        self._newest = self._received = None

    def __iter__(self) -> Iterator[Batch]:
        ahead = self._newest = _Ahead(self)
        try:
            while True:
                item = ahead.receive()
                if item is None:
                    return
                batch, arrive = item
                arrive()
                if batch is END:
                    return
                del item, arrive
                yield batch
                del batch
        finally:
            ahead.stop()

    def _draw(self, me: "_Ahead") -> Generator[tuple[Batch, _Arrival]]:
        """The loader's batches, each with what has to be done when the loop receives it."""
        loader = cast("Any", self.loader)
        if isinstance(loader, StreamLoader) and type(loader).__iter__ is StreamLoader.__iter__:
            yield from loader._draw()  # which leaves it to us when a batch counts
            return
        is_stateful = isinstance(self, _StatefulPrefetcher)
        self._note(me, loader.state_dict() if is_stateful else None)
        for batch in loader:
            yield batch, partial(self._note, me, loader.state_dict() if is_stateful else None)

    def _note(self, me: "_Ahead", state: Any) -> None:
        if self._newest is me:
            self._received = state

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _prepare(self, batch: Batch, slot: PinnedSlot | None) -> Batch:
        # A column `key` of a StreamLoader is its own: augmentation reads it on the host, and asking
        # the device for it would wait for all that the device has to do.
        is_keyed = (
            isinstance(self.loader, StreamLoader) and isinstance(batch, dict) and "key" in batch
        )
        key = batch["key"] if is_keyed else None
        if slot is None:
            batch = move(batch, lambda tensor: tensor.to(self.device), self.device)
        else:
            batch = slot.send(batch, self.device)
        if key is not None:
            batch["key"] = key
        if self.transform is None:
            return batch
        with torch.no_grad():
            return self.transform(batch)


class _StatefulPrefetcher(DevicePrefetcher):
    """A prefetcher over a loader that has a state."""

    def state_dict(self) -> Any:
        """The loader's state as of the last batch that the loop received."""
        return cast("Any", self.loader).state_dict() if self._received is None else self._received

    def load_state_dict(self, state_dict: Any) -> None:
        """Go on from a state of this prefetcher or its loader at the next iteration."""
        self._settle()
        cast("Any", self.loader).load_state_dict(state_dict)


class _Ahead:
    """One iteration: a thread that prepares batches, and the loop that receives them.

    The loop sends a permit for each batch to prepare, with an event of its stream that says how far
    the GPU has come; the thread sends batches back. Neither ever looks at a lock or a clock.
    """

    def __init__(self, owner: DevicePrefetcher) -> None:
        self.owner = owner
        self.permits: SimpleQueue[Any] = SimpleQueue()
        self.results: SimpleQueue[Any] = SimpleQueue()
        self.stopped = threading.Event()
        self.thread: threading.Thread | None = None
        self.slots: list[PinnedSlot] = []
        self.source = owner._draw(self)
        self._end: weakref.finalize[Any, Any] | None = None

    def receive(self) -> tuple[Batch, _Arrival] | None:
        """The next batch, ready for the current stream."""
        owner = self.owner
        if self.thread is None:
            # Drawn here, so that worker processes start before there is a second thread.
            with owner._on_stream():
                first = next(self.source, None)
            if first is None:
                return None
            self._begin(first)
        else:
            self.permits.put(_mark(owner.device))
        batch, arrive, ready, error = self.results.get()
        if error is not None:
            raise error
        if arrive is None:
            return None
        if ready is not None:
            current = torch.cuda.current_stream(owner.device)
            current.wait_event(ready)
            lend(batch, current)
        return batch, arrive

    def _begin(self, first: tuple[Batch, _Arrival]) -> None:
        owner = self.owner
        for _ in range(owner.depth if owner.device.type == "cuda" else 0):
            self.slots.append(owner._slots.pop() if owner._slots else PinnedSlot())
        for _ in range(owner.depth + 1):
            self.permits.put(None)
        self.thread = threading.Thread(
            target=_prepare_ahead,
            args=(owner, first, self.source, self.permits, self.results, self.slots, self.stopped),
            name="DevicePrefetcher",
            daemon=True,  # nothing may hang at exit, where the finalizer ends it
        )
        self._end = weakref.finalize(
            self, _join, self.permits, self.stopped, self.thread, patience=_PATIENCE
        )
        self.thread.start()

    def stop(self) -> None:
        """End the thread, after the batch that it is at, and close the loader's iterator."""
        if self.thread is not None and self._end is not None:
            if not self._end.detach():
                return  # the program ends, and the loader hangs
            _join(self.permits, self.stopped, self.thread)
        # It runs if this was collected in the thread's own code.
        if inspect.getgeneratorstate(self.source) != inspect.GEN_RUNNING:
            self.source.close()
            self.owner._slots.extend(self.slots)
            self.slots.clear()


_STOP = object()


def _join(
    permits: "SimpleQueue[Any]",
    stopped: threading.Event,
    thread: threading.Thread,
    patience: float | None = None,
) -> None:
    stopped.set()  # for the permits that it has not used
    permits.put(_STOP)
    if thread is not threading.current_thread():
        thread.join(patience)


def _mark(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _prepare_ahead(
    owner: DevicePrefetcher,
    drawn: tuple[Batch, _Arrival] | None,
    source: Iterator[tuple[Batch, _Arrival]],
    permits: "SimpleQueue[Any]",
    results: "SimpleQueue[Any]",
    slots: list[PinnedSlot],
    stopped: threading.Event,
) -> None:
    number = 0
    try:
        with owner._on_stream():
            while True:
                permit = permits.get()
                if permit is _STOP or stopped.is_set():
                    return
                if drawn is None:
                    drawn = next(source, None)
                if drawn is None:
                    results.put((None, None, None, None))
                    return
                if stopped.is_set():
                    return
                if permit is not None:
                    permit.synchronize()
                batch, arrive = drawn
                if batch is not END:
                    batch = owner._prepare(batch, slots[number % len(slots)] if slots else None)
                ready = _mark(owner.device)
                results.put((batch, arrive, ready, None))
                drawn = batch = arrive = None
                number += 1
    except BaseException as error:
        results.put((None, None, None, error))
