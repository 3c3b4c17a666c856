"""What quantization did to a model, layer by layer."""

from dataclasses import dataclass

from torsh_quant._layer import QuantizedLayer
from torsh_quant._layers import FloatTable
from torsh_quant._table import text_table


@dataclass(frozen=True)
class LayerReport:
    """What quantization did to one layer.

    Args:
        layer: Name in the model.
        scheme: Short name of its scheme, or ``"float"``.
        bytes_before: Weight and bias as they were.
        bytes_after: Integers, scales, zero points and bias.
        max_error: Largest change of a weight.
        mean_error: Root mean square change over the root mean square weight.
        note: Why it stayed float; empty otherwise.
    """

    layer: str
    scheme: str
    bytes_before: int
    bytes_after: int
    max_error: float
    mean_error: float
    note: str = ""


@dataclass(frozen=True)
class QuantReport:
    """What :func:`quantize` did, layer by layer; ``str()`` is a table.

    Args:
        rows: One for each layer that can be quantized.
        bytes_before: Bytes of the whole model before.
        bytes_after: Bytes of the whole model now.
    """

    rows: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        head = ["layer", "scheme", "bytes before", "after", "max error", "mean error", "note"]
        rows = [
            [
                row.layer or "(model)",
                row.scheme,
                f"{row.bytes_before:,}",
                f"{row.bytes_after:,}",
                f"{row.max_error:.2e}",
                f"{row.mean_error:.2%}",
                row.note,
            ]
            for row in self.rows
        ]
        total = ["model", "", f"{self.bytes_before:,}", f"{self.bytes_after:,}", "-", "-", ""]
        return text_table(head, [*rows, total])


def report_layer(name: str, layer: FloatTable, made: QuantizedLayer) -> LayerReport:
    """Compare a layer with its quantized one."""
    size = sum(tensor.nbytes for tensor in layer.parameters())
    weight = layer.weight.detach().float().flatten(1)
    change = made.dequantized_weight() - weight
    power = weight.square().mean().sqrt().item()
    mean_error = change.square().mean().sqrt().item() / power if power else 0.0
    now = sum(tensor.nbytes for tensor in made._buffers.values() if tensor is not None)
    worst = change.abs().max().item() if change.numel() else 0.0
    return LayerReport(name, str(made.scheme), size, now, worst, mean_error)
