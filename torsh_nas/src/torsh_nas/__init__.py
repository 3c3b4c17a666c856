"""Architecture search inside your own model, under a latency budget measured on your own machine."""

__version__ = "0.2.0"

__all__ = ["__version__"]
