"""INT8 and INT4 quantization with plain modules, plain buffers and real integer kernels."""

from torsh_quant._explain import Explanation, LayerPlan, explain
from torsh_quant._layers import model_bytes
from torsh_quant._quant_conv import QuantConv1d, QuantConv2d, QuantConv3d
from torsh_quant._quant_embedding import QuantEmbedding
from torsh_quant._quant_linear import QuantLinear
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
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantEmbedding",
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
