"""Augmentation of texts, drawn for each text from its own key."""

from torsh_data.text._back_translation import BackTranslator, Yield
from torsh_data.text._eda import EDA
from torsh_data.text._lexicon import Lexicon, Synonym
from torsh_data.text._synonyms import SynonymReplacer
from torsh_data.text._translator import Translator

__all__ = [
    "EDA",
    "BackTranslator",
    "Lexicon",
    "Synonym",
    "SynonymReplacer",
    "Translator",
    "Yield",
]
