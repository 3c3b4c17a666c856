"""Which layers of a model can be quantized, and how patterns name them."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import cast

from torch import Tensor, nn

from torsh_quant._layer import QuantizedLayer
from torsh_quant._quant_conv import CONVOLUTIONS, FloatConv, QuantConv
from torsh_quant._quant_embedding import QuantEmbedding
from torsh_quant._quant_linear import QuantLinear
from torsh_quant._rounding import Rounded
from torsh_quant._spec import Scheme

FloatLayer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
FloatTable = FloatLayer | nn.Embedding
_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)


def quantizable_layers(model: nn.Module) -> Iterator[tuple[str, FloatLayer]]:
    """Yield the name and module of each plain linear layer and convolution, each module once.

    Subclasses are left out: what they do with their weight is not known. Among them is the output
    projection of ``nn.MultiheadAttention``, whose weight is read without calling the layer.
    """
    for name, module in model.named_modules():
        if type(module) in _KINDS:
            yield name, cast("FloatLayer", module)


def embedding_layers(model: nn.Module) -> Iterator[tuple[str, nn.Embedding]]:
    """Yield the name and module of each plain ``nn.Embedding``, each module once."""
    for name, module in model.named_modules():
        if type(module) is nn.Embedding:
            yield name, module


def quantized_layer(
    name: str,
    layer: FloatTable,
    scheme: Scheme,
    rounded: Rounded | None = None,
    act: tuple[Tensor, Tensor] | None = None,
) -> QuantLinear | QuantConv | QuantEmbedding:
    """Make the quantized layer of a float one, by default rounding to nearest.

    Args:
        name: Used in error messages.
        layer: The float layer.
        scheme: Its scheme.
        rounded: The integers.
        act: Scale and zero point of the input for static schemes.
    """
    if isinstance(layer, nn.Embedding):
        return QuantEmbedding.from_float(layer, scheme, name=name, rounded=rounded)
    if isinstance(layer, nn.Linear):
        return QuantLinear.from_float(layer, scheme, name=name, rounded=rounded, act=act)
    made = CONVOLUTIONS[type(layer)]
    return made.from_float(cast("FloatConv", layer), scheme, name=name, rounded=rounded, act=act)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Yield the name and module of each quantized layer, each module once."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a layer: by its whole name, its last part, or a module it is in.

    A number is no last part: ``"0"`` is the layer ``0``, not every layer that ends in ``.0``.

    Example:
        >>> matches("encoder.layer.0.fc", "encoder.*.fc"), matches("model.lm_head", "lm_head")
        (True, True)
        >>> matches("encoder.layer.0.fc", "encoder"), matches("encoder.fc", "enc")
        (True, False)
    """
    return (
        fnmatchcase(name, pattern)
        or fnmatchcase(name, f"{pattern}.*")
        or (not pattern.isdigit() and fnmatchcase(name.rpartition(".")[2], pattern))
    )


def require_matches(argument: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raise if a pattern names no layer.

    Raises:
        ValueError: Naming the pattern and what there is.
    """
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            listed = ", ".join(map(repr, names[:6])) + (", ..." if len(names) > 6 else "")
            raise ValueError(
                f"{argument} names no layer that can be quantized: {pattern!r}; "
                f"there are {listed or 'none'}"
            )


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones counted once.

    Args:
        model: Float or quantized, on any device.

    Example:
        >>> model_bytes(nn.Linear(3, 2))
        32
    """
    tensors: dict[int, Tensor] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                tensors[id(tensor)] = tensor
    return sum(tensor.nbytes for tensor in tensors.values())


def replace_modules(model: nn.Module, new: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put each module's replacement wherever the module stands, and return the model."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[name] = new[child]
    return new.get(model, model)
