"""Which tensors a step updates with which call, kept from step to step while it stays true."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from operator import is_, is_not
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from torsh_optim._control import Control, Scaler
from torsh_optim._layout import Layout
from torsh_optim._options import Group
from torsh_optim._shards import Axes, Spread, is_spread, local

_present = partial(is_not, None)


@dataclass(frozen=True)
class Hypers:
    """Hyper-parameters of a step.

    Attributes:
        groups: The optimizer's parameter groups.
        changed: Whether an option other than the learning rate may have changed.
        rates: Learning rate of each group.
    """

    groups: list[Group]
    changed: bool
    rates: list[Any]


@dataclass(frozen=True)
class Members:
    """Parameters that one call can update, and all that belongs to them.

    Attributes:
        indices: Positions of the parameters in the optimizer.
        params: Parameters on one device, of one element type.
        states: State tensors, a list for each name in the order of the launch table; None where a
            parameter has no such state.
        steps: Step counters, 0-d.
        group_of: Number of the group of each parameter.
        grad_dtype: Element type of the gradients.
        axes: Over which processes the parameters are cut, if that matters for a sum; else None.
    """

    indices: list[int]
    params: list[Tensor]
    states: dict[str, list[Tensor | None]]
    steps: list[Tensor]
    group_of: list[int]
    grad_dtype: torch.dtype
    axes: Axes | None


class Bucket:
    """Tensors updated by one call: same implementation, device and element types.

    Args:
        members: The tensors.
        any_layout: Take gradients as they are, whatever their memory layout.
    """

    has_kernels = False  # whether it leaves what it computes on the device
    sums: Tensor  # (tensors, 2)

    def __init__(self, members: Members, *, any_layout: bool = False) -> None:
        self.indices = members.indices
        self.group_of = members.group_of
        self.grad_dtype = members.grad_dtype
        self.axes = members.axes
        self._is_spread = any(map(is_spread, members.params))
        self.params = members.params
        self.states = {
            name: [None if state is None else local(state) for state in row]
            for name, row in members.states.items()
        }
        self.device = local(members.params[0]).device
        self._any_layout = any_layout
        states = [t for row in members.states.values() for t in row if t is not None]
        self._kept = [*members.params, *states]
        self._addresses = list(map(Tensor.data_ptr, self._whole(self._kept)))
        self.local_params = self._whole(members.params)
        self._param_layout = Layout(self.local_params)
        self._grad_layout: Layout | None = None
        self.counts = self._adopt(members.steps, torch.device("cpu"))

    def _whole(self, tensors: list[Tensor]) -> list[Tensor]:
        return list(map(local, tensors)) if self._is_spread else tensors

    def _adopt(self, steps: list[Tensor], device: torch.device) -> Tensor:
        """Lay the step counters into one tensor, so that one addition advances all.

        The 0-d tensors in the state stay the same objects; only their memory becomes a view.
        """
        self.steps = steps
        if len({step.device for step in steps}) == 1:  # on a device: without a wait for each
            counts = torch.stack([step.float() for step in steps]).to(device)
        else:
            numbers = [float(step) for step in steps]
            counts = torch.tensor(numbers, dtype=torch.float32, device=device)
        for step, view in zip(steps, counts.unbind(), strict=True):
            step.data = view
        return counts

    def collect(self, grads: list[Tensor | None]) -> list[Tensor | None] | None:
        """Give the gradients in the memory layout of their parameters.

        Args:
            grads: This bucket's gradients, of DTensors the local part; None where a parameter has
                none.

        Returns:
            The gradients, with a copy in place of each that is laid out differently; or None if the
            bucket no longer fits: tensors moved or changed shape, layout or type.
        """
        params = self._whole(self.params)
        if (
            list(map(Tensor.data_ptr, self._whole(self._kept))) != self._addresses
            or not self._param_layout.matches(params)  # `param.data = param.data.t()`
        ):
            return None
        if self._grad_layout is not None and self._grad_layout.matches(grads):
            return grads
        collected = list(grads)
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            if grad is None:
                continue
            if (
                grad.layout is not torch.strided
                or is_spread(grad)
                or grad.dtype != self.grad_dtype
                or grad.shape != param.shape
                or grad.device != param.device
            ):
                return None
            if not self._any_layout and (grad.stride() != param.stride() or grad.is_neg()):
                collected[i] = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
        present = [grad for grad in collected if grad is not None]
        if len(present) == len(params) and all(map(is_, present, grads)):
            self._grad_layout = Layout(present)
        return collected

    def run(self, hypers: Hypers, grads: list[Tensor | None], control: Control | None) -> None:
        """Update the parameters that have a gradient.

        Args:
            hypers: Hyper-parameters of this step.
            grads: What ``collect`` returned.
            control: Norm of the gradients and what follows from it; None if it does not matter.
        """
        raise NotImplementedError

    def write(self, hypers: Hypers, grads: list[Tensor | None]) -> None:
        """Get ready for this step, before the norm of the gradients is taken."""

    def measure(self, hypers: Hypers, grads: list[Tensor | None], control: Control | None) -> None:
        """Take the sums over each tensor, ``sums``, that the update needs; may begin with it."""

    def square_norm(self, grads: list[Tensor | None]) -> Tensor:
        """Give the sum of the squares of all gradients: 0-d, float64, on this bucket's device."""
        present = [grad for grad in grads if grad is not None]
        if not present:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        # the norm of a 16-bit tensor would be rounded to its type, and overflow in float16
        wide = torch.float32 if self.grad_dtype.itemsize == 2 else None
        norms = torch._foreach_norm(present, 2, dtype=wide)
        return torch.stack([norm.double() for norm in norms]).square().sum()

    def estimate_sums(self) -> Tensor | None:
        """Give the sums from which Prodigy's step size is estimated: ``(2,)``; None if no step."""
        raise NotImplementedError

    def _count(self, grads: list[Tensor | None]) -> list[float]:
        """Count the step of each parameter with a gradient; give all counts."""
        if all(map(_present, grads)):
            self.counts.add_(1.0)
        else:
            taken = [float(grad is not None) for grad in grads]
            self.counts.add_(torch.tensor(taken, dtype=torch.float32, device="cpu"))
        return self.counts.tolist()


