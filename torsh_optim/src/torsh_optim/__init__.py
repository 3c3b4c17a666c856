"""Fused PyTorch optimizers: one Triton launch per step for all tensors and parameter groups."""

__version__ = "0.2.0"

__all__ = ["__version__"]
