"""Models that commands use where none is named, by their ids on the hub."""

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
TAGGER = "dslim/bert-base-NER"
PARAPHRASER = "humarin/chatgpt_paraphraser_on_T5_base"
ZERO_SHOT = {
    "embed": ENCODER,
    "nli": "MoritzLaurer/ModernBERT-base-zeroshot-v2.0",
    "lm": "HuggingFaceTB/SmolLM2-360M-Instruct",
}
