"""Quantized layers: ordinary modules whose weights are ordinary integer buffers."""

from collections.abc import Callable
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torsh_quant import _ops as _ops  # registers the operators called below
from torsh_quant._cpu import forget
from torsh_quant._numerics import (
    dequantize_weight,
    pack_int4,
    packed_width,
    quantize_weight,
    stored_integers,
    weight_qparams,
)
from torsh_quant._spec import Scheme, group_size_for

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
LARGEST_IN_FEATURES = 131_071  # beyond it 2**31 no longer holds a sum of 8-bit products


class QuantizedLayer(nn.Module):
    """What quantized layers share: the buffers, and how they are filled, loaded and converted.

    Args:
        rows: Output features or channels.
        columns: Weights of one of them.
        scheme: Scheme or its short name.
        bias: Whether there is one.
        device: Where the buffers go.
        layer: Name used in error messages.
    """

    _version = 1
    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        rows: int,
        columns: int,
        scheme: str | Scheme,
        *,
        bias: bool,
        device: torch.device | str | None,
        layer: str,
    ) -> None:
        super().__init__()
        self.scheme: Scheme = Scheme.parse(scheme)
        self.columns = columns
        spec = self.scheme.weight
        if columns > LARGEST_IN_FEATURES and self.scheme.act is not None:
            raise ValueError(
                f"in_features={columns} of {layer!r} may overflow 32-bit sums; integer "
                f"activations take up to {LARGEST_IN_FEATURES}, 'w8a16' takes any"
            )
        self.group_size: int = group_size_for(spec, columns, layer)
        self.packed: bool = spec.bits <= 4
        groups = columns // self.group_size
        width = packed_width(columns, self.group_size) if self.packed else columns
        dtype = torch.uint8 if self.packed else torch.int8
        # Never inference tensors: a kernel's packed copy is renewed when their version changes.
        with torch.inference_mode(False):
            self.register_buffer("weight", torch.zeros(rows, width, dtype=dtype, device=device))
            self.register_buffer("scale", torch.ones(rows, groups, device=device))
            zero_point = None
            if not spec.symmetric:
                zero_point = torch.zeros(rows, groups, dtype=torch.int8, device=device)
            self.register_buffer("zero_point", zero_point)
            self.register_buffer("bias", torch.zeros(rows, device=device) if bias else None)

    def _fill(self, weight: Tensor, bias: Tensor | None) -> None:
        spec = self.scheme.weight
        matrix = weight.detach().reshape(weight.shape[0], -1)
        scale, zero_point = weight_qparams(matrix, spec, self.group_size)
        q = quantize_weight(matrix, scale, zero_point, spec)
        self.weight.copy_(pack_int4(q, self.group_size) if self.packed else q)
        self.scale.copy_(scale)
        if self.zero_point is not None and zero_point is not None:
            self.zero_point.copy_(zero_point)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias.detach())

    @property
    def act_bits(self) -> int:
        """Bits the scheme asks of the activations; 0 where they stay floating point."""
        return self.scheme.act.bits if self.scheme.act else 0

    def integers(self) -> Tensor:
        """Return the weight as int8 ``(out_features, in_features)``, unpacked."""
        return stored_integers(self.weight, self.columns, self.scale.shape[1])

    def dequantized_weight(self) -> Tensor:
        """Return the float32 matrix ``(out_features, in_features)`` the integers stand for."""
        return dequantize_weight(self.integers(), self.scale, self.zero_point)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Integers and scales define the weight: .half() and .to(dtype) leave them as they are.
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        version = local_metadata.get("version") or 1
        if version > self._version:
            error_msgs.append(f"{prefix[:-1]!r} has version {version}; this is {self._version}")
        for name, buffer in self._buffers.items():
            found = state_dict.get(prefix + name)
            if buffer is not None and isinstance(found, Tensor) and found.dtype != buffer.dtype:
                error_msgs.append(
                    f"{prefix}{name} is {found.dtype}, not the {buffer.dtype} of {self.scheme}: "
                    "it belongs to a float model or to another scheme"
                )
                return
        forget(self.weight)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        forget(self.weight)  # another thread may have packed what was half loaded

    def extra_repr(self) -> str:
        return f"scheme={str(self.scheme)!r}, group_size={self.group_size}"


