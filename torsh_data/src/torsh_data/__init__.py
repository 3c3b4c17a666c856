"""Streaming data sets that resume exactly, and augmentation drawn per sample inside a batch."""

from torsh_data import vision
from torsh_data._dataset import ShardedDataset
from torsh_data._loader import StreamLoader
from torsh_data._mixture import Mixture
from torsh_data._stats import LoaderStats
from torsh_data._writer import write_shards

__version__ = "0.2.0"

__all__ = [
    "LoaderStats",
    "Mixture",
    "ShardedDataset",
    "StreamLoader",
    "__version__",
    "vision",
    "write_shards",
]
