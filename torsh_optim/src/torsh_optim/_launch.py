"""The launch table: how one kernel launch finds every tensor and its hyper-parameters."""

from array import array
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import accumulate, chain
from typing import Any, Protocol

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version
from triton.runtime import driver

from torsh_optim import _kernels
from torsh_optim._control import D0, Control
from torsh_optim._plan import Bucket, Group, Hypers, Members

_WORDS, _CONSTANTS, _FACTORS, _EXPONENTS = (
    int(width.value)
    for width in (_kernels.WORDS, _kernels.CONSTANTS, _kernels.FACTORS, _kernels.EXPONENTS)
)
_STATES, _ELEMENTS, _GROUP, _FIRST = 1, 7, 8, 9
_AT_CONSTANTS, _AT_EXPONENTS, _AT_ENTRIES, _AT_FACTORS = range(1, 5)
_SLOTS = 6
_NUMBERS = {float, int}
_RING = 4  # how many steps the host may be ahead of the device before it waits
_ARGUMENTS = -1  # in place of a row of factors: they are arguments of the launch
_FACTOR_ARGUMENTS = slice(8, 11)
_CHUNK = 1024  # numbers that a reducing kernel takes at once


class Rule(Protocol):
    """What the launch table needs to know of an algorithm; the optimizer classes say it."""

    _rule: str
    _factors_of: tuple[str, ...]
    _factors_kind: str

    @staticmethod
    def _constants(group: Group) -> tuple[float, ...]:
        """Learning rate 0, sign of the gradient, decoupled and coupled decay, and eight more."""

    @staticmethod
    def _factors(group: Group, step: float) -> tuple[float, ...]:
        """Warm-up and three numbers that depend on ``_factors_of`` and the step."""

    @staticmethod
    def _exponents(group: Group) -> tuple[float, ...]:
        """What ``advance`` needs to make the factors on the device."""


