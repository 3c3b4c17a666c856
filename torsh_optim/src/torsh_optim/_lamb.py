"""LAMB."""

import math
from typing import Any

import torch
from torch import Tensor

from torsh_optim._checkpoint import FORMAT
from torsh_optim._lion import check_betas
from torsh_optim._optimizer import FusedOptimizer, ParamsT
from torsh_optim._options import ramp, sign
from torsh_optim._plan import Batch, Group
from torsh_optim._reference import chunks, lamb_, lamb_moments_, square_norm


class LAMB(FusedOptimizer):
    """LAMB: Adam whose step is as long, for each tensor, as the tensor's norm allows.

    On CUDA a step is two passes over all tensors of all groups, the norms of each tensor between
    them, whatever the number of tensors; norms of sharded tensors are those of the whole tensor.

    Weight decay is a part of the update and of its norm, as in the paper. Tensors of groups without
    weight decay (biases, norms) take plain Adam steps unless ``always_adapt``, as in NVIDIA's and
    timm's LAMB.

    Args:
        params: Tensors, name and tensor pairs, or dictionaries of parameter groups.
        lr: Learning rate, at least 0; a number or a tensor of one element.
        betas: Decay of the two moments, in [0, 1).
        eps: Added to the denominator, at least 0.
        weight_decay: Added to the update as ``weight_decay * param``; at least 0.
        bias_correction: Correct the moments for their start at zero.
        grad_averaging: Weigh a gradient in the first moment by ``1 - beta1``; False by 1.
        max_grad_norm: Clip all gradients together to this norm before anything else; None does not.
            The default is that of NVIDIA's LAMB.
        trust_clip: Largest trust ratio; None does not limit it.
        always_adapt: Apply the trust ratio without weight decay too.
        skip_nonfinite: With ``max_grad_norm``, leave out steps whose norm is not finite.
        warmup_steps: Raise the learning rate linearly over so many steps.
        maximize: Go up the gradient.
        fused: None takes the kernels where they can, True makes it an error where they cannot,
            False updates one by one.

    Raises:
        ValueError: A hyper-parameter is out of range.

    Example:
        The first Adam update is the sign of the gradient, of norm 2; the weights have norm 10, so
        the step is five times as long, and ``lr`` of the norm of the weights.

        >>> weight = torch.nn.Parameter(torch.full((4,), 5.0))
        >>> opt = LAMB([weight], lr=0.1, weight_decay=0.0, always_adapt=True, eps=0.0)
        >>> weight.grad = torch.tensor([1.0, -1.0, 2.0, -2.0])
        >>> opt.step()
        >>> weight.detach()
        tensor([4.5000, 5.5000, 4.5000, 5.5000])

    Reference:
        Yang You et al.: Large Batch Optimization for Deep Learning: Training BERT in 76 minutes,
        2020, arXiv 1904.00962, with the identity for the scaling function.
    """

    _slot_names = ("exp_avg", "exp_avg_sq")
    _rule = "lamb"
    _cpu_types = frozenset({torch.float32, torch.float64})  # the update itself would be rounded
    _factors_of = ("betas", "warmup_steps", "bias_correction")
    _factors_kind = "bias"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool = True,
        grad_averaging: bool = True,
        max_grad_norm: float | None = 1.0,
        trust_clip: float | None = None,
        always_adapt: bool = False,
        skip_nonfinite: bool = True,
        warmup_steps: int = 0,
        maximize: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "grad_averaging": grad_averaging,
            "max_grad_norm": max_grad_norm,
            "trust_clip": trust_clip,
            "always_adapt": always_adapt,
            "skip_nonfinite": skip_nonfinite,
            "warmup_steps": warmup_steps,
            "maximize": maximize,
            "fused": fused,
            "torsh_version": FORMAT,
        }
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        super()._check(group)
        check_betas(group["betas"])
        if not group["eps"] >= 0.0:
            raise ValueError(f"Invalid epsilon value: {group['eps']}; it must be at least 0")
        if group["trust_clip"] is not None and not group["trust_clip"] > 0.0:
            raise ValueError(f"trust_clip={group['trust_clip']} must be above 0, or None")

    @staticmethod
    def _constants(group: Group) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return (
            *(0.0, sign(group), group["weight_decay"], 0.0),
            *(1.0 - beta1, 1.0 - beta2, group["eps"]),
            1.0 - beta1 if group["grad_averaging"] else 1.0,
            float(_adapts(group)),
            math.inf if group["trust_clip"] is None else group["trust_clip"],
        )

    @staticmethod
    def _factors(group: Group, step: float) -> tuple[float, ...]:
        bias1, bias2 = _biases(group, step)
        return (ramp(group, step), 1.0 / bias1, 1.0 / math.sqrt(bias2), 0.0)

    @staticmethod
    def _exponents(group: Group) -> tuple[float, ...]:
        betas = group["betas"] if group["bias_correction"] else (0.0, 0.0)
        return (group["warmup_steps"], *(math.log(b) if b > 0.0 else -math.inf for b in betas))

    def _wants_sums(self, group: Group) -> bool:
        return True

    def _has_update_cpu(self, group: Group) -> bool:
        return bool(group["bias_correction"] and group["grad_averaging"])

    def _measure_cpu(self, batch: Batch) -> Tensor:
        """Let torch's Adam kernel take a step from zero, with copies of the moments."""
        group = batch.group
        states = [batch.states[slot] for slot in self._slot_names]
        sums = torch.zeros(len(batch.params), 2, dtype=torch.float64, device="cpu")
        for i, tensors in enumerate(zip(batch.params, batch.grads, *states, strict=True)):
            for p, g, m, v in chunks(*tensors):
                u = torch.zeros_like(p)
                scaled = g if batch.scale == 1.0 else g * batch.scale
                torch._fused_adam_(
                    *([u], [scaled], [m.clone()], [v.clone()], [], [batch.steps[i]]),
                    **_fused_options(group, lr=1.0, weight_decay=0.0),
                )
                sums[i, 0] += square_norm(p)
                sums[i, 1] += square_norm(u.add_(p, alpha=-group["weight_decay"]))
        return sums

    def _update_cpu(self, batch: Batch) -> None:
        # LAMB is AdamW whose learning rate is multiplied by the trust ratio of the tensor
        rates = [
            float(batch.group["lr"]) * ramp(batch.group, step) * _trust(batch.group, sums)
            for step, sums in zip(batch.numbers, batch.sums, strict=True)
        ]
        scaled = batch.scaled_grads()
        states = [batch.states[slot] for slot in self._slot_names]
        for rate in dict.fromkeys(rates):
            mine = [i for i, other in enumerate(rates) if other == rate]
            params, grads, exp_avgs, exp_avg_sqs, steps = (
                [row[i] for i in mine] for row in (batch.params, scaled, *states, batch.steps)
            )
            torch._fused_adamw_(
                *(params, grads, exp_avgs, exp_avg_sqs, [], steps),
                **_fused_options(batch.group, lr=rate, weight_decay=batch.group["weight_decay"]),
            )

    def _measure(self, batch: Batch) -> Tensor:
        group = batch.group
        beta1, beta2 = group["betas"]
        biases = [_biases(group, step) for step in batch.numbers]
        states = [batch.states[slot] for slot in self._slot_names]
        members = list(zip(batch.params, batch.grads, *states, strict=True))
        sums = torch.zeros(len(members), 2, dtype=torch.float64, device=batch.params[0].device)
        for i, tensors in enumerate(members):
            for p, g, m, v in chunks(*tensors):
                sums[i] += lamb_moments_(
                    *(p, g, m, v),
                    bias1=biases[i][0],
                    bias2=biases[i][1],
                    beta1=beta1,
                    beta2=beta2,
                    weight=1.0 - beta1 if group["grad_averaging"] else 1.0,
                    eps=group["eps"],
                    decay=group["weight_decay"],
                    scale=batch.scale * sign(group),
                )
        return sums

    def _update_reference(self, batch: Batch) -> None:
        group = batch.group
        states = [batch.states[slot] for slot in self._slot_names]
        for i, (param, exp_avg, exp_avg_sq) in enumerate(zip(batch.params, *states, strict=True)):
            bias1, bias2 = _biases(group, batch.numbers[i])
            trust = _trust(group, batch.sums[i])
            lr = float(group["lr"]) * ramp(group, batch.numbers[i])
            for p, m, v in chunks(param, exp_avg, exp_avg_sq):
                lamb_(
                    *(p, m, v),
                    bias1=bias1,
                    bias2=bias2,
                    lr=lr,
                    trust=trust,
                    eps=group["eps"],
                    decay=group["weight_decay"],
                )


def _adapts(group: Group) -> bool:
    return bool(group["always_adapt"] or group["weight_decay"] != 0.0)


def _trust(group: Group, sums: list[float]) -> float:
    """Ratio of the norms of parameter and update, from their squares."""
    if not _adapts(group):
        return 1.0
    param_norm, update_norm = map(math.sqrt, sums)
    trust = param_norm / update_norm if param_norm > 0.0 and update_norm > 0.0 else 1.0
    return min(trust, group["trust_clip"] or math.inf)


def _fused_options(group: Group, *, lr: float, weight_decay: float) -> dict[str, Any]:
    """Arguments of torch's fused Adam kernels."""
    beta1, beta2 = group["betas"]
    return {
        "lr": lr,
        "beta1": beta1,
        "beta2": beta2,
        "weight_decay": weight_decay,
        "eps": group["eps"],
        "amsgrad": False,
        "maximize": group["maximize"],
    }


def _biases(group: Group, step: float) -> tuple[float, float]:
    if not group["bias_correction"]:
        return 1.0, 1.0
    beta1, beta2 = group["betas"]
    return 1.0 - beta1**step, 1.0 - beta2**step
