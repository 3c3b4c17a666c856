"""NLP tasks around Hugging Face models on one padding-free runtime."""

__version__ = "0.2.0"

__all__ = ["__version__"]
