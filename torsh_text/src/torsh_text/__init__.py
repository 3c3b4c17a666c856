"""NLP tasks around Hugging Face models on one padding-free runtime."""

from ._attention import AttentionPath
from ._cache import CacheDamage, CacheHits, CacheStats, EmbeddingCache
from ._classify import Classifier
from ._cluster import Clusters, cluster
from ._crf import CRF
from ._encoder import Encoder
from ._entities import Entity
from ._extract import Picks, facility_location, lexrank, mmr
from ._few_shot import FewShot
from ._generate import Generation, Generator
from ._highlight import highlight, write_highlight
from ._labels import Label
from ._language import Language, LanguageDetector, LanguageSpan
from ._near_duplicates import Duplicates, near_duplicates
from ._packing import PackedBatch
from ._paraphrase import Paraphrase, Paraphraser, word_overlap
from ._plot import plot_map, plot_topic_map, plot_topics
from ._quantized import QuantizedVectors, quantize
from ._sampler import Collator, TokenBudgetSampler
from ._sentences import Sentence, split_sentences
from ._sentiment import Sentiment, SentimentLabel
from ._similarity import MinedPairs, SearchResult, mine_pairs, search, similarity
from ._spans import Span, TagScheme, Transitions
from ._summarize import KeySentence, Summarizer, Summary
from ._tagged_batch import TaggedBatch
from ._tagging import Tagger
from ._terms import TopicTerms, topic_terms
from ._topic import DocumentTopics, Topic, TopicMerge, TopicPeriod
from ._topics import TopicModel
from ._zero_shot import ZeroShot

__version__ = "0.2.0"

__all__ = [
    "CRF",
    "AttentionPath",
    "CacheDamage",
    "CacheHits",
    "CacheStats",
    "Classifier",
    "Clusters",
    "Collator",
    "DocumentTopics",
    "Duplicates",
    "EmbeddingCache",
    "Encoder",
    "Entity",
    "FewShot",
    "Generation",
    "Generator",
    "KeySentence",
    "Label",
    "Language",
    "LanguageDetector",
    "LanguageSpan",
    "MinedPairs",
    "PackedBatch",
    "Paraphrase",
    "Paraphraser",
    "Picks",
    "QuantizedVectors",
    "SearchResult",
    "Sentence",
    "Sentiment",
    "SentimentLabel",
    "Span",
    "Summarizer",
    "Summary",
    "TagScheme",
    "TaggedBatch",
    "Tagger",
    "TokenBudgetSampler",
    "Topic",
    "TopicMerge",
    "TopicModel",
    "TopicPeriod",
    "TopicTerms",
    "Transitions",
    "ZeroShot",
    "__version__",
    "cluster",
    "facility_location",
    "highlight",
    "lexrank",
    "mine_pairs",
    "mmr",
    "near_duplicates",
    "plot_map",
    "plot_topic_map",
    "plot_topics",
    "quantize",
    "search",
    "similarity",
    "split_sentences",
    "topic_terms",
    "word_overlap",
    "write_highlight",
]
