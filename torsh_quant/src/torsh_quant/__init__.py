"""INT8 and INT4 quantization with plain modules, plain buffers and real integer kernels."""

from torsh_quant._explain import Explanation, LayerPlan, explain
from torsh_quant._layers import model_bytes
from torsh_quant._modules import QuantConv2d, QuantLinear
from torsh_quant._quantize import LayerReport, QuantReport, dequantize, quantize
from torsh_quant._sensitivity import LayerScore, Sensitivity, sensitivity
from torsh_quant._spec import IntSpec, Scheme, default_group_size

__version__ = "0.2.0"

__all__ = [
    "Explanation",
    "IntSpec",
    "LayerPlan",
    "LayerReport",
    "LayerScore",
    "QuantConv2d",
    "QuantLinear",
    "QuantReport",
    "Scheme",
    "Sensitivity",
    "default_group_size",
    "dequantize",
    "explain",
    "model_bytes",
    "quantize",
    "sensitivity",
]
