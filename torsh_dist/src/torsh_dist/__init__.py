"""Data-parallel training with compressed gradients on torch.distributed, from one process up."""

from torsh_dist._compression import Compression, CompressionStats, compress
from torsh_dist._methods import Cast, Int8
from torsh_dist._runtime import Context, init
from torsh_dist._spawn import launch
from torsh_dist._step import Step, StepResult, no_sync

__version__ = "0.2.0"

__all__ = [
    "Cast",
    "Compression",
    "CompressionStats",
    "Context",
    "Int8",
    "Step",
    "StepResult",
    "__version__",
    "compress",
    "init",
    "launch",
    "no_sync",
]
