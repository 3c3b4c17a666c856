"""The methods that ``quantize`` takes, and the order in which a chain of them works."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias, cast

from torch import Tensor

from torsh_quant._adaround import AdaRound
from torsh_quant._equalize import Equalize
from torsh_quant._gptq import GPTQ
from torsh_quant._hqq import HQQ
from torsh_quant._rounding import Rounded, round_to_nearest
from torsh_quant._smooth import SmoothQuant
from torsh_quant._spec import IntSpec
from torsh_quant._statistics import Statistics


class Rounding(Protocol):
    """A method that chooses the integers of a weight."""

    needs_data: ClassVar[bool]

    def round(
        self, weight: Tensor, spec: IntSpec, group_size: int, statistics: Statistics | None
    ) -> Rounded:
        """Round a weight ``(out_features, in_features)``."""
        ...


@dataclass(frozen=True)
class RTN:
    """Round each weight to the nearest integer. At 4 bits and below, scales are searched.

    Example:
        >>> import torch
        >>> RTN().round(torch.tensor([[1.0, 127.0]]), IntSpec(8), 2, None).q
        tensor([[  1, 127]], dtype=torch.int8)
    """

    needs_data: ClassVar[bool] = False

    def round(
        self, weight: Tensor, spec: IntSpec, group_size: int, statistics: Statistics | None
    ) -> Rounded:
        """Round a weight ``(out_features, in_features)``; ``statistics`` are not looked at."""
        del statistics
        return round_to_nearest(weight, spec, group_size)


@dataclass(frozen=True)
class BiasCorrection:
    """Move each bias so that rounding the weights leaves the mean of the outputs as it was.

    Adds ``(W - W_q) E[x]``, with the mean input as quantized layers before it give it. A layer
    without a bias gets one.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torsh_quant import quantize
        >>> net = nn.Sequential(nn.Linear(3, 1)).eval()
        >>> x = torch.rand(64, 3)
        >>> small = quantize(net, "w3a16", data=[x], method=BiasCorrection())
        >>> bool((small(x).mean() - net(x).mean()).abs() < 1e-6)
        True

    Reference:
        M. Nagel et al., Data-free quantization through weight equalization and bias correction,
        2019, arXiv:1906.04721, section 4.2, with means from data.
    """


Method: TypeAlias = Equalize | SmoothQuant | Rounding | BiasCorrection

_NAMES: dict[str, type] = {
    "equalize": Equalize,
    "smoothquant": SmoothQuant,
    "rtn": RTN,
    "gptq": GPTQ,
    "hqq": HQQ,
    "adaround": AdaRound,
    "bias_correction": BiasCorrection,
}


@dataclass(frozen=True)
class Chain:
    """Methods in the order in which they work.

    Args:
        before: Change the float model, without changing its output.
        rounding: Chooses integers.
        after: Corrects biases; None leaves them.
    """

    before: tuple[Equalize | SmoothQuant, ...]
    rounding: Rounding
    after: BiasCorrection | None

    @property
    def needs_data(self) -> bool:
        """Whether any of them looks at activations."""
        return bool(self.before or self.after or self.rounding.needs_data)


def parse_methods(method: "str | Method | Sequence[str | Method]") -> Chain:
    """Sort a chain of methods.

    Args:
        method: One method or several, or their names.

    Raises:
        ValueError: If one is not known, or there are two ways of rounding.
        TypeError: If one is no method.
    """
    given = [method] if isinstance(method, str) or not isinstance(method, Sequence) else method
    before: list[Equalize | SmoothQuant] = []
    roundings: list[Rounding] = []
    after: BiasCorrection | None = None
    for one in given:
        if isinstance(one, str) and one not in _NAMES:
            raise ValueError(f"method={one!r} is not known; use {', '.join(map(repr, _NAMES))}")
        made = _NAMES[one]() if isinstance(one, str) else one
        if isinstance(made, (Equalize, SmoothQuant)):
            before.append(made)
        elif isinstance(made, BiasCorrection):
            after = made
        elif hasattr(made, "round") and hasattr(made, "needs_data"):
            roundings.append(cast("Rounding", made))
        else:
            raise TypeError(
                f"method has {made!r}; use {', '.join(map(repr, _NAMES))}, or an object such as "
                "GPTQ(damp=0.01)"
            )
    if len(roundings) > 1:
        raise ValueError(
            f"method has {' and '.join(type(one).__name__ for one in roundings)}, which both "
            "choose the integers; keep one"
        )
    return Chain(tuple(before), roundings[0] if roundings else RTN(), after)
