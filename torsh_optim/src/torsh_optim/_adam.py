"""Adam, AdamW and AdvancedAdam."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from torsh_optim._checkpoint import FORMAT
from torsh_optim._control import D0
from torsh_optim._optimizer import FusedOptimizer, ParamsT
from torsh_optim._options import ramp, sign
from torsh_optim._plan import Batch, Group
from torsh_optim._reference import adam_, agreement, chunks, prodigy_

_BETAS = (0.9, 0.999)


class AdvancedAdam(FusedOptimizer):
    """Adam with what is usually built around it, in one kernel launch for all tensors and groups.

    Warm-up, clipping by the global norm, unscaling for ``GradScaler``, leaving out steps that are
    not finite, and an average of the weights happen inside the step, where the numbers are in
    registers anyway. Without these options it is :class:`Adam` or :class:`AdamW`.

    On CUDA a step is one launch for each combination of element types, whatever the number of
    tensors and groups; ``max_grad_norm`` adds a pass over the gradients, ``cautious`` one over
    gradients and first moments. None waits for the device. On the CPU it is torch's fused kernel
    where that knows the options, else torch operations on pieces that fit into the cache. What
    these do not take (complex, float64 on CUDA, other tensor subclasses than DTensor) is updated
    one by one, with a warning; :attr:`implementation` says what runs.

    16-bit parameters are computed in float32 and rounded to nearest when stored, as torch's fused
    kernels do. A state loaded with float32 moments keeps them.

    Args:
        params: Tensors, name and tensor pairs, or dictionaries of parameter groups. An option that
            a group does not know is an error.
        lr: Learning rate, at least 0; None is 1e-3, and 1.0 with ``adaptive_lr``. A tensor of one
            element is read in each step, on its own device, so filling it changes the rate without
            a synchronisation.
        betas: Decay of the two moments, in [0, 1). Tensors must be on the CPU.
        eps: Added to the denominator, at least 0.
        weight_decay: At least 0.
        amsgrad: Divide by the largest second moment so far.
        decoupled_weight_decay: Shrink the weights themselves (AdamW), instead of adding the decay
            to the gradient (Adam).
        decay: By what a decoupled decay shrinks the weights in a step: ``"lr"``: by
            ``lr * weight_decay``; ``"absolute"``: by ``weight_decay`` times the learning rate as a
            part of the first one, so that the decay does not depend on the size of ``lr`` but
            follows its schedule.
        max_grad_norm: Largest norm of all gradients of the optimizer together; larger ones are
            scaled down as by ``torch.nn.utils.clip_grad_norm_``. ``math.inf`` measures without
            clipping. See :attr:`grad_norm`. The gradients themselves stay as they are.
        skip_nonfinite: With ``max_grad_norm``: leave out a step whose norm is not finite, and count
            it in :attr:`skipped_steps`.
        warmup_steps: Raise the learning rate linearly over so many steps of each parameter, as a
            factor beside ``lr``, so that no scheduler sees it.
        adaptive_lr: Estimate the size of the steps (Prodigy); ``lr`` becomes a factor of the
            estimate, so that 1.0 and a schedule that ends at 0 are right, and the moments are not
            bias-corrected. All groups must have the same ``lr``, or 0.
        cautious: Leave out, and make up for, elements whose update points against the gradient.
        ema_decay: Keep an average of the weights in the state, as ``ema``, with this decay in
            (0, 1); it begins as the weights, and is float32 for 16-bit ones. None keeps none.
            :meth:`ema_weights` puts it into the model.
        maximize: Go up the gradient.
        foreach: Only for torch's signature: None or False; there is no foreach implementation.
        capturable: Only for torch's signature: False; graph capture is not supported.
        differentiable: Only for torch's signature: False.
        fused: None takes the fused kernels where they can, True makes it an error where they
            cannot, False updates one by one.

    Raises:
        ValueError: A hyper-parameter is out of range, or an option asks for what is not here.

    Example:
        The norm of the gradient is 5, so it is scaled to 1; the first step of a warm-up over two
        is half as long, and as always with Adam it is as long as the rate.

        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = AdvancedAdam([weight], lr=0.1, max_grad_norm=1.0, warmup_steps=2)
        >>> weight.grad = torch.tensor([4.0, -3.0])
        >>> opt.step()
        >>> weight.detach(), opt.grad_norm, opt.last_lr()
        (tensor([ 0.9500, -1.9500]), tensor(5.), [0.05])

    Reference:
        Diederik Kingma, Jimmy Ba: Adam: A Method for Stochastic Optimization, 2015,
        arXiv 1412.6980. Ilya Loshchilov, Frank Hutter: Decoupled Weight Decay Regularization, 2019,
        arXiv 1711.05101. Sashank Reddi, Satyen Kale, Sanjiv Kumar: On the Convergence of Adam and
        Beyond, 2018, arXiv 1904.09237, for AMSGrad; the maximum is taken before the bias
        correction, as in torch. Konstantin Mishchenko, Aaron Defazio: Prodigy, 2023,
        arXiv 2306.06101, for ``adaptive_lr``, with safeguarded warm-up. Kaizhao Liang, Lizhang
        Chen, Bo Liu, Qiang Liu: Cautious Optimizers, 2024, arXiv 2411.16085; the mean of the mask
        is at least 1e-3, as in the authors' program.
    """

    _slot_names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "ema", "s", "p0")
    _late_slots = frozenset({"max_exp_avg_sq", "ema", "s", "p0"})
    _rule = "adam"
    _factors_of = ("betas", "warmup_steps", "adaptive_lr")
    _factors_kind = "bias"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        betas: tuple[float | Tensor, float | Tensor] = _BETAS,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = True,
        decay: Literal["lr", "absolute"] = "lr",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        warmup_steps: int = 0,
        adaptive_lr: bool = False,
        cautious: bool = False,
        ema_decay: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": (1.0 if adaptive_lr else 1e-3) if lr is None else lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "decay": decay,
            "reference_lr": None,
            "max_grad_norm": max_grad_norm,
            "skip_nonfinite": skip_nonfinite,
            "warmup_steps": warmup_steps,
            "adaptive_lr": adaptive_lr,
            "cautious": cautious,
            "ema_decay": ema_decay,
            "torsh_version": FORMAT,
        }
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        super()._check(group)
        betas = group["betas"]
        if not group["eps"] >= 0.0:
            raise ValueError(f"Invalid epsilon value: {group['eps']}; it must be at least 0")
        if len(betas) != 2 or isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
            raise ValueError(f"betas must be either both floats or both Tensors, got {betas}")
        for i, beta in enumerate(betas):
            if isinstance(beta, Tensor) and (beta.numel() != 1 or not beta.is_cpu):
                raise ValueError(f"Tensor betas[{i}] must be 1-element and on the CPU, got {beta}")
            if not 0.0 <= beta < 1.0:
                raise ValueError(
                    f"Invalid beta parameter at index {i}: {beta}; it must be in [0, 1)"
                )
        if group["decay"] not in ("lr", "absolute"):
            raise ValueError(f"decay={group['decay']!r} must be 'lr' or 'absolute'")
        if group["decay"] == "absolute":
            if not group["decoupled_weight_decay"]:
                raise ValueError("decay='absolute' needs decoupled_weight_decay=True")
            if not (group["reference_lr"] or group["lr"]) > 0.0:
                raise ValueError(
                    "decay='absolute' measures the decay by the first learning rate, which is "
                    f"lr={group['lr']}; begin with a rate above 0"
                )
        ema_decay = group["ema_decay"]
        if ema_decay is not None and not 0.0 < ema_decay < 1.0:
            raise ValueError(f"ema_decay={ema_decay} must be in (0, 1), or None")
        if group["adaptive_lr"] and group["cautious"]:
            raise ValueError("adaptive_lr and cautious cannot be used together")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group.

        Args:
            param_group: ``params`` (tensors or name and tensor pairs) and options of this group.

        Raises:
            ValueError: An option is unknown or out of range.
        """
        if isinstance(param_group, dict):
            full = {**self.defaults, **param_group}
            self._check_rates([*self.param_groups, full])
            if full["adaptive_lr"] and 0.0 < float(full["lr"]) < 0.1:
                warnings.warn(
                    f"adaptive_lr=True estimates the size of the steps, and lr={float(full['lr'])} "
                    "makes them smaller still; lr=1.0 is meant for it",
                    stacklevel=4,
                )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["decay"] == "absolute" and group["reference_lr"] is None:
            group["reference_lr"] = float(group["lr"])

    def _check_shared(self, groups: list[Group]) -> None:
        super()._check_shared(groups)
        self._check_rates(groups)

    @staticmethod
    def _check_rates(groups: list[Group]) -> None:
        if not any(group["adaptive_lr"] for group in groups):
            return
        rates = {group["lr"] for group in groups if not isinstance(group["lr"], Tensor)} - {0.0}
        if len(rates) > 1:
            raise ValueError(
                f"adaptive_lr estimates one step size, but the groups have lr {sorted(rates)}; "
                "give all the same lr, or 0 to freeze a group"
            )

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Put the averages of ``ema_decay`` into the parameters for as long as the block runs.

        Parameters without an average, and buffers, stay as they are.

        Raises:
            RuntimeError: No parameter has an average.

        Example:
            >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
            >>> opt = AdvancedAdam([weight], lr=0.5, ema_decay=0.5)
            >>> weight.grad = torch.ones(1)
            >>> opt.step()  # from 1 to 0.5, and their mean is 0.75
            >>> with opt.ema_weights():
            ...     print(weight.detach())
            tensor([0.7500])
            >>> weight.detach()
            tensor([0.5000])
        """
        averages = {p: state["ema"] for p, state in self.state.items() if "ema" in state}
        if not averages:
            raise RuntimeError(
                "no parameter has an average yet; set ema_decay, and take a step with gradients"
            )
        kept = [param.detach().clone() for param in averages]
        with torch.no_grad():
            for param, average in averages.items():
                param.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for param, value in zip(averages, kept, strict=True):
                    param.copy_(value)

    def _slots(self, group: Group) -> tuple[str, ...]:
        wanted = {
            "max_exp_avg_sq": group["amsgrad"],
            "ema": group["ema_decay"] is not None,
            "s": group["adaptive_lr"],
            "p0": group["adaptive_lr"],
        }
        return tuple(slot for slot in self._slot_names if wanted.get(slot, True))

    def _initial(self, slot: str, param: Tensor) -> Tensor:
        if slot == "ema" and param.dtype.itemsize == 2:  # too coarse for steps of 1 - ema_decay
            return param.detach().to(torch.float32, memory_format=torch.preserve_format)
        if slot in ("ema", "p0"):
            return param.detach().clone(memory_format=torch.preserve_format)
        return super()._initial(slot, param)

    @staticmethod
    def _constants(group: Group) -> tuple[float, ...]:
        beta1, beta2 = (float(beta) for beta in group["betas"])
        decoupled, coupled = _decays(group)
        ema_decay = group["ema_decay"]
        return (
            *(0.0, sign(group), decoupled, coupled),
            *(1.0 - beta1, 1.0 - beta2, group["eps"]),
            0.0 if ema_decay is None else 1.0 - ema_decay,
            float(group["cautious"]),
            *(math.sqrt(beta2), float(group["warmup_steps"] > 0), 1.0 / D0),
        )

    @staticmethod
    def _factors(group: Group, step: float) -> tuple[float, ...]:
        if group["adaptive_lr"]:
            return (ramp(group, step), 1.0, 1.0, 0.0)
        beta1, beta2 = group["betas"]
        return (
            ramp(group, step),
            1.0 / (1.0 - float(beta1) ** step),
            1.0 / math.sqrt(1.0 - float(beta2) ** step),
            0.0,
        )

    @staticmethod
    def _exponents(group: Group) -> tuple[float, ...]:
        betas = (0.0, 0.0) if group["adaptive_lr"] else map(float, group["betas"])
        return (group["warmup_steps"], *(math.log(b) if b > 0.0 else -math.inf for b in betas))

    def _has_update_cpu(self, group: Group) -> bool:
        return not (group["cautious"] or group["adaptive_lr"])

    def _update_cpu(self, batch: Batch) -> None:
        group = batch.group
        decoupled, coupled = _decays(group)
        beta1, beta2 = map(float, group["betas"])
        update = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        scaled = batch.scaled_grads()
        # one call, unless parameters are at different places of the warm-up
        ramps = [ramp(group, step) for step in batch.numbers]
        for factor in dict.fromkeys(ramps):
            mine = [i for i, other in enumerate(ramps) if other == factor]
            params, grads, steps = (
                [row[i] for i in mine] for row in (batch.params, scaled, batch.steps)
            )
            states = {name: [row[i] for i in mine] for name, row in batch.states.items()}
            update(
                params,
                grads,
                states["exp_avg"],
                states["exp_avg_sq"],
                states.get("max_exp_avg_sq", []),
                steps,
                lr=float(group["lr"]) * factor,
                beta1=beta1,
                beta2=beta2,
                weight_decay=decoupled if group["decoupled_weight_decay"] else coupled,
                eps=group["eps"],
                amsgrad=group["amsgrad"],
                maximize=group["maximize"],
            )
            if "ema" in states:
                torch._foreach_lerp_(states["ema"], params, 1.0 - group["ema_decay"])

    def _wants_sums(self, group: Group) -> bool:
        return bool(group["cautious"])

    def _measure(self, batch: Batch) -> Tensor:
        group = batch.group
        beta1, l2 = float(group["betas"][0]), _decays(group)[1]
        scale = batch.scale * sign(group)
        counts = torch.zeros(
            len(batch.params), 2, dtype=torch.float64, device=batch.grads[0].device
        )
        members = zip(batch.params, batch.grads, batch.states["exp_avg"], strict=True)
        for i, tensors in enumerate(members):
            for p, g, m in chunks(*tensors):
                counts[i] += agreement(p, g, m, beta1=beta1, l2=l2, scale=scale)
        return counts

    def _update_reference(self, batch: Batch) -> Tensor | None:
        group = batch.group
        decoupled, coupled = _decays(group)
        beta1, beta2 = map(float, group["betas"])
        ema_weight = 0.0 if group["ema_decay"] is None else 1.0 - group["ema_decay"]
        scale = batch.scale * sign(group)
        common = {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "decay": decoupled}
        common |= {"l2": coupled, "scale": scale, "ema_weight": ema_weight}
        estimates = torch.zeros(2, dtype=torch.float64, device="cpu")
        for i, (param, grad) in enumerate(zip(batch.params, batch.grads, strict=True)):
            states: list[Any] = [
                batch.states[slot][i] if slot in batch.states else None for slot in self._slot_names
            ]
            step = batch.numbers[i]
            lr = float(group["lr"]) * ramp(group, step)
            if group["adaptive_lr"]:
                assert batch.control is not None
                weight = 1.0 if group["warmup_steps"] else lr
                d = batch.control.d()
                for p, g, *others in chunks(param, grad, *states):
                    found = prodigy_(p, g, *others, d=d, d0=D0, lr=lr, weight=weight, **common)
                    estimates += found.cpu()
                continue
            agreeing = None
            if group["cautious"]:
                agree, count = batch.sums[i]
                agreeing = max(1e-3, agree / max(1.0, count))
            for p, g, m, v, x, e in chunks(param, grad, *states[:4]):
                adam_(p, g, m, v, x, e, step=step, lr=lr, agreeing=agreeing, **common)
        return estimates if group["adaptive_lr"] else None


def _decays(group: Group) -> tuple[float, float]:
    """Decoupled decay, to be multiplied by the learning rate, and coupled decay."""
    weight_decay = float(group["weight_decay"])
    if not group["decoupled_weight_decay"]:
        return 0.0, weight_decay
    if group["decay"] == "absolute":
        return weight_decay / (group["reference_lr"] or float(group["lr"])), 0.0
    return weight_decay, 0.0


class Adam(AdvancedAdam):
    """Adam in one kernel launch for all tensors and parameter groups.

    A drop-in for :class:`torch.optim.Adam`: same arguments, defaults, state and results. How a step
    is computed, and the options that torch does not have, are as in :class:`AdvancedAdam`.

    Args:
        params: Tensors, name and tensor pairs, or dictionaries of parameter groups.
        lr: Learning rate, at least 0; a number or a tensor of one element.
        betas: Decay of the two moments, in [0, 1).
        eps: Added to the denominator, at least 0.
        weight_decay: Added to the gradient as ``weight_decay * param``; at least 0.
        amsgrad: Divide by the largest second moment so far.
        foreach: None or False.
        maximize: Go up the gradient.
        capturable: False.
        differentiable: False.
        fused: None takes the fused kernels where they can, True makes it an error where they
            cannot, False updates one by one.
        decoupled_weight_decay: Make it AdamW.
        max_grad_norm: Clip all gradients together to this norm inside the step.
        skip_nonfinite: With ``max_grad_norm``, leave out steps whose norm is not finite.
        warmup_steps: Raise the learning rate linearly over so many steps.

    Raises:
        ValueError: A hyper-parameter is out of range, or an option asks for what is not here.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = Adam([weight], lr=0.1)
        >>> weight.grad = torch.tensor([4.0, -0.25])
        >>> opt.step()  # the first step goes by lr against the sign of the gradient
        >>> weight.detach()
        tensor([ 0.9000, -1.9000])

    Reference:
        Diederik Kingma, Jimmy Ba: Adam: A Method for Stochastic Optimization, 2015,
        arXiv 1412.6980.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = _BETAS,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(
            *(params, lr, betas, eps, weight_decay, amsgrad),
            decoupled_weight_decay=decoupled_weight_decay,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            warmup_steps=warmup_steps,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )


