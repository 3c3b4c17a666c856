"""INT8 and INT4 quantization with plain modules, plain buffers and real integer kernels."""

__version__ = "0.2.0"

__all__ = ["__version__"]