class LaunchBucket(Bucket):
    """Tensors of all groups that one kernel launch updates.

    Everything the kernel is told lies in one block of memory, written on the host and sent through
    a ring of pinned buffers, from the first part that has changed to the end:

    - the table, ``(tensors, 10)`` int64: addresses of parameter and states, sizes, group;
    - constants, ``(groups, 12)`` float32: learning rate and other hyper-parameters;
    - exponents, ``(groups, 4)`` float64: what the device needs to make the factors itself;
    - entries, ``(tensors, 2)`` int64: address of the gradient, row of factors;
    - factors, ``(rows, 4)`` float32: what changes in every step. Groups whose factors are equal
      share a row. Where all tensors would share one, they are arguments of the launch instead, so
      that a step at an unchanged learning rate sends nothing. With ``control`` the device counts
      the steps and writes the factors itself.

    The block map, ``(programs, 2)`` int32, gives each program a tensor and a block inside it.

    Args:
        members: The tensors; at most six states each.
        rule: The algorithm.
        groups: The optimizer's parameter groups.
        control: Norm of the gradients and what follows from it; None if it does not matter.
    """

    has_kernels = True

    def __init__(
        self, members: Members, rule: Rule, groups: list[Group], control: Control | None
    ) -> None:
        super().__init__(members)
        self._rule = rule
        self._rows_of = [*dict.fromkeys(members.group_of)]
        row_of = {number: row for row, number in enumerate(self._rows_of)}
        self._row_of = [row_of[number] for number in members.group_of]
        options = [groups[number] for number in self._rows_of]
        self._coupled = any(rule._constants(group)[3] != 0.0 for group in options)
        self._cautious = any(group.get("cautious") for group in options)
        self._adaptive = any(group.get("adaptive_lr") for group in options)
        self._on_cuda = self.device.type == "cuda"
        if control is not None:
            self.counts = self._adopt(members.steps, self.device)

        elements = _words([p.numel() for p in self.local_params])
        self._empty = [i for i, p in enumerate(self.local_params) if p.numel() == 0]
        self._blocks = _block_map(elements, _kernels.BLOCK).to(self.device)
        self._count_of_programs = self._blocks.shape[0]
        self._lay_out(elements)
        nothing = torch.empty(0, device=self.device)
        self._values = nothing if control is None else control.values[self.device]
        self._make_starts(members, control)

    def _lay_out(self, elements: Tensor) -> None:
        count, rows = len(self.params), len(self._rows_of)
        # all even, so that each part begins at a multiple of 16 bytes
        widths = (_WORDS, _CONSTANTS // 2, _EXPONENTS, 2, _FACTORS // 2)
        sizes = [
            width * (rows if part in (_AT_CONSTANTS, _AT_EXPONENTS) else count)
            for part, width in enumerate(widths)
        ]
        self._begin = [0, *accumulate(sizes)]
        self._host = torch.zeros(self._begin[-1], dtype=torch.int64, device="cpu")
        self._sender = (_Ring if self._on_cuda else _Sender)(self._host, self.device)
        parts = [
            [block[b : b + size] for b, size in zip(self._begin[:-1], sizes, strict=True)]
            for block in (self._host, self._sender.sent)
        ]
        self._host_table = parts[0][0].view(count, _WORDS)
        self._host_constants = parts[0][1].view(torch.float32).view(rows, _CONSTANTS)
        self._host_exponents = parts[0][2].view(torch.float64).view(rows, _EXPONENTS)
        self._host_entries = parts[0][3].view(count, 2)
        self._host_factors = parts[0][4].view(torch.float32)
        self._table, self._constants, self._exponents, self._entries, self._factors = parts[1]
        self._constants = self._constants.view(torch.float32)
        self._exponents = self._exponents.view(torch.float64)
        self._factors = self._factors.view(torch.float32)

        self._host_table[:, 0] = _words(self._addresses[:count])
        for column, row in enumerate(self.states.values()):
            addresses = [0 if t is None else t.data_ptr() for t in row]
            self._host_table[:, _STATES + column] = _words(addresses)
        self._host_table[:, _ELEMENTS] = elements
        self._host_table[:, _GROUP] = _words(self._row_of)
        blocks = (elements + _kernels.BLOCK - 1) // _kernels.BLOCK
        self._host_table[:, _FIRST] = blocks.cumsum(0) - blocks

        self._dirty = 0  # the first part of the block that has to be sent
        self._grads: list[int] = []
        self._factor_rows: list[int] = []
        self._keys: list[tuple[int, float]] = []
        self._rates: list[Any] = []
        self._device_rates: list[tuple[int, Tensor]] = []
        self._kinds: list[int] = []  # for each parameter, the first group with equal factors
        self._distinct: list[int] = []  # these groups, once each
        self._even_rows: list[int] = []  # rows of factors while all steps are equal

    def _make_starts(self, members: Members, control: Control | None) -> None:
        """Prepare the launches: all that is passed to them stays where it is."""
        types = [self.local_params[0].dtype, members.grad_dtype]
        used = 0
        for slot, row in enumerate(self.states.values()):
            present = [t.dtype for t in row if t is not None]
            used |= bool(present) << slot
            types.append(present[0] if present else types[0])
        types += [types[0]] * (_SLOTS + 2 - len(types))
        names = ("P", "G", *(f"S{i}" for i in range(_SLOTS)))
        elements = {
            name: getattr(tl, str(dtype).removeprefix("torch."))
            for name, dtype in zip(names, types, strict=True)
        }
        count, programs = len(self.params), self._count_of_programs
        lamb = self._rule._rule == "lamb"
        sums = 2 * (lamb or self._cautious or self._adaptive)
        new = {"device": self.device, "dtype": torch.float32}
        self._sums = torch.zeros(max(1, count * sums), **new)
        self.sums = self._sums[: count * sums].view(-1, 2)
        self._partials = torch.zeros(max(1, programs * sums), **new)
        self._sender.buffers += [self._blocks, self._sums, self._partials]
        nothing = self._sums
        factors = self._factors
        if control is not None:
            factors = torch.zeros(count * _FACTORS, **new)

        self._updates: list[_Start] = []  # the launches of ``update`` that take factors

        def start(rule: str, partials: int, *, controlled: bool = control is not None) -> _Start:
            launch = _Start(
                _kernels.update,
                programs,
                [
                    *(self._table, self._entries, self._constants, factors, self._blocks),
                    *(self._sums, self._values if controlled else nothing, self._partials),
                    *(1.0, 0.0, 0.0),
                    *(elements[name] for name in names),
                    *(rule, used, self._coupled, self._cautious and rule == "adam"),
                    *(controlled, partials, _kernels.BLOCK, _kernels.TAIL),
                ],
                num_warps=_kernels.NUM_WARPS,
                maxnreg=_kernels.registers(used, cautious=self._cautious),
            )
            self._updates.append(launch)
            return launch

        self._measures: list[_Start] = []
        self._starts: list[_Start] = []
        first = "lamb_moments" if lamb else "agree" if self._cautious else ""
        if first:
            self._measures.append(start(first, 2))
            args = [self._table, self._partials, self._sums, _kernels.BLOCK, _CHUNK]
            self._measures.append(_Start(_kernels.tensor_sums, count, args))
        self._starts.append(start(self._rule._rule, 2 * self._adaptive))
        if control is None:
            return

        elements_of = self._host_table[:, _ELEMENTS]
        self._norm_blocks = _block_map(elements_of, _kernels.NORM_BLOCK).to(self.device)
        norms = max(1, self._norm_blocks.shape[0])
        self._norm_partials = torch.zeros(norms, **new)
        self._square = torch.zeros(1, dtype=torch.float64, device=self.device)
        self._estimates = torch.zeros(2, dtype=torch.float64, device=self.device)
        args = [
            *(self._table, self._entries, self._constants, factors, self._norm_blocks),
            *(self._sums, nothing, self._norm_partials, 1.0, 0.0, 0.0),
            *(elements[name] for name in names),
            *("norm", 0, False, False, False, 1, _kernels.NORM_BLOCK, _kernels.TAIL),
        ]
        norm = _Start(_kernels.update, self._norm_blocks.shape[0], args, num_warps=4)
        self._sender.buffers += [factors, self._norm_blocks, self._norm_partials, self._square]
        args = [self._norm_partials, self._square, norms, 1, _CHUNK]
        self._norm_starts = [norm, _Start(_kernels.total, 1, args, num_warps=8)]
        args = [self._partials, self._estimates, programs, 2, _CHUNK]
        self._total_estimates = _Start(_kernels.total, 2, args, num_warps=8)

        args = [
            *(self._table, self._entries, self._exponents, self.counts, self._values, factors),
            *(count, self._rule._factors_kind, 128),
        ]
        self._measures.insert(0, _Start(_kernels.advance, (count + 127) // 128, args))
        self._controlled = True

    _controlled = False

    def write(self, hypers: Hypers, grads: list[Tensor | None]) -> None:
        self._write_constants(hypers)
        steps = None if self._controlled else self._count(grads)
        self._write_entries(hypers, grads, steps)
        with self._here():
            self._sender.send(self._begin[self._dirty], self._used)
        self._dirty = _AT_FACTORS
        for row, rate in self._device_rates:  # read on the device: no synchronisation
            self._constants[row * _CONSTANTS].copy_(rate.reshape(()), non_blocking=True)

    def measure(self, hypers: Hypers, grads: list[Tensor | None], control: Control | None) -> None:
        with self._here():
            for start in self._measures:
                start()

    def run(self, hypers: Hypers, grads: list[Tensor | None], control: Control | None) -> None:
        with self._here():
            for start in self._starts:
                start()
        # the kernel knows addresses only: without this a graph that saved a parameter would not
        # notice that its value has changed
        written = self.params
        if not self._complete:
            written = [p for p, grad in zip(written, grads, strict=True) if grad is not None]
        increment_version(written)

    def square_norm(self, grads: list[Tensor | None]) -> Tensor:
        with self._here():
            for start in self._norm_starts:
                start()
        return self._square

    def estimate_sums(self) -> Tensor:
        """Give the two sums from which Prodigy's step size is estimated: ``(2,)``, float64."""
        with self._here():
            self._total_estimates()
        return self._estimates

    def _write_constants(self, hypers: Hypers) -> None:
        if hypers.changed or not self._kinds:
            groups = [hypers.groups[number] for number in self._rows_of]
            self._host_constants.copy_(_rows(map(self._rule._constants, groups), _CONSTANTS))
            first: dict[tuple[Any, ...], int] = {}
            kinds = [
                first.setdefault(
                    tuple(_hashable(group[key]) for key in self._rule._factors_of), number
                )
                for group, number in zip(groups, self._rows_of, strict=True)
            ]
            self._kinds = [kinds[row] for row in self._row_of]
            self._distinct = list(dict.fromkeys(self._kinds))
            rows = {kind: row for row, kind in enumerate(self._distinct)}
            alone = len(rows) == 1
            self._even_rows = [_ARGUMENTS if alone else rows[kind] for kind in self._kinds]
            self._rates = []
            if self._controlled:
                self._host_exponents.copy_(_rows(map(self._rule._exponents, groups), _EXPONENTS))
        rates = hypers.rates
        if len(self._rows_of) != len(rates):
            rates = [rates[number] for number in self._rows_of]
        if not _NUMBERS.issuperset(map(type, rates)):
            pairs = enumerate(rates)
            self._device_rates = [(i, r) for i, r in pairs if _is_tensor(r) and not r.is_cpu]
            rates = [float(r) if not _is_tensor(r) or r.is_cpu else 0.0 for r in rates]
        else:
            self._device_rates = []
        if rates != self._rates:
            self._host_constants[:, 0] = torch.frombuffer(array("f", rates), dtype=torch.float32)
            self._rates = list(rates)
            self._dirty = min(self._dirty, _AT_CONSTANTS)

    def _write_entries(
        self, hypers: Hypers, grads: list[Tensor | None], steps: list[float] | None
    ) -> None:
        """Write the addresses of the gradients and the factors of the step, where they changed."""
        try:
            addresses = list(map(Tensor.data_ptr, grads))  # pyrefly: ignore[bad-argument-type]
            complete = True
        except TypeError:  # a gradient is missing: address 0 makes the kernel pass it by
            addresses = [0 if grad is None else grad.data_ptr() for grad in grads]
            complete = False
        for i in self._empty:  # no memory, but a step to count
            if grads[i] is not None:
                addresses[i] = 16
        if addresses != self._grads:
            self._host_entries[:, 0] = _words(addresses)
            self._grads = addresses
            self._dirty = min(self._dirty, _AT_ENTRIES)
        self._used = self._begin[_AT_FACTORS]
        self._complete = complete
        if steps is None:
            if not self._factor_rows:
                self._factor_rows = list(range(len(grads)))
                self._host_entries[:, 1] = _words(self._factor_rows)
                self._dirty = min(self._dirty, _AT_ENTRIES)
            return
        if complete and steps.count(steps[0]) == len(steps):
            rows = self._even_rows
            keys = [(kind, steps[0]) for kind in self._distinct]
        else:
            numbers: dict[tuple[int, float], int] = {}
            rows = [
                0 if grad is None else numbers.setdefault((kind, step), len(numbers))
                for grad, kind, step in zip(grads, self._kinds, steps, strict=True)
            ]
            keys = list(numbers)
        if rows is not self._factor_rows and rows != self._factor_rows:
            self._host_entries[:, 1] = _words(rows)
            self._dirty = min(self._dirty, _AT_ENTRIES)
        self._factor_rows, self._keys = rows, keys
        factors = [self._rule._factors(hypers.groups[kind], step) for kind, step in keys]
        if rows and rows[0] == _ARGUMENTS:
            for start in self._updates:
                start.args[_FACTOR_ARGUMENTS] = factors[0][:3]
        elif factors:
            values = array("f", chain.from_iterable(factors))
            self._host_factors[: len(values)] = torch.frombuffer(values, dtype=torch.float32)
            self._used += (len(values) + 1) // 2

    _complete = False
    _used = 0

    def _here(self) -> torch.cuda.device | nullcontext[None]:
        return _on(self.device)


class _Start:
    """A launch with arguments that stay the same, but for numbers among ``args``.

    The first goes through Triton's dispatcher, which compiles the kernel; the others start the
    compiled kernel, which saves about half of the host's time.
    """

    def __init__(self, kernel: Any, programs: int, args: list[Any], **options: Any) -> None:
        self._kernel = kernel
        self._programs = programs
        self.args = args
        self._options = options
        self._again: Callable[..., None] | None = None

    def __call__(self) -> None:
        if self._again is not None:
            self._again(*self.args)
        elif self._programs:
            grid = (self._programs, 1, 1)
            compiled = self._kernel[grid](*self.args, **self._options)
            if compiled is not None:  # the interpreter has nothing to give
                self._again = compiled[grid]


def _on(device: torch.device) -> torch.cuda.device | nullcontext[None]:
    """Make a device the current one: Triton launches there, whatever it is given."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)


def decide(square: Tensor, values: Tensor) -> None:
    """Start the kernel ``decide``."""
    start: Any = _kernels.decide
    with _on(values.device):
        start[(1,)](square, values)


def estimate(sums: Tensor, values: Tensor) -> None:
    """Start the kernel ``estimate``."""
    start: Any = _kernels.estimate
    with _on(values.device):
        start[(1,)](sums, values, 1.0 / D0)


def _hashable(option: Any) -> Any:
    return tuple(option) if isinstance(option, list) else option


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _rows(rows: Iterable[tuple[float, ...]], width: int) -> Tensor:
    """Rows of numbers, filled up with zeros: ``(rows, width)`` in float64."""
    numbers = array("d", chain.from_iterable((*r, *[0.0] * (width - len(r))) for r in rows))
    return torch.frombuffer(numbers, dtype=torch.float64).view(-1, width)


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
    """Copies parts of a host tensor to where the kernels read it."""

    def __init__(self, host: Tensor, device: torch.device) -> None:
        self._host = host
        self.sent = torch.empty_like(host, device=device)
        self.buffers: list[Tensor] = []  # what the launches use beside the tensors themselves

    def send(self, first: int, last: int) -> None:
        if first < last:
            self.sent[first:last].copy_(self._host[first:last])


class _Ring(_Sender):
    """Copies to the device without waiting, through a ring of pinned buffers.

    A buffer is written again only after its copy has finished. The launches and copies of a stream
    follow each other; after a change of streams the new one waits for the old one.
    """

    def __init__(self, host: Tensor, device: torch.device) -> None:
        super().__init__(host, device)
        self._ring = [torch.empty_like(host, pin_memory=True) for _ in range(_RING)]
        self._done = [torch.cuda.Event() for _ in range(_RING)]
        self._turn = 0
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._handle: int | None = None
        self.buffers.append(self.sent)

    def send(self, first: int, last: int) -> None:
        active: Any = driver.active
        handle = active.get_current_stream(self._device.index)
        if handle != self._handle:
            self._change_stream()
            self._handle = handle
        if first >= last:
            return
        done = self._done[self._turn]
        done.synchronize()
        pinned = self._ring[self._turn][first:last]
        pinned.copy_(self._host[first:last])
        self.sent[first:last].copy_(pinned, non_blocking=True)
        done.record(self._stream)
        self._turn = (self._turn + 1) % _RING

    def _change_stream(self) -> None:
        stream = torch.cuda.current_stream(self._device)
        if self._stream is not None:
            stream.wait_stream(self._stream)  # its last launch may still read `sent`
            for buffer in self.buffers:  # freed with the plan, but not used again too early
                buffer.record_stream(stream)
        self._stream = stream
