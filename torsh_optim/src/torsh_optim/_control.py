"""The norm of all gradients, and what it decides: clipping, unscaling, skipping a step.

On CUDA everything stays on the device: no step waits for it.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torsh_optim._shards import Spread

if TYPE_CHECKING:
    from torsh_optim._plan import Bucket

_COEFFICIENT, _GO_ON, _NORM, _SKIPPED, _SCALE, _FOUND_INF, _D, _NUMERATOR = range(8)


@dataclass(frozen=True)
class Scaler:
    """What ``torch.amp.GradScaler`` hands to an optimizer that unscales by itself.

    Attributes:
        grad_scale: By which the gradients are multiplied; None if they are not.
        found_inf: Not 0 if a gradient is not finite; None if nobody has looked.
    """

    grad_scale: Tensor | None
    found_inf: Tensor | None


class Control:
    """What all parameters of an optimizer share in a step, on each of their devices.

    Attributes:
        values: Float32 ``(12,)`` for each device: factor of the gradients, 1 to go on or 0 to skip
            the step, norm of the gradients before clipping, steps skipped so far, scale of the
            gradients, whether a value is not finite, step size estimate (Prodigy), its numerator,
            largest norm, 1 to skip what is not finite, decay of the numerator, unused.
    """

    def __init__(self) -> None:
        self.values: dict[torch.device, Tensor] = {}
        self._lead = torch.device("cpu")
        self._written: dict[int, float] = {}
        self._square = torch.zeros(1, dtype=torch.float64, device="cpu")
        self._estimates = torch.zeros(2, dtype=torch.float64, device="cpu")

    def prepare(self, buckets: list[tuple[torch.device, bool]]) -> None:
        """Have values on the devices of the buckets.

        Args:
            buckets: Device of each bucket, and whether it has kernels: those decide for all.
        """
        old = self.values.get(self._lead)
        if old is None:
            start = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, math.inf, 1.0, 0.0, 0.0]
            old = torch.tensor(start, dtype=torch.float32, device="cpu")
        devices = [device for device, _ in buckets] or [self._lead]  # no parameter has a gradient
        leads = [device for device, has_kernels in buckets if has_kernels]
        self._kernels = bool(leads)
        self._lead = (leads or devices)[0]
        self.values = {device: old.to(device, copy=True) for device in dict.fromkeys(devices)}
        self._square = torch.zeros(1, dtype=torch.float64, device=self._lead)
        self._estimates = torch.zeros(2, dtype=torch.float64, device=self._lead)
        self._written = {}

    @property
    def lead(self) -> Tensor:
        """The values on the device that decides."""
        return self.values[self._lead]

    def adopt(self, states: list[dict[str, Any]]) -> None:
        """Make the estimates in the state views of the values, beginning with the first one's."""
        adaptive = [state for state in states if "d" in state]
        if not adaptive:
            return
        first = adaptive[0]
        for index, key in ((_D, "d"), (_NUMERATOR, "d_numerator")):
            number = float(first[key])
            for values in self.values.values():
                values[index] = number
            for state in adaptive:
                state[key].data = self.lead[index]

    def decide(
        self,
        buckets: list["Bucket"],
        collected: list[list[Tensor | None]],
        group: dict[str, Any],
        scaler: Scaler,
        spread: Spread,
    ) -> None:
        """Measure the gradients of all buckets, and write what follows into the values."""
        max_norm = group["max_grad_norm"]
        if max_norm is None:
            return
        self._write(8, float(max_norm))
        self._write(9, float(group["skip_nonfinite"]))
        self._take(_SCALE, scaler.grad_scale, 1.0)
        self._take(_FOUND_INF, scaler.found_inf, 0.0)
        squares = [
            (bucket.axes, bucket.square_norm(grads))
            for bucket, grads in zip(buckets, collected, strict=True)
        ]
        spread.total(squares, self._square)
        if self._kernels:
            from torsh_optim import _launch

            _launch.decide(self._square, self.lead)
        else:
            decide_(self._square, self.lead)
        self._spread()

    def _spread(self) -> None:
        for device, values in self.values.items():
            if device != self._lead:
                values.copy_(self.lead, non_blocking=True)

    def _write(self, index: int, value: float) -> None:
        if self._written.get(index) != value:
            self.lead[index].fill_(value)
            self._written[index] = value

    def _take(self, index: int, tensor: Tensor | None, otherwise: float) -> None:
        if tensor is None:
            self._write(index, otherwise)
        else:
            self.lead[index].copy_(tensor.reshape(()), non_blocking=True)
            self._written.pop(index, None)

    def scale(self, device: torch.device) -> float | None:
        """Factor of the gradients for parameters without a kernel; None to skip the step.

        Waits for the device.
        """
        coefficient, go_on = self.values[device][:2].tolist()
        return coefficient if go_on else None

    def d(self) -> float:
        """The step size estimate."""
        return float(self.lead[_D])

    def finish(self, buckets: list["Bucket"], group: dict[str, Any], spread: Spread) -> None:
        """Raise the step size estimate after a step."""
        if not group.get("adaptive_lr"):
            return
        self._write(10, math.sqrt(float(group["betas"][1])))
        found = [(bucket.axes, bucket.estimate_sums()) for bucket in buckets]
        sums = [(axes, part) for axes, part in found if part is not None]
        if not sums and not spread.axes:
            return
        spread.total(sums, self._estimates)
        if self._kernels:
            from torsh_optim import _launch

            _launch.estimate(self._estimates, self.lead)
        else:
            estimate_(self._estimates, self.lead)
        self._spread()


def decide_(square: Tensor, values: Tensor) -> None:
    """Turn the sum of squares into the factor of the gradients and the decision to go on.

    As ``torch.nn.utils.clip_grad_norm_``, with the step left out where it would do harm.

    Args:
        square: Float64 ``(1,)``: sum of the squared gradients, still scaled.
        values: As in ``Control``; changed.
    """
    scale, found_inf, max_norm, skip_nonfinite = values[4], values[5], values[8], values[9]
    norm = (square[0].sqrt() / scale).float()
    finite = norm < math.inf
    go_on = (found_inf == 0.0) & (finite | (skip_nonfinite == 0.0))
    clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    clip = torch.where((max_norm == math.inf) & finite, 1.0, clip)
    values[_COEFFICIENT] = clip / scale
    values[_GO_ON] = go_on
    values[_NORM] = norm
    values[_SKIPPED] += ~go_on


D0 = 1e-6  # first estimate of the step size


def estimate_(sums: Tensor, values: Tensor) -> None:
    """Raise the step size estimate of Prodigy after a step.

    Args:
        sums: Float64 ``(2,)``: learning rate times <gradient, way back to the start>, and the sum
            of the absolute values of the accumulated gradients.
        values: As in ``Control``; changed.

    Reference:
        Konstantin Mishchenko, Aaron Defazio: Prodigy: An Expeditiously Adaptive Parameter-Free
        Learner, 2023, arXiv 2306.06101.
    """
    if float(values[_GO_ON]) == 0.0:
        return
    d = values[_D]
    numerator = values[10] * values[_NUMERATOR] + d * d / D0 * sums[0].float()
    if not float(sums[1]) > 0.0:  # nothing has been learnt
        return
    values[_NUMERATOR] = numerator
    values[_D] = torch.maximum(d, numerator / sums[1].float())
