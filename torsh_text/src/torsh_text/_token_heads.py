"""Loading a token classification model: with its own head, or with a fresh one."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ._backbone import read_layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def label_names(config: Any) -> list[str]:
    """Names of a model's outputs, in their order."""
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def load_token_model(
    folder: Path,
    *,
    labels: Sequence[str] | None,
    seed: int,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> "tuple[PreTrainedModel, Any, bool]":
    """Load a model and its tokenizer on the CPU, in eval mode.

    Weights come from safetensors, or from a ``.bin`` file read with ``weights_only=True``.

    Args:
        folder: Folder of transformers, or of sentence-transformers (whose pooling is left out).
        labels: Names of the tags; None for the folder's. A head with other tags is made anew.
        seed: Decides the weights of a fresh head.
        dtype: Of the weights.
        trust_remote_code: Let the model's own code run on this machine.

    Returns:
        The model, the tokenizer, and whether the head is fresh.

    Raises:
        ValueError: If weights are missing, or there is no head and ``labels`` is None.
    """
    from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer
    from transformers.utils import logging as hf_logging

    folder = read_layout(folder).transformer
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    kept = True
    if labels is not None:
        old = label_names(config)
        unnamed = len(old) == len(labels) and old == [f"LABEL_{i}" for i in range(len(old))]
        kept = unnamed or old == list(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    shown, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    if labels is not None:
        hf_logging.set_verbosity_error()  # its report of missing weights: they shall be fresh
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, report = AutoModelForTokenClassification.from_pretrained(
                folder,
                config=config,
                dtype=dtype,  # not .to(dtype): that would round rotary tables too
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=labels is not None,
                output_loading_info=True,
            )
    finally:
        hf_logging.set_verbosity(level)
        if shown:
            hf_logging.enable_progress_bar()
    inside = f"{model.base_model_prefix}."
    missing = sorted(report["missing_keys"])
    lost = [key for key in missing if key.startswith(inside)]
    lost += [key for key, *_ in report["mismatched_keys"] if key.startswith(inside)]
    if lost:
        raise ValueError(
            f"the weights in {folder} lack {len(lost)} tensors of {type(model).__name__} (first:"
            f" {lost[0]!r}); they would be random. Save the model with its weights"
        )
    if missing and labels is None:
        raise ValueError(
            f"{folder} holds no head for tags ({missing[0]!r} is missing); pass labels=[...] for a"
            " fresh one to train, or a model that was trained for token classification"
        )
    kept = kept and not missing
    if not kept:
        _renew(_output_layer(model), seed, getattr(config, "initializer_range", 0.02))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return model.eval(), tokenizer, not kept


def _output_layer(model: "PreTrainedModel") -> nn.Linear:
    """Return the layer that gives the scores of the tags."""
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not name.startswith(f"{model.base_model_prefix}.")
        and module.out_features == model.config.num_labels
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layer for its tags to renew")
    return found[-1]


@torch.no_grad()
def _renew(layer: nn.Linear, seed: int, deviation: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(layer.weight.shape, generator=generator) * deviation
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.zero_()
