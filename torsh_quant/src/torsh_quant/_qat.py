"""Quantization-aware training: from a float model to one that trains rounded, and to integers."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from torsh_quant._fold import BatchNorm, foldable_pairs, folded
from torsh_quant._layer import QuantizedLayer
from torsh_quant._layers import (
    FloatLayer,
    embedding_layers,
    quantizable_layers,
    quantized_layer,
    quantized_layers,
    replace_modules,
)
from torsh_quant._qat_layers import QAT_LAYERS, QATLayer
from torsh_quant._quantize import DEFAULT_SKIP, _choose, _left_alone
from torsh_quant._spec import Scheme

QATMethod = Literal["lsq", "ste"]
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def prepare_qat(
    model: nn.Module,
    scheme: str | Scheme = "w8a8",
    *,
    data: Any = None,
    method: QATMethod = "lsq",
    skip: Sequence[str] = DEFAULT_SKIP,
    overrides: Mapping[str, str | Scheme | None] | None = None,
    fold_bn: bool = True,
    inplace: bool = False,
) -> nn.Module:
    """Make linear layers and convolutions train with what their integers will stand for.

    The layers keep their parameters: an optimizer made before still trains them, and a state of the
    float model loads with ``strict=False``. Learned scales are new parameters; make the optimizer
    after this call, with :func:`scale_parameters` free of weight decay. The mode of the model,
    training or evaluation, stays.

    Static schemes take the scale of the input from the first batch in training mode, and learn it
    or follow it from there.

    Args:
        model: A float model, best one that is trained already.
        scheme: As for :func:`quantize`. ``"w4a8-static"`` and below is what needs training.
        data: One batch, as for :func:`quantize`, if the model has batch normalisation: it runs
            once, to see which layer each follows.
        method: ``"lsq"`` learns the scales; ``"ste"`` takes them from the weights at each step, and
            follows the range of the inputs.
        skip: Layers that stay float, as for :func:`quantize`.
        overrides: Schemes of single layers, as for :func:`quantize`. Embeddings stay float.
        fold_bn: Train the weights as they are once batch normalisation is folded into them;
            otherwise it stays a float module behind the quantized layer.
        inplace: Change ``model`` instead of a copy.

    Returns:
        The model.

    Raises:
        ValueError: If a scheme does not fit a layer, a pattern names none, an embedding or an
            unknown method is asked for, or there is batch normalisation and no ``data``.
        RuntimeError: If the model is quantized, prepared already, on the meta device, or has
            nothing to quantize.

    Example:
        >>> net = prepare_qat(nn.Sequential(nn.Linear(4, 2)), "w4a8")
        >>> net(torch.randn(3, 4)).sum().backward()
        >>> net[0].weight_scale.grad.shape
        torch.Size([2, 1])
        >>> type(convert(net)[0]).__name__
        'QuantLinear'

    Reference:
        S. K. Esser et al., Learned step size quantization, 2020, arXiv:1902.08153; scales are
        learned in units of where they begin (see :func:`scale_parameters`). R. Krishnamoorthi,
        Quantizing deep convolutional networks for efficient inference, 2018, arXiv:1806.08342, for
        batch normalisation.
    """
    if method not in ("lsq", "ste"):
        raise ValueError(f"method={method!r} is not known; use 'lsq' or 'ste'")
    _require_float(model)
    if fold_bn and data is None and any(type(module) in _NORMS for module in model.modules()):
        raise ValueError(
            "data is missing: batch normalisation is trained as part of the layer before it, and "
            "one batch shows which that is; give data= one batch, or fold_bn=False"
        )
    parsed = Scheme.parse(scheme)
    chosen = _choose(model, parsed, skip, overrides or {})
    tables = dict(embedding_layers(model))
    for name, one in chosen.items():
        if one is not None and name in tables:
            raise ValueError(
                f"overrides names the embedding {name!r}, which is not trained rounded; leave it "
                "out"
            )
    model = model if inplace else copy.deepcopy(model)
    notes = _left_alone(model, chosen)
    layers = dict(quantizable_layers(model))
    new: dict[str, QATLayer] = {}
    for name, layer in layers.items():
        one = chosen[name]
        if one is not None and name not in notes:
            new[name] = QAT_LAYERS[type(layer)].from_float(layer, one, method, name)
    pairs: list[tuple[str, str]] = []
    if fold_bn and data is not None:
        with _evaluating(model):
            pairs = foldable_pairs(model, data)
    for name, norm in pairs:
        if name in new:
            new[name].link(cast("BatchNorm", model.get_submodule(norm)))
    leave_fused_paths(model)
    return replace_modules(model, {layers[name]: layer for name, layer in new.items()})


def convert(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Turn a model in quantization-aware training into the quantized one.

    Batch normalisations that were trained as part of a layer are folded into it. Each layer's
    integers are checked to stand for exactly the weight that the model computed with.

    Args:
        model: A model from :func:`prepare_qat`.
        inplace: Change ``model`` instead of a copy.

    Returns:
        The quantized model, in evaluation mode.

    Raises:
        RuntimeError: If no layer is prepared, the input of a static layer was never seen, a weight
            is not finite, or a layer's integers are not those it was trained with.

    Example:
        >>> net = prepare_qat(nn.Sequential(nn.Linear(4, 2)), "w8a16").eval()
        >>> x = torch.randn(3, 4)
        >>> torch.allclose(convert(net)(x), net(x))
        True
    """
    if next(qat_layers(model), None) is None:
        raise RuntimeError(
            f"{type(model).__name__} has no layer in quantization-aware training; call prepare_qat "
            "first"
        )
    model = model if inplace else copy.deepcopy(model)
    return replace_modules(model, converted(model)).eval()


