"""One update of a training loop, right at any number of processes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one update did; 0-d tensors on the model's device, the same on every rank.

    Attributes:
        loss: mean of the loss over all items of all ranks.
        grad_norm: Euclidean norm of the averaged gradient, before clipping.
        count: items of all ranks (rows, or what ``count`` counted).
        skipped: True if the gradient was not finite and nothing was updated.
    """

    loss: Tensor
    grad_norm: Tensor
    count: Tensor
    skipped: Tensor


class Step:
    """Forward, backward, clip and update; call it with a batch.

    Every rank calls it with its own share of the batch, and the update is that of one process
    with all shares: losses are weighted by the number of items, so ranks may have more or fewer
    of them, or none. Without a process group, or with one process, it takes the bare model.

    Reading a result (``float(result.loss)``) waits for the device, making one does not, with one
    exception: to leave out an update on CUDA the host must see the flag, unless the optimizer
    takes it on the device (``fused=True``). A skipped update changes neither parameters nor
    optimizer; the scheduler counts calls and goes on.

    Args:
        model: the model, wrapped in DistributedDataParallel when there are several processes.
        optimizer: over parameters of this model.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss over the batch's items, 0-d.
        accumulate: pieces to cut each batch into, >= 1; all but the last leave gradients where
            they are. A piece takes that much less memory, and the update stays the same.
        max_norm: clip the gradient to this norm, > 0; None does not clip.
        scheduler: advanced once per call.
        count: ``count(batch)`` returns how many items the mean of ``loss_fn`` is over, as a number
            or a 0-d tensor: the tokens that are not padding, say. By default the rows: the first
            dimension of the first tensor in the batch. A piece with none brings in nothing,
            whatever its loss, when the count is a number or on the CPU. A count on CUDA is not
            read, so there the loss must have a finite gradient at none: divide by
            ``count.clamp(min=1)``. ``F.cross_entropy`` with its ``ignore_index`` has one.

    Raises:
        ValueError: an argument is out of range, or the optimizer holds parameters the model lacks.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> step = Step(
        ...     model,
        ...     torch.optim.SGD(model.parameters(), lr=0.5),
        ...     lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        ... )
        >>> result = step((torch.ones(2, 1), torch.ones(2, 1)))  # gradient 2 x (0 - 1)
        >>> float(result.loss), float(result.grad_norm), model.weight.item()
        (1.0, 2.0, 1.0)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: Loss,
        *,
        accumulate: int = 1,
        max_norm: float | None = None,
        scheduler: LRScheduler | None = None,
        count: Callable[[Any], float | Tensor] | None = None,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"accumulate={accumulate} is not a number of pieces; use 1 or more")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm={max_norm} is not above 0; use None to leave out clipping")
        self._group: dist.ProcessGroup | None = None
        if isinstance(model, DistributedDataParallel):
            self._group = (
                model.process_group if dist.get_world_size(model.process_group) > 1 else None
            )
        elif dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"model is a bare {type(model).__name__} and there are {dist.get_world_size()} "
                f"processes: nothing would average its gradients; pass "
                f"DistributedDataParallel(model)"
            )
        known = {id(param) for param in model.parameters()}
        self._params = [param for group in optimizer.param_groups for param in group["params"]]
        strangers = [param for param in self._params if id(param) not in known]
        if strangers:
            raise ValueError(
                f"optimizer holds {len(strangers)} parameter(s) that model does not have, the "
                f"first of shape {tuple(strangers[0].shape)}; make it from model.parameters()"
            )
        if not self._params:
            raise ValueError("optimizer has no parameters; make it from model.parameters()")
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.accumulate = accumulate
        self.max_norm = max_norm
        self._loss_fn = loss_fn
        self._count = count or _rows
        self._device = self._params[0].device
        self._on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self._device)
        """Updates skipped so far: a 0-d tensor, the same on every rank."""

    def __call__(self, batch: Any) -> StepResult:
        """Train on one batch.

        Args:
            batch: this rank's share: a tensor, or tuples, lists and dicts of them. With
                ``accumulate`` every tensor is cut along its first dimension, 0-d tensors and other
                values go to each piece as they are.
        """
        self.optimizer.zero_grad(set_to_none=True)
        pieces = _cut(batch, self.accumulate)
        given = [self._count(piece) for piece in pieces]
        counts = [self._as_count(count) for count in given]
        total, pending = self._sum(torch.stack(counts).sum(), wait=False)
        loss = torch.zeros_like(total)
        for number, (piece, count) in enumerate(zip(pieces, counts, strict=True)):
            last = number == len(pieces) - 1
            none = _is_known_zero(given[number])
            with (
                nullcontext() if last else no_sync(self.model),
                _zero_gradients(self.model) if none else nullcontext(),
            ):
                mean = self._loss_fn(self.model, piece)
                if pending is not None:
                    pending.wait()
                    pending = None
                share = _share(count, total)
                # DDP divides by the number of ranks, so each brings in its share that many times.
                scale = share if self._group is None else share * dist.get_world_size(self._group)
                # The mean over nothing is NaN. This masks the value; its gradient may be 0 / 0.
                some = torch.where(count > 0, mean, 0.0)
                (some * scale.to(mean.dtype)).backward()
                loss += some.detach() * share
        loss, _ = self._sum(loss)
        norm, skipped = self._update()
        return StepResult(loss.to(norm.dtype), norm, total, skipped)

    def eval(self, batch: Any) -> Tensor:
        """Return the mean loss over all ranks' items of ``batch``, 0-d, without training on it.

        The model is in evaluation mode meanwhile. Every rank must call it equally often.
        """
        module = self.model.module if self._is_wrapped() else self.model
        assert isinstance(module, nn.Module)
        training = [part for part in module.modules() if part.training]
        count = self._as_count(self._count(batch))
        module.eval()
        try:
            with torch.no_grad():
                mean = self._loss_fn(module, batch)
        finally:
            for part in training:
                part.training = True
        both = torch.stack([torch.where(count > 0, mean.to(count.dtype), 0.0) * count, count])
        both, _ = self._sum(both)
        return _share(both[0], both[1]).to(mean.dtype)

    def _update(self) -> tuple[Tensor, Tensor]:
        grads = [param.grad for param in self._params if param.grad is not None]
        norm = get_total_norm(grads)
        if self.max_norm is not None:
            clip_grads_with_norm_(self._params, self.max_norm, norm)
        # All ranks hold the same averaged gradient, so all decide alike without asking.
        skipped = ~torch.isfinite(norm)
        self.skipped += skipped
        if self._on_device:
            flags = vars(self.optimizer)  # what torch.amp.GradScaler sets
            flags["found_inf"] = skipped.float()
            self.optimizer.step()
            del flags["found_inf"]
        elif not skipped:
            self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return norm, skipped

    def _is_wrapped(self) -> bool:
        return isinstance(self.model, DistributedDataParallel)

    def _as_count(self, count: float | Tensor) -> Tensor:
        if isinstance(count, Tensor):
            return count.detach().to(self._device, torch.float64, non_blocking=True)
        # A fill, not a copy from the host, which would wait for the device.
        return torch.full((), count, dtype=torch.float64, device=self._device)

    def _sum(self, value: Tensor, *, wait: bool = True) -> tuple[Tensor, dist.Work | None]:
        """Add up ``value`` over the ranks, in place."""
        if self._group is None:
            return value, None
        work = dist.all_reduce(value, group=self._group, async_op=not wait)
        return value, work


def no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Leave gradients unaveraged in backward passes inside; for a bare model, do nothing.

    The forward pass must be inside as well.

    Args:
        model: a model, wrapped in DistributedDataParallel or not.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> with no_sync(model):
        ...     model(torch.ones(1, 2)).sum().backward()
        >>> model.weight.grad.tolist()
        [[1.0, 1.0]]
    """
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