@dataclass(frozen=True)
class Batch:
    """Tensors of one group for an update by torch functions.

    Attributes:
        group: Their group.
        params: Parameters with a gradient; of DTensors the local part.
        grads: Their gradients, to be multiplied by ``scale``.
        states: State tensors, a list for each name that the group uses.
        steps: Step counters.
        numbers: Their values.
        scale: Factor of the gradients.
        control: Where the estimates of the whole optimizer are kept.
        sums: What the optimizer's ``_measure`` gave, over whole tensors.
    """

    group: Group
    params: list[Tensor]
    grads: list[Tensor]
    states: dict[str, list[Tensor]]
    steps: list[Tensor]
    numbers: list[float]
    scale: float
    control: Control | None
    sums: list[list[float]]

    def scaled_grads(self) -> list[Tensor]:
        """Give the gradients times ``scale``; those of the parameters are not changed."""
        return self.grads if self.scale == 1.0 else list(torch._foreach_mul(self.grads, self.scale))


class GroupBucket(Bucket):
    """Parameters of one group, updated by a function over lists of tensors."""

    def __init__(
        self,
        members: Members,
        update: Callable[[Batch], Tensor | None],
        measure: Callable[[Batch], Tensor | None] | None = None,
        *,
        any_layout: bool,
    ) -> None:
        super().__init__(members, any_layout=any_layout)
        self._update = update
        self._measure = measure
        self._batch: Batch | None = None
        self._estimates: Tensor | None = None
        self.sums = torch.zeros(len(self.params), 2, dtype=torch.float64, device=self.device)
        present = {name: [t for t in row if t is not None] for name, row in self.states.items()}
        self._used = {name: row for name, row in present.items() if row}

    def measure(self, hypers: Hypers, grads: list[Tensor | None], control: Control | None) -> None:
        self._keep = keep = [i for i, grad in enumerate(grads) if grad is not None]
        self._batch = None
        if self._measure is not None:
            self.sums.zero_()
        scale = 1.0 if control is None else control.scale(self.device)
        if not keep or scale is None:
            return
        numbers = self._count(grads)
        params = [self.local_params[i] for i in keep]
        self._batch = Batch(
            hypers.groups[self.group_of[0]],
            params,
            [grad for grad in grads if grad is not None],
            {name: [row[i] for i in keep] for name, row in self._used.items()},
            [self.steps[i] for i in keep],
            [numbers[i] for i in keep],
            scale,
            control,
            [],
        )
        found = None if self._measure is None else self._measure(self._batch)
        if found is not None:
            self.sums[keep] = found

    def run(self, hypers: Hypers, grads: list[Tensor | None], control: Control | None) -> None:
        batch, self._batch, self._estimates = self._batch, None, None
        if batch is None:
            return
        keep = self._keep
        if self._measure is not None:
            batch = replace(batch, sums=self.sums[keep].tolist())
        self._estimates = self._update(batch)
        if not self._any_layout:  # torch's fused kernels do not tell autograd what they wrote
            increment_version([self.params[i] for i in keep])

    def estimate_sums(self) -> Tensor | None:
        return self._estimates


