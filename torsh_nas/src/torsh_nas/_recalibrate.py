"""Fresh batch-norm statistics for a model whose inputs have changed."""

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def recalibrate(model: nn.Module, batches: Iterable[object]) -> None:
    """Replace running batch-norm statistics by those of the given data.

    A derived model inherits statistics gathered while every option contributed. This forgets
    them and averages over ``batches`` instead, with equal weight for each batch. Only the norm
    layers run in training mode; weights and all other modes stay as they are.

    Args:
        model: The model; unchanged if it has no batch norm with running statistics.
        batches: Input tensors, or tuples whose first entry is the input (such as a loader of
            ``(input, target)``).

    Raises:
        ValueError: ``batches`` is empty.

    Example:
        >>> from torsh_nas import recalibrate
        >>> norm = torch.nn.BatchNorm1d(1)
        >>> recalibrate(norm, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
        >>> norm.running_mean.item(), norm.running_var.item()  # means 2 and 6, variance 2 twice
        (4.0, 2.0)
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("batches is empty: there is nothing to take statistics from")
    momenta = [(norm, norm.momentum) for norm in norms]
    modes = {part: part.training for part in model.modules()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # torch then averages over the batches instead of forgetting
    try:
        with torch.no_grad():
            for batch in chain([first], iterator):
                x = batch[0] if isinstance(batch, Sequence) else batch
                model(x.to(device) if isinstance(x, Tensor) else x)
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
        for part, mode in modes.items():
            part.training = mode