@contextmanager
def _zero_gradients(model: nn.Module) -> Iterator[None]:
    """Let backward passes inside bring zeros to every parameter they reach, also instead of NaN.

    Leaving the backward pass out would be less work, but DDP waits for every parameter.
    """
    params = [param for param in model.parameters() if param.requires_grad]
    handles = [param.register_hook(torch.zeros_like) for param in params]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_known_zero(count: float | Tensor) -> bool:
    """Tell whether there are no items, without waiting for a device: False if it has the count."""
    return not (isinstance(count, Tensor) and not count.is_cpu) and not count > 0


def _share(part: Tensor, total: Tensor) -> Tensor:
    """Return ``part / total``, and 0 for nothing of nothing."""
    return torch.where(total > 0, part / total, 0.0)


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return [tensor for value in batch.values() for tensor in _tensors(value)]
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return [tensor for value in batch for tensor in _tensors(value)]
    return []


def _rows(batch: Any) -> int:
    sized = [tensor for tensor in _tensors(batch) if tensor.dim()]
    if not sized:
        raise TypeError(
            f"batch is a {type(batch).__name__} without a tensor that has rows; pass "
            f"Step(..., count=) to say how many items it holds"
        )
    return sized[0].shape[0]


def _cut(batch: Any, pieces: int) -> list[Any]:
    """Cut a batch into up to ``pieces`` parts along the first dimension, never an empty one."""
    if pieces == 1:
        return [batch]
    sizes = {tensor.shape[0] for tensor in _tensors(batch) if tensor.dim()}
    if len(sizes) != 1:
        raise ValueError(
            f"accumulate={pieces} cuts batches along the first dimension, and the tensors of this "
            f"one have {sorted(sizes)} rows; give them equally many, or use accumulate=1"
        )
    rows = sizes.pop()
    # Fewer rows than pieces on one rank is no reason to fail there and hang the others.
    pieces = max(1, min(pieces, rows))
    edges = [rows * number // pieces for number in range(pieces + 1)]
    return [_part(batch, slice(*pair)) for pair in pairwise(edges)]


def _part(batch: Any, rows: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[rows] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {key: _part(value, rows) for key, value in batch.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        parts = [_part(value, rows) for value in batch]
        kind: Any = type(batch)
        return kind(*parts) if hasattr(batch, "_fields") else kind(parts)
    return batch