def converted(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return what takes the place of each prepared layer and each folded normalisation."""
    names = {module: name for name, module in model.named_modules()}
    new: dict[nn.Module, nn.Module] = {}
    for name, layer in qat_layers(model):
        if not layer.saw_data:
            raise RuntimeError(
                f"{layer.scheme} of {name!r} needs the range of its input, which no batch in "
                "training mode has shown yet; train first, or use a dynamic scheme"
            )
        norm = layer.batch_norm
        if norm is not None:
            if norm not in names:
                raise RuntimeError(
                    f"the batch normalisation behind {name!r} was replaced after prepare_qat; "
                    "replace it before (nn.SyncBatchNorm: with fold_bn=False)"
                )
            new[norm] = nn.Identity().train(norm.training)
        new[layer] = _quantized(name, layer)
    return new


def _quantized(name: str, layer: QATLayer) -> QuantizedLayer:
    if not torch.isfinite(layer.weight_matrix()[0]).all():
        raise RuntimeError(f"the weight of {name!r} has NaN or infinity; training has failed")
    rounded, norm = layer.rounded(), layer.batch_norm
    plain = _plain(layer)
    if norm is not None:
        _, bias = folded(plain, norm)
        plain.bias = nn.Parameter(bias, requires_grad=False)
    act = layer.input_qparams() if layer.scheme.is_static else None
    with torch.no_grad():
        made = quantized_layer(name, plain, layer.scheme, rounded, act)
    trained = layer.fake_weight()
    if not torch.equal(made.dequantized_weight().to(trained.dtype), trained):
        raise RuntimeError(
            f"the integers of {name!r} do not stand for the weight it was trained with"
        )
    return made


def _plain(layer: QATLayer) -> FloatLayer:
    """A float layer of torch's own class with the parameters of a prepared one."""
    kind = next(kind for kind, made in QAT_LAYERS.items() if type(layer) is made)
    plain = cast("FloatLayer", kind.__new__(kind))
    for key, value in layer.__dict__.items():
        plain.__dict__[key] = value.copy() if isinstance(value, (dict, set)) else value
    plain._parameters = {name: layer._parameters[name] for name in ("weight", "bias")}
    plain._buffers = {}
    return plain


def qat_layers(model: nn.Module) -> Iterator[tuple[str, QATLayer]]:
    """Yield the name and module of each prepared layer, each module once."""
    for name, module in model.named_modules():
        if isinstance(module, QATLayer):
            yield name, module


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the learned scales, which are to have no weight decay.

    They are factors near 1, in units of the scale they began with, so a learning rate is the share
    of it that one step of Adam changes. That of the weights usually does.

    Args:
        model: A model from :func:`prepare_qat`.

    Example:
        >>> net = prepare_qat(nn.Sequential(nn.Linear(4, 2)), "w4a8-static")
        >>> scales = scale_parameters(net)
        >>> [tuple(scale.shape) for scale in scales]
        [(2, 1), ()]
        >>> rest = [p for p in net.parameters() if all(p is not scale for scale in scales)]
        >>> groups = [{"params": rest}, {"params": scales, "weight_decay": 0.0}]
        >>> _ = torch.optim.AdamW(groups, lr=1e-3)
    """
    found: list[nn.Parameter] = []
    for _, layer in qat_layers(model):
        for name in ("weight_scale", "act_scale"):
            parameter = layer._parameters.get(name)
            if isinstance(parameter, nn.Parameter):
                found.append(parameter)
    return found


def freeze_batch_norm(model: nn.Module) -> None:
    """Keep the statistics of the normalisations that are trained as part of layers.

    Best called when most of the training is done: from here on the layers train as they will run.
    ``model.train()`` does not undo it.

    Args:
        model: A model from :func:`prepare_qat`.

    Raises:
        RuntimeError: If no layer is prepared.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
        >>> net = prepare_qat(net, data=torch.ones(4, 1, 2, 2))
        >>> freeze_batch_norm(net)
        >>> _ = net.train()(torch.ones(4, 1, 2, 2))
        >>> net[1].training
        False
    """
    for layer in _required(model):
        layer.norm_frozen = True


def freeze_ranges(model: nn.Module) -> None:
    """Keep the scales of the inputs of static schemes as they are, learned or followed.

    Args:
        model: A model from :func:`prepare_qat`.

    Raises:
        RuntimeError: If no layer is prepared, or one has not seen its input yet.
    """
    layers = _required(model)
    for name, layer in qat_layers(model):
        if not layer.saw_data:
            raise RuntimeError(
                f"{name!r} has not seen its input in training mode yet; train first, then freeze"
            )
    for layer in layers:
        layer.freeze_ranges()


def _required(model: nn.Module) -> list[QATLayer]:
    found = [layer for _, layer in qat_layers(model)]
    if not found:
        raise RuntimeError(
            f"{type(model).__name__} has no layer in quantization-aware training; call prepare_qat "
            "first"
        )
    return found


def _require_float(model: nn.Module) -> None:
    if (found := next(quantized_layers(model), None)) is not None:
        raise RuntimeError(
            f"{found[0] or type(model).__name__!r} is quantized already; prepare the float model, "
            "or call dequantize first"
        )
    if (prepared := next(qat_layers(model), None)) is not None:
        raise RuntimeError(f"{prepared[0] or type(model).__name__!r} is prepared already")
    tensors: Iterable[tuple[str, Tensor]] = (*model.named_parameters(), *model.named_buffers())
    for name, tensor in tensors:
        if tensor.is_meta:
            raise RuntimeError(f"{name!r} is on the meta device; load the weights before")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def leave_fused_paths(model: nn.Module) -> None:
    # In evaluation torch's encoder layers hand their linear layers' weights to one fused float
    # kernel instead of calling the layers.
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = module.use_nested_tensor = False
