"""Linear layers with an integer weight."""

from typing import Self, cast

import torch
from torch import Tensor, nn

from torsh_quant._layer import QuantizedLayer, require_floats
from torsh_quant._rounding import Rounded
from torsh_quant._spec import Scheme, group_size_for


class QuantLinear(QuantizedLayer):
    """A linear layer with an integer weight.

    State: ``weight`` int8 ``(out_features, in_features)``, or uint8 with two 4-bit integers a byte
    at 4 bits and below; ``scale`` float32 ``(out_features, groups)``; ``zero_point`` int8 of that
    shape for asymmetric schemes; ``bias`` float32; ``act_scale`` and ``act_zero_point`` float32
    ``()`` for static schemes; ``input_scale`` float32 ``(in_features,)`` where smoothing left a
    factor for the input. With dynamic integer activations each row of the input gets its own
    scale, so a row's output never depends on the other rows.

    The integer kernels keep a packed copy of the weight and renew it when a buffer changes or is
    loaded. Two things escape or disable that: a write through ``.data``, which torch does not
    count, is not seen (write ``layer.weight.copy_(...)`` instead); and buffers that were copied or
    moved under ``torch.inference_mode()`` are packed anew at every call, which is slow.

    Args:
        in_features: Size of each input row; up to 131,071 with integer activations.
        out_features: Size of each output row.
        bias: Whether to add one.
        scheme: Scheme or its short name.
        device: Where the buffers go; ``"meta"`` allocates nothing.

    Raises:
        ValueError: If the scheme does not fit the sizes.

    Example:
        >>> layer = nn.Linear(3, 1, bias=False).eval()
        >>> _ = layer.weight.data.copy_(torch.tensor([[127.0, -127.0, 1.0]]))
        >>> QuantLinear.from_float(layer)(torch.tensor([[1.0, 0.0, 1.0]]))
        tensor([[128.]])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: str | Scheme = "w8a8",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            out_features, in_features, scheme, bias=bias, device=device, layer="QuantLinear"
        )
        self.in_features = in_features
        self.out_features = out_features
        self.input_scale: Tensor | None
        self.register_buffer("input_scale", None)

    @classmethod
    def from_float(
        cls,
        layer: nn.Linear,
        scheme: str | Scheme = "w8a8",
        *,
        name: str = "Linear",
        rounded: Rounded | None = None,
        act: tuple[Tensor, Tensor] | None = None,
    ) -> Self:
        """Quantize a float layer.

        Args:
            layer: The float layer.
            scheme: Scheme or its short name.
            name: Used in error messages.
            rounded: The integers; None rounds to nearest.
            act: Scale and zero point of the input for static schemes.

        Raises:
            ValueError: If the scheme does not fit it, or is static without ``act``.
        """
        group_size_for(Scheme.parse(scheme).weight, layer.in_features, name)
        has_bias = cast("Tensor | None", layer.bias) is not None
        made = cls(
            layer.in_features,
            layer.out_features,
            has_bias,
            scheme=scheme,
            device=layer.weight.device,
        )
        made._fill(layer.weight, layer.bias, rounded, act, name)
        return made.train(layer.training)

    def float_weight(self) -> Tensor:
        """Return the float32 weight for input as the layer gets it, before ``input_scale``."""
        weight = self.dequantized_weight()
        return weight if self.input_scale is None else weight * self.input_scale

    def to_float(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """Return a float layer with the weight the integers stand for."""
        made = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.weight.device,
            dtype=dtype,
        )
        with torch.no_grad():
            made.weight.copy_(self.float_weight())
            if self.bias is not None:
                made.bias.copy_(self.bias)
        return made.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``, keeping the dtype of ``x``.

        Raises:
            TypeError: If ``x`` is not floating point.
            ValueError: If its last dimension is not ``in_features``.
        """
        require_floats(x, "QuantLinear")
        if not x.ndim or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x of shape {tuple(x.shape)} does not fit in_features={self.in_features} of "
                f"QuantLinear; its last dimension must be {self.in_features}"
            )
        return torch.ops.torsh_quant.linear(
            x if self.input_scale is None else x * self.input_scale.to(x.dtype),
            self.weight,
            self.scale,
            self.zero_point,
            self.bias,
            self.act_bits,
            self.act_scale,
            self.act_zero_point,
        )

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={bias}, {super().extra_repr()}"
