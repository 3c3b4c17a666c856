"""Streaming data sets that resume exactly, and augmentation drawn per sample inside a batch."""

__version__ = "0.2.0"

__all__ = ["__version__"]
