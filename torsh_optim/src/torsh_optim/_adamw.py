"""AdamW."""

import math
from typing import Any

import torch
from torch import Tensor

from torsh_optim._checkpoint import FORMAT
from torsh_optim._optimizer import FusedOptimizer, ParamsT
from torsh_optim._plan import Group
from torsh_optim._reference import adamw_

_BETAS = (0.9, 0.999)


class AdamW(FusedOptimizer):
    """AdamW in one kernel launch for all tensors and parameter groups.

    A drop-in for :class:`torch.optim.AdamW`: same arguments, defaults, state and results. On CUDA
    a step is one launch for each combination of element types, whatever the number of tensors and
    groups, and neither allocates nor synchronises once it has run. On CPU it is torch's fused
    kernel, which ``torch.optim.AdamW`` leaves off unless asked. What those do not take (float64 on
    CUDA, complex, tensor subclasses) is updated one by one, with a warning;
    :attr:`implementation` says what runs.

    16-bit parameters are computed in float32 and rounded to nearest when stored, as torch's fused
    kernels do. A state loaded with float32 moments keeps them.

    Args:
        params: Tensors, name and tensor pairs, or dictionaries of parameter groups. An option that
            a group does not know is an error.
        lr: Learning rate, at least 0. A tensor of one element is read in each step, on its own
            device, so filling it changes the rate without a synchronisation.
        betas: Decay of the two moments, in [0, 1). Tensors must be on the CPU.
        eps: Added to the denominator, at least 0.
        weight_decay: Decoupled weight decay, at least 0.
        amsgrad: Divide by the largest second moment so far.
        maximize: Go up the gradient.
        foreach: Only for torch's signature: None or False; there is no foreach implementation.
        capturable: Only for torch's signature: False; graph capture is not supported.
        differentiable: Only for torch's signature: False.
        fused: None takes the fused kernels where they can, True makes it an error where they
            cannot, False updates one by one.

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
        Sashank Reddi, Satyen Kale, Sanjiv Kumar: On the Convergence of Adam and Beyond, 2018,
        arXiv 1904.09237, for AMSGrad; the maximum is taken before the bias correction, as in torch.
    """

    _bucket_options = ("fused", "amsgrad")

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
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
            "torsh_version": FORMAT,
        }
        self._check(defaults)
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        lr, betas = group["lr"], group["betas"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}; it must be at least 0")
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
        if not group["weight_decay"] >= 0.0:
            raise ValueError(
                f"Invalid weight_decay value: {group['weight_decay']}; it must be at least 0"
            )
        if group["foreach"] and group["fused"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        for option, instead in (
            ("foreach", "leave it out: one launch needs no lists"),
            ("capturable", "a step cannot be captured in a CUDA graph yet"),
            ("differentiable", "use torch.optim.AdamW to differentiate through a step"),
        ):
            if group[option]:
                raise ValueError(f"{option}=True is not supported by AdamW; {instead}")
        if not group["decoupled_weight_decay"]:
            raise ValueError(
                "decoupled_weight_decay=False is Adam, not AdamW; use torch.optim.Adam"
            )

    def _slots(self, group: Group) -> tuple[str, ...]:
        if group["amsgrad"]:
            return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        return ("exp_avg", "exp_avg_sq")

    def _scalars(self, group: Group, step: float) -> tuple[float, ...]:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        if isinstance(lr, Tensor):
            lr = float(lr) if lr.is_cpu else 0.0  # the launch copies a rate on the device itself
        beta1, beta2 = float(beta1), float(beta2)
        return (
            lr,
            group["weight_decay"],
            1.0 - beta1,
            1.0 - beta2,
            group["eps"],
            1.0 / (1.0 - beta1**step),
            1.0 / math.sqrt(1.0 - beta2**step),
            -1.0 if group["maximize"] else 1.0,
        )

    def _block(self) -> int:
        from torsh_optim import _kernels

        return _kernels.BLOCK

    def _launch(
        self,
        programs: int,
        table: Tensor,
        scalars: Tensor,
        blocks: Tensor,
        types: list[torch.dtype],
        block: int,
    ) -> None:
        from torsh_optim import _kernels

        _kernels.launch_adamw(programs, table, scalars, blocks, types, block)

    def _update_cpu(
        self,
        group: Group,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[list[Tensor]],
        steps: list[Tensor],
        numbers: list[float],
    ) -> None:
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            params,
            grads,
            states[0],
            states[1],
            states[2] if group["amsgrad"] else [],
            steps,
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
        )

    def _update_reference(
        self,
        group: Group,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[list[Tensor]],
        steps: list[Tensor],
        numbers: list[float],
    ) -> None:
        beta1, beta2 = group["betas"]
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            adamw_(
                param,
                grad,
                states[0][i],
                states[1][i],
                states[2][i] if group["amsgrad"] else None,
                step=numbers[i],
                lr=float(group["lr"]),
                beta1=float(beta1),
                beta2=float(beta2),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                maximize=group["maximize"],
            )