class QuantLinear(QuantizedLayer):
    """A linear layer with an integer weight.

    State: ``weight`` int8 ``(out_features, in_features)``, or uint8 with two 4-bit integers a byte
    at 4 bits and below; ``scale`` float32 ``(out_features, groups)``; ``zero_point`` int8 of that
    shape for asymmetric schemes; ``bias`` float32. With integer activations each row of the input
    gets its own scale, so a row's output never depends on the other rows.

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

    @classmethod
    def from_float(
        cls, layer: nn.Linear, scheme: str | Scheme = "w8a8", *, name: str = "Linear"
    ) -> Self:
        """Quantize a float layer, rounding to nearest.

        Raises:
            ValueError: If the scheme does not fit it; ``name`` is used in the message.
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
        made._fill(layer.weight, layer.bias)
        return made.train(layer.training)

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
            made.weight.copy_(self.dequantized_weight())
            if self.bias is not None:
                made.bias.copy_(self.bias)
        return made.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``, keeping the dtype of ``x``.

        Raises:
            TypeError: If ``x`` is not floating point.
            ValueError: If its last dimension is not ``in_features``.
        """
        _require_floats(x, "QuantLinear")
        if not x.ndim or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x of shape {tuple(x.shape)} does not fit in_features={self.in_features} of "
                f"QuantLinear; its last dimension must be {self.in_features}"
            )
        return torch.ops.torsh_quant.linear(
            x, self.weight, self.scale, self.zero_point, self.bias, self.act_bits
        )

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={bias}, {super().extra_repr()}"


class QuantConv2d(QuantizedLayer):
    """A 2-d convolution with an integer weight.

    The weight is kept as a matrix ``(out_channels, in_channels / groups * height * width)`` in the
    form :class:`QuantLinear` describes. With integer activations each image gets its own scale, so
    its output does not depend on the other images of the batch. Output is laid out as
    :class:`torch.nn.Conv2d` lays it out: channels last if the input or the layer is. The integer
    kernels of CPUs work channels last inside, so that layout saves them two copies.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the window.
        stride: Step of the window.
        padding: Zeros on both sides, or ``"same"`` or ``"valid"``.
        dilation: Distance between the window's elements.
        groups: Number of independent convolutions side by side.
        bias: Whether to add one.
        padding_mode: As in :class:`torch.nn.Conv2d`.
        scheme: Scheme or its short name.
        device: Where the buffers go.

    Raises:
        ValueError: If the scheme does not fit the sizes.

    Example:
        >>> layer = nn.Conv2d(1, 1, 2, bias=False).eval()
        >>> _ = layer.weight.data.copy_(torch.tensor([[[[127.0, 1.0], [-1.0, 0.0]]]]))
        >>> QuantConv2d.from_float(layer)(torch.ones(1, 1, 2, 3))
        tensor([[[[127., 127.]]]])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        scheme: str | Scheme = "w8a8",
        device: torch.device | str | None = None,
    ) -> None:
        # A float layer without storage checks the arguments and works out the paddings.
        like = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device="meta",
        )
        self._set_up(like, scheme, device, "QuantConv2d")

    def _set_up(
        self, like: nn.Conv2d, scheme: str | Scheme, device: torch.device | str | None, name: str
    ) -> None:
        height, width = _pair(like.kernel_size)
        QuantizedLayer.__init__(
            self,
            like.out_channels,
            like.in_channels // like.groups * height * width,
            scheme,
            bias=cast("Tensor | None", like.bias) is not None,
            device=device,
            layer=name,
        )
        self.in_channels = like.in_channels
        self.out_channels = like.out_channels
        self.kernel_size = (height, width)
        self.stride = _pair(like.stride)
        self.dilation = _pair(like.dilation)
        self.groups = like.groups
        self.padding: str | tuple[int, int] = (
            like.padding if isinstance(like.padding, str) else _pair(like.padding)
        )
        self.padding_mode = cast("PaddingMode", like.padding_mode)
        self._borders: list[int] = list(like._reversed_padding_repeated_twice)
        self.channels_last: bool = _is_channels_last(like.weight)

    @classmethod
    def from_float(
        cls, layer: nn.Conv2d, scheme: str | Scheme = "w8a8", *, name: str = "Conv2d"
    ) -> Self:
        """Quantize a float layer, rounding to nearest.

        Raises:
            ValueError: If the scheme does not fit it; ``name`` is used in the message.
        """
        made = cls.__new__(cls)
        made._set_up(layer, scheme, layer.weight.device, name)
        made._fill(layer.weight, layer.bias)
        return made.train(layer.training)

    def to_float(self, dtype: torch.dtype = torch.float32) -> nn.Conv2d:
        """Return a float layer with the weight the integers stand for."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        made = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device=self.weight.device,
            dtype=dtype,
        )
        with torch.no_grad():
            made.weight.copy_(self.dequantized_weight().view(made.weight.shape))
            if self.bias is not None and made.bias is not None:
                made.bias.copy_(self.bias)
        return made.to(memory_format=layout).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, in_channels, height, width)``, or one image without ``batch``.

        Raises:
            TypeError: If ``x`` is not floating point.
            ValueError: If it has other dimensions, or not ``in_channels`` channels.
        """
        _require_floats(x, "QuantConv2d")
        if x.ndim not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"x of shape {tuple(x.shape)} does not fit in_channels={self.in_channels} of "
                f"QuantConv2d; pass (batch, {self.in_channels}, height, width), or one image "
                "without batch"
            )
        if x.ndim == 3:
            return self.forward(x[None])[0]
        left, right, top, bottom = self._borders
        padding = (top, left)
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._borders, mode=self.padding_mode), (0, 0)
        elif (left, top) != (right, bottom):
            x, padding = F.pad(x, self._borders), (0, 0)
        return torch.ops.torsh_quant.conv2d(
            x,
            self.weight,
            self.scale,
            self.zero_point,
            self.bias,
            self.act_bits,
            self.kernel_size,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self.channels_last,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, bias={self.bias is not None}, {super().extra_repr()}"
        )


def _require_floats(x: Tensor, layer: str) -> None:
    if not x.is_floating_point():
        raise TypeError(
            f"x is {x.dtype}; {layer} takes floating-point input and rounds it to integers "
            "itself: pass x.float(), scaled as the float layer had it"
        )


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    first, second = values
    return first, second


def _is_channels_last(weight: Tensor) -> bool:
    # By its strides: with one input channel both layouts count as contiguous.
    _, channels, height, width = weight.shape
    strides = (channels * height * width, 1, width * channels, channels)
    return (
        weight.stride() == strides
        and channels * height * width > 1
        and not (height == width == 1 and weight.stride(2) == 1)
    )