class Plan:
    """The buckets of a step, and the check that they still describe the optimizer.

    Args:
        params: All parameters in the order of the groups.
        buckets: Buckets over the members, the parameters that have state.
        states: The optimizer's state.
        sizes: Number of parameters of each group.
        control: What the norm of the gradients decides, if it is wanted.
        spread: How the parameters are spread over processes.
        shares: Whether updates need sums over whole tensors.
    """

    def __init__(
        self,
        params: list[Tensor],
        buckets: list[Bucket],
        states: dict[Tensor, dict[str, Any]],
        sizes: list[int],
        control: Control | None,
        spread: Spread,
        *,
        shares: bool,
    ) -> None:
        self.buckets = buckets
        self.spread = spread
        self._shares = shares
        self._params = params
        self._sizes = sizes
        self._control = control
        self._values = list(chain.from_iterable(map(dict.values, states.values())))
        members = list(chain.from_iterable(bucket.indices for bucket in buckets))
        self._idle = sorted(set(range(len(params))) - set(members))
        self._whole = len(buckets) == 1 and members == list(range(len(params)))

    def matches(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        states: dict[Tensor, dict[str, Any]],
        sizes: list[int],
    ) -> bool:
        """Whether parameters, state tensors and groups are still those of this plan."""
        values = list(chain.from_iterable(map(dict.values, states.values())))
        return (
            len(params) == len(self._params)
            and len(values) == len(self._values)
            and all(map(is_, params, self._params))
            and all(map(is_, values, self._values))
            and sizes == self._sizes
            and all(grads[i] is None for i in self._idle)
        )

    def run(self, hypers: Hypers, grads: list[Tensor | None], scaler: Scaler) -> bool:
        """Take a step with all buckets.

        Args:
            hypers: Hyper-parameters of this step.
            grads: Gradients of all parameters, in the order of the groups; of DTensors the local
                part.
            scaler: What ``GradScaler`` handed over.

        Returns:
            False, with nothing changed, if a bucket no longer fits its tensors.
        """
        collected: list[list[Tensor | None]] = []
        for bucket in self.buckets:
            mine = bucket.collect(grads if self._whole else [grads[i] for i in bucket.indices])
            if mine is None:
                return False
            collected.append(mine)
        for bucket, mine in zip(self.buckets, collected, strict=True):
            bucket.write(hypers, mine)
        if self._control is not None:
            self._control.decide(self.buckets, collected, hypers.groups[0], scaler, self.spread)
        for bucket, mine in zip(self.buckets, collected, strict=True):
            bucket.measure(hypers, mine, self._control)
        if self._shares:
            self.spread.share(self.buckets)
        for bucket, mine in zip(self.buckets, collected, strict=True):
            bucket.run(hypers, mine, self._control)
        if self._control is not None:
            self._control.finish(self.buckets, hypers.groups[0], self.spread)
        return True
