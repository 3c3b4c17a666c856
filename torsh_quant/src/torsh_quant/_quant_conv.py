"""Convolutions with an integer weight, in one, two and three dimensions."""

from typing import ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torsh_quant._layer import QuantizedLayer, require_floats
from torsh_quant._rounding import Rounded
from torsh_quant._spec import Scheme

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
FloatConv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Sizes = int | tuple[int, ...]
_SIDES = ("length", "height, width", "depth, height, width")


class QuantConv(QuantizedLayer):
    """What the three have in common; use :class:`QuantConv1d`, 2d or 3d."""

    dims: ClassVar[int]
    float_class: ClassVar[type[nn.Conv1d | nn.Conv2d | nn.Conv3d]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: str | Sizes = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        scheme: str | Scheme = "w8a8",
        device: torch.device | str | None = None,
    ) -> None:
        # A float layer without storage checks the arguments and works out the paddings.
        like = self.float_class(
            in_channels,
            out_channels,
            kernel_size,  # pyrefly: ignore[bad-argument-type]
            stride,  # pyrefly: ignore[bad-argument-type]
            padding,  # pyrefly: ignore[bad-argument-type]
            dilation,  # pyrefly: ignore[bad-argument-type]
            groups,
            bias,
            padding_mode,
            device="meta",
        )
        self._set_up(like, scheme, device, type(self).__name__)

    def _set_up(
        self, like: FloatConv, scheme: str | Scheme, device: torch.device | str | None, name: str
    ) -> None:
        columns = like.in_channels // like.groups
        for side in like.kernel_size:
            columns *= side
        QuantizedLayer.__init__(
            self,
            like.out_channels,
            columns,
            scheme,
            bias=cast("Tensor | None", like.bias) is not None,
            device=device,
            layer=name,
        )
        self.in_channels = like.in_channels
        self.out_channels = like.out_channels
        self.kernel_size: tuple[int, ...] = tuple(like.kernel_size)
        self.stride: tuple[int, ...] = tuple(like.stride)
        self.dilation: tuple[int, ...] = tuple(like.dilation)
        self.groups = like.groups
        self.padding: str | tuple[int, ...] = (
            like.padding if isinstance(like.padding, str) else tuple(like.padding)
        )
        self.padding_mode = cast("PaddingMode", like.padding_mode)
        self._borders: list[int] = list(like._reversed_padding_repeated_twice)
        self.channels_last: bool = _is_channels_last(like.weight)

    @classmethod
    def from_float(
        cls,
        layer: FloatConv,
        scheme: str | Scheme = "w8a8",
        *,
        name: str = "Conv",
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
        made = cls.__new__(cls)
        made._set_up(layer, scheme, layer.weight.device, name)
        made._fill(layer.weight, layer.bias, rounded, act, name)
        return made.train(layer.training)

    def to_float(self, dtype: torch.dtype = torch.float32) -> FloatConv:
        """Return a float layer with the weight the integers stand for."""
        made = self.float_class(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # pyrefly: ignore[bad-argument-type]
            self.stride,  # pyrefly: ignore[bad-argument-type]
            self.padding,  # pyrefly: ignore[bad-argument-type]
            self.dilation,  # pyrefly: ignore[bad-argument-type]
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
        if self.channels_last:
            made = made.to(memory_format=channels_last(self.dims))
        return made.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, in_channels, ...)``, or one sample without ``batch``.

        Raises:
            TypeError: If ``x`` is not floating point.
            ValueError: If it has other dimensions, or not ``in_channels`` channels.
        """
        kind = type(self).__name__
        require_floats(x, kind)
        if x.ndim not in (self.dims + 1, self.dims + 2) or x.shape[-self.dims - 1] != (
            self.in_channels
        ):
            raise ValueError(
                f"x of shape {tuple(x.shape)} does not fit in_channels={self.in_channels} of "
                f"{kind}; pass (batch, {self.in_channels}, {_SIDES[self.dims - 1]}), or one sample "
                "without batch"
            )
        if x.ndim == self.dims + 1:
            return self.forward(x[None])[0]
        padding = tuple(self._borders[-2::-2])
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._borders, mode=self.padding_mode), (0,) * self.dims
        elif self._borders[::2] != self._borders[1::2]:
            x, padding = F.pad(x, self._borders), (0,) * self.dims
        return torch.ops.torsh_quant.convolution(
            x,
            self.weight,
            self.scale,
            self.zero_point,
            self.bias,
            self.act_bits,
            self.act_scale,
            self.act_zero_point,
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


class QuantConv1d(QuantConv):
    """A 1-d convolution with an integer weight; see :class:`QuantConv2d`.

    Example:
        >>> layer = nn.Conv1d(1, 1, 2, bias=False).eval()
        >>> _ = layer.weight.data.copy_(torch.tensor([[[127.0, 1.0]]]))
        >>> QuantConv1d.from_float(layer)(torch.ones(1, 1, 3))
        tensor([[[128., 128.]]])
    """

    dims = 1
    float_class = nn.Conv1d


class QuantConv2d(QuantConv):
    """A 2-d convolution with an integer weight.

    The weight is kept as a matrix ``(out_channels, in_channels / groups * height * width)`` in the
    form :class:`QuantLinear` describes. With dynamic integer activations each image gets its own
    scale, so its output does not depend on the other images of the batch. Output is laid out as
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

    dims = 2
    float_class = nn.Conv2d


class QuantConv3d(QuantConv):
    """A 3-d convolution with an integer weight; see :class:`QuantConv2d`.

    Example:
        >>> layer = nn.Conv3d(1, 1, (2, 1, 1), bias=False).eval()
        >>> _ = layer.weight.data.copy_(torch.tensor([127.0, 1.0]).view(1, 1, 2, 1, 1))
        >>> QuantConv3d.from_float(layer)(torch.ones(1, 1, 2, 1, 2)).flatten()
        tensor([128., 128.])
    """

    dims = 3
    float_class = nn.Conv3d


CONVOLUTIONS: dict[type[FloatConv], type[QuantConv]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
}


def channels_last(dims: int) -> torch.memory_format:
    """The layout with channels last; of 1-d convolutions there is none."""
    formats = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
    return formats[dims - 1]


def _is_channels_last(weight: Tensor) -> bool:
    # By its strides: with one input channel both layouts count as contiguous.
    _, channels, *sides = weight.shape
    if len(sides) == 1 or weight[0].numel() <= 1:
        return False
    step = channels
    steps: list[int] = []
    for side in reversed(sides):
        steps.insert(0, step)
        step *= side
    return weight.stride() == (step, 1, *steps) and not (
        all(side == 1 for side in sides) and weight.stride(2) == 1
    )
