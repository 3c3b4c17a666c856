"""NLP tasks around Hugging Face models on one padding-free runtime."""

from ._attention import AttentionPath
from ._cluster import Clusters, cluster
from ._encoder import Encoder
from ._packing import PackedBatch
from ._plot import plot_map
from ._sampler import Collator, TokenBudgetSampler
from ._similarity import SearchResult, search, similarity
from ._terms import TopicTerms, topic_terms

__version__ = "0.2.0"

__all__ = [
    "AttentionPath",
    "Clusters",
    "Collator",
    "Encoder",
    "PackedBatch",
    "SearchResult",
    "TokenBudgetSampler",
    "TopicTerms",
    "__version__",
    "cluster",
    "plot_map",
    "search",
    "similarity",
    "topic_terms",
]
