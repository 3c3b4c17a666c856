"""SGD."""

from typing import Any

import torch
from torch import Tensor

from torsh_optim._checkpoint import FORMAT
from torsh_optim._optimizer import FusedOptimizer, ParamsT
from torsh_optim._options import ramp, sign
from torsh_optim._plan import Batch, Group
from torsh_optim._reference import chunks, sgd_


class SGD(FusedOptimizer):
    """SGD with momentum in one kernel launch for all tensors and parameter groups.

    A drop-in for :class:`torch.optim.SGD`: same arguments, defaults and results. Its state has a
    ``step`` beside the ``momentum_buffer``, which torch's ignores; states load both ways.

    Args:
        params: Tensors, name and tensor pairs, or dictionaries of parameter groups.
        lr: Learning rate, at least 0; a number or a tensor of one element.
        momentum: Decay of the momentum, at least 0; 0 keeps none.
        dampening: Part of the gradient that does not enter the momentum, except in the first step.
        weight_decay: Added to the gradient as ``weight_decay * param``; at least 0.
        nesterov: Look ahead along the momentum; needs momentum and no dampening.
        maximize: Go up the gradient.
        foreach: None or False.
        differentiable: False.
        fused: None takes the fused kernels where they can, True makes it an error where they
            cannot, False updates one by one.
        max_grad_norm: Clip all gradients together to this norm inside the step.
        skip_nonfinite: With ``max_grad_norm``, leave out steps whose norm is not finite.
        warmup_steps: Raise the learning rate linearly over so many steps.

    Raises:
        ValueError: A hyper-parameter is out of range, or an option asks for what is not here.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([2.0, -2.0]))
        >>> opt = SGD([weight], lr=0.5, momentum=0.5)
        >>> for _ in range(2):
        ...     weight.grad = torch.tensor([1.0, -2.0])
        ...     opt.step()
        >>> weight.detach()  # steps of 0.5 and 0.5 * (0.5 + 1) times the gradient
        tensor([0.7500, 0.5000])

    Reference:
        Ilya Sutskever et al.: On the importance of initialization and momentum in deep learning,
        2013.
    """

    _slot_names = ("momentum_buffer",)
    _late_slots = frozenset({"momentum_buffer"})
    _rule = "sgd"
    _factors_of = ("momentum", "dampening", "warmup_steps")
    _factors_kind = "first"

    # torch 2.11's kernel leaves garbage in the momentum of 16-bit parameters
    _cpu_types = frozenset({torch.float32, torch.float64})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        warmup_steps: int = 0,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "max_grad_norm": max_grad_norm,
            "skip_nonfinite": skip_nonfinite,
            "warmup_steps": warmup_steps,
            "torsh_version": FORMAT,
        }
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        super()._check(group)
        momentum = group["momentum"]
        if not momentum >= 0.0:
            raise ValueError(f"Invalid momentum value: {momentum}; it must be at least 0")
        if group["nesterov"] and (momentum <= 0 or group["dampening"] != 0):
            raise ValueError(
                "Nesterov momentum requires a momentum and zero dampening, got "
                f"momentum={momentum}, dampening={group['dampening']}"
            )

    def _slots(self, group: Group) -> tuple[str, ...]:
        return self._slot_names if group["momentum"] != 0 else ()

    @staticmethod
    def _constants(group: Group) -> tuple[float, ...]:
        decay, momentum = group["weight_decay"], group["momentum"]
        return (0.0, sign(group), 0.0, decay, momentum, float(group["nesterov"]))

    @staticmethod
    def _factors(group: Group, step: float) -> tuple[float, ...]:
        return (ramp(group, step), 1.0 if step == 1.0 else 1.0 - group["dampening"], 0.0, 0.0)

    @staticmethod
    def _exponents(group: Group) -> tuple[float, ...]:
        return (group["warmup_steps"], 1.0, 1.0 - group["dampening"])

    def _has_update_cpu(self, group: Group) -> bool:
        return True

    def _update_cpu(self, batch: Batch) -> None:
        group = batch.group
        scaled = batch.scaled_grads()
        # one call, unless parameters are at different places: torch's has one rate and one first
        places = [(ramp(group, step), step == 1.0) for step in batch.numbers]
        for place in dict.fromkeys(places):
            mine = [i for i, other in enumerate(places) if other == place]
            params, grads = ([row[i] for i in mine] for row in (batch.params, scaled))
            momenta = batch.states.get("momentum_buffer")
            torch._fused_sgd_(
                params,
                grads,
                [momenta[i] for i in mine] if momenta else [],
                weight_decay=float(group["weight_decay"]),
                momentum=group["momentum"],
                lr=float(group["lr"]) * place[0],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                is_first_step=place[1],
            )

    def _update_reference(self, batch: Batch) -> None:
        group = batch.group
        for i, (param, grad) in enumerate(zip(batch.params, batch.grads, strict=True)):
            momenta = batch.states.get("momentum_buffer")
            step = batch.numbers[i]
            for p, g, m in chunks(param, grad, momenta[i] if momenta else None):
                sgd_(
                    *(p, g, m),
                    step=step,
                    lr=float(group["lr"]) * ramp(group, step),
                    momentum=group["momentum"],
                    dampening=group["dampening"],
                    l2=group["weight_decay"],
                    nesterov=group["nesterov"],
                    scale=batch.scale * sign(group),
                )
