"""Fused PyTorch optimizers: one Triton launch per step for all tensors and parameter groups."""

from torsh_optim._adam import Adam, AdamW, AdvancedAdam
from torsh_optim._lamb import LAMB
from torsh_optim._lion import Lion
from torsh_optim._lookahead import Lookahead
from torsh_optim._sgd import SGD

__version__ = "0.2.0"

__all__ = ["LAMB", "SGD", "Adam", "AdamW", "AdvancedAdam", "Lion", "Lookahead", "__version__"]
