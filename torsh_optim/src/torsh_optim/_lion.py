"""Lion."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torsh_optim._checkpoint import FORMAT
from torsh_optim._optimizer import FusedOptimizer, ParamsT
from torsh_optim._options import ramp, sign
from torsh_optim._plan import Batch, Group
from torsh_optim._reference import chunks, lion_


class Lion(FusedOptimizer):
    """Lion in one kernel launch for all tensors and parameter groups.

    Every element moves by the learning rate, in the direction that momentum and gradient agree on;
    the authors advise a learning rate three to ten times smaller than AdamW's, and as much more
    weight decay. It keeps one state, so a step moves 20 bytes for each float32 parameter where
    AdamW moves 28.

    Args:
        params: Tensors, name and tensor pairs, or dictionaries of parameter groups.
        lr: Learning rate, at least 0; a number or a tensor of one element.
        betas: Weight of the momentum in the direction, and decay of the momentum, in [0, 1).
        weight_decay: Decoupled: the weights shrink by ``lr * weight_decay``; at least 0.
        maximize: Go up the gradient.
        max_grad_norm: Clip all gradients together to this norm inside the step. The sign in the
            update makes it matter less than elsewhere: it only weighs steps in the momentum.
        skip_nonfinite: With ``max_grad_norm``, leave out steps whose norm is not finite.
        warmup_steps: Raise the learning rate linearly over so many steps.
        fused: None takes the kernel where it can, True makes it an error where it cannot, False
            updates one by one.

    Raises:
        ValueError: A hyper-parameter is out of range.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = Lion([weight], lr=0.1, weight_decay=1.0)
        >>> weight.grad = torch.tensor([4.0, -0.25])
        >>> opt.step()  # decay 1 - 0.1, then 0.1 against the sign
        >>> weight.detach()
        tensor([ 0.8000, -1.7000])

    Reference:
        Xiangning Chen et al.: Symbolic Discovery of Optimization Algorithms, 2023,
        arXiv 2302.06675.
    """

    _slot_names = ("exp_avg",)
    _rule = "lion"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        warmup_steps: int = 0,
        fused: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "max_grad_norm": max_grad_norm,
            "skip_nonfinite": skip_nonfinite,
            "warmup_steps": warmup_steps,
            "fused": fused,
            "torsh_version": FORMAT,
        }
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        super()._check(group)
        check_betas(group["betas"])

    @staticmethod
    def _constants(group: Group) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return (0.0, sign(group), group["weight_decay"], 0.0, 1.0 - beta1, 1.0 - beta2)

    def _update_reference(self, batch: Batch) -> None:
        group = batch.group
        beta1, beta2 = group["betas"]
        scale = batch.scale * sign(group)
        for param, grad, exp_avg, step in zip(
            batch.params, batch.grads, batch.states["exp_avg"], batch.numbers, strict=True
        ):
            lr = float(group["lr"]) * ramp(group, step)
            for p, g, m in chunks(param, grad, exp_avg):
                lion_(
                    p, g, m, lr=lr, beta1=beta1, beta2=beta2, decay=group["weight_decay"],
                    scale=scale,
                )  # fmt: skip


def check_betas(betas: Any) -> None:
    """Raise ValueError unless there are two numbers in [0, 1)."""
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas={betas!r} must be two numbers in [0, 1)")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}; it must be in [0, 1)")
