"""Compressed gradients for DistributedDataParallel."""

import hashlib
import importlib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from torsh_dist import _codec, _runtime
from torsh_dist._lane import Lane
from torsh_dist._methods import Cast, Int8
from torsh_dist._wire import Layout, coded_bytes, plan

logger = logging.getLogger(__name__)

Method = Int8 | Cast

_VERSION = 1


@dataclass(frozen=True)
class CompressionStats:
    """What compression did so far, on this rank.

    Attributes:
        steps: backward passes that exchanged gradients.
        bytes_sent: bytes of gradients handed to collectives for other ranks, counted there.
        bytes_exchange: the part sent in the first phase, the all-to-all.
        bytes_gather: the part sent in the second phase, the all-gather.
        bytes_uncompressed: bytes a ring all-reduce of the same gradients would have sent.
        ratio: ``bytes_sent / bytes_uncompressed``; 1.0 when nothing was sent.
        residual_norm: Euclidean norm of what this rank still owes; 0.0 without error feedback.
    """

    steps: int
    bytes_sent: int
    bytes_exchange: int
    bytes_gather: int
    bytes_uncompressed: int
    ratio: float
    residual_norm: float


class Compression:
    """Made by :func:`compress`; holds the error feedback and the counters."""

    def __init__(
        self,
        names: Mapping[Tensor, str],
        method: Method | None,
        lane: Lane | None,
        min_numel: int,
        warmup: int,
    ) -> None:
        self.method = method
        self.min_numel = min_numel
        self.warmup = warmup
        self._names = names
        self._lane = lane
        self._rank = lane.rank if lane else 0
        self._world_size = lane.world_size if lane else 1
        self._codec = _int8_codec(lane.device) if lane and isinstance(method, Int8) else None
        # Per parameter the stretches of the residuals below, or one loaded before its bucket came.
        self._owed: dict[str, list[Tensor]] = {}
        self._plans: dict[int, tuple[tuple[int, ...], bool, Layout, Tensor, Tensor]] = {}
        # Of the backward pass under way: residuals with their copies from before, and the norm.
        self._undo: list[tuple[Tensor, Tensor]] = []
        self._norm = torch.zeros(())
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._steps = 0
        self._bytes_uncompressed = 0.0

    def stats(self) -> CompressionStats:
        """Return the counters of this rank; waits for the exchanges under way."""
        exchange = gather = 0
        if self._lane is not None:
            self._lane.drain()
            exchange, gather = self._lane.sent["exchange"], self._lane.sent["gather"]
        sent = exchange + gather
        ring = round(self._bytes_uncompressed)
        pieces = [piece for one in self._owed.values() for piece in one]
        norms = [torch.linalg.vector_norm(piece) for piece in pieces]
        owed = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
        ratio = sent / ring if ring else 1.0
        return CompressionStats(self._steps, sent, exchange, gather, ring, ratio, owed)

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state: what it owes per parameter name, and the step.

        Ranks differ, so save one per rank. Plain types and tensors only.
        """
        if self._lane is not None:
            self._lane.drain()
        return {
            "version": _VERSION,
            "method": repr(self.method),
            "rank": self._rank,
            "world_size": self._world_size,
            "steps": self._steps,
            "residual": {name: torch.cat(self._owed[name]) for name in sorted(self._owed)},
        }

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Take up a saved state.

        With the world size it was saved at, training goes on bit for bit. At another world size
        pass the states of all old ranks: each new rank then owes their mean, which leaves the
        correction that is still to reach the averaged gradient as it was.

        Args:
            state: this rank's own state, or a sequence with the states of all ranks.

        Raises:
            ValueError: the state is of another format, method, model, rank or world size.
        """
        states = [state] if isinstance(state, Mapping) else list(state)
        for one in states:
            self._check(one)
        worlds = {one["world_size"] for one in states}
        ranks = sorted(one["rank"] for one in states)
        if worlds == {self._world_size}:
            mine = [one for one in states if one["rank"] == self._rank]
            if len(mine) != 1:
                raise ValueError(
                    f"state is of rank(s) {ranks} and this is rank {self._rank}: what a rank owes "
                    f"is its own; pass this rank's state, or those of all ranks"
                )
            residual = mine[0]["residual"]
        elif len(worlds) == 1 and ranks == list(range(next(iter(worlds)))):
            names = {name for one in states for name in one["residual"]}
            residual = {
                name: torch.stack([one["residual"][name] for one in states]).mean(0)
                for name in names
                if all(name in one["residual"] for one in states)
            }
        else:
            raise ValueError(
                f"state is of rank(s) {ranks} of world size(s) {sorted(worlds)}, and the world "
                f"size is now {self._world_size}; pass a list with the states of all old ranks, "
                f"or start with none to drop what they owed"
            )
        if self._lane is not None:
            self._lane.drain()
        self._steps = int(states[0]["steps"])
        if self._lane is None:
            return
        for name in self._owed.keys() - residual.keys():
            for piece in self._owed[name]:
                piece.zero_()
        for name, owed in residual.items():
            new = owed.to(self._lane.device, torch.float32, copy=True)
            _fill(self._owed.setdefault(name, [new]), new)

    def _check(self, state: Mapping[str, Any]) -> None:
        keys = {"version", "method", "rank", "world_size", "steps", "residual"}
        if set(state) != keys:
            raise ValueError(f"state has keys {sorted(state)}; expected {sorted(keys)}")
        if state["version"] != _VERSION:
            raise ValueError(f"state has version {state['version']}; this release reads {_VERSION}")
        if self._world_size > 1 and state["method"] != repr(self.method):
            raise ValueError(f"state is of method {state['method']}, not of {self.method!r}")
        numels = {name: param.numel() for param, name in self._names.items()}
        for name, owed in state["residual"].items():
            if numels.get(name) != owed.numel():
                raise ValueError(
                    f"state: {name!r} has {owed.numel()} values, the model has "
                    f"{numels.get(name, 'no such parameter')}"
                )

    def _hook(self, lane: Lane, bucket: dist.GradBucket) -> Future[Tensor]:
        """Queue one bucket; DDP calls this in the same order on every rank."""
        buffer = bucket.buffer()
        params = tuple(bucket.parameters())
        warm = self._steps < self.warmup
        index = bucket.index()
        if bucket.is_last():
            self._steps += 1
        share = 2 * (lane.world_size - 1) / lane.world_size
        self._bytes_uncompressed += share * buffer.numel() * buffer.element_size()
        job = partial(self._average, lane, index, params, warm, bucket.is_last(), buffer)
        return lane.submit(f"the average of gradient bucket {index}", job)

    def _average(
        self,
        lane: Lane,
        index: int,
        params: tuple[Tensor, ...],
        warm: bool,
        last: bool,
        bucket: Tensor,
    ) -> Tensor:
        """Run both phases for one bucket; runs on the lane."""
        layout, residual, before = self._plan(index, params, warm, bucket)
        sent, received = self._rows(layout)
        if index == 0:
            self._undo.clear()
            self._norm = torch.zeros((), device=bucket.device)
        if layout.groups:
            assert self._codec is not None
            self._undo.append((residual, before.copy_(residual)))
            self._codec.encode(bucket, residual, sent, layout, lane.rank)
        for section in layout.plain:
            _codec.pack(bucket, sent, section)
        lane.exchange(received, sent)
        if layout.groups:
            assert self._codec is not None
            self._codec.reduce(residual, received, layout, lane.rank)
        for section in layout.plain:
            _codec.average(received, section, lane.rank)
        lane.gather(sent, received[lane.rank])
        if layout.groups:
            assert self._codec is not None
            self._codec.decode(bucket, sent, layout)
        for section in layout.plain:
            _codec.unpack(bucket, sent, section)
        if self._codec is not None:
            self._settle(bucket, last)
        return bucket

    def _settle(self, bucket: Tensor, last: bool) -> None:
        """Take back what a backward pass did to the residuals if its average is not finite.

        Such an update is discarded, so the debts paid in it were not paid and the rounding errors
        are of a gradient that nobody applied. All ranks see the same average and decide alike.
        The norm, not each value: that of finite gradients may overflow, and `Step` skips it too.
        """
        wide = torch.promote_types(bucket.dtype, torch.float32)
        norm = torch.linalg.vector_norm(bucket, dtype=wide).to(torch.float32)
        self._norm = torch.linalg.vector_norm(torch.stack([self._norm, norm]))
        if not last:
            return
        finite = self._norm.isfinite()
        # Elsewhere the host would have to wait for the flag.
        if not (finite.is_cpu and finite):
            for residual, before in self._undo:
                torch.where(finite, residual, before, out=residual)

    def _plan(
        self, index: int, params: tuple[Tensor, ...], warm: bool, bucket: Tensor
    ) -> tuple[Layout, Tensor, Tensor]:
        """Return the bucket's layout, its residual and the space for a copy of that.

        They are made anew when DDP has rebuilt its buckets.
        """
        key = tuple(map(id, params))
        known = self._plans.get(index)
        if known is not None and known[:2] == (key, warm):
            return known[2:]
        layout = plan(
            [(self._names[one], one.numel(), self._travels_as(one, warm)) for one in params],
            self._world_size,
            self.method.group_size if isinstance(self.method, Int8) else 256,
        )
        residual = torch.zeros(
            layout.world_size, layout.codes.width, dtype=torch.float32, device=bucket.device
        )
        for run in layout.codes.runs:
            pieces = [residual[row, columns] for row, columns, _ in run.pieces()]
            if run.name in self._owed:
                _fill(pieces, torch.cat(self._owed[run.name]))
            self._owed[run.name] = pieces
        before = torch.empty_like(residual)
        self._plans[index] = (key, warm, layout, residual, before)
        return layout, residual, before

    def _travels_as(self, param: Tensor, warm: bool) -> torch.dtype:
        dtype = param.dtype
        if warm or param.numel() < self.min_numel or dtype not in _COMPRESSIBLE:
            return dtype
        if isinstance(self.method, Cast):
            return self.method.dtype if dtype == torch.float32 else dtype
        assert isinstance(self.method, Int8)
        coded = coded_bytes(param.numel(), self._world_size, self.method.group_size)
        return torch.int8 if coded < param.numel() * dtype.itemsize else dtype

    def _rows(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Return the two row buffers, shared by all buckets: the lane has one job at a time."""
        size = layout.world_size * layout.row_bytes
        if self._workspace.numel() < 2 * size:
            assert self._lane is not None
            self._workspace = torch.zeros(2 * size, dtype=torch.uint8, device=self._lane.device)
        shape = (layout.world_size, layout.row_bytes)
        return self._workspace[:size].view(shape), self._workspace[size : 2 * size].view(shape)


_COMPRESSIBLE = (torch.float32, torch.bfloat16, torch.float16)


def compress(
    model: DistributedDataParallel,
    method: Method | None,
    *,
    min_numel: int = 1024,
    warmup: int = 0,
) -> Compression:
    """Send a DDP model's gradients compressed; the training loop stays as it is.

    Worth it where the link is slow against the arithmetic: around 100 Mbit/s yes, at 1 Gbit/s
    seldom, between GPUs of one machine no. Call it on every rank alike, after wrapping the model
    and before the first backward. Each bucket is averaged in two phases, all-to-all and
    all-gather, on a lane of its own beside the backward pass; all ranks decode the same bytes, so
    their replicas stay equal bit for bit. A NaN or an infinity arrives as NaN or infinity on every
    rank. If the norm of the averaged gradient is not finite, the error feedback is put back to
    what it was before that backward pass; :class:`Step` skips such an update, and a loop of your
    own should too. ``Int8`` keeps 8 bytes per compressed value for this: two fp32 buffers.

    With one process or ``method=None`` nothing is changed, and the log says so.

    Args:
        model: the wrapped model; gradients in fp32, bf16 or fp16 are compressed, others not.
        method: :class:`Int8`, :class:`Cast` or None.
        min_numel: parameters with fewer values than this travel uncompressed: biases and norms,
            which are a small share of the bytes and tolerate rounding least. So do those whose
            codes, padded to a group per rank, would take more bytes than they do. >= 0.
        warmup: first backward passes that are sent uncompressed, >= 0.

    Returns:
        A handle with ``stats()``, ``state_dict()`` and ``load_state_dict()``.

    Raises:
        TypeError: ``model`` is not wrapped in DistributedDataParallel.
        RuntimeError: the model has a communication hook already.
        ValueError: the ranks disagree about the model, the method or the options.

    Example:
        >>> from torsh_dist import init
        >>> with init("cpu"):
        ...     model = DistributedDataParallel(torch.nn.Linear(64, 64))
        ...     compress(model, Int8()).stats().bytes_sent  # one process: nothing to send
        0

    Reference:
        Two phases as in Alistarh et al., "QSGD", 2017, arXiv 1610.02132 and later systems; error
        feedback as in Seide et al., "1-bit stochastic gradient descent", Interspeech 2014.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"model is a {type(model).__name__}; wrap it first: "
            f"compress(DistributedDataParallel(model), {method!r})"
        )
    if method is not None and not isinstance(method, Int8 | Cast):
        raise TypeError(f"method={method!r} is not Int8(...), Cast(...) or None")
    for option, number in (("min_numel", min_numel), ("warmup", warmup)):
        if number < 0:
            raise ValueError(f"{option}={number} is negative; use 0 or more")
    group = model.process_group
    assert group is not None
    names = {param: name for name, param in model.module.named_parameters()}
    if method is None or dist.get_world_size(group) == 1:
        why = "method is None" if method is None else "one process has nobody to send to"
        logger.info("compress: %s; gradients travel as they are", why)
        return Compression(names, method, None, min_numel, warmup)
    device = next(iter(names)).device
    lane = Lane(group, device, _runtime.current_timeout())
    compression = Compression(names, method, lane, min_numel, warmup)
    shapes = [(name, tuple(one.shape), str(one.dtype)) for one, name in names.items()]
    text = repr((method, min_numel, warmup, shapes)).encode()
    prints = lane.agree(int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 1)
    odd = [rank for rank, one in enumerate(prints) if one != prints[0]]
    if odd:
        raise ValueError(
            f"compress: rank(s) {odd} have another model, method, min_numel or warmup than rank 0; "
            f"call it with the same arguments everywhere"
        )
    try:
        model.register_comm_hook(lane, compression._hook)
    except RuntimeError as error:
        raise RuntimeError(
            "model has a communication hook already; wrap the module anew and compress that once"
        ) from error
    return compression


def _fill(pieces: Sequence[Tensor], values: Tensor) -> None:
    sizes = [piece.numel() for piece in pieces]
    for piece, part in zip(pieces, values.split(sizes), strict=True):
        piece.copy_(part)


def _int8_codec(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is not None:
            return importlib.import_module("torsh_dist._kernels")
        logger.warning("compress: triton is not installed; Int8 runs in plain torch, slower")
    return _codec
