"""Float layers that compute with rounded weights and inputs while they are trained."""

from collections.abc import Callable
from math import prod
from typing import Any, Self, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from torsh_quant._fake_quantize import (
    fake_quantize_rows,
    fake_quantize_static,
    fake_quantize_weight,
    learned_scale,
    search_range,
)
from torsh_quant._fold import BatchNorm
from torsh_quant._layers import FloatLayer
from torsh_quant._numerics import quantize_weight, range_qparams, weight_qparams
from torsh_quant._rounding import Rounded
from torsh_quant._spec import Scheme, group_size_for

MOMENTUM = 0.05  # share of a new batch in the running range of the input


class QATLayer(nn.Module):
    """A float layer that rounds its weight and input as the quantized layer will.

    Its ``weight`` and ``bias`` are those of the float layer, under the same names, so a state of
    the float model loads with ``strict=False``. Beside them, where they apply:

    - ``weight_scale``: learned, ``(out_features, groups)``, in units of the buffer ``weight_unit``
      (both ``(1, 1)`` where the whole weight shares a scale), and the fixed ``weight_zero_point``;
    - ``act_scale``: learned, ``()``, in units of ``act_unit``, and the fixed ``act_zero_point``;
    - ``act_low`` and ``act_high``: the running range of the input, where nothing is learned.

    A unit of zero, or an empty range, stands for one that is not known yet. The weight's unit is
    taken from the weight, the input's from the first batch in training mode; until then the input
    stays as it is.

    The layer knows the batch normalisation after it without owning it. It rounds the weight as it
    will be once the normalisation is folded into it, and undoes the factor behind, so that the
    normalisation still sees, and learns from, the layer's own output.

    Attributes:
        enabled: Whether anything is rounded.
        ranges_frozen: Whether the scale of the input stays as it is.
        norm_frozen: Whether the normalisation stays in evaluation mode.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    scheme: Scheme
    method: str
    group_size: int
    enabled: bool
    ranges_frozen: bool
    norm_frozen: bool
    weight_scale: nn.Parameter
    weight_unit: Tensor
    weight_zero_point: Tensor | None
    act_scale: nn.Parameter
    act_unit: Tensor
    act_zero_point: Tensor
    act_low: Tensor
    act_high: Tensor
    _weight_known: bool
    _act_known: bool
    _norm: list[BatchNorm]

    @classmethod
    def from_float(cls, layer: FloatLayer, scheme: Scheme, method: str, name: str) -> Self:
        """Return a layer with the same parameters as ``layer``, which it takes over.

        Raises:
            ValueError: If the scheme does not fit the layer.
        """
        made = cls.__new__(cls)
        for key, value in layer.__dict__.items():
            made.__dict__[key] = value.copy() if isinstance(value, (dict, set)) else value
        made._set_up(scheme, method, name)
        return made

    def _set_up(self, scheme: Scheme, method: str, name: str) -> None:
        weight, learned = self.weight, self.method_learns(method)
        columns = weight[0].numel()
        self.scheme, self.method = scheme, method
        self.group_size = group_size_for(scheme.weight, columns, name)
        self.enabled, self.ranges_frozen, self.norm_frozen = True, False, False
        self._weight_known = self._act_known = False
        self._norm = []

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=weight.device)

        shape = (len(weight), columns // self.group_size)
        if scheme.weight.group == "tensor":
            shape = (1, 1)
        if learned:
            self.register_buffer("weight_unit", zeros(*shape))
            offset = None if scheme.weight.symmetric else zeros(*shape, dtype=torch.int8)
            self.register_buffer("weight_zero_point", offset)
            self.register_parameter("weight_scale", nn.Parameter(zeros(*shape) + 1))
        if scheme.is_static and learned:
            self.register_buffer("act_unit", zeros())
            self.register_buffer("act_zero_point", zeros())
            self.register_parameter("act_scale", nn.Parameter(zeros() + 1))
        elif scheme.is_static:
            self.register_buffer("act_low", zeros())
            self.register_buffer("act_high", zeros())

    @staticmethod
    def method_learns(method: str) -> bool:
        """Whether scales are learned."""
        return method == "lsq"

    @property
    def batch_norm(self) -> BatchNorm | None:
        """The normalisation that alone uses this layer's output, where it is to be folded."""
        return self._norm[0] if self._norm else None

    def link(self, norm: BatchNorm) -> None:
        """Train together with the normalisation that is to be folded into this layer."""
        self._norm = [norm]  # in a list, lest it count as a child

    @property
    def saw_data(self) -> bool:
        """Whether the scale of the input is known, or none is needed."""
        return self._act_known or not self.scheme.is_static

    def forget_weight_scale(self) -> None:
        """Take the scale from the weight anew, at the next forward pass."""
        if self.method_learns(self.method):
            self._weight_known = False
            with torch.no_grad():
                self.weight_unit.zero_()

    @torch.no_grad()
    def take_weight_scale(self) -> None:
        """Take the scale from the weight now, where it is learned and not known yet."""
        self.weight_qparams(self.weight_matrix()[0])

    def freeze_ranges(self) -> None:
        """Keep the scale of the input as it is from here on."""
        if self.ranges_frozen:
            return
        if self.scheme.is_static and self.method_learns(self.method):
            with torch.no_grad():
                self.act_unit.copy_(self._learned_act_scale(1))
        self.ranges_frozen = True

    def weight_matrix(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight as it is rounded, and the factor of the normalisation in its rows.

        Returns:
            ``(out_features, in_features)``, and ``(out_features,)`` or None.
        """
        norm, matrix = self.batch_norm, self.weight.flatten(1)
        if norm is None:
            return matrix, None
        assert norm.running_var is not None
        # Without a gradient: what the factor does before the rounding is undone behind it.
        factor = (norm.running_var.float() + norm.eps).rsqrt()
        if norm.affine:
            gain = norm.weight.detach().float()
            # A gain of zero would leave nothing to undo; such a row is trained as if it were one.
            factor = torch.where(gain == 0, factor, factor * gain)
        return (matrix.float() * factor[:, None]).to(matrix.dtype), factor

    def weight_qparams(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero point ``(out_features, groups)`` of a weight matrix."""
        spec, shape = self.scheme.weight, (len(matrix), matrix.shape[1] // self.group_size)
        if not self.method_learns(self.method):
            return weight_qparams(matrix.detach(), spec, self.group_size)
        if not self._weight_known:
            with torch.no_grad():
                scale, offset = weight_qparams(matrix.detach(), spec, self.group_size)
                rows, groups = self.weight_unit.shape
                self.weight_unit.copy_(scale[:rows, :groups])
                if self.weight_zero_point is not None and offset is not None:
                    self.weight_zero_point.copy_(offset[:rows, :groups])
            self._weight_known = True
        count = matrix.numel() // self.weight_unit.numel()
        scale = learned_scale(self.weight_scale, self.weight_unit, count, spec.qmax)
        offset = self.weight_zero_point
        return scale.expand(shape), None if offset is None else offset.expand(shape)

    def rounded(self) -> Rounded:
        """Return the integers of the weight as the layer computes with it, normalisation folded."""
        with torch.no_grad():
            matrix, _ = self.weight_matrix()
            scale, zero_point = self.weight_qparams(matrix)
            q = quantize_weight(matrix, scale, zero_point, self.scheme.weight)
            scale = scale.contiguous()
            zero_point = None if zero_point is None else zero_point.contiguous()
            norm = self.batch_norm
            if norm is not None and norm.affine:
                zero = (
                    torch.zeros_like(q)
                    if zero_point is None
                    else zero_point.repeat_interleave(self.group_size, 1)
                )
                q = torch.where((norm.weight == 0)[:, None], zero, q)
            return Rounded(q, scale, zero_point)

    def fake_weight(self) -> Tensor:
        """Return the floats that a forward pass multiplies with, normalisation folded."""
        with torch.no_grad():
            matrix, _ = self.weight_matrix()
            out = fake_quantize_weight(matrix, *self.weight_qparams(matrix), self.scheme.weight)
            norm = self.batch_norm
            if norm is not None and norm.affine:
                out[norm.weight == 0] = 0
            return out

    def input_qparams(self, features: int = 1) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of the input of a static scheme.

        Args:
            features: Values in one sample of the input; they balance the gradient.
        """
        assert self.scheme.act is not None
        if self.method_learns(self.method):
            return self._learned_act_scale(features), self.act_zero_point
        return range_qparams(self.act_low, self.act_high, self.scheme.act.bits)

    def _learned_act_scale(self, features: int) -> Tensor:
        assert self.scheme.act is not None
        if self.ranges_frozen:
            return self.act_unit + 0 * self.act_scale  # data-parallel training misses no gradient
        return learned_scale(self.act_scale, self.act_unit, features, 2**self.scheme.act.bits - 1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute as the float layer does, with what the integers stand for."""
        norm = self.batch_norm
        if norm is not None and self.norm_frozen and norm.training:
            norm.eval()
        if not self.enabled:
            return self._compute(x, self.weight, self.bias)
        matrix, factor = self.weight_matrix()
        weight = fake_quantize_weight(matrix, *self.weight_qparams(matrix), self.scheme.weight)
        weight, x = weight.view(self.weight.shape), self._rounded_input(x)
        if factor is None:
            return self._compute(x, weight, self.bias)
        out = self._compute(x, weight, None)
        ones = (1,) * (weight.ndim - 2)
        out = out * factor.reciprocal().to(out.dtype).view(-1, *ones)
        return out if self.bias is None else out + self.bias.to(out.dtype).view(-1, *ones)

    def _rounded_input(self, x: Tensor) -> Tensor:
        act = self.scheme.act
        if act is None or not x.numel():
            return x
        if act.dynamic:
            rows = x.reshape(-1, *x.shape[-self.sample_dims :])
            return fake_quantize_rows(rows, act.bits).view(x.shape)
        if self.training and not self.ranges_frozen:
            self.observe(x)
        if not self._act_known:
            return x
        scale, zero_point = self.input_qparams(prod(x.shape[-self.sample_dims :]))
        return fake_quantize_static(x, scale, zero_point, act.bits)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take or update the range of the input of a static scheme."""
        assert self.scheme.act is not None
        if self.method_learns(self.method):
            if self._act_known:
                return
            scale, zero_point = search_range(x, self.scheme.act.bits)
            low = scale * (zero_point - self.scheme.act.qmax)
            high = scale * (zero_point + self.scheme.act.qmax)
            low, high = _over_ranks(low, high)
            if not torch.isfinite(high - low) or not x.any():
                return
            scale, zero_point = range_qparams(low, high, self.scheme.act.bits)
            self.act_unit.copy_(scale)
            self.act_zero_point.copy_(zero_point)
            self._act_known = True
            return
        low, high = _over_ranks(*(end.float() for end in torch.aminmax(x)))
        low, high = low.clamp(max=0), high.clamp(min=0)
        if not self._act_known:
            if torch.isfinite(high - low) and high > low:
                self.act_low.copy_(low)
                self.act_high.copy_(high)
                self._act_known = True
            return
        finite = torch.isfinite(high - low)
        for running, new in ((self.act_low, low), (self.act_high, high)):
            running.lerp_(torch.where(finite, new, running), MOMENTUM)

    sample_dims: int

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = dict(self._buffers)  # scales stay float32 in a model of half precision
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def get_extra_state(self) -> Tensor:
        """Return version and switches as a tensor, which every kind of checkpoint can hold."""
        switches = (1, self.enabled, self.ranges_frozen, self.norm_frozen)
        return torch.tensor(switches, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take version and switches back.

        Raises:
            ValueError: If they are of another version.
        """
        version, *switches = state.tolist()
        if version != 1 or len(switches) != 3:
            raise ValueError(f"this state of a QAT layer has version {version}; known is 1")
        self.enabled, self.ranges_frozen, self.norm_frozen = map(bool, switches)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any, **options: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments, **options)
        unit = self._buffers.get("weight_unit")
        if unit is not None and f"{prefix}weight" in state_dict:
            if f"{prefix}weight_unit" not in state_dict:  # of a float model: its scales are others
                self.forget_weight_scale()
            self._weight_known = bool((unit != 0).all())
        if self.scheme.is_static:
            learned = self.method_learns(self.method)
            known = self.act_unit if learned else self.act_high - self.act_low
            self._act_known = bool(known > 0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={str(self.scheme)!r}, method={self.method!r}"


def _over_ranks(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The range over all processes: their layers must not part."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return low, high
    ends = torch.stack((-low, high))
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    return -ends[0], ends[1]


class QATLinear(QATLayer, nn.Linear):  # pyrefly: ignore[inconsistent-inheritance]
    """A linear layer in quantization-aware training; see :class:`QATLayer`."""

    sample_dims = 1

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class _QATConv(QATLayer):
    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return cast("Any", self)._conv_forward(x, weight, bias)


class QATConv1d(_QATConv, nn.Conv1d):
    """A 1-d convolution in quantization-aware training; see :class:`QATLayer`."""

    sample_dims = 2


class QATConv2d(_QATConv, nn.Conv2d):
    """A 2-d convolution in quantization-aware training; see :class:`QATLayer`."""

    sample_dims = 3


class QATConv3d(_QATConv, nn.Conv3d):
    """A 3-d convolution in quantization-aware training; see :class:`QATLayer`."""

    sample_dims = 4


QAT_LAYERS: dict[type[nn.Module], type[QATLayer]] = {
    nn.Linear: QATLinear,
    nn.Conv1d: QATConv1d,
    nn.Conv2d: QATConv2d,
    nn.Conv3d: QATConv3d,
}
