"""Tiny random models of many families, and a tokenizer for them, made on the spot."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 500
_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": VOCAB,
    "initializer_range": 0.2,  # far from uniform attention, so that a leak shows
}
_GQA = {**_SMALL, "num_key_value_heads": 2, "pad_token_id": 0}
PACKED: dict[str, dict[str, Any]] = {
    "bert": _SMALL,
    "roberta": {**_SMALL, "max_position_embeddings": 514},
    "xlm-roberta": {**_SMALL, "max_position_embeddings": 514},
    "distilbert": {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 96,
        "vocab_size": VOCAB,
        "initializer_range": 0.2,
    },
    "modernbert": {
        **_SMALL,
        "num_hidden_layers": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": VOCAB,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama": _GQA,
    "mistral": {**_GQA, "sliding_window": 32},
    "qwen2": _GQA,
    "qwen3": {**_GQA, "head_dim": 16},
    "gemma3_text": {**_GQA, "head_dim": 16, "sliding_window": 32, "num_hidden_layers": 6},
    "electra": {**_SMALL, "embedding_size": 64},
    "albert": {**_SMALL, "embedding_size": 32},
    "esm": {**_SMALL, "pad_token_id": 1, "mask_token_id": 3, "max_position_embeddings": 514},
}
PADDED: dict[str, dict[str, Any]] = {
    "mobilebert": {"num_hidden_layers": 2, "vocab_size": VOCAB},
    "mpnet": _SMALL,
    "layoutlm": _SMALL,
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB},
}


def make_model(family: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(PACKED | PADDED)[family] | changes)
    return AutoModel.from_config(config).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words "w4" to "w499" are tokens; every text gets a first and a last token."""
    special = {"[CLS]": 0, "[PAD]": 1, "[SEP]": 2, "[UNK]": 3}  # ids as in RoBERTa
    words = {f"w{i}": i for i in range(4, VOCAB)}
    backend = Tokenizer(models.WordLevel(special | words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )


def random_texts(lengths: list[int], seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return [" ".join(f"w{i}" for i in row) for row in rows]
