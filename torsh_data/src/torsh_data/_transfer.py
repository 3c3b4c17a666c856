"""Batches of any structure on their way to a device."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch

Move = Callable[[torch.Tensor], torch.Tensor]

_ALIGNMENT = 512  # what the device's own allocator aligns to
_GRAIN = 1 << 20


def move(value: Any, tensor: Move, device: torch.device) -> Any:
    """The same structure with `tensor` applied to its plain tensors.

    Mappings, lists, tuples, named tuples and dataclasses are rebuilt. An object with a method `to`
    moves itself: only its class knows what of it has to stay on the host. All else is passed on.
    """
    if type(value) is torch.Tensor and value.layout == torch.strided:
        return tensor(value)
    if isinstance(value, Mapping):
        return _rebuild_mapping(value, {k: move(v, tensor, device) for k, v in value.items()})
    if hasattr(value, "to") and not isinstance(value, type):
        return _move_itself(value, device)
    if isinstance(value, (list, tuple)):
        items = [move(item, tensor, device) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return items if isinstance(value, list) else tuple(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _rebuild_dataclass(value, tensor, device)
    return value


def _rebuild_mapping(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(value) is dict:
        return items
    copy = cast("Any", value).copy() if hasattr(value, "copy") else None
    if type(copy) is not type(value) or not hasattr(copy, "update"):
        return items
    copy.update(items)
    return copy


def _rebuild_dataclass(value: Any, tensor: Move, device: torch.device) -> Any:
    moved = {f: move(getattr(value, f.name), tensor, device) for f in dataclasses.fields(value)}
    rebuilt = dataclasses.replace(value, **{f.name: v for f, v in moved.items() if f.init})
    for field, item in moved.items():
        if not field.init:
            object.__setattr__(rebuilt, field.name, item)
    return rebuilt


def _move_itself(value: Any, device: torch.device) -> Any:
    if device.type == "cuda" and hasattr(value, "pin_memory") and not _is_on(value, device):
        pinned = value.pin_memory()  # from torch's pool of pinned blocks
        value = value if pinned is None else pinned
    if _takes_non_blocking(value.to):
        return value.to(device, non_blocking=True)
    return value.to(device)


def _is_on(value: Any, device: torch.device) -> bool:
    own = getattr(value, "device", None)
    return isinstance(own, torch.device) and own.type == device.type


def _takes_non_blocking(method: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(method).parameters
    except (TypeError, ValueError):  # torch's own methods have no signature
        return True
    kinds = {p.kind for p in parameters.values()}
    return "non_blocking" in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All strided tensors that a batch holds, those inside objects with a method `to` too."""
    if isinstance(value, torch.Tensor):
        yield from _strided_parts(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, type):
        return
    elif dataclasses.is_dataclass(value):
        names = {field.name for field in dataclasses.fields(value)} | set(_attributes(value))
        for name in names:
            yield from tensors_in(getattr(value, name))
    elif hasattr(value, "to"):
        for item in _attributes(value).values():
            yield from tensors_in(item)


def _attributes(value: Any) -> dict[str, Any]:
    slots = (s for kind in type(value).__mro__ for s in getattr(kind, "__slots__", ()))
    named = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return named | getattr(value, "__dict__", {})


def _strided_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if hasattr(tensor, "__tensor_flatten__"):  # wrappers, nested tensors among them
        for name in cast("Any", tensor).__tensor_flatten__()[0]:
            yield from _strided_parts(getattr(tensor, name))
    elif tensor.layout == torch.strided:
        yield tensor
    elif tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    else:
        rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        yield tensor.crow_indices() if rows else tensor.ccol_indices()
        yield tensor.col_indices() if rows else tensor.row_indices()
        yield tensor.values()


def lend(batch: Any, stream: torch.cuda.Stream) -> None:
    """Let a stream use the memory of a batch that was made on another.

    Raises:
        TypeError: If an object in the batch hides its tensors.
    """
    for value in _opaque_in(batch):
        if not any(True for _ in tensors_in(value)) and not hasattr(value, "record_stream"):
            raise TypeError(
                f"the batch holds a {type(value).__name__}, which moves itself to the device but "
                "does not show its tensors; make it a dataclass, or give it record_stream(stream)"
            )
        if hasattr(value, "record_stream"):
            value.record_stream(stream)
    for tensor in tensors_in(batch):
        if tensor.is_cuda:
            tensor.record_stream(stream)


def _opaque_in(value: Any) -> Iterator[Any]:
    if isinstance(value, (torch.Tensor, type)):
        return
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _opaque_in(item)
    elif hasattr(value, "to"):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _opaque_in(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _opaque_in(getattr(value, field.name))


class PinnedSlot:
    """Pinned memory through which one batch at a time passes to the device."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None
        self._sources: list[torch.Tensor] = []

    def send(self, batch: Any, device: torch.device) -> Any:
        """Copy a batch to the device on the current stream; waits for the slot's last batch."""
        if self._copied is not None:
            self._copied.synchronize()
        self._sources.clear()
        self._reserve(batch)
        used = 0

        def tensor(source: torch.Tensor) -> torch.Tensor:
            nonlocal used
            if source.device.type != "cpu" or source.is_pinned() or source.numel() == 0:
                self._sources.append(source)
                return source.to(device, non_blocking=True)
            # Both sides get the source's dense strides, so that the copy is one block of bytes.
            strides = torch.empty_like(source, device="meta").stride()
            target = torch.empty_strided(source.shape, strides, dtype=source.dtype, device=device)
            part = self._buffer[used : used + source.nbytes].view(source.dtype)
            used += _aligned(source.nbytes)
            staged = part.as_strided(source.shape, strides, part.storage_offset())
            staged.copy_(source)
            return target.copy_(staged, non_blocking=True)

        moved = move(batch, tensor, device)
        self._copied = torch.cuda.Event(blocking=True)
        self._copied.record()
        return moved

    def _reserve(self, batch: Any) -> None:
        needed = sum(_aligned(t.nbytes) for t in tensors_in(batch) if t.device.type == "cpu")
        if needed > len(self._buffer):
            size = -(-needed * 5 // 4 // _GRAIN) * _GRAIN  # batches of texts differ in length
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
