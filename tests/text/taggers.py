"""Tiny taggers with random weights."""

import torch
from transformers import AutoConfig, AutoModelForTokenClassification

from tests.text.architectures import PACKED, PADDED, make_tokenizer
from torsh_text import CRF, Tagger

LABELS = ["O", "B-x", "I-x", "B-y", "I-y"]


def make_tagger(family="bert", *, labels=LABELS, tokenizer=None, crf=False, **changes):
    torch.manual_seed(0)
    options = {"id2label": dict(enumerate(labels))}
    config = AutoConfig.for_model(family, **((PACKED | PADDED)[family] | changes | options))
    model = AutoModelForTokenClassification.from_config(config).eval()
    tagger = Tagger(model, tokenizer or make_tokenizer(), max_length=40, name="tiny").eval()
    if crf:
        tagger.crf = CRF(len(labels), tagger.scheme.transitions()).eval()
        for parameter in tagger.crf.parameters():
            torch.nn.init.normal_(parameter)
    return tagger


def local_tagger(**options):
    """A model whose layers only see their own token, so that context always suffices."""
    tagger = make_tagger(**options)
    with torch.no_grad():
        for layer in tagger.backbone.encoder.layer:
            layer.attention.output.dense.weight.zero_()
        tagger.backbone.embeddings.position_embeddings.weight.zero_()
    return tagger
