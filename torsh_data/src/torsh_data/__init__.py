"""Streaming data sets that resume exactly, and augmentation drawn per sample inside a batch."""

from torsh_data import text, vision
from torsh_data._convert import convert
from torsh_data._dataset import ShardedDataset
from torsh_data._loader import StreamLoader
from torsh_data._mixture import Mixture
from torsh_data._prefetch import DevicePrefetcher
from torsh_data._sample_cache import CacheStats, SampleCache
from torsh_data._stats import LoaderStats
from torsh_data._tune import LoaderPlan, Trial, tune_workers
from torsh_data._writer import write_shards

__version__ = "0.2.0"

__all__ = [
    "CacheStats",
    "DevicePrefetcher",
    "LoaderPlan",
    "LoaderStats",
    "Mixture",
    "SampleCache",
    "ShardedDataset",
    "StreamLoader",
    "Trial",
    "__version__",
    "convert",
    "text",
    "tune_workers",
    "vision",
    "write_shards",
]
