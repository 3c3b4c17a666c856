"""What quantized layers share: ordinary integer buffers in ordinary modules."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from torsh_quant import _ops as _ops  # registers the operators called below
from torsh_quant._cpu import forget
from torsh_quant._numerics import (
    dequantize_weight,
    pack_int4,
    packed_width,
    stored_integers,
)
from torsh_quant._rounding import Rounded, round_to_nearest
from torsh_quant._spec import Scheme, group_size_for

LARGEST_IN_FEATURES = 131_071  # beyond it 2**31 no longer holds a sum of 8-bit products


class QuantizedLayer(nn.Module):
    """The buffers of a quantized layer, and how they are filled, loaded and converted.

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
    act_scale: Tensor | None
    act_zero_point: Tensor | None

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
            static = self.scheme.is_static
            self.register_buffer("act_scale", torch.ones((), device=device) if static else None)
            offset = torch.zeros((), device=device) if static else None
            self.register_buffer("act_zero_point", offset)

    def _fill(
        self,
        weight: Tensor,
        bias: Tensor | None,
        rounded: Rounded | None,
        act: tuple[Tensor, Tensor] | None,
        layer: str,
    ) -> None:
        matrix = weight.detach().reshape(weight.shape[0], -1)
        if rounded is None:
            rounded = round_to_nearest(matrix, self.scheme.weight, self.group_size)
        q = rounded.q
        self.weight.copy_(pack_int4(q, self.group_size) if self.packed else q)
        self.scale.copy_(rounded.scale)
        if self.zero_point is not None and rounded.zero_point is not None:
            self.zero_point.copy_(rounded.zero_point)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias.detach())
        if self.act_scale is not None and self.act_zero_point is not None:
            if act is None:
                raise ValueError(
                    f"{self.scheme} takes the scale of the input of {layer!r} from calibration "
                    "data: give quantize(..., data=), or use a dynamic scheme"
                )
            self.act_scale.copy_(act[0])
            self.act_zero_point.copy_(act[1])

    def to_float(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return a float layer with the weight the integers stand for."""
        raise NotImplementedError

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
        smoothing = state_dict.get(f"{prefix}input_scale")
        if self._buffers.get("input_scale", smoothing) is None and isinstance(smoothing, Tensor):
            self._buffers["input_scale"] = torch.ones(self.columns, device=self.weight.device)
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


def require_floats(x: Tensor, layer: str) -> None:
    """Raise if the input of a layer is of integers.

    Raises:
        TypeError: Naming the layer and what to pass.
    """
    if not x.is_floating_point():
        raise TypeError(
            f"x is {x.dtype}; {layer} takes floating-point input and rounds it to integers "
            "itself: pass x.float(), scaled as the float layer had it"
        )
