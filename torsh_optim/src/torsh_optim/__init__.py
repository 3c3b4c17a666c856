"""Fused PyTorch optimizers: one Triton launch per step for all tensors and parameter groups."""

from torsh_optim._adamw import AdamW
from torsh_optim._lookahead import Lookahead

__version__ = "0.2.0"

__all__ = ["AdamW", "Lookahead", "__version__"]
