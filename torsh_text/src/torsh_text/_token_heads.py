"""Loading a token classification model: with its own head, or with a fresh one."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ._backbone import read_layout
from ._heads import load_headed

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
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    folder = read_layout(folder).transformer
    model, fresh = load_headed(
        AutoModelForTokenClassification,
        folder,
        labels=labels,
        seed=seed,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return model, tokenizer, fresh
