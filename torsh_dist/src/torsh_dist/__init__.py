"""Data-parallel training with compressed gradients on torch.distributed, from one process up."""

__version__ = "0.2.0"

__all__ = ["__version__"]
