"""The launch table: how one kernel launch finds every tensor and its hyper-parameters."""

from array import array
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from torsh_optim._plan import Bucket, Group

_COLUMNS = (
    8  # int64 per tensor: parameter, gradient, three states, elements, row of scalars, unused
)
_GRAD, _ELEMENTS, _ROW = 1, 5, 6
_SCALARS = 8  # float32 per row; the first is the learning rate
_RING = 4  # how many steps the host may be ahead of the device before it waits

Scalars = Callable[[Group, float], tuple[float, ...]]
Launch = Callable[[int, Tensor, Tensor, Tensor, list[torch.dtype], int], None]


class LaunchBucket(Bucket):
    """Tensors of all groups that one kernel launch updates.

    Two tables tell the kernel what to do. The block map, ``(programs, 2)`` int32, is built once: it
    gives each program a tensor and a block inside it. The launch table, ``(tensors, 8)`` int64 and
    ``(rows, 8)`` float32 behind it, holds addresses and hyper-parameters. It is written on the host
    and sent through a ring of pinned buffers: the rows in each step, because the bias corrections
    change, the addresses only when they differ from those sent last.

    Args:
        indices: Positions of the parameters in the optimizer.
        params: Parameters on one device, of one element type.
        states: State tensors, at most three lists.
        group_of: Number of the group of each parameter.
        grad_dtype: Element type of the gradients.
        scalars: Gives the eight hyper-parameters of a group at a step.
        launch: Starts the kernel: programs, table, rows, block map, element types, block size.
        block: Elements a program updates.
    """

    def __init__(
        self,
        indices: list[int],
        params: list[Tensor],
        states: list[list[Tensor]],
        group_of: list[int],
        grad_dtype: torch.dtype,
        scalars: Scalars,
        launch: Launch,
        block: int,
    ) -> None:
        super().__init__(indices, params, states, group_of, grad_dtype)
        self._scalars = scalars
        self._launch = launch
        self._block = block
        self._device = params[0].device
        self._types = [params[0].dtype, grad_dtype, *(tensors[0].dtype for tensors in states)]

        elements = _words([p.numel() for p in params])
        self._blocks = _block_map(elements, block).to(self._device)

        self._active_groups = sorted(set(group_of))
        row_of_group = {group: row for row, group in enumerate(self._active_groups)}
        self._group_rows = [row_of_group[group] for group in group_of]
        self._rows: list[int] = []
        self._grads: list[int] = []

        count = len(params)
        self._words = count * _COLUMNS
        self._host = torch.zeros(
            self._words + count * _SCALARS // 2, dtype=torch.int64, device="cpu"
        )
        self._host_table = self._host[: self._words].view(count, _COLUMNS)
        self._host_rows = self._host[self._words :].view(torch.float32)
        self._host_table[:, 0] = _words([p.data_ptr() for p in params])
        for column, tensors in enumerate(states, start=_GRAD + 1):
            self._host_table[:, column] = _words([t.data_ptr() for t in tensors])
        self._host_table[:, _ELEMENTS] = elements

        on_cuda = self._device.type == "cuda"
        self._sender = _Sender(self._host, self._device) if on_cuda else None
        sent = self._host if self._sender is None else self._sender.sent
        self._table = sent[: self._words]
        self._row_table = sent[self._words :].view(torch.float32)

    def run(self, groups: list[Group], grads: list[Tensor | None], steps: list[float]) -> None:
        programs = self._blocks.shape[0]
        if programs == 0:
            return
        changed, keys = self._write(groups, grads, steps)
        # the kernel knows addresses only: without this a graph that saved a parameter would not
        # notice that its value has changed
        increment_version(
            [param for param, grad in zip(self.params, grads, strict=True) if grad is not None]
        )
        with self._on_device():
            if self._sender is None:
                self._start(programs, groups, keys)
                return
            used = len(keys) * _SCALARS // 2
            first = 0 if changed else self._words
            self._sender.send(first, self._words + used)
            self._start(programs, groups, keys)
            self._sender.mark()

    def _write(
        self, groups: list[Group], grads: list[Tensor | None], steps: list[float]
    ) -> tuple[bool, list[tuple[int, float]]]:
        """Write what changed into the host's table; say whether addresses or row numbers did."""
        try:
            addresses = list(map(Tensor.data_ptr, grads))  # pyrefly: ignore[bad-argument-type]
            complete = True
        except TypeError:  # a gradient is missing: address 0 makes the kernel pass it by
            addresses = [0 if grad is None else grad.data_ptr() for grad in grads]
            complete = False
        if complete and steps.count(steps[0]) == len(steps):
            rows = self._group_rows
            keys = [(group, steps[0]) for group in self._active_groups]
        else:
            numbers: dict[tuple[int, float], int] = {}
            rows = [
                0 if grad is None else numbers.setdefault((group, step), len(numbers))
                for grad, group, step in zip(grads, self.group_of, steps, strict=True)
            ]
            keys = list(numbers)

        changed = False
        for column, current, last in (
            (_GRAD, addresses, self._grads),
            (_ROW, rows, self._rows),
        ):
            if current != last:
                self._host_table[:, column] = _words(current)
                changed = True
        self._grads, self._rows = addresses, rows

        if keys:
            values = array(
                "f", chain.from_iterable(self._scalars(groups[group], step) for group, step in keys)
            )
            self._host_rows[: len(values)] = torch.frombuffer(values, dtype=torch.float32)
        return changed, keys

    def _start(self, programs: int, groups: list[Group], keys: list[tuple[int, float]]) -> None:
        for row, (group, _) in enumerate(keys):
            lr = groups[group]["lr"]
            if isinstance(lr, Tensor) and not lr.is_cpu:  # read on the device: no synchronisation
                self._row_table[row * _SCALARS].copy_(lr.reshape(()), non_blocking=True)
        self._launch(programs, self._table, self._row_table, self._blocks, self._types, self._block)

    def _on_device(self) -> torch.cuda.device | nullcontext[None]:
        if self._sender is None or torch.cuda.current_device() == self._device.index:
            return nullcontext()
        return torch.cuda.device(self._device)


