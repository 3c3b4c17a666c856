"""Second moments of a layer's input: what rounding with data needs to know of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torsh_quant._layers import FloatLayer
from torsh_quant._quant_conv import FloatConv

_BLOCK = 2**22  # numbers of windows at a time: 16 MiB
_MOST_ROWS = 8192  # of a block: what float32 sums are trusted with


@dataclass(frozen=True)
class Statistics:
    """Moments of the rows that a weight matrix is multiplied with.

    A convolution's rows are its windows, flattened as its weight is; with ``groups``, each group of
    output channels has rows of its own.

    Args:
        hessian: ``(groups, columns, columns)`` float32, the mean of ``x x^T``. The mean squared
            change of the outputs that a change ``d`` of the weight makes is the diagonal of
            ``d hessian d^T``.
        mean: ``(groups, columns)`` float32.
        largest: ``(in_channels,)`` float32, the largest magnitude of each input feature or channel.
        rows: How many rows were seen.
    """

    hessian: Tensor
    mean: Tensor
    largest: Tensor
    rows: int

    def error(self, change: Tensor) -> Tensor:
        """Mean squared change of each output when the weight changes.

        Args:
            change: ``(out_features, columns)``.

        Returns:
            ``(out_features,)`` float64.

        Example:
            >>> one = Statistics(torch.eye(2)[None], torch.zeros(1, 2), torch.ones(2), rows=4)
            >>> one.error(torch.tensor([[3.0, 4.0]]))
            tensor([25.], dtype=torch.float64)
        """
        parts = change.double().unflatten(0, (len(self.hessian), -1))
        return (parts @ self.hessian.double()).mul_(parts).sum(2).flatten().clamp_(min=0)


class Collector:
    """Adds up the moments of a layer's input, batch by batch.

    Products are float32 over up to 8,192 rows, and those are added in float64: a sum over any
    number of batches is as good as that of one block, at the speed and the memory of float32. They
    are true float32 products whatever ``torch.set_float32_matmul_precision`` or an autocast says:
    ten bits of mantissa make a matrix that has no Cholesky factor.

    Args:
        layer: The layer.

    Example:
        >>> collector = Collector(nn.Linear(2, 1))
        >>> collector.observe(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
        >>> found = collector.statistics()
        >>> found.hessian.tolist(), found.mean.tolist(), found.largest.tolist()
        ([[[5.0, -5.0], [-5.0, 10.0]]], [[2.0, -1.0]], [3.0, 4.0])
    """

    def __init__(self, layer: FloatLayer) -> None:
        self.layer = layer
        self._rows = 0
        self._products: Tensor | None = None
        self._sums: Tensor | None = None
        self._largest: Tensor | None = None

    def observe(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            x: The layer's input: ``(..., in_features)``, or ``(batch, channels, ...)`` with or
                without the batch.
            mask: For linear layers, bool over leading dimensions of ``x``; False leaves a row out,
                such as a padded token. A mask of another shape is not for this input (one of pooled
                tokens, say) and changes nothing.

        Raises:
            ValueError: If what counts of ``x`` has NaN or infinity. It is then as if ``x`` had not
                been there.
        """
        x = x.detach()
        channel = -1
        if not isinstance(self.layer, nn.Linear):
            channel = -len(self.layer.kernel_size) - 1
        elif mask is not None and x.ndim > mask.ndim and x.shape[: mask.ndim] == mask.shape:
            x = x[mask]
        if not x.numel():
            return
        largest = x.abs().movedim(channel, 0).flatten(1).amax(1).float()
        if not torch.isfinite(largest).all():
            raise ValueError("it has NaN or infinity")
        with full_precision(x.device):
            for rows in _rows(self.layer, x):
                self._add(rows)
        if self._largest is not None:
            largest = torch.maximum(largest, self._largest)
        self._largest = largest

    def _add(self, rows: Tensor) -> None:
        products, sums = rows.mT @ rows, rows.sum(1, dtype=torch.float64)
        if self._products is None or self._sums is None:
            self._products, self._sums = products.double(), sums
        else:
            self._products += products
            self._sums += sums
        self._rows += rows.shape[1]

    def statistics(self) -> Statistics:
        """Return the means.

        Raises:
            ValueError: If nothing was seen, or squares of what was seen are beyond float32.
        """
        if self._products is None or self._sums is None or self._largest is None or not self._rows:
            raise ValueError("no input was seen; give data that has some")
        hessian = (self._products / self._rows).float()
        if not torch.isfinite(hessian).all():
            raise ValueError(
                f"the input reaches {self._largest.max():.3g}, whose square is beyond float32; "
                "give data that keeps the model's activations in range"
            )
        return Statistics(hessian, (self._sums / self._rows).float(), self._largest, self._rows)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what was added up so far; empty before the first batch."""
        if self._products is None or self._sums is None or self._largest is None:
            return {}
        return {
            "products": self._products.clone(),
            "sums": self._sums.clone(),
            "largest": self._largest.clone(),
            "rows": torch.tensor(self._rows),
        }

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Go on from there, to the same bits.

        Raises:
            ValueError: If it is not the state of such a layer.
        """
        if not state_dict:
            self._products = self._sums = self._largest = None
            self._rows = 0
            return
        groups = 1 if isinstance(self.layer, nn.Linear) else self.layer.groups
        columns, channels = self.layer.weight[0].numel(), self.layer.weight.shape[1] * groups
        wanted = {
            "products": ((groups, columns, columns), torch.float64),
            "sums": ((groups, columns), torch.float64),
            "largest": ((channels,), torch.float32),
            "rows": ((), torch.int64),
        }
        if set(state_dict) != set(wanted):
            raise ValueError(f"state_dict has {sorted(state_dict)}; it must have {sorted(wanted)}")
        for name, (shape, dtype) in wanted.items():
            found = state_dict[name]
            if tuple(found.shape) != shape or found.dtype != dtype:
                raise ValueError(
                    f"{name!r} of state_dict is {found.dtype} {tuple(found.shape)}; that of "
                    f"{self.layer} is {dtype} {shape}"
                )
        device = self.layer.weight.device
        self._products, self._sums, self._largest = (
            state_dict[name].to(device, copy=True) for name in ("products", "sums", "largest")
        )
        self._rows = int(state_dict["rows"].item())


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices as float32, whatever autocast or global settings say."""
    named = cast("Any", torch.backends)  # which has more than its types say
    backends = named.cuda.matmul, named.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False), torch.no_grad():
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _rows(layer: FloatLayer, x: Tensor) -> Iterator[Tensor]:
    """The rows of a batch, ``(groups, rows, columns)`` float32, in blocks."""
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, layer.in_features)
        for block in rows.split(_rows_at_once(layer.in_features)):
            yield block.float()[None]
        return
    conv = cast("FloatConv", layer)
    if x.ndim == len(conv.kernel_size) + 1:
        x = x[None]
    columns = conv.in_channels * prod(conv.kernel_size)
    most = _rows_at_once(columns)
    windows = _windows(conv, x)
    places = prod(windows.shape[2 : 2 + len(conv.kernel_size)])
    for images in windows.split(max(1, most // max(1, places))):
        # Of an image too large, some lines at a time: the windows are views until here.
        for lines in images.split(max(1, most * images.shape[2] // max(1, places)), dim=2):
            block = _flat(lines, len(conv.kernel_size)).float()
            yield block.view(len(block), conv.groups, -1).transpose(0, 1)


def _rows_at_once(columns: int) -> int:
    return min(_MOST_ROWS, max(1, _BLOCK // columns))


def _windows(conv: FloatConv, x: Tensor) -> Tensor:
    """All windows as a view of the padded input, ``(batch, channels, places..., window...)``."""
    borders = list(conv._reversed_padding_repeated_twice)
    if any(borders):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, borders, mode=mode)
    for dim, (side, step, dilation) in enumerate(
        zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), 2
    ):
        x = x.unfold(dim, (side - 1) * dilation + 1, step)[..., ::dilation]
    return x


def _flat(windows: Tensor, dims: int) -> Tensor:
    """Windows as rows, ``(windows, columns)``."""
    order = (0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    moved = windows.permute(order)
    return moved.reshape(prod(moved.shape[: 1 + dims]), -1)