class AdamW(AdvancedAdam):
    """AdamW in one kernel launch for all tensors and parameter groups.

    A drop-in for :class:`torch.optim.AdamW`: same arguments, defaults, state and results. How a
    step is computed, and the options that torch does not have, are as in :class:`AdvancedAdam`.

    Args:
        params: Tensors, name and tensor pairs, or dictionaries of parameter groups.
        lr: Learning rate, at least 0; a number or a tensor of one element.
        betas: Decay of the two moments, in [0, 1).
        eps: Added to the denominator, at least 0.
        weight_decay: Decoupled: the weights shrink by ``lr * weight_decay``; at least 0.
        amsgrad: Divide by the largest second moment so far.
        maximize: Go up the gradient.
        foreach: None or False.
        capturable: False.
        differentiable: False.
        fused: None takes the fused kernels where they can, True makes it an error where they
            cannot, False updates one by one.
        max_grad_norm: Clip all gradients together to this norm inside the step.
        skip_nonfinite: With ``max_grad_norm``, leave out steps whose norm is not finite.
        warmup_steps: Raise the learning rate linearly over so many steps.

    Raises:
        ValueError: A hyper-parameter is out of range, or an option asks for what is not here.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = AdamW([weight], lr=0.1, weight_decay=0.5)
        >>> weight.grad = torch.tensor([4.0, -0.25])
        >>> opt.step()  # decay 1 - 0.1 * 0.5, then lr times the sign of the first gradient
        >>> weight.detach()
        tensor([ 0.8500, -1.8000])

    Reference:
        Ilya Loshchilov, Frank Hutter: Decoupled Weight Decay Regularization, 2019,
        arXiv 1711.05101. As in torch, the decay is multiplied by the learning rate.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = _BETAS,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(
            *(params, lr, betas, eps, weight_decay, amsgrad),
            decoupled_weight_decay=True,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            warmup_steps=warmup_steps,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )

    def _check(self, group: Group) -> None:
        super()._check(group)
        if not group["decoupled_weight_decay"]:
            raise ValueError("decoupled_weight_decay=False is Adam, not AdamW; use Adam")