def _words(numbers: list[int]) -> Tensor:
    """An int64 tensor of the numbers, several times faster than ``torch.tensor``."""
    return torch.frombuffer(array("q", numbers), dtype=torch.int64)


def _block_map(elements: Tensor, block: int) -> Tensor:
    """Tensor and block inside it for each program: ``(programs, 2)`` int32."""
    blocks = (elements + block - 1) // block
    owner = torch.repeat_interleave(torch.arange(len(blocks), device="cpu"), blocks)
    inside = torch.arange(int(blocks.sum()), device="cpu") - (blocks.cumsum(0) - blocks)[owner]
    return torch.stack((owner, inside), dim=1).to(torch.int32)


class _Sender:
    """Copies a host tensor to the device without waiting, through a ring of pinned buffers.

    A buffer is written again only after the launch that needed its copy has finished, so neither
    the buffer nor the device's table is overwritten while it is still in use.
    """

    def __init__(self, host: Tensor, device: torch.device) -> None:
        self._host = host
        self.sent = torch.empty_like(host, device=device)
        self._ring = [torch.empty_like(host, pin_memory=True) for _ in range(_RING)]
        self._done = [torch.cuda.Event() for _ in range(_RING)]
        self._turn = 0
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def send(self, first: int, last: int) -> None:
        stream = torch.cuda.current_stream(self._device)
        if self._stream is not None and stream != self._stream:
            stream.wait_event(self._done[self._turn - 1])  # the last launch may still read `sent`
        self._stream = stream
        self._done[self._turn].synchronize()
        pinned = self._ring[self._turn][first:last]
        pinned.copy_(self._host[first:last])
        self.sent[first:last].copy_(pinned, non_blocking=True)

    def mark(self) -> None:
        """Note that all work which needs the last copy has been queued."""
        self._done[self._turn].record(self._stream)
        self._turn = (self._turn + 1) % _RING
