"""Which tensors a step updates with which call, kept from step to step while it stays true."""

from collections.abc import Callable
from functools import partial
from itertools import chain
from operator import attrgetter, is_, is_not
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

Group = dict[str, Any]

_dtype = attrgetter("dtype")
_shape = attrgetter("shape")
_taken = partial(is_not, None)


class Bucket:
    """Tensors updated by one call: same implementation, device and element types.

    Attributes:
        params: The parameters.
        states: State tensors, one list per name, each as long as ``params``.
        group_of: Number of the parameter group of each parameter.
        steps: Step counters of the parameters: 0-d views of one tensor of the plan.
    """

    def __init__(
        self,
        indices: list[int],
        params: list[Tensor],
        states: list[list[Tensor]],
        group_of: list[int],
        grad_dtype: torch.dtype,
    ) -> None:
        self.indices = indices
        self.params = params
        self.states = states
        self.group_of = group_of
        self.grad_dtype = grad_dtype
        self.steps: list[Tensor] = []
        self._kept = [*params, *chain.from_iterable(states)]
        self._addresses = list(map(Tensor.data_ptr, self._kept))
        self._dtypes = {params[0].dtype}
        self._shapes = list(map(_shape, params))
        contiguous = all(p.is_contiguous() for p in params)
        self._strides = None if contiguous else [p.stride() for p in params]

    def collect(self, grads: list[Tensor | None]) -> list[Tensor | None] | None:
        """Give the gradients in the memory layout of their parameters.

        Args:
            grads: This bucket's gradients; None where a parameter has none.

        Returns:
            The same list, with a copy in place of each gradient that is laid out differently; or
            None if the bucket no longer fits: tensors moved or changed shape, layout or type.
        """
        if list(map(Tensor.data_ptr, self._kept)) != self._addresses:
            return None
        if not self._all_fit(self.params, self._dtypes):  # `param.data = param.data.t()`
            return None
        if self._all_fit(grads, {self.grad_dtype}):
            return grads
        collected = list(grads)
        for i, (param, grad) in enumerate(zip(self.params, grads, strict=True)):
            if grad is None:
                continue
            if not self._takes(param, grad):
                return None
            if grad.stride() != param.stride() or grad.is_neg():
                collected[i] = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
        return collected

    def _all_fit(self, tensors: list[Any], dtypes: set[torch.dtype]) -> bool:
        """Whether all are there and laid out as the parameters were, at C speed."""
        try:
            if self._strides is None:
                same_layout = all(map(Tensor.is_contiguous, tensors))
            else:
                same_layout = list(map(Tensor.stride, tensors)) == self._strides
            same_shape = list(map(_shape, tensors)) == self._shapes
        except (TypeError, RuntimeError, AttributeError):  # None, or a sparse tensor
            return False
        return same_layout and same_shape and set(map(_dtype, tensors)) == dtypes

    def _takes(self, param: Tensor, grad: Tensor) -> bool:
        return (
            grad.layout is torch.strided
            and grad.dtype == self.grad_dtype
            and grad.shape == param.shape
        )

    def run(self, groups: list[Group], grads: list[Tensor | None], steps: list[float]) -> None:
        """Update the parameters that have a gradient.

        Args:
            groups: The optimizer's parameter groups.
            grads: What ``collect`` returned.
            steps: Number of this step for each parameter.
        """
        raise NotImplementedError


GroupUpdate = Callable[
    [Group, list[Tensor], list[Tensor], list[list[Tensor]], list[Tensor], list[float]], None
]


