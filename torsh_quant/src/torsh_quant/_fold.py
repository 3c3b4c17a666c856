"""Batch normalisation moved into the convolution or linear layer before it."""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from torsh_quant._batches import first_tensor, run_model
from torsh_quant._flow import record_flow, same_output
from torsh_quant._layers import FloatLayer, quantizable_layers, replace_modules

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batch_norm(model: nn.Module, batch: Any, *, inplace: bool = False) -> nn.Module:
    """Move each batch normalisation into the layer before it, where nothing else is between.

    The model runs once to see which normalisation gets the output of which layer, and once more to
    see that its output stayed. An ``nn.Identity`` takes the place of what was folded.

    Args:
        model: In evaluation mode.
        batch: One batch: a tensor, a tuple or list whose first item is the input, or a dictionary
            of keyword arguments.
        inplace: Change ``model`` instead of a copy.

    Returns:
        The model.

    Raises:
        RuntimeError: If the model is in training mode, where statistics still change.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2)).eval()
        >>> folded = fold_batch_norm(net, torch.ones(1, 1, 2, 2))
        >>> type(folded[1]).__name__, folded[0].bias is not None
        ('Identity', True)

    Reference:
        B. Jacob et al., Quantization and training of neural networks for efficient
        integer-arithmetic-only inference, 2018, arXiv:1712.05877, section 3.2.
    """
    if model.training:
        raise RuntimeError("the model is in training mode; call model.eval() before folding")
    model = model if inplace else copy.deepcopy(model)
    pairs = foldable_pairs(model, batch)
    if not pairs:
        return model
    with torch.no_grad():
        expected = first_tensor(run_model(model, batch))
    undo = [_fold(model, *pair) for pair in pairs]
    if same_output(model, batch, expected):
        return model
    for step in reversed(undo):  # one does more than it seems to
        step()
    for pair in pairs:
        step = _fold(model, *pair)
        if not same_output(model, batch, expected):
            step()
    return model


def _fold(model: nn.Module, layer_name: str, norm_name: str) -> Callable[[], object]:
    """Fold one pair; returns what undoes it."""
    layer = cast("FloatLayer", model.get_submodule(layer_name))
    norm = cast("BatchNorm", model.get_submodule(norm_name))
    before, identity = dict(layer._parameters), nn.Identity()
    layer.weight, layer.bias = (
        nn.Parameter(tensor, requires_grad=layer.weight.requires_grad)
        for tensor in folded(layer, norm)
    )
    identity.train(norm.training)
    replace_modules(model, {norm: identity})

    def undo() -> None:
        layer._parameters |= before
        replace_modules(model, {identity: norm})

    return undo


def foldable_pairs(model: nn.Module, batch: Any) -> list[tuple[str, str]]:
    """Return the names of layers and of the normalisations that alone use their output."""
    norms = {
        name: module
        for name, module in model.named_modules()
        if type(module) in _KINDS and cast("BatchNorm", module).running_var is not None
    }
    if not norms:
        return []
    flow = record_flow(model, batch)
    found = []
    for name, layer in quantizable_layers(model):
        use = flow.only_user(name)
        if use is None or use.function != "batch_norm" or use.module not in norms:
            continue
        norm = cast("BatchNorm", norms[use.module])
        if flow.output(use.module) is not None and norm.num_features == len(layer.weight):
            found.append((name, use.module))
    return found


def folded(layer: FloatLayer, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the weight and bias that give what the layer and its normalisation give."""
    assert norm.running_var is not None
    assert norm.running_mean is not None
    ones = (1,) * (layer.weight.ndim - 1)
    with torch.no_grad():
        gain = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.affine:
            gain = gain * norm.weight.double()
        bias = -norm.running_mean.double()
        if layer.bias is not None:
            bias = bias + layer.bias.double()
        bias = bias * gain
        if norm.affine:
            bias = bias + norm.bias.double()
        weight = layer.weight.double() * gain.view(-1, *ones)
        weight = torch.empty_like(layer.weight).copy_(weight)
        return weight, bias.to(layer.weight.dtype)
