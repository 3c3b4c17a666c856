"""INT8 and INT4 quantization with plain modules, plain buffers and real integer kernels."""

from torsh_quant._adaround import AdaRound
from torsh_quant._allocate import allocate
from torsh_quant._equalize import Equalize
from torsh_quant._explain import Explanation, LayerPlan, explain
from torsh_quant._file import load, save
from torsh_quant._fold import fold_batch_norm
from torsh_quant._fuse import fuse
from torsh_quant._gptq import GPTQ
from torsh_quant._hqq import HQQ
from torsh_quant._latency import measure_latency
from torsh_quant._layers import model_bytes
from torsh_quant._methods import RTN, BiasCorrection
from torsh_quant._observers import Observer, make_observer
from torsh_quant._qat import (
    convert,
    freeze_batch_norm,
    freeze_ranges,
    prepare_qat,
    scale_parameters,
)
from torsh_quant._quant_conv import QuantConv1d, QuantConv2d, QuantConv3d
from torsh_quant._quant_embedding import QuantEmbedding
from torsh_quant._quant_linear import QuantLinear
from torsh_quant._quantize import dequantize, quantize
from torsh_quant._report import LayerReport, QuantReport
from torsh_quant._scores import LayerScore, Sensitivity
from torsh_quant._sensitivity import sensitivity
from torsh_quant._smooth import SmoothQuant
from torsh_quant._spec import IntSpec, Scheme, default_group_size

__version__ = "0.2.0"

__all__ = [
    "GPTQ",
    "HQQ",
    "RTN",
    "AdaRound",
    "BiasCorrection",
    "Equalize",
    "Explanation",
    "IntSpec",
    "LayerPlan",
    "LayerReport",
    "LayerScore",
    "Observer",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantEmbedding",
    "QuantLinear",
    "QuantReport",
    "Scheme",
    "Sensitivity",
    "SmoothQuant",
    "allocate",
    "convert",
    "default_group_size",
    "dequantize",
    "explain",
    "fold_batch_norm",
    "freeze_batch_norm",
    "freeze_ranges",
    "fuse",
    "load",
    "make_observer",
    "measure_latency",
    "model_bytes",
    "prepare_qat",
    "quantize",
    "save",
    "scale_parameters",
    "sensitivity",
]