class GroupBucket(Bucket):
    """Parameters of one group, updated by a function over lists of tensors."""

    def __init__(
        self,
        indices: list[int],
        params: list[Tensor],
        states: list[list[Tensor]],
        group_of: list[int],
        grad_dtype: torch.dtype,
        update: GroupUpdate,
        *,
        any_layout: bool,
    ) -> None:
        self._update = update
        self._any_layout = any_layout
        super().__init__(indices, params, [] if any_layout else states, group_of, grad_dtype)
        self.states = states

    def collect(self, grads: list[Tensor | None]) -> list[Tensor | None] | None:
        if not self._any_layout:
            return super().collect(grads)
        if not self._all_fit(self.params, self._dtypes):
            return None
        for param, grad in zip(self.params, grads, strict=True):
            if grad is not None and not self._takes(param, grad):
                return None
        return grads

    def run(self, groups: list[Group], grads: list[Tensor | None], steps: list[float]) -> None:
        group = groups[self.group_of[0]]
        keep = [i for i, grad in enumerate(grads) if grad is not None]
        if not keep:
            return
        params = [self.params[i] for i in keep]
        self._update(
            group,
            params,
            [grad for grad in grads if grad is not None],
            [[tensors[i] for i in keep] for tensors in self.states],
            [self.steps[i] for i in keep],
            [steps[i] for i in keep],
        )
        if not self._any_layout:  # torch's fused kernels do not tell autograd what they wrote
            increment_version(params)


class Plan:
    """The buckets of a step, and the check that they still describe the optimizer.

    Args:
        params: All parameters in the order of the groups.
        buckets: Buckets over the members, the parameters that have state.
        states: The optimizer's state.
        options: What decides between buckets: options and sizes of the groups.
    """

    def __init__(
        self,
        params: list[Tensor],
        buckets: list[Bucket],
        states: dict[Tensor, dict[str, Any]],
        options: list[Any],
    ) -> None:
        self.buckets = buckets
        self._params = params
        self._options = options
        self._values = list(chain.from_iterable(map(dict.values, states.values())))
        members = list(chain.from_iterable(bucket.indices for bucket in buckets))
        self._idle = sorted(set(range(len(params))) - set(members))
        self._in_order = members == list(range(len(params)))
        self._counts = self._adopt([states[params[i]]["step"] for i in members])

    def _adopt(self, steps: list[Tensor]) -> Tensor:
        """Lay the step counters into one tensor, so that one addition advances all.

        The 0-d tensors in the state stay the same objects; only their memory becomes a view.
        """
        counts = torch.tensor([float(step) for step in steps], dtype=torch.float32, device="cpu")
        for step, view in zip(steps, counts.unbind(), strict=True):
            step.data = view
        remaining = iter(steps)
        for bucket in self.buckets:
            bucket.steps = [next(remaining) for _ in bucket.indices]
        return counts

    def matches(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        states: dict[Tensor, dict[str, Any]],
        options: list[Any],
    ) -> bool:
        """Whether parameters, state tensors and options are still those of this plan."""
        values = list(chain.from_iterable(map(dict.values, states.values())))
        return (
            len(params) == len(self._params)
            and len(values) == len(self._values)
            and all(map(is_, params, self._params))
            and all(map(is_, values, self._values))
            and options == self._options
            and all(grads[i] is None for i in self._idle)
        )

    def run(self, groups: list[Group], grads: list[Tensor | None]) -> bool:
        """Take a step with all buckets.

        Args:
            groups: The optimizer's parameter groups.
            grads: Gradients of all parameters, in the order of the groups.

        Returns:
            False, with nothing changed, if a bucket no longer fits its tensors.
        """
        collected: list[list[Tensor | None]] = []
        for bucket in self.buckets:
            whole = self._in_order and len(self.buckets) == 1
            mine = bucket.collect(grads if whole else [grads[i] for i in bucket.indices])
            if mine is None:
                return False
            collected.append(mine)
        steps = self._advance(collected)
        first = 0
        for bucket, mine in zip(self.buckets, collected, strict=True):
            bucket.run(groups, mine, steps[first : first + len(mine)])
            first += len(mine)
        return True

    def _advance(self, collected: list[list[Tensor | None]]) -> list[float]:
        taken = list(map(_taken, chain.from_iterable(collected)))
        if all(taken):
            self._counts.add_(1.0)
        else:
            self._counts.add_(torch.tensor(taken, dtype=torch.float32, device="cpu"))
        return self._counts.tolist()
